"""A part of methods: networks that learn from each other's segmentations as if they were labels.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class WithCrossPseudoSupervision(nnUNetTrainerSemiSupervised):
    """Hard pseudo-labels in both directions.

    As published, the loss is the supervised one, which in nnU-Net is cross-entropy and Dice; other than published,
    labeled cases have no pseudo-labels.

    Attributes:
        pseudo_label_weight: of cross-entropy and of Dice with pseudo-labels. Published: 1.5, without a ramp, on natural
            images. Segmentations of the beginning are wrong, so the weight is ramped as in Semi-CML. With 0.5, both
            networks of a run on validation patients ended up segmenting nothing (benchmarks/study/validation.md at
            commit 8d54f3c).
    """

    pseudo_label_weight = 0.25
    term_weights = {"ce": "pseudo_label_weight", "dice": "pseudo_label_weight"}
    makes_pseudo_labels = True

    def labelers(self, learner: ModalityTrainer) -> list[ModalityTrainer]:
        """Whose segmentations a network learns from: those of the other modalities."""
        return [t for t in self.trainers if t.modality is not learner.modality]

    def cross_pseudo_supervision(self, outputs: View) -> dict[str, Tensor]:
        """Cross-entropy "ce" and "dice" with pseudo-labels; means over those of a network, sums over the networks.

        Args:
            outputs: network -> logits (B, heads, *patch).
        """
        regions, batch_dice = self.label_manager.has_regions, self.configuration_manager.batch_dice
        probabilities = {name: self.probabilities(logits) for name, logits in outputs.items()}
        labels = {name: self.hard_pseudo_labels(p.detach()) for name, p in probabilities.items()}
        ce, dice = [], []
        for trainer in (t for t in self.trainers if t.name in outputs):
            prediction = self.foreground(probabilities[trainer.name])
            others = [labels[t.name] for t in self.labelers(trainer) if t.name in labels]
            for label in others:
                self.count_pseudo_labels(trainer.name, label)
            ce_of = [soft_cross_entropy(outputs[trainer.name], label, regions) for label in others]
            dice_of = [
                soft_dice_loss(prediction, self.foreground(label), batch_dice, distributed=self.is_ddp)
                for label in others
            ]
            ce.append(torch.stack(ce_of).mean())
            dice.append(torch.stack(dice_of).mean())
        return {"ce": self.over_networks(ce), "dice": self.over_networks(dice)}

    def unsupervised_terms(self, outputs: Sequence[View], targets: Any) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the labelers."""
        (logits,) = outputs
        return self.cross_pseudo_supervision(logits)
