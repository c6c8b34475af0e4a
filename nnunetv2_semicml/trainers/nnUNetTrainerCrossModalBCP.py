"""Bidirectional copy-paste between modalities: the same mixtures of the same patients in all of them.

Sources: Bai et al., CVPR 2023 (copy-paste); Zhang et al., Med. Image Anal. 83:102656, 2023 (the better modality, which
one is measured, teaches).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nnunetv2_semicml.training.conductor import UnlabeledDraw
from nnunetv2_semicml.training.copy_paste import WithBidirectionalCopyPaste
from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.teaching_modality import WithTeachingModality


@with_schedules
class nnUNetTrainerCrossModalBCP(WithTeachingModality, WithBidirectionalCopyPaste):
    """A mixture is one patient for all modalities, so that they may learn from each other's teachers.

    Attributes:
        labeled_by: whose teachers segment the unlabeled patches of a modality: its "own", that of the "better" modality
            of the draw, those of the "others" or of "all" modalities, by their mean probabilities. The better one is
            `teaching_modality`, or measured by the best validation Dice values so far; before there are any, all label.
    """

    pairs_labeled = True
    labeled_by: Literal["own", "better", "others", "all"] = "better"

    def labelers(self, learner: str, modalities: Sequence[str]) -> list[str]:
        """Which modalities' teachers label for a network, of those that a draw shows."""
        if self.labeled_by == "own":
            return [learner]
        if self.labeled_by == "others":
            return [name for name in modalities if name != learner]
        if self.labeled_by == "all":
            return list(modalities)
        if self.labeled_by != "better":
            raise ValueError(f'labeled_by must be "own", "better", "others" or "all", got {self.labeled_by!r}.')
        dice = {name: value for name, value in self.best_dice().items() if name in modalities}
        teacher = self.teaching(dice)
        return list(modalities) if teacher is None else [teacher]

    def on_train_epoch_start(self) -> None:
        """Say who labels."""
        super().on_train_epoch_start()
        if self.labeled_by == "better" and not self.warming_up:
            dice = self.best_dice()
            who = " and ".join(self.labelers("", list(dice)))  # the same for every network
            values = ", ".join(f"{name} {value:.4f}" for name, value in dice.items())
            self.print_to_log_file(f"pseudo-labels by the teacher of {who} (best validation Dice values: {values})")

    def pseudo_labels(self, unlabeled: UnlabeledDraw) -> dict[str, Tensor]:
        """Segmentations by the mean of the probabilities of the labelers' teachers."""
        images = unlabeled.images
        labelers = {name: self.labelers(name, list(images)) for name in images}
        predictions = {
            name: self.mean_prediction(self.teachers[name], images[name])
            for name in dict.fromkeys(labeler for of_network in labelers.values() for labeler in of_network)
        }
        return {
            name: self.segmented(name, torch.stack([predictions[labeler] for labeler in of_network]).mean(0))
            for name, of_network in labelers.items()
        }
