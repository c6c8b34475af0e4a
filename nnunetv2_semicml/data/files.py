"""Files that are whole or absent, JSON files, and links, as all parts of the package make them. Imports `errors`."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunetv2_semicml.errors import UserError

Json = dict[str, Any]  # the object of a JSON file such as dataset.json or plans
_UNFINISHED = ".unfinished"
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def written_whole(file: str | Path) -> Iterator[Path]:
    """Let a file be written beside its place and take it when it is complete, so that readers see all or nothing.

    A crash leaves what was there before, and a hidden file, which `remove_unfinished` removes. No two calls, of
    whatever processes and machines, write to the same hidden file.

    Args:
        file: its folder exists.

    Yields:
        What to write instead.
    """
    file = Path(file)
    unfinished = file.with_name(f".{file.name}.{uuid4().hex}{_UNFINISHED}")
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what crashes have left of `written_whole` in a folder, in which nobody writes at the moment."""
    for file in folder.glob(f".*{_UNFINISHED}"):
        file.unlink(missing_ok=True)


@contextmanager
def explains_failed_writes(where: str | Path, remedy: str) -> Iterator[None]:
    """Turn the error of a full or protected disk into a sentence.

    Args:
        where: the folder that is being written to, if the error names no file.
        remedy: what to do when there is room.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            error.filename or where,
            f"that it cannot be written ({error.strerror})",
            "enough space and the right to write there",
            remedy,
        ) from error


def read_json(file: Path) -> Any:
    """Content of a JSON file, which is UTF-8 whatever the encoding of the system.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON or not UTF-8.
    """
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Json | list[Any]) -> None:
    """Write a JSON file, whole or not at all, in folders that are made if they are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=4), encoding="utf-8")


def link_file(source: str | Path, target: Path) -> None:
    """Make a file appear in another place: by a hard link, or as a copy where there can be none.

    A hard link takes no space and, unlike a symbolic link, needs no privileges on Windows and survives when the source
    is moved or deleted.
    """
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # another drive, or a file system without hard links
        shutil.copy2(source, target)
