"""Checkpoints as files: whether they are whole, which one it is, and what was trained. Imports nothing of the package.

PyTorch stores a checkpoint as a zip archive, with a CRC-32 of everything in it that PyTorch itself does not compare.
"""

import hashlib
import zipfile
from collections.abc import Mapping
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
    provenance: dict[str, Any] | None = _read(file).get("provenance")
    return provenance


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the hyper-parameters that differ. Another version of this package may have more or fewer of them."""
    return [name for name in sorted({*old} & {*new}) if old[name] != new[name]]


def read_log(file: str | Path) -> dict[str, list[Any]]:
    """What nnU-Net has logged of a training, without reading the weights of its checkpoint.

    Returns:
        Key -> a value for each epoch; nothing if this is no whole checkpoint.

    Raises:
        OSError: it cannot be read.
    """
    log: dict[str, list[Any]] = _read(file).get("logging", {})
    return log


def _read(file: str | Path) -> dict[str, Any]:
    """A checkpoint of this package or of nnU-Net, whose tensors stay in the file; {} if it is none, or damaged."""
    import torch  # takes seconds, which not every process that compares files needs to wait for

    try:
        with torch.serialization.safe_globals(numpy_numbers()):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception:  # PyTorch raises many kinds of errors
        return {}
    return content if isinstance(content, dict) else {}


def numpy_numbers() -> list[Any]:
    """What stock nnU-Net's log holds beside Python's numbers, for `torch.serialization.safe_globals`.

    Pickle knows the function that makes them by its name, which NumPy 2 has changed.
    """
    import numpy as np  # see `_read`

    make = np.float64().__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
    return [*((make, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")), np.dtype, *kinds]
