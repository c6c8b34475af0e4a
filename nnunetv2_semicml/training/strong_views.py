"""A part of methods: what a network is sure of in a patch, it learns to see in strongly changed views of it.

Sources: Sohn et al., FixMatch, NeurIPS 2020; Yang et al., Revisiting weak-to-strong consistency in semi-supervised
semantic segmentation (UniMatch), CVPR 2023, and its published code for cardiac MR, whose settings these are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_semicml.losses.soft_pseudo_label import soft_dice_loss
from nnunetv2_semicml.training.boxes import draw_boxes_of_shares
from nnunetv2_semicml.training.conductor import UnlabeledDraw, View
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.photometry import draw_photometry


class SureLabels(NamedTuple):
    """What a network has segmented in the weak view.

    Attributes:
        labels: zeros and ones (B, heads, *patch).
        sure: where it was sure, zeros and ones (B, 1, *patch) or, for regions, (B, heads, *patch).
    """

    labels: Tensor
    sure: Tensor

    def pasted(self, box: Tensor) -> "SureLabels":
        """With a box of another case of the batch in it, (B, 1, *patch)."""
        return SureLabels(*(torch.where(box, part.roll(1, 0), part) for part in self))


class WithStrongViews(nnUNetTrainerSemiSupervised):
    """The network's own segmentation of a patch, where it is sure, is the label of strong views; there is no teacher.

    The patch as nnU-Net augments it is the weak view. Strong ones have its geometry, other brightness, contrast and
    blur (`draw_photometry`), and in half of the cases a box of the strong view of another case of the batch.

    Attributes:
        strong_weight: weight of the loss of strong views, of several of their mean.
        sure_from: probability of a class, or of a region or its absence, from which a network is sure; published.
        box_probability: of a box; published.
        box_shares: lowest and highest share of the patch that is in the box; published.
        dice_smooth: published.
        rampup_fraction: published: no ramp.
    """

    makes_pseudo_labels = True
    dice_smooth = 1e-5
    rampup_fraction = 0.0
    sure_from = 0.95
    box_probability = 0.5
    box_shares = (0.02, 0.4)
    strong_weight: float

    def sure_labels(self, unlabeled: UnlabeledDraw) -> dict[str, SureLabels]:
        """What every network segments in its patches as they were drawn, and where it is sure of it."""
        found = {}
        for trainer in (t for t in self.trainers if t.name in unlabeled.images):
            probabilities = self.own_prediction(trainer, unlabeled.images[trainer.name])
            labels = self.hard_pseudo_labels(probabilities)
            if self.label_manager.has_regions:
                sure = torch.maximum(probabilities, 1 - probabilities) >= self.sure_from
            else:
                sure = probabilities.amax(1, keepdim=True) >= self.sure_from
            self.count_pseudo_labels(trainer.name, labels * sure)
            found[trainer.name] = SureLabels(labels, sure.float())
        return found

    def strong_view(
        self, unlabeled: UnlabeledDraw, labels: Mapping[str, SureLabels]
    ) -> tuple[dict[str, Tensor], dict[str, SureLabels]]:
        """Draw a strong view of the patches; return it with the labels pasted alike."""
        view, of_view = {}, {}
        for name, image in unlabeled.images.items():
            box = draw_boxes_of_shares(len(image), image.shape[2:], image.device, self.box_probability, self.box_shares)
            strong = draw_photometry(len(image), image.device).apply(image)
            view[name] = torch.where(box, strong.roll(1, 0), strong)
            of_view[name] = labels[name].pasted(box)
        return view, of_view

    def dice_where_sure(self, outputs: Sequence[View], targets: Sequence[Mapping[str, SureLabels]]) -> Tensor:
        """Dice loss over the sure voxels of the batch, of all classes, the background included; the mean over views."""
        return self.over_networks(
            soft_dice_loss(
                self.probabilities(z),
                of_view[name].labels,
                True,
                of_view[name].sure,
                smooth=self.dice_smooth,
                distributed=self.is_ddp,
            )
            for logits, of_view in zip(outputs, targets, strict=True)
            for name, z in logits.items()
        )
