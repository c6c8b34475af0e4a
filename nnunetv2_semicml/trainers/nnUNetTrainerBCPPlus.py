"""Bidirectional copy-paste (BCP) of one modality, beside nnU-Net's own learning from labels.

Source: Bai et al., CVPR 2023. What differs is what `nnUNetTrainerSemiCMLPlus` does of copy-paste (docs/methods/bcp.md).
"""

from nnunetv2_semicml.training.copy_paste import WithCopyPasteBesideLabels
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerBCPPlus(WithCopyPasteBesideLabels):
    """Every network learns from labeled patches, and from mixtures with its own teacher's segmentations."""
