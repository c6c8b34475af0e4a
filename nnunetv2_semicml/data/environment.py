"""The folders that nnU-Net's environment variables name. Imports nothing of the package but `errors`."""

from os import environ
from pathlib import Path

from nnunetv2_semicml.errors import UserError

FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def environment_folder(variable: str) -> Path:
    """Value of one of nnU-Net's folder variables.

    Raises:
        UserError: if it is not set.
    """
    if not environ.get(variable):
        raise UserError(
            f"environment variable {variable}", "nothing", "a folder", f"Set it as for nnU-Net: export {variable}=…"
        )
    return Path(environ[variable])
