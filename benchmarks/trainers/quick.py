"""What the trainers of study and data share, so that a CPU bears many trainings: an optimizer and a schedule.

Momentum 0.9 instead of 0.99 and ten times the learning rate take as long steps without the hundred that the momentum
needs to build up.
"""

import os
from collections.abc import Mapping

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.training.conductor import Conductor

NNUNET_LEARNING_RATE, LEARNING_RATE_FACTOR, MOMENTUM = 0.01, 10, 0.9


class WithoutPictures:
    """Without progress.png: half a second per epoch and network."""

    def on_train_start(self) -> None:
        """Start the training."""
        self.logger.plot_progress_png = lambda folder: None
        super().on_train_start()


class NetworkTrainer(WithoutPictures, nnUNetTrainer):
    """What every network is trained with.

    It is not validated after the training unless SEMICML_VALIDATE is in the environment: with fold "all" the cases are
    those of the training.
    """

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """nnU-Net's, with less momentum."""
        optimizer, schedule = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["momentum"] = MOMENTUM
        return optimizer, schedule

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate if the environment asks for it."""
        if "SEMICML_VALIDATE" in os.environ:
            super().perform_actual_validation(save_probabilities)


class QuickSupervisedTrainer(NetworkTrainer):
    """Supervised-only nnU-Net on a schedule that a subclass names."""

    schedule: Mapping[str, int] = {}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr *= LEARNING_RATE_FACTOR
        for name, value in self.schedule.items():
            setattr(self, name, value)


def quick(
    name: str, module: str, method: type[Conductor], schedule: Mapping[str, int], **changes: object
) -> type[Conductor]:
    """A method on a schedule, with the optimizer above.

    Args:
        name: of the new class.
        module: its module.
        method: the trainer.
        schedule: hyper-parameters of nnU-Net.
        **changes: other attributes; those that it does not have are refused.
    """
    for attribute in changes:
        getattr(method, attribute)  # a misspelled one would change nothing
    rate = getattr(method, "initial_lr", NNUNET_LEARNING_RATE) * LEARNING_RATE_FACTOR
    members = {"__module__": module, "__doc__": f"{method.__name__}, {changes}", "network_trainer": NetworkTrainer}
    return type(name, (WithoutPictures, method), {**members, **schedule, "initial_lr": rate, **changes})
