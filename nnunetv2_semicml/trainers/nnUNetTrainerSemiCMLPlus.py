"""Semi-CML with hard pseudo-labels between the modalities in place of the mean squared error, its PReL, and schedules.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast, teachers, PReL); Chen et al., CVPR 2021 (cross
pseudo-supervision). The combination was better than Semi-CML on the validation patients of benchmarks/study; on its
test patients that is not confirmed.
"""

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class nnUNetTrainerSemiCMLPlus(nnUNetTrainerCrossModalCPS, nnUNetTrainerSemiCML):
    """Semi-CML whose consistency term is that of cross-modal CPS."""

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
        # Of a network that segments perfectly, see `reliability`. Chosen on validation patients, where believing every
        # network alike was as good with 0.25 and destroyed networks with 0.5 (benchmarks/study/validation.md).
        self.pseudo_label_weight = 0.5

    def reliability(self, labeler: nnUNetTrainer) -> float:
        """The network's latest validation Dice, 0 before the first one.

        The weaker modality begins to segment late. Until then it labels everything as background, and the others would
        learn from that to segment nothing.
        """
        dice = labeler.logger.get_value("mean_fg_dice", step=None)
        return float(np.nan_to_num(dice[-1])) if dice else 0.0

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the other modalities, and the area-similarity contrast."""
        in_batch = {name: self.in_batch(logits) for name, logits in outputs.items()}
        return {**super().unsupervised_terms(in_batch, targets), "asc": self.area_contrast(self.predictions(outputs))}

    def unsupervised_weights(self) -> dict[str, float]:
        """All ramped over the first epochs."""
        return {**super().unsupervised_weights(), "asc": self.ramp() * self.asc_weight}


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
