"""Semi-CML whose modalities agree on one segmentation in place of the mean squared error, its PReL, and schedules.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast, PReL); Tarvainen and Valpola, NeurIPS 2017 (teachers
that average over the steps); Chen et al., CVPR 2021 (segmentations as labels). On the validation patients of
benchmarks/study better than Semi-CML in the weaker modality, and after PReL no longer measurably so.
"""

import numpy as np
import torch
from torch import Tensor

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class nnUNetTrainerSemiCMLPlus(nnUNetTrainerSemiCML):
    """Every network learns what the teachers of all modalities, exponential moving averages, segment together.

    The mean squared error pulls the better modality towards the weaker one as much as the other way. Here the teachers'
    probabilities are averaged, each with a weight, and the segmentation that they make is a label for all networks.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        del self.mse_weight  # there is no such term
        self.teacher_averaging = "ema"
        self.pseudo_label_weight = 0.5

    def fusion_weights(self) -> dict[str, float]:
        """Share of every modality in the pseudo-labels: proportional to its latest validation Dice.

        The weaker modality begins to segment late. Until then it labels everything as background, and the others would
        learn from that to segment nothing.
        """
        dice = {t.name: t.logger.get_value("mean_fg_dice", step=None)[-1:] for t in self.trainers}
        dice = {name: float(np.nan_to_num(latest).sum()) for name, latest in dice.items()}
        total = sum(dice.values())
        return {name: value / total if total else 1 / len(dice) for name, value in dice.items()}

    def unsupervised_targets(self, images: dict[str, Tensor]) -> Tensor:
        """The pseudo-labels of the unlabeled batch, zeros and ones (B, heads, *patch)."""
        weighted = [
            weight * self.mean_prediction(self.teachers[name], self.in_batch(images[name]))
            for name, weight in self.fusion_weights().items()
        ]
        return self.hard_pseudo_labels(torch.stack(weighted).sum(0))

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the pseudo-labels, sums over the modalities, and the area-similarity contrast."""
        regions, batch_dice = self.label_manager.has_regions, self.configuration_manager.batch_dice
        predictions = self.predictions(outputs)
        foreground = self.foreground(targets)
        ce = [soft_cross_entropy(self.in_batch(logits), targets, regions) for logits in outputs.values()]
        dice = [soft_dice_loss(self.in_batch(p), foreground, batch_dice, distributed=self.is_ddp) for p in predictions]
        return {"ce": torch.stack(ce).sum(), "dice": torch.stack(dice).sum(), "asc": self.area_contrast(predictions)}

    def unsupervised_weights(self) -> dict[str, float]:
        """All ramped over the first epochs."""
        ramp = self.ramp()
        return {
            "ce": ramp * self.pseudo_label_weight,
            "dice": ramp * self.pseudo_label_weight,
            "asc": ramp * self.asc_weight,
        }


class nnUNetTrainerSemiCMLPlusPReL(nnUNetTrainerSemiCMLPReL):
    """PReL from the networks and teachers of Semi-CML Plus."""

    first_stage = nnUNetTrainerSemiCMLPlus


class nnUNetTrainerSemiCMLPlus_5epochs(nnUNetTrainerSemiCMLPlus):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerSemiCMLPlus_50epochs(nnUNetTrainerSemiCMLPlus):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerSemiCMLPlus_250epochs(nnUNetTrainerSemiCMLPlus):
    """A quarter of nnU-Net's schedule."""

    epochs = 250


class nnUNetTrainerSemiCMLPlusPReL_5epochs(nnUNetTrainerSemiCMLPlusPReL):
    """For trying things out, after nnUNetTrainerSemiCMLPlus_5epochs."""

    first_stage = nnUNetTrainerSemiCMLPlus_5epochs
    epochs = 5


class nnUNetTrainerSemiCMLPlusPReL_50epochs(nnUNetTrainerSemiCMLPlusPReL):
    """After nnUNetTrainerSemiCMLPlus_50epochs."""

    first_stage = nnUNetTrainerSemiCMLPlus_50epochs
    epochs = 50


class nnUNetTrainerSemiCMLPlusPReL_250epochs(nnUNetTrainerSemiCMLPlusPReL):
    """After nnUNetTrainerSemiCMLPlus_250epochs."""

    first_stage = nnUNetTrainerSemiCMLPlus_250epochs
    epochs = 250
