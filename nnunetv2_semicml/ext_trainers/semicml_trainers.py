"""What nnU-Net finds in this folder: the trainers of the installed package, under their own names."""

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import (
    nnUNetTrainerSemiCML,
    nnUNetTrainerSemiCML_5epochs,
    nnUNetTrainerSemiCML_50epochs,
    nnUNetTrainerSemiCML_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import (
    nnUNetTrainerSemiCMLPReL,
    nnUNetTrainerSemiCMLPReL_5epochs,
    nnUNetTrainerSemiCMLPReL_50epochs,
    nnUNetTrainerSemiCMLPReL_250epochs,
)

__all__ = [
    "nnUNetTrainerSemiCML",
    "nnUNetTrainerSemiCMLPReL",
    "nnUNetTrainerSemiCMLPReL_5epochs",
    "nnUNetTrainerSemiCMLPReL_50epochs",
    "nnUNetTrainerSemiCMLPReL_250epochs",
    "nnUNetTrainerSemiCML_5epochs",
    "nnUNetTrainerSemiCML_50epochs",
    "nnUNetTrainerSemiCML_250epochs",
]
