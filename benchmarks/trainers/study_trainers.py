"""Found through nnUNet_extTrainer: the methods and variants of ../protocols, as long as a protocol says.

nnU-Net finds a trainer by the name of its class, so each row of TRAINERS becomes a class Protocol_<name>. The number of
steps is `PROTOCOL_STEPS` in the environment; where PReL follows, the first stage takes two thirds of them and PReL the
rest. Optimizers and learning rates are nnU-Net's.
"""

import os
from collections.abc import Mapping, Sequence
from os.path import join
from typing import Any

import torch
from torch import Tensor

from nnunetv2_semicml.losses.consistency import prediction_consistency
from nnunetv2_semicml.trainers.nnUNetTrainerBCP import nnUNetTrainerBCP
from nnunetv2_semicml.trainers.nnUNetTrainerBCPPlus import nnUNetTrainerBCPPlus
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerFilterMatch import nnUNetTrainerFilterMatch
from nnunetv2_semicml.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch
from nnunetv2_semicml.training.area_contrast import WithAreaContrast
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.copy_paste import MixedLabels, WithBidirectionalCopyPaste, WithCopyPasteBesideLabels
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.photometry import draw_photometry
from nnunetv2_semicml.training.teacher import Teacher
from nnunetv2_semicml.training.teaching_modality import WithTeachingModality

STEPS, STEPS_PER_EPOCH = int(os.environ.get("PROTOCOL_STEPS", "3000")), 50
SHARES = {"single": 1.0, "first": 2 / 3, "second": 1 / 3}
EMA_CHECKPOINT = "checkpoint_ema.pth"


