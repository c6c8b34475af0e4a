"""FixMatch of one modality, in the form in which UniMatch's authors compare with it.

Sources: Sohn et al., FixMatch, NeurIPS 2020; Yang et al., CVPR 2023.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.strong_views import SureLabels, WithStrongViews


@with_schedules
class nnUNetTrainerFixMatch(WithStrongViews):
    """Every network learns on one strong view from its own sure segmentation of the weak one.

    Attributes:
        strong_weight: weight of the loss of the strong view. Published: (L_x + L_s) / 2 with L_x = (CE + Dice) / 2;
            nnU-Net's loss is twice that L_x.
    """

    term_weights = {"strong": "strong_weight"}
    strong_weight = 2.0

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, SureLabels]]]:
        """A strong view."""
        view, targets = self.strong_view(unlabeled, self.sure_labels(unlabeled))
        return [view], [targets]

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, SureLabels]]
    ) -> dict[str, Tensor]:
        """The Dice loss of the strong view."""
        return {"strong": self.dice_where_sure(outputs, targets)}
