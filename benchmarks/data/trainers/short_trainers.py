"""Found through nnUNet_extTrainer: every trainer as Short_<method>, in a few epochs that a CPU bears.

`SEMICML_EPOCHS` and `SEMICML_STEPS` in the environment are the length of the schedule; `SEMICML_VALIDATE` lets nnU-Net
validate at its end, which fold "all", whose cases are those of the training, does without. Momentum 0.9 instead of 0.99
and ten times the learning rate take as long steps without the hundred that the momentum needs to build up.
"""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.ext_trainers import semicml_trainers


class Short_(nnUNetTrainer):
    """Supervised-only nnU-Net."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        shorten(self)

    def configure_optimizers(self) -> tuple:
        """nnU-Net's, with less momentum."""
        optimizer, schedule = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
        return optimizer, schedule

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate if the environment asks for it."""
        if "SEMICML_VALIDATE" in os.environ:
            super().perform_actual_validation(save_probabilities)


class _OfNetworks(Short_):
    """The same under the name by which stock nnU-Net predicts: networks and weights are those of nnU-Net's trainer."""


_OfNetworks.__name__ = nnUNetTrainer.__name__


def shorten(trainer: nnUNetTrainer) -> None:
    """Set the schedule."""
    trainer.num_epochs = int(os.environ.get("SEMICML_EPOCHS", "5"))
    trainer.num_iterations_per_epoch = int(os.environ.get("SEMICML_STEPS", "10"))
    trainer.num_val_iterations_per_epoch = 3
    trainer.initial_lr *= 10
    trainer.save_every = 1000
    trainer.logger.plot_progress_png = lambda folder: None  # half a second per epoch and network


def make(name: str) -> type[nnUNetTrainer]:
    """A trainer of the package in short, and its first stage if it has one."""
    method = getattr(semicml_trainers, f"nnUNetTrainer{name}")

    def __init__(
        self: nnUNetTrainer,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        method.__init__(self, plans, configuration, fold, dataset_json, device)
        shorten(self)

    members = {"__init__": __init__, "__module__": __name__, "network_trainer": _OfNetworks}
    if hasattr(method, "first_stage"):
        members["first_stage"] = globals()[method.first_stage.__name__.replace("nnUNetTrainer", "Short_")]
    return type(f"Short_{name}", (method,), members)


METHODS = [name.removeprefix("nnUNetTrainer") for name in semicml_trainers.__all__ if not name.endswith("epochs")]
for method_name in sorted(METHODS, key=lambda name: (name.endswith("PReL"), name)):  # first stages first
    globals()[f"Short_{method_name}"] = make(method_name)
