"""Writes images that are whole, which ITK does not promise. Imports `stored_file`, and nothing else of the package."""

import errno
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_semicml.data.stored_file import check_stored_file


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
    if file.stat().st_size < 2 or check_stored_file(file).damage:  # the start of a gzip stream has two bytes
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
