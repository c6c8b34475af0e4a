"""PReL from the networks and teachers of Semi-CML Plus."""

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSemiCMLPlusPReL(nnUNetTrainerSemiCMLPReL):
    """The second stage of Semi-CML Plus.

    Attributes:
        first_stage: the trainer that it goes on from.
    """

    first_stage = nnUNetTrainerSemiCMLPlus
