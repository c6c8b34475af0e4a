"""A part of methods: bidirectional copy-paste (BCP), mixtures of labeled and unlabeled patches.

Source: Bai et al., Bidirectional copy-paste for semi-supervised medical image segmentation, CVPR 2023.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component_cc3d
from torch import Tensor
from torch.nn.functional import interpolate

from nnunetv2_semicml.training.boxes import draw_box
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised


class MixedLabels(NamedTuple):
    """What mixtures of N pairs of a labeled and an unlabeled patch are compared with.

    Attributes:
        labels: of both, as zeros and ones (N, heads, *patch).
        from_labels: (N, 1, *patch), 1 where the labeled patch shows and is annotated, otherwise 0.
        from_teacher: the same where the unlabeled patch shows.
    """

    labels: Tensor
    from_labels: Tensor
    from_teacher: Tensor


class WithBidirectionalCopyPaste(nnUNetTrainerSemiSupervised):
    """Networks learn from labeled patches with a box of an unlabeled one in them, and the reverse.

    A step has one box, for all mixtures of all networks. The label of a mixture is mixed as the image is, from the
    label and the teacher's segmentation, and cross-entropy and Dice are computed apart in the two regions. Half of the
    pairs are mixed in one direction, half in the other, so that a step has no more mixtures than it has labeled
    patches, unless `both_ways` says otherwise.

    During the warm-up labeled patches are mixed among themselves, under nnU-Net's own loss; networks see nothing but
    mixtures from then on, at full resolution, without deep supervision.

    Attributes:
        box_side: of the box, in sides of the patch; published.
        both_ways: whether every pair is mixed in both directions, which costs twice as much; published: not.
        labeled_weight_in_mixtures: weight of the region of labels in a mixture. Published: 1 of ½ (CE + Dice) of each
            of the two mixtures, summed: the mean over these of nnU-Net's cross-entropy + Dice.
        pseudo_label_weight: weight of the other region; published, likewise.
        largest_component: whether the largest component of every class of a pseudo-label is kept alone, patch by patch;
            published; wrong for what has several, such as lesions.
        teacher_averaging: published.
        noise_std: of a teacher's images; the published one sees them as they are.
        warmup_fraction: share of the schedule on mixtures of labeled patches alone. Published: 10000 of 40000 steps
            (ACDC) or 2000 of 17000 (left atrium).
        supervised_weight_after_warmup: of labeled patches that are not mixed; published.
        rampup_fraction: published: no ramp.
    """

    teacher_averaging = "ema"
    noise_std = 0.0
    mixes_labeled = True
    makes_pseudo_labels = True
    warmup_fraction = 0.25
    supervised_weight_after_warmup = 0.0
    rampup_fraction = 0.0
    term_weights = {
        "labeled ce": "labeled_weight_in_mixtures",
        "labeled dice": "labeled_weight_in_mixtures",
        "pseudo ce": "pseudo_label_weight",
        "pseudo dice": "pseudo_label_weight",
    }
    box_side = 2 / 3
    both_ways = False
    labeled_weight_in_mixtures = 1.0
    pseudo_label_weight = 0.5
    largest_component = True

    def labeled_views(
        self, labeled: Mapping[str, LabeledPatches], draws: Sequence[UnlabeledDraw]
    ) -> Mapping[str, LabeledPatches]:
        """While warming up, every labeled patch has a box of another one of the batch in it."""
        if not self.warming_up:
            return labeled
        box = draw_box(self.configuration_manager.patch_size, self.box_side, self.device)

        def mixed(own: Tensor) -> Tensor:
            inside = interpolate(box.float(), own.shape[2:], mode="nearest-exact").bool()
            return torch.where(inside, own.roll(1, 0), own)

        views = {}
        for name, (image, target) in labeled.items():
            scales = [mixed(scale) for scale in target] if isinstance(target, list) else mixed(target)
            views[name] = LabeledPatches(mixed(image), scales)
        return views

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, MixedLabels]]]:
        """Mix in both directions: unlabeled boxes in labeled patches are the first view, the reverse is the second."""
        box = draw_box(self.configuration_manager.patch_size, self.box_side, self.device)
        pseudo_labels = self.pseudo_labels(unlabeled)
        views: list[dict[str, Tensor]] = [{}, {}]
        targets: list[dict[str, MixedLabels]] = [{}, {}]
        for name, image in unlabeled.images.items():
            of_labels, target = labeled[name].image, labeled[name].full_target
            pairs = max(len(image), len(of_labels))
            taught, untaught = (torch.arange(pairs, device=self.device) % len(images) for images in (of_labels, image))
            half = pairs if self.both_ways else pairs - pairs // 2
            directions = [slice(0, half), slice(0 if self.both_ways or pairs == 1 else half, pairs)]
            labels, annotated = self.one_hot_labels(target), self.annotated(target)
            for view, of_view, direction, from_labels in zip(views, targets, directions, (~box, box), strict=True):
                a, b = taught[direction], untaught[direction]
                view[name] = torch.where(from_labels, of_labels[a], image[b])
                of_view[name] = MixedLabels(
                    torch.where(from_labels, labels[a], pseudo_labels[name][b]),
                    (from_labels & annotated[a]).float(),
                    (~from_labels).float().expand_as(annotated[a]),
                )
        return views, targets

    def pseudo_labels(self, unlabeled: UnlabeledDraw) -> dict[str, Tensor]:
        """The segmentations (B, heads, *patch) that networks learn from, as zeros and ones: those of their teachers."""
        return {
            name: self.segmented(name, self.mean_prediction(self.teachers[name], image))
            for name, image in unlabeled.images.items()
        }

    def segmented(self, name: str, probabilities: Tensor) -> Tensor:
        """Pseudo-labels of a network, of probabilities (B, heads, *patch)."""
        labels = self.hard_pseudo_labels(probabilities)
        if self.largest_component:
            labels = self._largest_components(labels)
        self.count_pseudo_labels(name, labels)
        return labels

    def _largest_components(self, labels: Tensor) -> Tensor:
        foreground = self.foreground(labels)
        connectivity = {2: 8, 3: 26}[foreground.ndim - 2]
        kept = torch.stack(
            [
                torch.from_numpy(remove_all_but_largest_component_cc3d(of_class, connectivity))
                for of_class in foreground.flatten(0, 1).bool().cpu().numpy()
            ]
        )
        foreground = kept.view(foreground.shape).to(labels)
        if self.label_manager.has_regions:
            return foreground
        return torch.cat([1 - foreground.sum(1, keepdim=True), foreground], 1)

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, MixedLabels]]
    ) -> dict[str, Tensor]:
        """Cross-entropy and Dice in the region of labels and in the other one; the mean over the two directions."""
        terms: dict[str, list[Tensor]] = {name: [] for name in WithBidirectionalCopyPaste.term_weights}
        for logits, of_view in zip(outputs, targets, strict=True):
            for name, z in logits.items():
                prediction = self.foreground(self.probabilities(z))
                labels, *regions = of_view[name]
                for kind, where in zip(("labeled", "pseudo"), regions, strict=True):
                    ce, dice = self.ce_and_dice(z, prediction, labels, where)
                    terms[f"{kind} ce"].append(ce)
                    terms[f"{kind} dice"].append(dice)
        return {term: self.over_networks(values) for term, values in terms.items()}


class WithCopyPasteBesideLabels(WithBidirectionalCopyPaste):
    """Networks learn from labels as always, and from mixtures beside it; what is deployed is their average.

    Attributes:
        both_ways: on the first draw of validation patients this and unmixed labels beside the mixtures each gained over
            what is published of copy-paste, and with `largest_component` more (benchmarks/study/lgg.md).
        supervised_weight_after_warmup: see `both_ways`.
        largest_component: a lesion may have several; by itself it made no difference (ibid.).
        deploy_average: of Semi-CML Plus better by 0.005 and 0.002 in the mean of three draws of validation patients
            (ibid.).
    """

    both_ways = True
    supervised_weight_after_warmup = 1.0
    largest_component = False
    deploy_average = True
