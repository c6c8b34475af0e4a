"""Modality groups and paired cases: what the trainers read. Imports nnU-Net, nothing else of the package but errors."""
