"""Cross pseudo-supervision between modalities: hard pseudo-labels in both directions, and its schedules.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021, carried over from
two networks of one image to the networks of several modalities.
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.nn.functional import one_hot

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class nnUNetTrainerCrossModalCPS(nnUNetTrainerSemiSupervised):
    """Every network learns from the segmentations of the others as if they were labels.

    As published, the loss is the supervised one, which in nnU-Net is cross-entropy and Dice; other than published,
    labeled cases have no pseudo-labels.
    """

    min_modalities = 2

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        # Published: 1.5, without a ramp, on natural images. Segmentations of the beginning are wrong, so the weight is
        # ramped as in Semi-CML. On validation patients 0.25 was better than 0.5, with which both networks of one run
        # ended up segmenting nothing (benchmarks/study/validation.md).
        self.pseudo_label_weight = 0.25

    def labelers(self, learner: nnUNetTrainer) -> list[nnUNetTrainer]:
        """Whose segmentations a network learns from: those of the other modalities."""
        return [t for t in self.trainers if t.channel != learner.channel]

    def reliability(self, labeler: nnUNetTrainer) -> float:
        """Factor of the loss with a network's segmentations; as published, all count alike."""
        return 1.0

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with pseudo-labels; means over those of a network, sums over the networks."""
        regions, batch_dice = self.label_manager.has_regions, self.configuration_manager.batch_dice
        labels = {name: self.hard_pseudo_labels(logits.detach()) for name, logits in outputs.items()}
        ce, dice = [], []
        for trainer in self.trainers:
            logits = outputs[trainer.name]
            prediction, others = self.foreground(self.probabilities(logits)), self.labelers(trainer)
            for other in others:
                label, share = labels[other.name], self.reliability(other) / len(others)
                target = self.foreground(label)
                ce.append(share * soft_cross_entropy(logits, label, regions))
                dice.append(share * soft_dice_loss(prediction, target, batch_dice, distributed=self.is_ddp))
        return {"ce": torch.stack(ce).sum(), "dice": torch.stack(dice).sum()}

    def unsupervised_weights(self) -> dict[str, float]:
        """The ramped weight, of both."""
        weight = self.ramp() * self.pseudo_label_weight
        return {"ce": weight, "dice": weight}

    def hard_pseudo_labels(self, logits: Tensor) -> Tensor:
        """The most probable class, or all regions above one half, as zeros and ones (B, heads, *patch)."""
        if self.label_manager.has_regions:
            return (logits > 0).float()
        return one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()


class nnUNetTrainerCrossModalCPS_5epochs(nnUNetTrainerCrossModalCPS):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerCrossModalCPS_50epochs(nnUNetTrainerCrossModalCPS):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerCrossModalCPS_250epochs(nnUNetTrainerCrossModalCPS):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
