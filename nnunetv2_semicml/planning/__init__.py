"""Reading and preparing raw and preprocessed datasets. May import nnU-Net and `data`; trainers import nothing of it."""

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")  # nnU-Net's default
