"""Images that are written whole, which ITK does not promise. Imports `errors` and `stored_file`."""

import errno
from collections.abc import Iterable
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_semicml.data.stored_file import check_stored_file
from nnunetv2_semicml.errors import UserError


def write_image(image: sitk.Image, file: Path) -> None:
    """Write a NIfTI file and look whether all of it is there: on a full disk ITK writes a part, and is content.

    Args:
        image: the image.
        file: ends in .nii.gz.

    Raises:
        OSError: it cannot be written.
    """
    try:
        sitk.WriteImage(image, str(file), useCompression=True)
    except RuntimeError as error:  # it has not even been opened
        raise OSError(errno.EACCES, str(error).strip().splitlines()[-1], str(file)) from error
    if _is_cut_off(file):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))


def require_written(files: Iterable[Path], remedy: str) -> None:
    """Look whether all of some images is there that others have written with ITK.

    Args:
        files: the images.
        remedy: what to do when there is room.

    Raises:
        UserError: one of them ends before its end.
    """
    for file in files:
        if _is_cut_off(file):
            raise UserError(file, "a part of a file", "all of it: the disk was full when it was written", remedy)


def _is_cut_off(file: Path) -> bool:
    # the start of a gzip stream has two bytes
    return file.stat().st_size < 2 or bool(check_stored_file(file).damage)
