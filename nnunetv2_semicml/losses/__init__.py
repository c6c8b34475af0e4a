"""Losses: pure functions and modules of tensors. Nothing here imports nnU-Net."""
