"""Uncertainty-aware Mean Teacher (UA-MT): consistency where the teacher is certain.

Source: Yu et al., Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation, MICCAI 2019.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nnunetv2_semicml.losses.consistency import masked_consistency
from nnunetv2_semicml.losses.soft_pseudo_label import confidence
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.schedules import sigmoid_rampup, with_schedules


@with_schedules
class nnUNetTrainerUAMT(nnUNetTrainerSemiSupervised):
    """Mean Teacher on voxels where the entropy of several forward passes of the teacher is low; deploys the student.

    The published networks have dropout, by which the forward passes differ. nnU-Net's have none unless the plans say
    so; they then differ by the noise of their images alone.

    Attributes:
        consistency_weight: of the term. Published: 0.1 beside half of the sum of cross-entropy and Dice that nnU-Net's
            loss is.
        rampup_fraction: published.
        uncertainty_passes: forward passes of the teacher, of whose mean the entropy is taken; published.
        teacher_averaging: published.
    """

    teacher_averaging = "ema"
    term_weights = {"mse": "consistency_weight"}
    consistency_weight = 0.2
    rampup_fraction = 1.0
    uncertainty_passes = 8

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], dict[str, tuple[Tensor, Tensor]]]:
        """Compare with the probabilities (B, heads, *patch) of every teacher where they count, (B, 1 or heads, *patch).

        Published: where the entropy of the mean of 8 forward passes is below a share of the largest possible one that
        rises from 3/4 to 1 during the training.
        """
        epoch, epochs = (n - self.warmup_epochs for n in (self.current_epoch, self.num_epochs))
        threshold = 0.75 + 0.25 * sigmoid_rampup(epoch, epochs)
        targets = {}
        for name, image in unlabeled.images.items():
            prediction = self.mean_prediction(self.teachers[name], image)
            mean = self.mean_prediction(self.teachers[name], image, self.uncertainty_passes)
            targets[name] = prediction, confidence(mean, self.label_manager.has_regions) > 1 - threshold
        return [unlabeled.images], targets

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The sum over the networks, which learn independently of each other."""
        (logits,) = outputs
        terms = (masked_consistency(self.probabilities(z), *targets[name], self.is_ddp) for name, z in logits.items())
        return {"mse": self.over_networks(terms)}
