"""Files that are whole or absent, JSON, links and names, for all parts of the package. Imports `errors` and `locks`."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.errors import UserError, some_of

Json = dict[str, Any]  # the object of a JSON file such as dataset.json or plans
_UNFINISHED = ".unfinished"
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_BLOSC2_FAILED = "Error while creating the NDArray"  # all that it says, whatever has kept it from writing
_LONGEST_NAME = 200  # bytes; file systems take 255, and CASE becomes CASE_0000.nii.gz, CASE_seg.b2nd, …


def is_sound_name(name: object) -> bool:
    """Whether files and folders can be called so: one visible part of a path, on every system, that can be printed.

    Every name that comes from a file or an option, and that a file is made of, is asked for this.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and not {"/", "\\"} & {*name}
        and not name.startswith(".")
        and 0 < len(name.encode()) <= _LONGEST_NAME
    )


def require_sound_names(names: Iterable[object], where: str | Path) -> None:
    """Refuse names that no file can have, or that lead elsewhere.

    Args:
        names: of cases, datasets, plans …
        where: they come from.

    Raises:
        UserError: naming them.
    """
    if unsound := [name for name in names if not is_sound_name(name)]:
        raise UserError(
            where,
            f"the names {some_of(map(repr, unsound))}",
            f"names for files: up to {_LONGEST_NAME} bytes that can be printed, no / or \\, no . at the beginning",
            "Choose other names.",
        )


@contextmanager
def written_whole(file: str | Path) -> Iterator[Path]:
    """Let a file be written beside its place and take it when it is complete, so that readers see all or nothing.

    A crash leaves what was there before, and a hidden file, which `remove_unfinished` removes. No two calls, of
    whatever processes and machines, write to the same hidden file. A link is replaced, and not followed.

    Args:
        file: its folder exists.

    Yields:
        What to write instead.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    file = Path(file)
    unfinished = file.with_name(f".{uuid4().hex}{_UNFINISHED}")
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    except OSError as error:
        if error.filename is None or str(unfinished) in (str(error.filename), str(error.filename2)):
            error.filename, error.filename2 = str(file), None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what crashes have left of `written_whole` in a folder, in which nobody writes at the moment."""
    for file in folder.glob(f".*{_UNFINISHED}"):
        file.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Let a new folder be written beside its place and take it when it is complete.

    A crash leaves a hidden folder, which the next call for the same folder removes.

    Args:
        folder: does not exist, or is empty.

    Yields:
        The folder to write to instead.

    Raises:
        UserError: there is something in the folder, or another process writes it, or something cannot be written.
    """
    hidden = folder.with_name(f".{folder.name}{_UNFINISHED}")
    unfinished = hidden / folder.name
    remedy = "Make room, and repeat the command: nothing is left of what it has written."
    with explains_failed_writes(folder, remedy), locked(hidden, f"writing {folder.name}"):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(folder, "files", "a new or empty folder", "Delete it or choose another dataset id.")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def explains_failed_writes(where: str | Path, remedy: str) -> Iterator[None]:
    """Turn the error of a full or protected disk into a sentence, whichever library has met it.

    Args:
        where: what is being written, if the error names no file.
        remedy: what to do when there is room.

    Raises:
        UserError: something could not be written.
    """

    def refuse(file: str | Path, reason: str) -> UserError:
        return UserError(
            file, f"that it cannot be written ({reason})", "enough space and the right to write there", remedy
        )

    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        # the second name is that of a copy
        raise refuse(error.filename2 or error.filename or where, str(error.strerror)) from error
    except RuntimeError as error:
        if str(error) != _BLOSC2_FAILED:
            raise
        raise refuse(where, "blosc2 does not say why; probably the disk is full") from error


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


def json_digest(content: Any) -> str:
    """Digest of what a JSON file could hold; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def link_file(source: str | Path, target: Path) -> None:
    """Make a file appear in another place: by a hard link, or as a copy where there can be none.

    A hard link takes no space and, unlike a symbolic link, needs no privileges on Windows and survives when the source
    is moved or deleted.

    Raises:
        FileExistsError: there is something in that place, which may be a link to other data: it stays as it is.
        OSError: it cannot be written.
    """
    try:
        os.link(Path(source).resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another drive, or a file system without hard links
        copy_file(source, target)


def copy_file(source: str | Path, target: Path) -> None:
    """Copy a file, whole or not at all, to a place where there may be an older one.

    Raises:
        OSError: it cannot be read, or not be written.
    """
    with written_whole(target) as unfinished:
        shutil.copy2(source, unfinished)
