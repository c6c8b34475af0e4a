"""Checkpoints as files: whether they are whole, which one it is, and what was trained. Imports nothing of the package.

PyTorch stores a checkpoint as a zip archive, with a CRC-32 of everything in it that PyTorch itself does not compare.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

_FOLDER = 0x10  # among the attributes of a file in an archive


def find_damage(file: str | Path) -> str:
    """Read a checkpoint and compare its checksums.

    Returns:
        What is wrong, in words that may follow "found"; "" if it is whole.

    Raises:
        OSError: it cannot be opened.
    """
    with Path(file).open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
                # PyTorch's reader, unlike Python's, goes by this attribute and leaves memory as it is
                folders = [info.filename for info in archive.infolist() if info.external_attr & _FOLDER]
        except Exception as error:  # a flipped bit in a header can lead to any
            return f"a damaged file ({type(error).__name__}: {error})"
    if damaged or folders:
        return f"a damaged file (in {damaged or folders[0]})"
    return ""


def content_digest(file: str | Path) -> str:
    """Short digest of what a checkpoint holds, from its checksums, without reading all of it.

    Raises:
        OSError: it cannot be read.
        zipfile.BadZipFile: it is no checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            # the first folder is called like the file
            entries = sorted((info.filename.partition("/")[2], info.CRC) for info in archive.infolist())
    except OSError:
        raise
    except Exception as error:  # see `find_damage`
        raise zipfile.BadZipFile(f"{type(error).__name__}: {error}") from error
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:12]


def read_provenance(file: str | Path) -> dict[str, Any] | None:
    """What a checkpoint of this package was trained on, without reading its weights.

    Returns:
        Its "provenance", see `Conductor.provenance`; None if this is no checkpoint of this package.

    Raises:
        OSError: it cannot be read.
    """
    import torch  # takes seconds, which not every process that compares files needs to wait for

    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        provenance: dict[str, Any] | None = checkpoint.get("provenance")
    except OSError:
        raise
    except Exception:  # of stock nnU-Net, which holds NumPy numbers, or damaged; PyTorch raises many kinds of errors
        return None
    return provenance
