"""Semi-CML Plus: Semi-CML with two parts exchanged, its PReL, and schedules.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast, PReL); Chen et al., CVPR 2021 (hard pseudo-labels);
Tarvainen and Valpola, NeurIPS 2017 (teachers). What the exchanges gain: benchmarks/study/validation.md.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


class nnUNetTrainerSemiCMLPlus(nnUNetTrainerCrossModalCPS, nnUNetTrainerSemiCML):
    """Semi-CML with the hard pseudo-labels of cross-modal CPS for the mean squared error, and with EMA teachers."""

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
        # The best-model average hardly follows a network whose validation Dice has little left to gain. On validation
        # patients it was worse than its network, and the weaker modality gained less (benchmarks/study/validation.md).
        self.teacher_averaging = "ema"

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
