"""Found through nnUNet_extTrainer: both methods on the same schedule of 1000 steps, short enough for a CPU."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML


def _shorten(trainer: nnUNetTrainer) -> None:
    trainer.num_epochs = 20
    trainer.num_iterations_per_epoch = 50
    trainer.num_val_iterations_per_epoch = 5


class nnUNetTrainer_1000steps(nnUNetTrainer):
    """Stock nnU-Net on the labeled cases alone."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class nnUNetTrainerSemiCML_1000steps(nnUNetTrainerSemiCML):
    """Semi-CML with its default hyper-parameters."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)
