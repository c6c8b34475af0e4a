"""The folder for nnU-Net's variable nnUNet_extTrainer; `nnUNetv2_semicml_trainers` prints it.

nnU-Net imports every module that it finds there under a top-level name and forgets it again. So the folder holds one
thin module that re-exports the trainers of the installed package, whose classes thereby keep one identity.
"""
