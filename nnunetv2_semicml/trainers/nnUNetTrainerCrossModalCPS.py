"""Cross pseudo-supervision between modalities: hard pseudo-labels in both directions, and its schedules.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021, carried over from
two networks of one image to the networks of several modalities.
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class nnUNetTrainerCrossModalCPS(nnUNetTrainerSemiSupervised):
    """Every network learns from the segmentations of the others as if they were labels.

    As published, the loss is the supervised one, which in nnU-Net is cross-entropy and Dice; other than published,
    labeled cases have no pseudo-labels.
    """

    min_modalities = 2
    compares_modalities = True

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
        # ramped as in Semi-CML. With 0.5, both networks of a run on validation patients ended up segmenting nothing
        # (benchmarks/study/validation.md at commit 8d54f3c).
        self.pseudo_label_weight = 0.25

    def labelers(self, learner: nnUNetTrainer) -> list[nnUNetTrainer]:
        """Whose segmentations a network learns from: those of the other modalities."""
        return [t for t in self.trainers if t.modality is not learner.modality]

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: None) -> dict[str, Tensor]:
        """Cross-entropy and Dice with pseudo-labels; means over those of a network, sums over the networks."""
        regions, batch_dice = self.label_manager.has_regions, self.configuration_manager.batch_dice
        probabilities = {name: self.probabilities(logits) for name, logits in outputs.items()}
        labels = {name: self.hard_pseudo_labels(p.detach()) for name, p in probabilities.items()}
        ce, dice = [], []
        for trainer in (t for t in self.trainers if t.name in outputs):
            prediction = self.foreground(probabilities[trainer.name])
            others = [labels[t.name] for t in self.labelers(trainer) if t.name in labels]
            ce_of = [soft_cross_entropy(outputs[trainer.name], label, regions) for label in others]
            dice_of = [
                soft_dice_loss(prediction, self.foreground(label), batch_dice, distributed=self.is_ddp)
                for label in others
            ]
            ce.append(torch.stack(ce_of).mean())
            dice.append(torch.stack(dice_of).mean())
        return {"ce": self.over_networks(ce), "dice": self.over_networks(dice)}

    def unsupervised_weights(self) -> dict[str, float]:
        """The ramped weight, of both."""
        weight = self.ramp() * self.pseudo_label_weight
        return {"ce": weight, "dice": weight}


class nnUNetTrainerCrossModalCPS_5epochs(nnUNetTrainerCrossModalCPS):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerCrossModalCPS_50epochs(nnUNetTrainerCrossModalCPS):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerCrossModalCPS_250epochs(nnUNetTrainerCrossModalCPS):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
