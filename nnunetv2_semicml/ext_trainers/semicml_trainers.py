"""What nnU-Net finds in this folder: the trainers of the installed package, under their own names."""

from importlib import import_module
from pkgutil import iter_modules

from nnunetv2_semicml import trainers
from nnunetv2_semicml.training.schedules import offered_trainers

__all__ = []
for _file in iter_modules(trainers.__path__):
    _offered = offered_trainers(import_module(f"{trainers.__name__}.{_file.name}"))
    globals().update(_offered)
    __all__ += _offered
