"""Reading and preparing raw and preprocessed datasets. May import nnU-Net and `data`; trainers import nothing of it."""
