"""Bidirectional copy-paste (BCP) of one modality.

Source: Bai et al., Bidirectional copy-paste for semi-supervised medical image segmentation, CVPR 2023.
"""

from nnunetv2_semicml.training.copy_paste import WithBidirectionalCopyPaste
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerBCP(WithBidirectionalCopyPaste):
    """Every network learns from mixtures with its own teacher's segmentations; the student is deployed."""
