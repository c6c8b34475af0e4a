"""Found through nnUNet_extTrainer: every trainer as Short_<method>, in a few epochs that a CPU bears.

`SEMICML_EPOCHS` and `SEMICML_STEPS` in the environment are the length of the schedule; for the optimizer see quick.py.
"""

import os

from quick import QuickSupervisedTrainer, quick

from nnunetv2_semicml.ext_trainers import semicml_trainers

SCHEDULE = {
    "num_epochs": int(os.environ.get("SEMICML_EPOCHS", "5")),
    "num_iterations_per_epoch": int(os.environ.get("SEMICML_STEPS", "10")),
    "num_val_iterations_per_epoch": 3,
    "save_every": 1000,
}


class Short_(QuickSupervisedTrainer):
    """Supervised-only nnU-Net."""

    schedule = SCHEDULE


METHODS = [name.removeprefix("nnUNetTrainer") for name in semicml_trainers.__all__ if not name.endswith("epochs")]
for _name in sorted(METHODS, key=lambda name: (name.endswith("PReL"), name)):  # first stages first
    _method = getattr(semicml_trainers, f"nnUNetTrainer{_name}")
    _changes = {}
    if hasattr(_method, "first_stage"):
        _changes["first_stage"] = globals()[_method.first_stage.__name__.replace("nnUNetTrainer", "Short_")]
    globals()[f"Short_{_name}"] = quick(f"Short_{_name}", __name__, _method, SCHEDULE, **_changes)
