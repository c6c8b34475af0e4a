"""A part of methods: the area-similarity contrast (ASC) of predictions, and the cases that it contrasts.

Source: Zhang et al., Med. Image Anal. 83:102656, 2023.
"""

from torch import Tensor

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class WithAreaContrast(nnUNetTrainerSemiSupervised):
    """Predictions of a case by several modalities are contrasted with those of other cases.

    Attributes:
        asc_temperature: see `AreaSimilarityContrastiveLoss`; published. A sharper 0.2 with weight 1 destroyed both
            networks in development.
        asc_cases: unlabeled cases per draw that are contrasted; None takes those of the unlabeled batch, as far as they
            are different cases. If there are more, the step draws as many, and the first ones are the unlabeled batch
            (`in_batch`), to which the other terms of the method keep.
    """

    min_modalities = 2
    compares_modalities = True
    min_unlabeled = 2
    asc_temperature = 1.0
    asc_cases: int | None = None

    def initialize(self) -> None:
        """Build the networks, if there are enough cases to contrast."""
        super().initialize()
        if self.asc_cases is not None and not 2 <= self.asc_cases <= self.distinct_cases:
            raise ValueError(
                f"asc_cases must lie between 2 and {self.distinct_cases}, since there are no more unlabeled cases and "
                f"none is to be contrasted with itself; got {self.asc_cases}."
            )

    @property
    def cases_per_draw(self) -> int:
        """Unlabeled cases of a draw: the batch, and what is contrasted beyond it."""
        return max(super().cases_per_draw, self.asc_cases or 0)

    def in_batch(self, unlabeled: Tensor) -> Tensor:
        """The cases of the unlabeled batch among those of the draw; (B, ...)."""
        return unlabeled[: self.cases_here(super().cases_per_draw)]

    def contrasted(self, unlabeled: Tensor) -> Tensor:
        """The cases among those of the draw that are contrasted, all different; (B, ...)."""
        return self.different_cases(unlabeled)[: self.cases_here(self.asc_cases or super().cases_per_draw)]

    def area_contrast(self, predictions: list[Tensor]) -> Tensor:
        """The ASC loss of foreground probabilities (B, C, *patch), one for each modality."""
        asc_loss = AreaSimilarityContrastiveLoss(self.asc_temperature, distributed=self.is_ddp)
        loss: Tensor = asc_loss([self.contrasted(p) for p in predictions])
        return loss
