"""Found through nnUNet_extTrainer: all methods on schedules that a CPU bears, and variants of PReL to choose from.

Supervised-only nnU-Net takes as many steps as both stages together.
"""

import os

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

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
