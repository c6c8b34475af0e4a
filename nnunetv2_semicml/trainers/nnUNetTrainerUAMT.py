"""Uncertainty-aware Mean Teacher (UA-MT): consistency where the teacher is certain, and its schedules.

Source: Yu et al., Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation, MICCAI 2019.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.losses.consistency import masked_consistency, sigmoid_rampup
from nnunetv2_semicml.losses.soft_pseudo_label import confidence
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher


class nnUNetTrainerUAMT(nnUNetTrainerMeanTeacher):
    """Mean Teacher, on voxels where the entropy of several teacher passes is low; the student is deployed.

    The published networks have dropout, by which the passes differ. nnU-Net's have none unless the plans say so; the
    passes then differ by the noise of their images alone.
    """

    deploys_teacher = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.consistency_weight = 0.2  # published: 0.1 beside half of the sum of CE and Dice that nnU-Net's loss is
        self.rampup_fraction = 1.0  # published
        self.uncertainty_passes = 8  # published

    def unsupervised_targets(self, images: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every teacher, its probabilities (B, heads, *patch) and where they count, (B, 1 or heads, *patch).

        Published: where the entropy of the mean of 8 passes is below a share of the largest possible one that rises
        from 3/4 to 1 during the training.
        """
        threshold = 0.75 + 0.25 * sigmoid_rampup(self.current_epoch, self.num_epochs)
        targets, noise = {}, (self.noise_std, self.noise_bounds)
        for name, image in images.items():
            prediction = self.mean_prediction(self.teachers[name], image, 1, *noise)
            mean = self.mean_prediction(self.teachers[name], image, self.uncertainty_passes, *noise)
            certain = confidence(mean, self.label_manager.has_regions) > 1 - threshold
            targets[name] = prediction, certain
        return targets

    def unsupervised_terms(
        self, outputs: dict[str, Tensor], targets: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The sum over the networks, which learn independently of each other."""
        terms = [masked_consistency(self.probabilities(z), *targets[name], self.is_ddp) for name, z in outputs.items()]
        return {"mse": self.over_networks(terms)}


class nnUNetTrainerUAMT_5epochs(nnUNetTrainerUAMT):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerUAMT_50epochs(nnUNetTrainerUAMT):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerUAMT_250epochs(nnUNetTrainerUAMT):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
