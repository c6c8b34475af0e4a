"""Semi-CML: contrastive mutual learning of single-modality nnU-Nets, and its schedules.

Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation, Med. Image Anal. 83:102656, 2023.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import prediction_consistency, sigmoid_rampup
from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class nnUNetTrainerSemiCML(nnUNetTrainerSemiSupervised):
    """Two or more modalities teach each other on unlabeled cases by the ASC loss and prediction consistency."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if len(self.group.modalities) < 2:
            raise NotImplementedError(
                f"{type(self).__name__} needs at least two modalities; {self.group.file} has one."
            )
        # Published: ASC weight 3.5 beside 10 BCE + 7 Dice. nnU-Net's supervised loss is 1 CE + 1 Dice, a tenth of that.
        self.asc_weight = 0.35
        self.asc_temperature = 1.0  # published; a sharper 0.2 with weight 1 destroyed both networks in development
        self.mse_weight = 1.0  # published
        # Published: the ramp of the MSE, exp(-5 (1 - t/T)^2). Both terms are ramped here, since predictions that are
        # still wrong teach nothing, and T is a share of the training so that every schedule reaches the full weights.
        self.rampup_fraction = 0.4

    def unsupervised_terms(self, predictions: list[Tensor]) -> dict[str, Tensor]:
        """Mean squared difference between the modalities, and their area-similarity contrast."""
        asc_loss = AreaSimilarityContrastiveLoss(self.asc_temperature)
        return {"mse": prediction_consistency(predictions), "asc": asc_loss(predictions)}

    def unsupervised_weights(self) -> dict[str, float]:
        """Both weights, ramped over the first epochs."""
        ramp = sigmoid_rampup(self.current_epoch, self.rampup_fraction * self.num_epochs)
        return {"mse": ramp * self.mse_weight, "asc": ramp * self.asc_weight}


class nnUNetTrainerSemiCML_5epochs(nnUNetTrainerSemiCML):
    """For trying things out."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 5


class nnUNetTrainerSemiCML_50epochs(nnUNetTrainerSemiCML):
    """A twentieth of nnU-Net's schedule."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 50


class nnUNetTrainerSemiCML_250epochs(nnUNetTrainerSemiCML):
    """A quarter of nnU-Net's schedule."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 250
