"""Cross pseudo-supervision between modalities: hard pseudo-labels in both directions.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021, carried over from
two networks of one image to the networks of several modalities.
"""

from nnunetv2_semicml.training.cross_pseudo_supervision import WithCrossPseudoSupervision
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerCrossModalCPS(WithCrossPseudoSupervision):
    """Every network learns from the segmentations of the other modalities; teachers follow for a second stage.

    Attributes:
        teacher_averaging: the method has no use for teachers, but PReL can go on from them.
    """

    min_modalities = 2
    compares_modalities = True
    teacher_averaging = "ema"
