"""Where nnU-Net puts what was trained, for those who look for it there. Imports nothing of the package."""

from pathlib import Path

from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier

TRAINING_STATE = "training_state"
"""Folder in a fold's folder for what continues a training of one modality, whose model is in the fold's folder."""


def model_folder(results: Path, dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """The folder of a model, with one folder for each fold.

    Args:
        results: nnUNet_results.
        dataset: name of the dataset, e.g. Dataset501_BraTS_T1ce.
        trainer: class name.
        plans: name of the plans.
        configuration: e.g. 3d_fullres.
    """
    return results / dataset / str(convert_trainer_plans_config_to_identifier(trainer, plans, configuration))


def fold_folder(model: Path, fold: int | str) -> Path:
    """The folder of one fold of a model; fold may be "all"."""
    return model / f"fold_{fold}"


def state_folder(fold: Path) -> Path:
    """Where the checkpoints that continue a training are: a folder inside of the fold, or the fold itself."""
    state = fold / TRAINING_STATE
    return state if state.is_dir() else fold
