"""Mean Teacher: predictions agree with those of an averaged network, and its schedules.

Source: Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from nnunetv2_semicml.trainers.nnUNetTrainerSelfEnsembling import nnUNetTrainerSelfEnsembling


class nnUNetTrainerMeanTeacher(nnUNetTrainerSelfEnsembling):
    """Mean squared difference between a network's probabilities and its teacher's.

    Attributes:
        deploys_teacher: whether the teacher is validated and deployed, as published, or the network.
    """

    deploys_teacher = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.consistency_weight = 1.0  # none is published for segmentation; that of Semi-CML's mean squared error

    def initialize(self) -> None:
        """Build the networks and teachers, and say which of them are deployed."""
        super().initialize()
        if self.deploys_teacher:
            for trainer in self.trainers:
                trainer.averaged_network = self.teachers[trainer.name].network

    def unsupervised_targets(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities (B, heads, *patch) of every teacher, on noisy images."""
        return {
            name: self.mean_prediction(self.teachers[name], image, 1, self.noise_std, self.noise_bounds)
            for name, image in images.items()
        }

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum over the networks, which learn independently of each other."""
        terms = [mse_loss(self.probabilities(logits), targets[name]) for name, logits in outputs.items()]
        return {"mse": self.over_networks(terms)}

    def unsupervised_weights(self) -> dict[str, float]:
        """The ramped weight."""
        return {"mse": self.ramp() * self.consistency_weight}


class nnUNetTrainerMeanTeacher_5epochs(nnUNetTrainerMeanTeacher):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerMeanTeacher_50epochs(nnUNetTrainerMeanTeacher):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerMeanTeacher_250epochs(nnUNetTrainerMeanTeacher):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
