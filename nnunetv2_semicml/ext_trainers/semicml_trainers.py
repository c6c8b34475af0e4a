"""What nnU-Net finds in this folder: the trainers of the installed package, under their own names."""

from nnunetv2_semicml.trainers.nnUNetTrainerCPS import (
    nnUNetTrainerCPS,
    nnUNetTrainerCPS_5epochs,
    nnUNetTrainerCPS_50epochs,
    nnUNetTrainerCPS_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import (
    nnUNetTrainerCrossModalCPS,
    nnUNetTrainerCrossModalCPS_5epochs,
    nnUNetTrainerCrossModalCPS_50epochs,
    nnUNetTrainerCrossModalCPS_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import (
    nnUNetTrainerMeanTeacher,
    nnUNetTrainerMeanTeacher_5epochs,
    nnUNetTrainerMeanTeacher_50epochs,
    nnUNetTrainerMeanTeacher_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import (
    nnUNetTrainerSECLAnatomical,
    nnUNetTrainerSECLAnatomical_5epochs,
    nnUNetTrainerSECLAnatomical_50epochs,
    nnUNetTrainerSECLAnatomical_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import (
    nnUNetTrainerSECLRegion,
    nnUNetTrainerSECLRegion_5epochs,
    nnUNetTrainerSECLRegion_50epochs,
    nnUNetTrainerSECLRegion_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import (
    nnUNetTrainerSemiCML,
    nnUNetTrainerSemiCML_5epochs,
    nnUNetTrainerSemiCML_50epochs,
    nnUNetTrainerSemiCML_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import (
    nnUNetTrainerSemiCMLPlus,
    nnUNetTrainerSemiCMLPlus_5epochs,
    nnUNetTrainerSemiCMLPlus_50epochs,
    nnUNetTrainerSemiCMLPlus_250epochs,
    nnUNetTrainerSemiCMLPlusPReL,
    nnUNetTrainerSemiCMLPlusPReL_5epochs,
    nnUNetTrainerSemiCMLPlusPReL_50epochs,
    nnUNetTrainerSemiCMLPlusPReL_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import (
    nnUNetTrainerSemiCMLPReL,
    nnUNetTrainerSemiCMLPReL_5epochs,
    nnUNetTrainerSemiCMLPReL_50epochs,
    nnUNetTrainerSemiCMLPReL_250epochs,
)
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import (
    nnUNetTrainerUAMT,
    nnUNetTrainerUAMT_5epochs,
    nnUNetTrainerUAMT_50epochs,
    nnUNetTrainerUAMT_250epochs,
)

__all__ = [
    "nnUNetTrainerCPS",
    "nnUNetTrainerCPS_5epochs",
    "nnUNetTrainerCPS_50epochs",
    "nnUNetTrainerCPS_250epochs",
    "nnUNetTrainerCrossModalCPS",
    "nnUNetTrainerCrossModalCPS_5epochs",
    "nnUNetTrainerCrossModalCPS_50epochs",
    "nnUNetTrainerCrossModalCPS_250epochs",
    "nnUNetTrainerMeanTeacher",
    "nnUNetTrainerMeanTeacher_5epochs",
    "nnUNetTrainerMeanTeacher_50epochs",
    "nnUNetTrainerMeanTeacher_250epochs",
    "nnUNetTrainerSECLAnatomical",
    "nnUNetTrainerSECLAnatomical_5epochs",
    "nnUNetTrainerSECLAnatomical_50epochs",
    "nnUNetTrainerSECLAnatomical_250epochs",
    "nnUNetTrainerSECLRegion",
    "nnUNetTrainerSECLRegion_5epochs",
    "nnUNetTrainerSECLRegion_50epochs",
    "nnUNetTrainerSECLRegion_250epochs",
    "nnUNetTrainerSemiCML",
    "nnUNetTrainerSemiCMLPReL",
    "nnUNetTrainerSemiCMLPReL_5epochs",
    "nnUNetTrainerSemiCMLPReL_50epochs",
    "nnUNetTrainerSemiCMLPReL_250epochs",
    "nnUNetTrainerSemiCMLPlus",
    "nnUNetTrainerSemiCMLPlusPReL",
    "nnUNetTrainerSemiCMLPlusPReL_5epochs",
    "nnUNetTrainerSemiCMLPlusPReL_50epochs",
    "nnUNetTrainerSemiCMLPlusPReL_250epochs",
    "nnUNetTrainerSemiCMLPlus_5epochs",
    "nnUNetTrainerSemiCMLPlus_50epochs",
    "nnUNetTrainerSemiCMLPlus_250epochs",
    "nnUNetTrainerSemiCML_5epochs",
    "nnUNetTrainerSemiCML_50epochs",
    "nnUNetTrainerSemiCML_250epochs",
    "nnUNetTrainerUAMT",
    "nnUNetTrainerUAMT_5epochs",
    "nnUNetTrainerUAMT_50epochs",
    "nnUNetTrainerUAMT_250epochs",
]
