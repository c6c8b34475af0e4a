"""Semi-CML Plus: what Semi-CML teaches the weaker modality, beside copy-paste, which teaches both.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast; the better modality teaches); Bai et al., CVPR 2023
(copy-paste); Chen et al., CVPR 2021 (hard pseudo-labels). What the parts gain: benchmarks/study/lgg.md.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.copy_paste import MixedLabels
from nnunetv2_semicml.training.cross_pseudo_supervision import cross_pseudo_supervision
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSemiCMLPlus(WithAreaContrast, nnUNetTrainerCrossModalBCP):
    """All networks learn from mixtures, and those of weaker modalities from the better one on unlabeled patches, too.

    The first is `nnUNetTrainerCrossModalBCP` with other settings. For the second, networks see the unlabeled patches
    unmixed. Every network learns what the networks of its labelers segment there, and the predictions of a case are
    contrasted with those of other cases, as in Semi-CML. The better modality is its own labeler, so no gradient
    reaches it there: taught by a weaker one, it lost 0.065 Dice in one of two draws (benchmarks/study/lgg.md).

    Attributes:
        unmixed_pseudo_label_weight: of cross-entropy and of Dice on unmixed patches; not ramped, since networks have
            warmed up.
        asc_weight: of the contrast; as in Semi-CML, without its ramp.
        both_ways: on the first draw of validation patients this and unmixed labels beside the mixtures each gained over
            what is published of copy-paste, and with `largest_component` more (ibid.).
        supervised_weight_after_warmup: see `both_ways`.
        largest_component: a lesion may have several; by itself it made no difference (ibid.).
        deploy_average: better by 0.005 and 0.002 in the mean of three draws of validation patients (ibid.).
    """

    term_weights = {
        **nnUNetTrainerCrossModalBCP.term_weights,
        "unmixed ce": "unmixed_pseudo_label_weight",
        "unmixed dice": "unmixed_pseudo_label_weight",
        "asc": "asc_weight",
    }
    unmixed_pseudo_label_weight = 0.5
    asc_weight = 0.35
    both_ways = True
    supervised_weight_after_warmup = 1.0
    largest_component = False
    deploy_average = True

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, MixedLabels]]]:
        """The mixtures of the unlabeled batch and their labels; as a third view, the patches as they are."""
        batch = {name: self.in_batch(image) for name, image in unlabeled.images.items()}
        mixtures, targets = super().views_and_targets(UnlabeledDraw(batch), labeled)
        return [*mixtures, unlabeled.images], targets

    def unmixed_labelers(self, modalities: Sequence[str]) -> dict[str, list[str]]:
        """Of every network of a draw those that it learns from on unmixed patches; none if it labels by itself."""
        return {name: [other for other in self.labelers(name, modalities) if other != name] for name in modalities}

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, MixedLabels]]
    ) -> dict[str, Tensor]:
        """Those of copy-paste; cross-entropy and Dice with the labelers' segmentations, and the contrast."""
        *mixtures, unmixed = outputs
        terms = super().unsupervised_terms(mixtures, targets)
        labelers = self.unmixed_labelers(list(unmixed))
        if any(labelers.values()):
            taught = {name: logits if labelers[name] else logits.detach() for name, logits in unmixed.items()}
            batch = {name: self.in_batch(logits) for name, logits in taught.items()}
            terms["unmixed ce"], terms["unmixed dice"] = cross_pseudo_supervision(self, batch, labelers)
            terms["asc"] = self.area_contrast([self.foreground(self.probabilities(z)) for z in taught.values()])
        return terms
