"""A part of methods: the modality whose predictions teach the others.

Source: Zhang et al., Med. Image Anal. 83:102656, 2023 (the better one, which one is measured).
"""

from collections.abc import Mapping
from statistics import fmean

from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class WithTeachingModality(nnUNetTrainerSemiSupervised):
    """One modality teaches: the one that segments better, unless it is named.

    Attributes:
        teaching_modality: its name; None: the one whose best validation Dice values have the highest mean. Name it if
            you know it: with fold "all" that Dice is that of training cases, which on floods chose the one that is
            worse on others (benchmarks/study/README.md).
    """

    min_modalities = 2
    compares_modalities = True
    teaching_modality: str | None = None

    def initialize(self) -> None:
        """Build the networks, if there is such a modality."""
        names = [m.name for m in self.group.modalities]
        if self.teaching_modality not in (None, *names):
            raise ValueError(f"teaching_modality must be one of {', '.join(names)}; got {self.teaching_modality!r}.")
        super().initialize()

    def best_dice(self) -> dict[str, float]:
        """Of every network the mean of its `bma_pool_size` best validation Dice values so far; 0 if there is none."""
        found = {}
        for trainer in self.trainers:
            values = [dice for dice in trainer.logger.get_value("mean_fg_dice", step=None) if dice == dice]
            found[trainer.name] = fmean(sorted(values)[-self.bma_pool_size :]) if values else 0.0
        return found

    def teaching(self, dice: Mapping[str, float]) -> str | None:
        """Of modalities and their mean validation Dice the one that teaches; None if that is not known yet."""
        if self.teaching_modality is not None and self.teaching_modality in dice:
            return self.teaching_modality
        return max(dice, key=lambda name: dice[name]) if any(dice.values()) else None
