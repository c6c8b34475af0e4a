"""Found through nnUNet_extTrainer: every trainer as Short_<method>, in a few epochs that a CPU bears.

`SEMICML_EPOCHS` and `SEMICML_STEPS` in the environment are the length of the schedule; `SEMICML_VALIDATE` lets nnU-Net
validate at its end, which fold "all", whose cases are those of the training, does without. Momentum 0.9 instead of 0.99
and ten times the learning rate take as long steps without the hundred that the momentum needs to build up.
"""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.ext_trainers import semicml_trainers

NNUNET_LEARNING_RATE = 0.01
SCHEDULE = {
    "num_epochs": int(os.environ.get("SEMICML_EPOCHS", "5")),
    "num_iterations_per_epoch": int(os.environ.get("SEMICML_STEPS", "10")),
    "num_val_iterations_per_epoch": 3,
    "save_every": 1000,
}


class WithoutPictures:
    """Without progress.png: half a second per epoch and network."""

    def on_train_start(self) -> None:
        """Start the training."""
        self.logger.plot_progress_png = lambda folder: None
        super().on_train_start()


class NetworkTrainer(WithoutPictures, nnUNetTrainer):
    """What every network is trained with."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """nnU-Net's, with less momentum."""
        optimizer, schedule = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
        return optimizer, schedule

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate if the environment asks for it."""
        if "SEMICML_VALIDATE" in os.environ:
            super().perform_actual_validation(save_probabilities)


class Short_(NetworkTrainer):
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
        self.initial_lr *= 10
        for name, value in SCHEDULE.items():
            setattr(self, name, value)


def make(name: str) -> type[nnUNetTrainer]:
    """A trainer of the package in short, and its first stage if it has one."""
    method = getattr(semicml_trainers, f"nnUNetTrainer{name}")
    rate = 10 * getattr(method, "initial_lr", NNUNET_LEARNING_RATE)
    members = {**SCHEDULE, "initial_lr": rate, "__module__": __name__, "network_trainer": NetworkTrainer}
    if hasattr(method, "first_stage"):
        members["first_stage"] = globals()[method.first_stage.__name__.replace("nnUNetTrainer", "Short_")]
    return type(f"Short_{name}", (WithoutPictures, method), members)


METHODS = [name.removeprefix("nnUNetTrainer") for name in semicml_trainers.__all__ if not name.endswith("epochs")]
for method_name in sorted(METHODS, key=lambda name: (name.endswith("PReL"), name)):  # first stages first
    globals()[f"Short_{method_name}"] = make(method_name)
