"""Locks on folders, by file: one process changes what is in them, or several read. Imports only `errors`.

These are record locks of the system, which belong to a process: they end with it, however it ends, and the worker
processes that it has forked, which may outlive it, do not have them. On network file systems they hold between machines
if the file system supports them.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import ThreadError

from fasteners import InterProcessReaderWriterLock

from nnunetv2_semicml.errors import UserError

LOCK_FILE = ".lock"


@dataclass
class _Held:
    """A lock of this process, and how often it is held; the system does not count."""

    lock: InterProcessReaderWriterLock
    times: int = 1


_held: dict[Path, _Held] = {}  # lock file -> its lock


def hold_lock(folder: Path, task: str, shared: bool = False, wait: bool = False) -> None:
    """Lock a folder until this process ends or calls `release_lock` as often; it may hold a lock several times.

    Where no lock file can be made, in a folder that is read-only or on a file system without locks, there is none.

    Args:
        folder: is made if it is missing.
        task: what this process does, e.g. "training", for the others.
        shared: whether others may have the lock, too, if they share it.
        wait: for as long as it takes, instead of refusing.

    Raises:
        UserError: another process has it.
    """
    file = folder.absolute() / LOCK_FILE
    with suppress(KeyError):
        _held[file].times += 1  # at once: between two lines an object that has it may be freed, and release it
        return
    while file not in _held:
        lock = InterProcessReaderWriterLock(file)
        try:
            if file.is_symlink():
                file.unlink()  # what it leads to is no lock of ours, and would be written to
            acquired = lock.acquire_read_lock(blocking=wait) if shared else lock.acquire_write_lock(blocking=wait)
            if acquired and os.path.samestat(os.fstat(lock.lockfile.fileno()), file.stat()):
                _held[file] = _Held(lock)
        except FileNotFoundError:
            continue  # its last holder has just removed it
        except (OSError, ThreadError):
            return
        finally:
            if file not in _held and lock.lockfile is not None:
                lock.lockfile.close()  # now: whenever it is closed, a lock that the process has got meanwhile is lost
        if not acquired:
            raise UserError(
                folder,
                f"another process at work there ({_last_holder(file)})",
                f"no other one while {task}",
                "Wait until it has ended, or end it, and repeat the command.",
            )
    # not through another handle: closing one gives up the locks that the process has by all; and not buffered: what a
    # full disk does not take would be written again later
    with suppress(OSError):
        os.truncate(lock.lockfile.fileno(), 0)
        holder = f"{task}, process {os.getpid()} on {socket.gethostname()}, {time.strftime('%d %B %H:%M')}"
        os.write(lock.lockfile.fileno(), holder.encode())


def release_lock(folder: Path) -> None:
    """Give up a lock that `hold_lock` has got; nothing happens without one. A folder with nothing in it goes, too."""
    file = folder.absolute() / LOCK_FILE
    held = _held.get(file)
    if held is None:
        return
    held.times -= 1
    if held.times:
        return
    del _held[file]
    with suppress(OSError):
        if [*folder.iterdir()] == [folder / LOCK_FILE]:
            file.unlink()  # who waits for it notices that it is gone, see `hold_lock`
            folder.rmdir()
    held.lock.release_write_lock()  # of either kind


@contextmanager
def locked(folder: Path, task: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Have the lock of a folder for a while, see `hold_lock`."""
    hold_lock(folder, task, shared, wait)
    try:
        yield
    finally:
        release_lock(folder)


def _last_holder(file: Path) -> str:
    with suppress(OSError):
        if found := file.read_text(encoding="utf-8", errors="replace"):
            return found
    return "unknown"
