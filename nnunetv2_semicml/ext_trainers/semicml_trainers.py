"""What nnU-Net finds in this folder: the trainers of the installed package, under their own names."""

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import (
    nnUNetTrainerSemiCML,
    nnUNetTrainerSemiCML_5epochs,
    nnUNetTrainerSemiCML_50epochs,
    nnUNetTrainerSemiCML_250epochs,
)

__all__ = [
    "nnUNetTrainerSemiCML",
    "nnUNetTrainerSemiCML_5epochs",
    "nnUNetTrainerSemiCML_50epochs",
    "nnUNetTrainerSemiCML_250epochs",
]
