"""How a training unfolds over its epochs: the ramp of its weights, and the lengths in which a trainer exists."""

import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nnunetv2_semicml.training.conductor import Conductor

EPOCHS = (5, 50, 250)
TrainerClass = TypeVar("TrainerClass", bound="type[Conductor]")


def with_schedules(trainer: TrainerClass) -> TrainerClass:
    """Offer a trainer to nnU-Net's command line, also as `<name>_5epochs`, `_50epochs` and `_250epochs`.

    A class decorator. The variants differ in `num_epochs` alone and are put into the module of the trainer, where
    nnU-Net and pickle look for them. If the trainer has a `first_stage`, each goes on from the variant of that.

    Args:
        trainer: the class of a whole method; `schedules` of it then holds the variants by number of epochs.

    Raises:
        TypeError: if it goes on from a first stage that is not decorated itself.
    """
    first_stage = getattr(trainer, "first_stage", None)
    if first_stage and "schedules" not in vars(first_stage):  # those that it inherits are of another trainer
        raise TypeError(f"Decorate {first_stage.__name__}, the first stage of {trainer.__name__}, with_schedules, too.")
    module = sys.modules[trainer.__module__]
    trainer.schedules = {}
    for epochs in EPOCHS:
        name = f"{trainer.__name__}_{epochs}epochs"
        members: dict[str, Any] = {
            "__module__": trainer.__module__,
            "__doc__": f"{trainer.__name__} in {epochs} epochs.",
            "num_epochs": epochs,
        }
        if first_stage:
            members["first_stage"] = first_stage.schedules[epochs]
        trainer.schedules[epochs] = type(name, (trainer,), members)
        setattr(module, name, trainer.schedules[epochs])
    return trainer


def offered_trainers(module: ModuleType) -> "dict[str, type[Conductor]]":
    """The trainers, by name, that a module offers to nnU-Net's command line, variants included."""
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    methods: list[type[Conductor]] = [c for c in own if "schedules" in vars(c)]
    return {trainer.__name__: trainer for c in methods for trainer in (c, *c.schedules.values())}


def sigmoid_rampup(step: float, length: float) -> float:
    """Weight exp(-5 (1 - t/T)^2) that rises from 0.0067 at t = 0 to 1 at t >= T (Laine & Aila, ICLR 2017).

    Args:
        step: t, in the unit of `length`.
        length: T; 0 means no ramp.
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(step / length, 0.0), 1.0)) ** 2)
