"""A part of methods: networks that learn from each other's segmentations as if they were labels.

Source: Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunetv2_semicml.training.conductor import View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


def cross_pseudo_supervision(
    trainer: nnUNetTrainerSemiSupervised, outputs: View, labelers: Mapping[str, Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice with the segmentations of others.

    Args:
        trainer: of the networks.
        outputs: network -> logits (B, heads, *patch).
        labelers: network -> those that it learns from, or none.

    Returns:
        Means over the labelers of a network, sums over the networks.
    """
    probabilities = {name: trainer.probabilities(logits) for name, logits in outputs.items()}
    labels = {name: trainer.hard_pseudo_labels(p.detach()) for name, p in probabilities.items()}
    ce, dice = [], []
    for name, logits in outputs.items():
        none, prediction = logits.new_zeros(()), trainer.foreground(probabilities[name])
        pairs = [trainer.ce_and_dice(logits, prediction, labels[labeler]) for labeler in labelers[name]]
        of_labelers = pairs or [(none, none)]
        ce.append(torch.stack([ce for ce, _ in of_labelers]).mean())
        dice.append(torch.stack([dice for _, dice in of_labelers]).mean())
        for labeler in labelers[name]:
            trainer.count_pseudo_labels(name, labels[labeler])
    return trainer.over_networks(ce), trainer.over_networks(dice)


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

    def unsupervised_terms(self, outputs: Sequence[View], targets: Any) -> dict[str, Tensor]:
        """Cross-entropy and Dice with the segmentations of the labelers."""
        (logits,) = outputs
        shown = [t for t in self.trainers if t.name in logits]
        labelers = {t.name: [other.name for other in self.labelers(t) if other in shown] for t in shown}
        ce, dice = cross_pseudo_supervision(self, logits, labelers)
        return {"ce": ce, "dice": dice}
