"""Cross pseudo-supervision (CPS) of two networks of one modality.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
"""

from collections.abc import Sequence

from torch import Tensor

from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.cross_pseudo_supervision import WithCrossPseudoSupervision
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerCPS(WithCrossPseudoSupervision):
    """Two networks that differ in their initial weights label each other's unlabeled cases; the first is deployed."""

    networks_per_modality = 2
    term_weights = {"ce": "pseudo_label_weight", "dice": "pseudo_label_weight"}

    def labelers(self, learner: ModalityTrainer) -> list[ModalityTrainer]:
        """The other network of the modality."""
        return [t for t in self.trainers if t.modality is learner.modality and t is not learner]

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the other network."""
        (logits,) = outputs
        return self.cross_pseudo_supervision(logits)
