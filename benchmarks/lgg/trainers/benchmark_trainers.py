"""Found through nnUNet_extTrainer: all methods on schedules that a CPU bears, and variants of PReL to choose from.

Supervised-only nnU-Net takes as many steps as both stages together.
"""

import os
from typing import ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL


def _shorten(trainer: nnUNetTrainer, epochs: int, steps_per_epoch: int) -> None:
    trainer.num_epochs = epochs
    trainer.num_iterations_per_epoch = steps_per_epoch
    trainer.num_val_iterations_per_epoch = 5
    torch.set_num_threads(1)  # two small trainings at a time are faster than one after the other


class nnUNetTrainer_short(nnUNetTrainer):
    """Stock nnU-Net on the labeled cases alone, 960 steps."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=16, steps_per_epoch=60)
        torch.manual_seed(int(os.environ["nnUNet_semicml_seed"]))
        np.random.seed(int(os.environ["nnUNet_semicml_seed"]))


class nnUNetTrainerSemiCML_short(nnUNetTrainerSemiCML):
    """Semi-CML with its default hyper-parameters, 600 steps."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=12, steps_per_epoch=50)


class nnUNetTrainerSemiCMLPReL_short(nnUNetTrainerSemiCMLPReL):
    """PReL with its default hyper-parameters, 360 steps."""

    first_stage = nnUNetTrainerSemiCML_short

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=5, steps_per_epoch=72)


class nnUNetTrainerSemiCMLPReL_short_unlabeled(nnUNetTrainerSemiCMLPReL_short):
    """The published form of the stage, without the labeled cases."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.supervised_weight = 0.0


class nnUNetTrainerSemiCMLPReL_short_fast(nnUNetTrainerSemiCMLPReL_short):
    """Half of nnU-Net's learning rate instead of a tenth."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 5e-3


class _ShortSECL:
    """SECL with its default hyper-parameters but for `changes`."""

    epochs = 6  # of 50 steps
    changes: ClassVar = {}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, self.epochs, steps_per_epoch=50)
        for name, value in {**_FIRST_CHOICE, **self.changes}.items():
            setattr(self, name, value)


# where the first round of choices started from
_FIRST_CHOICE = {"contrast_weight": 0.1, "contrast_temperature": 0.1, "feature_stage": 2}


class nnUNetTrainerSECL_none(_ShortSECL, nnUNetTrainerSECLAnatomical):
    """Step for step stock nnU-Net on the labeled cases, by a weight of 0."""

    changes: ClassVar = {"contrast_weight": 0.0}


class nnUNetTrainerSECLAnatomical_short(_ShortSECL, nnUNetTrainerSECLAnatomical):
    """The first choice."""


class nnUNetTrainerSECLRegion_short(_ShortSECL, nnUNetTrainerSECLRegion):
    """The first choice."""


class nnUNetTrainerSECLAnatomical_heavy(nnUNetTrainerSECLAnatomical_short):
    """One change."""

    changes: ClassVar = {"contrast_weight": 1.0}


class nnUNetTrainerSECLAnatomical_warm(nnUNetTrainerSECLAnatomical_short):
    """One change."""

    changes: ClassVar = {"contrast_temperature": 0.5}


class nnUNetTrainerSECLAnatomical_deep(nnUNetTrainerSECLAnatomical_short):
    """One change."""

    changes: ClassVar = {"feature_stage": 99}


class nnUNetTrainerSECLRegion_heavy(nnUNetTrainerSECLRegion_short):
    """One change."""

    changes: ClassVar = {"contrast_weight": 1.0}


class nnUNetTrainerSECLRegion_deep(nnUNetTrainerSECLRegion_short):
    """One change."""

    changes: ClassVar = {"feature_stage": 99}


class nnUNetTrainerSECL_none_long(nnUNetTrainerSECL_none):
    """Twice the steps."""

    epochs = 12


class nnUNetTrainerSECLAnatomical_long(nnUNetTrainerSECLAnatomical_short):
    """Twice the steps."""

    epochs = 12
    changes: ClassVar = {"contrast_temperature": 0.5}


class nnUNetTrainerSECLRegion_heavy_long(nnUNetTrainerSECLRegion_short):
    """Twice the steps."""

    epochs = 12
    changes: ClassVar = {"contrast_weight": 1.0}