class WithAverages(nnUNetTrainerSemiSupervised):
    """Of every method: the networks of the last step and, beside them, their exponential moving averages.

    Attributes:
        averages: of every deployed network, whatever teachers the method has.
    """

    deploy_average = False
    num_iterations_per_epoch = STEPS_PER_EPOCH
    num_val_iterations_per_epoch = 3
    save_every = 1000

    def initialize(self) -> None:
        """Build the networks and their averages."""
        super().initialize()
        self.averages = {t.name: Teacher(t.unwrapped_network()) for t in self.trainers if t.deployed}

    def on_train_start(self) -> None:
        """Start, without progress.png: half a second per epoch and network."""
        super().on_train_start()
        for trainer in self.trainers:
            trainer.logger.plot_progress_png = lambda folder: None
        self.logger.plot_progress_png = lambda folder: None

    def plot_unsupervised_terms(self) -> None:
        """Do not: an eighth of the time that such short epochs take."""

    def train_step(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Make a step; the averages follow."""
        losses = super().train_step(batch)
        for trainer in (t for t in self.trainers if t.deployed):
            self.averages[trainer.name].follow(trainer.unwrapped_network(), self.ema_decay)
        return losses

    def on_train_end(self) -> None:
        """Save the networks, then the averages."""
        super().on_train_end()
        for trainer in (t for t in self.trainers if t.deployed):
            trainer.averaged_network = self.averages[trainer.name].network
            trainer.save_checkpoint(join(trainer.output_folder, EMA_CHECKPOINT))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do not validate: with fold "all" the cases are those of the training."""


class OneWay(WithTeachingModality, nnUNetTrainerSemiCML):
    """Semi-CML whose better modality teaches and is not taught."""

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Those of Semi-CML, without a gradient for the better modality."""
        (logits,) = outputs
        better = self.teaching({name: dice for name, dice in self.best_dice().items() if name in logits})
        taught = {name: z.detach() if name == better else z for name, z in logits.items()}
        return super().unsupervised_terms([taught], targets)


class StrongMixtures(nnUNetTrainerCrossModalBCP):
    """Mixtures have the photometry of strong views."""

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, MixedLabels]]]:
        """Change brightness, contrast and blur of the mixtures."""
        views, targets = super().views_and_targets(unlabeled, labeled)
        return [
            {name: draw_photometry(len(image), image.device).apply(image) for name, image in view.items()}
            for view in views
        ], targets


class SureMixtures(nnUNetTrainerCrossModalBCP):
    """Pseudo-labels count where the teacher is sure. For classes, not for regions.

    Attributes:
        sure_from: probability from which it is.
    """

    sure_from = 0.8

    def segmented(self, name: str, probabilities: Tensor) -> Tensor:
        """Zeros and ones; zero everywhere where the teacher is not sure."""
        return super().segmented(name, probabilities) * (probabilities.amax(1, keepdim=True) >= self.sure_from)

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Sequence[Mapping[str, MixedLabels]]]:
        """Leave out what has no label."""
        views, targets = super().views_and_targets(unlabeled, labeled)
        return views, [
            {name: t._replace(from_teacher=t.from_teacher * t.labels.sum(1, keepdim=True)) for name, t in of.items()}
            for of in targets
        ]


class ContrastedMixtures(WithAreaContrast, nnUNetTrainerCrossModalBCP):
    """The predictions of the mixtures are contrasted.

    Attributes:
        asc_weight: of the contrast.
    """

    term_weights = {**nnUNetTrainerCrossModalBCP.term_weights, "asc": "asc_weight"}
    asc_weight = 0.1

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, MixedLabels]]
    ) -> dict[str, Tensor]:
        """Those of copy-paste, and the contrast of all mixtures of a step."""
        mixtures = [
            torch.cat([self.foreground(self.probabilities(view[name])) for view in outputs]) for name in outputs[0]
        ]
        return {**super().unsupervised_terms(outputs, targets), "asc": self.area_contrast(mixtures)}


class PlusByConsistency(nnUNetTrainerSemiCMLPlus):
    """On unmixed patches networks have the terms of Semi-CML, after the warm-up and without a ramp.

    Attributes:
        mse_weight: of the mean squared difference.
    """

    term_weights = {**nnUNetTrainerCrossModalBCP.term_weights, "mse": "mse_weight", "asc": "asc_weight"}
    mse_weight = 1.0

    def unsupervised_terms(
        self, outputs: Sequence[View], targets: Sequence[Mapping[str, MixedLabels]]
    ) -> dict[str, Tensor]:
        """Those of copy-paste, and those of Semi-CML."""
        *mixtures, unmixed = outputs
        predictions = [self.foreground(self.probabilities(z)) for z in unmixed.values()]
        return {
            **nnUNetTrainerCrossModalBCP.unsupervised_terms(self, mixtures, targets),
            "mse": prediction_consistency([self.in_batch(p) for p in predictions]),
            "asc": self.area_contrast(predictions),
        }


class HardSemiCML(WithAreaContrast, nnUNetTrainerCrossModalCPS):
    """Semi-CML with hard pseudo-labels of the other modality in the place of the mean squared error.

    Attributes:
        asc_weight: of the contrast; as in Semi-CML.
    """

    term_weights = {**nnUNetTrainerCrossModalCPS.term_weights, "asc": "asc_weight"}
    asc_weight = 0.35

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """Cross pseudo-supervision in the batch, and the contrast."""
        (logits,) = outputs
        predictions = [self.foreground(self.probabilities(z)) for z in logits.values()]
        batch = {name: self.in_batch(z) for name, z in logits.items()}
        return {**super().unsupervised_terms([batch], targets), "asc": self.area_contrast(predictions)}


class CopyPastePReL(WithBidirectionalCopyPaste, nnUNetTrainerSemiCMLPReL):
    """PReL whose learners see mixtures of labeled and unlabeled patches instead of the unlabeled ones."""

    pairs_labeled = True
    warmup_fraction = 0.0

    def pseudo_labels(self, unlabeled: UnlabeledDraw) -> dict[str, Tensor]:
        """Of all networks those of the better modality's teacher."""
        soft = self.soft_pseudo_labels(unlabeled.images[self.better_modality])
        return {name: self.segmented(name, soft) for name in unlabeled.images}

    def unsupervised_weights(self) -> dict[str, float]:
        """Those of copy-paste."""
        return nnUNetTrainerSemiSupervised.unsupervised_weights(self)


class MixturesAlone(WithCopyPasteBesideLabels, nnUNetTrainerCrossModalBCP):
    """What Semi-CML Plus is without its unmixed patches."""


TRAINERS: dict[str, tuple[type[nnUNetTrainerSemiSupervised], str, str | None, dict[str, object]]] = {
    # name: (class, part of the schedule, first stage, what differs from its defaults)
    "Supervised": (nnUNetTrainerSupervisedEMA, "single", None, {}),
    "MeanTeacher": (nnUNetTrainerMeanTeacher, "single", None, {}),
    "UAMT": (nnUNetTrainerUAMT, "single", None, {}),
    "CPS": (nnUNetTrainerCPS, "single", None, {}),
    "SECLRegion": (nnUNetTrainerSECLRegion, "single", None, {}),
    "SECLAnatomical": (nnUNetTrainerSECLAnatomical, "single", None, {}),
    "BCP": (nnUNetTrainerBCP, "single", None, {}),
    "BCPPlus": (nnUNetTrainerBCPPlus, "single", None, {}),
    "FixMatch": (nnUNetTrainerFixMatch, "single", None, {}),
    "UniMatch": (nnUNetTrainerUniMatch, "single", None, {}),
    "FilterMatch": (nnUNetTrainerFilterMatch, "single", None, {}),
    "BCP_smooth": (nnUNetTrainerBCP, "single", None, {"dice_smooth": 1e-5}),
    "BCPPlus_components": (nnUNetTrainerBCPPlus, "single", None, {"largest_component": True}),
    "CrossModalCPS_smooth": (nnUNetTrainerCrossModalCPS, "single", None, {"dice_smooth": 1e-5}),
    "SemiCMLPlus_smooth": (nnUNetTrainerSemiCMLPlus, "single", None, {"dice_smooth": 1e-5}),
    "FixMatch_warmup": (nnUNetTrainerFixMatch, "single", None, {"warmup_fraction": 0.25}),
    "UniMatch_warmup": (nnUNetTrainerUniMatch, "single", None, {"warmup_fraction": 0.25}),
    "CrossModalCPS": (nnUNetTrainerCrossModalCPS, "single", None, {}),
    "SemiCML": (nnUNetTrainerSemiCML, "single", None, {}),
    "SemiCMLPlus": (nnUNetTrainerSemiCMLPlus, "single", None, {}),
    "CrossModalBCP": (nnUNetTrainerCrossModalBCP, "single", None, {}),
    "First_SemiCML": (nnUNetTrainerSemiCML, "first", None, {}),
    "First_SemiCMLPlus": (nnUNetTrainerSemiCMLPlus, "first", None, {}),
    "PReL": (nnUNetTrainerSemiCMLPReL, "second", "First_SemiCML", {}),
    "PReL_Plus": (nnUNetTrainerSemiCMLPReL, "second", "First_SemiCMLPlus", {}),
    "PReL_smooth": (nnUNetTrainerSemiCMLPReL, "second", "First_SemiCML", {"dice_smooth": 1e-5}),
    "First_SemiCML_ema": (nnUNetTrainerSemiCML, "first", None, {"teacher_averaging": "ema"}),
    "PReL_ema": (nnUNetTrainerSemiCMLPReL, "second", "First_SemiCML_ema", {}),
    "PReL_copy_paste": (CopyPastePReL, "second", "First_SemiCML_ema", {}),
    "SemiCML_OneWay": (OneWay, "single", None, {}),
    "XBCP_own": (nnUNetTrainerCrossModalBCP, "single", None, {"labeled_by": "own"}),
    "XBCP_others": (nnUNetTrainerCrossModalBCP, "single", None, {"labeled_by": "others"}),
    "XBCP_all": (nnUNetTrainerCrossModalBCP, "single", None, {"labeled_by": "all"}),
    "XBCP_components": (nnUNetTrainerCrossModalBCP, "single", None, {"largest_component": False}),
    "XBCP_weight_1": (nnUNetTrainerCrossModalBCP, "single", None, {"pseudo_label_weight": 1.0}),
    "XBCP_warmup_0": (nnUNetTrainerCrossModalBCP, "single", None, {"warmup_fraction": 0.0}),
    "XBCP_warmup_05": (nnUNetTrainerCrossModalBCP, "single", None, {"warmup_fraction": 0.5}),
    "XBCP_both_ways": (nnUNetTrainerCrossModalBCP, "single", None, {"both_ways": True}),
    "XBCP_unmixed_labels": (nnUNetTrainerCrossModalBCP, "single", None, {"supervised_weight_after_warmup": 1.0}),
    "XBCP_combined": (MixturesAlone, "single", None, {}),
    "HardSemiCML": (HardSemiCML, "single", None, {}),
    "Plus_radar_teaches": (nnUNetTrainerSemiCMLPlus, "single", None, {"teaching_modality": "S1"}),
    "Plus_both_ways": (nnUNetTrainerSemiCMLPlus, "single", None, {"taught_both_ways": True}),
    "Plus_consistency": (PlusByConsistency, "single", None, {}),
    "XBCP_strong": (StrongMixtures, "single", None, {}),
    "XBCP_sure": (SureMixtures, "single", None, {}),
    "XBCP_asc": (ContrastedMixtures, "single", None, {}),
}


for _name, (_base, _part, _first, _changes) in TRAINERS.items():
    for _attribute in _changes:
        getattr(_base, _attribute)  # a misspelled one would change nothing
    _members = {"num_epochs": round(SHARES[_part] * STEPS / STEPS_PER_EPOCH), **_changes}
    _members |= {"first_stage": globals()[f"Protocol_{_first}"]} if _first else {}
    _members |= {"__module__": __name__, "__doc__": f"{_base.__name__}, {_changes}"}
    globals()[f"Protocol_{_name}"] = type(f"Protocol_{_name}", (WithAverages, _base), _members)
