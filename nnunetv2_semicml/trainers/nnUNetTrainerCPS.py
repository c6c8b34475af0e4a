"""Cross pseudo-supervision (CPS) of two networks of one modality.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
"""

from nnunetv2_semicml.training.cross_pseudo_supervision import WithCrossPseudoSupervision
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerCPS(WithCrossPseudoSupervision):
    """Two networks that differ in their initial weights label each other's unlabeled cases; the first is deployed."""

    networks_per_modality = 2

    def labelers(self, learner: ModalityTrainer) -> list[ModalityTrainer]:
        """The other network of the modality."""
        return [t for t in self.trainers if t.modality is learner.modality and t is not learner]
