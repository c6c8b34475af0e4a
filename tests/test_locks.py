"""Locks between processes: who is refused, who waits, and that a lock ends with its process, however that ends."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest
from toy import held_elsewhere, lock_elsewhere

from nnunetv2_semicml.data import locks
from nnunetv2_semicml.data.locks import LOCK_FILE, hold_lock, locked, release_lock
from nnunetv2_semicml.errors import UserError


@pytest.fixture(autouse=True)
def no_lock_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not held_below(tmp_path)


def held_below(folder: Path) -> list[Path]:
    """Lock files that this process holds; trainers of other tests may have some until their memory is freed."""
    return [f for f in locks._held if f.is_relative_to(folder)]


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("shared", "shared", False),
        ("shared", "exclusive", True),
        ("exclusive", "shared", True),
        ("exclusive", "exclusive", True),
    ],
)
def test_who_is_refused_beside_whom(tmp_path: Path, first: str, second: str, refused: bool):
    with held_elsewhere(tmp_path, first) as (process, _):
        if not refused:
            with locked(tmp_path, "trying", shared=second == "shared"):
                return
        with pytest.raises(UserError) as error:
            hold_lock(tmp_path, "trying", shared=second == "shared")
        assert str(error.value).startswith(
            f"{tmp_path}: found another process at work there (holding, process {process.pid} on "
        )
        assert "expected no other one while trying. Wait until it has ended" in str(error.value)


def test_a_killed_holder_has_no_lock_although_its_child_lives(tmp_path: Path):
    with held_elsewhere(tmp_path, "exclusive", "fork") as (process, child):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        try:
            with locked(tmp_path, "trying"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_waiting_ends_with_the_holder(tmp_path: Path):
    with held_elsewhere(tmp_path, "exclusive") as (holder, _), lock_elsewhere(tmp_path, "exclusive", "wait") as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        assert not select([waiting.stdout], [], [], 0)[0]
        holder.kill()
        assert select([waiting.stdout], [], [], 10)[0]


def test_a_process_has_a_lock_until_it_has_released_it_as_often(tmp_path: Path):
    with locked(tmp_path, "outside"):
        with locked(tmp_path, "inside", shared=True):
            pass
        with pytest.raises(subprocess.CalledProcessError):
            attempt(tmp_path)
    attempt(tmp_path)


@pytest.mark.parametrize("function", [hold_lock, release_lock])
def test_a_holder_may_be_freed_between_any_two_lines(tmp_path: Path, function):
    """Whatever is released meanwhile, the lock is there as long as one holder is left, and no longer."""
    lines = list(dict.fromkeys(line for _, _, line in function.__code__.co_lines() if line))[1:]
    interrupted = 0
    for line in lines:
        freed = []

        def release_at(frame, event, argument, line=line, freed=freed):
            if event == "line" and frame.f_code is function.__code__ and frame.f_lineno == line and not freed:
                freed.append(line)
                release_lock(tmp_path)
            return release_at

        for _ in range(1 if function is hold_lock else 3):  # so that one holder is left in the end
            hold_lock(tmp_path, "training")
        sys.settrace(release_at)
        try:
            function(*((tmp_path, "training") if function is hold_lock else (tmp_path,)))
        finally:
            sys.settrace(None)
        for _ in range(0 if freed else 1):
            release_lock(tmp_path)
        interrupted += bool(freed)
        with pytest.raises(subprocess.CalledProcessError):
            attempt(tmp_path)
        release_lock(tmp_path)
        attempt(tmp_path)
    assert interrupted > 2


def attempt(folder: Path) -> None:
    """Get the lock in another process."""
    code = "import sys; from pathlib import Path; from nnunetv2_semicml.data.locks import hold_lock; "
    code += "hold_lock(Path(sys.argv[1]), 'trying')"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


def test_a_new_folder_goes_with_its_lock_unless_something_is_in_it(tmp_path: Path):
    empty, full = tmp_path / "a" / "empty", tmp_path / "full"
    for folder in (empty, full):
        hold_lock(folder, "trying")
    (full / "file").touch()
    for folder in (empty, full):
        release_lock(folder)
        release_lock(folder)  # nothing happens
    assert sorted(p.name for p in tmp_path.rglob("*")) == [LOCK_FILE, "a", "file", "full"]


def test_who_waited_for_a_folder_that_is_gone_makes_it_again(tmp_path: Path):
    """Else two processes had a lock, one of them on a file that nobody else can find."""
    folder = tmp_path / "folder"
    hold_lock(folder, "first")
    with lock_elsewhere(folder, "exclusive", "wait") as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)  # for the file that is removed now
        release_lock(folder)
        waiting.stdout.readline()
        with pytest.raises(UserError, match="another process"):
            hold_lock(folder, "third")


def test_a_refusal_takes_no_lock_away_later(tmp_path: Path):
    """A handle of a refused attempt, closed whenever its error is forgotten, would give up the lock got since."""
    with held_elsewhere(tmp_path, "exclusive"), pytest.raises(UserError) as refusal:
        hold_lock(tmp_path, "trying")
    with locked(tmp_path, "training"):
        del refusal
        gc.collect()
        with lock_elsewhere(tmp_path, "exclusive") as other:
            assert other.wait(60) == 1


def test_nothing_is_written_through_a_link(tmp_path: Path):
    (tmp_path / "precious").write_text("voxels")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with locked(tmp_path, "training"):
        assert (tmp_path / "precious").read_text() == "voxels"
        assert (tmp_path / LOCK_FILE).read_text().startswith("training, process ")


def test_there_is_no_lock_where_none_can_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with locked(tmp_path / "file", "training", shared=True):  # no folder, also for root, who may write everywhere
        assert not held_below(tmp_path)


def test_a_full_disk_is_no_obstacle(tmp_path: Path):
    """Nobody learns who holds the lock; nothing is printed at the end, either."""
    code = (
        "import resource, sys; from pathlib import Path; from nnunetv2_semicml.data.locks import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "hold_lock(Path(sys.argv[1]), 'first'); release_lock(Path(sys.argv[1])); hold_lock(Path(sys.argv[1]), 'second')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
