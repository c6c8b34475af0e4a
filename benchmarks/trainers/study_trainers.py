"""Found through nnUNet_extTrainer: every method of the study and every variant of one, on a schedule for a CPU.

nnU-Net finds a trainer by the name of its class, so each row of TRAINERS becomes a class Study_<name>. Single-stage
methods take 900 steps; where PReL follows, the first stage takes 600 and PReL 300. For the optimizer see quick.py.
"""

from quick import QuickSupervisedTrainer, quick
from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT

EPOCHS = {"single": 60, "first": 40, "second": 20}
SCHEDULE = {"num_iterations_per_epoch": 15, "num_val_iterations_per_epoch": 3, "save_every": 1000}


class StudyNetworkTrainer(QuickSupervisedTrainer):
    """Supervised-only nnU-Net on the study's schedule."""

    schedule = {**SCHEDULE, "num_epochs": EPOCHS["single"]}


class StudyMultiChannelTrainer(StudyNetworkTrainer):
    """The same with all modalities as channels of one network, which needs all of them for every prediction."""


class TeachersDeployed(nnUNetTrainerSemiCML):
    """Semi-CML whose teachers are predicted with, to see how good they are."""

    def on_train_end(self) -> None:
        """Put the averaged weights into the networks before these are written."""
        for trainer in self.trainers:
            trainer.unwrapped_network().load_state_dict(self.averaged_network(trainer.name).state_dict())
        super().on_train_end()


class HardPReL(nnUNetTrainerSemiCMLPReL):
    """PReL from the teacher's segmentation instead of its probabilities."""

    def soft_pseudo_labels(self, image: Tensor) -> Tensor:
        """Zeros and ones (B, heads, *patch)."""
        soft = super().soft_pseudo_labels(image)
        return self.hard_pseudo_labels(soft)


TRAINERS = {
    # name: (class, part of the schedule, first stage, what differs from its defaults)
    "MeanTeacher": (nnUNetTrainerMeanTeacher, "single", None, {}),
    "UAMT": (nnUNetTrainerUAMT, "single", None, {}),
    "CPS": (nnUNetTrainerCPS, "single", None, {}),
    "CrossModalCPS": (nnUNetTrainerCrossModalCPS, "single", None, {}),
    "SECLRegion": (nnUNetTrainerSECLRegion, "single", None, {}),
    "SECLAnatomical": (nnUNetTrainerSECLAnatomical, "single", None, {}),
    "SemiCML": (nnUNetTrainerSemiCML, "single", None, {}),
    "Plus": (nnUNetTrainerSemiCMLPlus, "single", None, {}),
    # the first stage and what each of its parts is for, and SECL in as many steps
    "First": (nnUNetTrainerSemiCML, "first", None, {}),
    "First_neither": (nnUNetTrainerSemiCML, "first", None, {"mse_weight": 0.0, "asc_weight": 0.0}),
    "First_mse": (nnUNetTrainerSemiCML, "first", None, {"asc_weight": 0.0}),
    "First_asc": (nnUNetTrainerSemiCML, "first", None, {"mse_weight": 0.0}),
    # cross-modal CPS with the published teachers
    "First_hard": (nnUNetTrainerSemiCMLPlus, "first", None, {"asc_weight": 0.0, "teacher_averaging": "bma"}),
    "First_plus": (nnUNetTrainerSemiCMLPlus, "first", None, {}),
    "First_weight_01": (nnUNetTrainerSemiCML, "first", None, {"asc_weight": 0.1}),
    "First_weight_1": (nnUNetTrainerSemiCML, "first", None, {"asc_weight": 1.0}),
    "First_weight_35": (nnUNetTrainerSemiCML, "first", None, {"asc_weight": 3.5}),
    "First_temperature_05": (nnUNetTrainerSemiCML, "first", None, {"asc_temperature": 0.5}),
    "First_temperature_02": (nnUNetTrainerSemiCML, "first", None, {"asc_temperature": 0.2}),
    "First_cases_4": (nnUNetTrainerSemiCML, "first", None, {"asc_cases": 4}),
    "First_cases_16": (nnUNetTrainerSemiCML, "first", None, {"asc_cases": 16}),
    "First_plus_bma": (nnUNetTrainerSemiCMLPlus, "first", None, {"teacher_averaging": "bma"}),
    "First_bma_teacher": (TeachersDeployed, "first", None, {}),
    "First_ema_teacher": (TeachersDeployed, "first", None, {"teacher_averaging": "ema"}),
    "First_ema": (nnUNetTrainerSemiCML, "first", None, {"teacher_averaging": "ema"}),
    "First_region": (nnUNetTrainerSECLRegion, "first", None, {}),
    "First_region_weight_01": (nnUNetTrainerSECLRegion, "first", None, {"contrast_weight": 0.1}),
    "First_region_last_stage": (nnUNetTrainerSECLRegion, "first", None, {"feature_stage": 99}),
    "First_anatomical": (nnUNetTrainerSECLAnatomical, "first", None, {}),
    "First_anatomical_weight_1": (nnUNetTrainerSECLAnatomical, "first", None, {"contrast_weight": 1.0}),
    "First_anatomical_temperature_01": (nnUNetTrainerSECLAnatomical, "first", None, {"contrast_temperature": 0.1}),
    "First_anatomical_last_stage": (nnUNetTrainerSECLAnatomical, "first", None, {"feature_stage": 99}),
    # the second stage, from each of these
    "PReL": (nnUNetTrainerSemiCMLPReL, "second", "First", {}),
    "PReL_neither": (nnUNetTrainerSemiCMLPReL, "second", "First_neither", {}),
    "PReL_mse": (nnUNetTrainerSemiCMLPReL, "second", "First_mse", {}),
    "PReL_asc": (nnUNetTrainerSemiCMLPReL, "second", "First_asc", {}),
    "PReL_hard": (nnUNetTrainerSemiCMLPReL, "second", "First_hard", {}),
    "PReL_plus": (nnUNetTrainerSemiCMLPReL, "second", "First_plus", {}),
    "PReL_plus_bma": (nnUNetTrainerSemiCMLPReL, "second", "First_plus_bma", {}),
    "PReL_ema": (nnUNetTrainerSemiCMLPReL, "second", "First_ema", {}),
    "PReL_hard_labels": (HardPReL, "second", "First", {}),
    "PReL_given_back": (nnUNetTrainerSemiCMLPReL, "second", "First", {"may_give_back": True}),
    "PReL_no_asc": (nnUNetTrainerSemiCMLPReL, "second", "First", {"asc_share": 0.0, "asc_share_better": 0.0}),
    "PReL_unlabeled": (nnUNetTrainerSemiCMLPReL, "second", "First", {"supervised_weight": 0.0}),
    "PReL_fast": (nnUNetTrainerSemiCMLPReL, "second", "First", {"initial_lr": 0.05}),
}


for _name, (_base, _part, _first, _changes) in TRAINERS.items():
    _members = {**_changes, "first_stage": globals()[f"Study_{_first}"]} if _first else _changes
    _schedule = {**SCHEDULE, "num_epochs": EPOCHS[_part]}
    globals()[f"Study_{_name}"] = quick(f"Study_{_name}", __name__, _base, _schedule, **_members)
