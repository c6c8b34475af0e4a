"""Reads scans and label maps as nnU-Net does, and refuses what its readers pass over: damage, and NaN read as zeros.

The judge of what is readable is nnU-Net's reader; `stored_file` knows what that reader passes over. May import nnU-Net,
`errors` and its neighbors in data/. Only reads, never writes.
"""

from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from numpy.typing import NDArray

from nnunetv2_semicml.data.grid import Difference, Grid
from nnunetv2_semicml.data.stored_file import check_stored_file
from nnunetv2_semicml.errors import UserError

Voxels = NDArray[Any]  # (channels, *spatial), of whatever type a reader returns
_RESAMPLE = "Resample it to the grid of that file, with nearest-neighbor interpolation."


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
        raise not_finite(file, stored.not_finite)


def read_image(file: str | Path, reader: BaseReaderWriter, is_label: bool = False) -> tuple[Voxels, Grid]:
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


def require_grid(file: str | Path, grid: Grid, reference: str | Path, expected: Grid, remedy: str = _RESAMPLE) -> None:
    """Refuse an image on another grid than that of the reference.

    Raises:
        UserError: naming what differs.
    """
    if difference := grid.difference(expected):
        raise another_grid(file, difference, reference, remedy)


def another_grid(file: str | Path, difference: Difference, reference: str | Path, remedy: str) -> UserError:
    """The error of an image whose grid differs from that of the reference."""
    attribute, found, expected = difference
    return UserError(file, f"{attribute} {found}", f"{expected} as in {reference}", remedy)


def _unreadable(file: str | Path, why: str) -> UserError:
    return UserError(file, f"an unreadable file ({' '.join(why.split())})", "an image", "Replace the file.")


def not_finite(file: str | Path, number: int) -> UserError:
    """The error of an image with so many voxels that are no numbers."""
    return UserError(
        file,
        f"{number} voxels that are NaN or infinite",
        "finite numbers",
        "Replace them by a meaningful value, e.g. that of the background.",
    )
