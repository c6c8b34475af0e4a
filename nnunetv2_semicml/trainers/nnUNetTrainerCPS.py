"""Cross pseudo-supervision (CPS) of two networks of one modality, and its schedules.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS


class nnUNetTrainerCPS(nnUNetTrainerCrossModalCPS):
    """Two networks that differ in their initial weights label each other's unlabeled cases; the first is deployed."""

    min_modalities = 1
    compares_modalities = False
    networks_per_modality = 2

    def labelers(self, learner: nnUNetTrainer) -> list[nnUNetTrainer]:
        """The other network of the modality."""
        return [t for t in self.trainers if t.modality is learner.modality and t is not learner]


class nnUNetTrainerCPS_5epochs(nnUNetTrainerCPS):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerCPS_50epochs(nnUNetTrainerCPS):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerCPS_250epochs(nnUNetTrainerCPS):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
