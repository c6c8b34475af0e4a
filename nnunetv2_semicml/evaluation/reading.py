"""Reads scans and label maps as nnU-Net does, and refuses what its readers pass over: damage, and NaN read as zeros.

May import nnU-Net, `errors` and `data`.
"""

from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semicml.data.grid import Grid
from nnunetv2_semicml.data.stored_file import check_stored_file
from nnunetv2_semicml.errors import UserError


def require_whole(file: str | Path) -> None:
    """Refuse a file that is damaged as it is stored, or whose voxels are not all finite.

    Raises:
        UserError: saying what is wrong.
    """
    try:
        stored = check_stored_file(file)
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    if stored.damage:
        raise _unreadable(file, stored.damage)
    if stored.not_finite:
        raise UserError(
            file,
            f"{stored.not_finite} voxels that are NaN or infinite",
            "finite numbers",
            "Replace them by a meaningful value, e.g. that of the background.",
        )


def read_image(file: str | Path, reader: BaseReaderWriter, is_label: bool = False) -> tuple[np.ndarray, Grid]:
    """Read one file: its voxels (channels, Z, Y, X) and its grid.

    Raises:
        UserError: it cannot be read, or `require_whole` refuses it.
    """
    require_whole(file)
    try:
        voxels, properties = reader.read_seg(str(file)) if is_label else reader.read_images([str(file)])
    except Exception as error:  # every reader raises the errors of its own library
        raise _unreadable(file, f"{type(error).__name__}: {error}") from error
    return voxels, Grid.of_properties(voxels, properties)


def require_grid(file: str | Path, grid: Grid, reference: str | Path, expected: Grid) -> None:
    """Refuse a segmentation on another grid than that of the reference.

    Raises:
        UserError: naming what differs.
    """
    if difference := grid.difference(expected):
        attribute, found, other = difference
        raise UserError(
            file,
            f"{attribute} {found}",
            f"{other} as in {reference}",
            "Resample it to the grid of that file, with nearest-neighbor interpolation.",
        )


def _unreadable(file: str | Path, why: str) -> UserError:
    return UserError(file, f"an unreadable file ({' '.join(why.split())})", "a whole image", "Replace the file.")
