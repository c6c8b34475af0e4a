"""Semi-CML Plus: what Semi-CML teaches the weaker modality, beside copy-paste, which teaches both.

Sources: Zhang et al., Med. Image Anal. 83:102656, 2023 (contrast; the better modality teaches); Bai et al., CVPR 2023
(copy-paste); Chen et al., CVPR 2021 (hard pseudo-labels). What the parts gain: benchmarks/study/lgg.md.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.copy_paste import MixedLabels, WithCopyPasteBesideLabels
from nnunetv2_semicml.training.cross_pseudo_supervision import cross_pseudo_supervision
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerSemiCMLPlus(WithAreaContrast, WithCopyPasteBesideLabels, nnUNetTrainerCrossModalBCP):
    """All networks learn from mixtures, and those of weaker modalities from the better one on unlabeled patches, too.

    The first is `nnUNetTrainerCrossModalBCP` beside labels. For the second, networks see the unlabeled patches
    unmixed. Every network learns what the networks of its labelers segment there, and the predictions of a case are
    contrasted with those of other cases, as in Semi-CML. The better modality is its own labeler, so no gradient
    reaches it there, unless another one is nearly as good.

    Attributes:
        taught_both_ways: whether all modalities teach each other on unmixed patches; None: those do whose best
            validation Dice values reach `teaches_from`, and the better one alone if it is named or if the fold is
            "all", whose validation Dice is that of training cases. On gliomas, whose T1 without unlabeled cases has
            half the Dice of FLAIR on validation patients, FLAIR lost 0.065 in one of two draws when T1 taught it; on
            floods, whose modalities are about equally good, both gained (benchmarks/study/README.md).
        teaches_from: share of the better modality's Dice. On validation cases networks of the few labels alone had 0.93
            of it in floods and 0.37 to 0.64 in gliomas; after Semi-CML Plus taught one way 0.86, and 0.72 to 0.82.
        unmixed_pseudo_label_weight: of cross-entropy and of Dice on unmixed patches, shared by the networks that are
            taught; not ramped, since networks have warmed up.
        asc_weight: of the contrast; as in Semi-CML, without its ramp.
    """

    term_weights = {
        **nnUNetTrainerCrossModalBCP.term_weights,
        "unmixed ce": "unmixed_pseudo_label_weight",
        "unmixed dice": "unmixed_pseudo_label_weight",
        "asc": "asc_weight",
    }
    taught_both_ways: bool | None = None
    teaches_from = 0.9
    unmixed_pseudo_label_weight = 0.5
    asc_weight = 0.35

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, MixedLabels]]]:
        """The mixtures of the unlabeled batch and their labels; as a third view, the patches as they are."""
        batch = {name: self.in_batch(image) for name, image in unlabeled.images.items()}
        mixtures, targets = super().views_and_targets(UnlabeledDraw(batch), labeled)
        return [*mixtures, unlabeled.images], targets

    def on_train_epoch_start(self) -> None:
        """Say who learns from whom."""
        super().on_train_epoch_start()
        if not self.warming_up:
            labelers = self.unmixed_labelers([t.name for t in self.trainers])
            who = [f"{name} from {' and '.join(of)}" for name, of in labelers.items() if of]
            self.print_to_log_file(f"on unmixed patches learns {', '.join(who) or 'nobody'}")

    def unmixed_labelers(self, modalities: Sequence[str]) -> dict[str, list[str]]:
        """Of every network of a draw those that it learns from on unmixed patches; none if it labels by itself."""
        also = self._teaching_too(modalities)
        teaching = {name: {*self.labelers(name, modalities), *also} for name in modalities}
        return {name: [other for other in modalities if other in of and other != name] for name, of in teaching.items()}

    def _teaching_too(self, modalities: Sequence[str]) -> list[str]:
        if self.taught_both_ways is not None:
            return list(modalities) if self.taught_both_ways else []
        if self.labeled_by != "better" or self.teaching_modality is not None or self.fold == "all":
            return []
        dice = {name: value for name, value in self.best_dice().items() if name in modalities}
        return [name for name, value in dice.items() if value >= self.teaches_from * max(dice.values())]

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, MixedLabels]]
    ) -> dict[str, Tensor]:
        """Those of copy-paste; cross-entropy and Dice with the labelers' segmentations, and the contrast."""
        *mixtures, unmixed = outputs
        terms = super().unsupervised_terms(mixtures, targets)
        labelers = self.unmixed_labelers(list(unmixed))
        if num_taught := sum(map(bool, labelers.values())):
            taught = {name: logits if labelers[name] else logits.detach() for name, logits in unmixed.items()}
            batch = {name: self.in_batch(logits) for name, logits in taught.items()}
            ce, dice = cross_pseudo_supervision(self, batch, labelers)
            terms["unmixed ce"], terms["unmixed dice"] = ce / num_taught, dice / num_taught
            terms["asc"] = self.area_contrast([self.foreground(self.probabilities(z)) for z in taught.values()])
        return terms
