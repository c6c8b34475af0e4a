"""Cross pseudo-supervision between modalities: hard pseudo-labels in both directions.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021, carried over from
two networks of one image to the networks of several modalities.
"""

from collections.abc import Sequence

from torch import Tensor

from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.cross_pseudo_supervision import WithCrossPseudoSupervision
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerCrossModalCPS(WithCrossPseudoSupervision):
    """Every network learns from the segmentations of the other modalities; teachers follow for a second stage."""

    min_modalities = 2
    compares_modalities = True
    teacher_averaging = "ema"
    term_weights = {"ce": "pseudo_label_weight", "dice": "pseudo_label_weight"}

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the other modalities."""
        (logits,) = outputs
        return self.cross_pseudo_supervision(logits)
