"""A new training over an earlier one, killed at every single change of a file: models are always of one training."""

import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from conftest import Killed

from nnunetv2_semicml.training.earlier_training import EARLIER, EarlierTraining

NAMES = ("joint", "FLAIR", "T1")
FINISHED = ("checkpoint_best.pth", "checkpoint_final.pth")


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def finish(folders, content, first=""):
    """What a training does, in the order of the trainers: best models, and in the end the final ones and validation."""
    for name in FINISHED:
        for folder in (*folders[1:], folders[0]):
            write(folder, name, content)
        yield name
    for folder in folders[1:]:
        write(folder / "validation", "summary.json", content)


def finished(folders, content):
    for _ in finish(folders, content):
        pass


def train(folders, content):
    """A new training, as a conductor begins and ends it."""
    earlier = EarlierTraining(folders)
    earlier.restore_interrupted()
    earlier.set_aside()
    for name in finish(folders, content):
        if name == "checkpoint_final.pth":
            earlier.forget()


def continue_training(folders):
    earlier = EarlierTraining(folders)
    earlier.restore_interrupted()
    earlier.bring_back()


def found(folders):
    """Every file of a training that nnU-Net would find, folder by folder -> its content."""
    files = [f for folder in folders for f in [*folder.glob("checkpoint_*"), *folder.glob("validation/*")]]
    return {str(file.relative_to(folders[0].parent)): file.read_text() for file in files}


def kill_after(patch, number):
    """Let the process die at a change of the file system."""
    left = count(number, -1)

    def dying(operation):
        def change(*args, **options):
            if next(left) <= 0:
                raise Killed
            return operation(*args, **options)

        return change

    for name in ("replace", "unlink", "rmdir", "touch", "mkdir", "write_text"):
        patch.setattr(Path, name, dying(getattr(Path, name)))
    for name in ("unlink", "rmdir"):  # of rmtree
        patch.setattr(os, name, dying(getattr(os, name)))


def moments():
    """Enough for every change that `train` makes; a test asserts that the last one kills nothing."""
    return range(80)


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in NAMES]
    finished(made, "old")
    return made


def test_new_training_replaces_the_earlier_one(folders):
    before = found(folders)
    train(folders, "new")
    assert found(folders) == dict.fromkeys(before, "new")
    assert not any((folder / EARLIER).exists() for folder in folders)
    assert len(before) == 2 * 3 + 2


def test_first_training_sets_nothing_aside(tmp_path):
    made = [tmp_path / name for name in NAMES]
    earlier = EarlierTraining(made)
    earlier.restore_interrupted()
    assert not earlier.set_aside()
    assert not earlier.bring_back()
    assert not list(tmp_path.iterdir())


def test_runs_of_loggers_stay_where_they_are(folders):
    """--c goes on in the run that nnU-Net's logger finds there."""
    for folder in folders:
        write(folder / "wandb" / "latest-run", "run-a1b2c3.wandb", "run")
    earlier = EarlierTraining(folders)
    runs = sorted(folders[0].parent.rglob("*.wandb"))
    earlier.set_aside()
    assert sorted(folders[0].parent.rglob("*.wandb")) == runs
    assert earlier.bring_back()
    train(folders, "new")
    assert sorted(folders[0].parent.rglob("*.wandb")) == runs


def killed_everywhere(folders, tmp_path, then):
    """Kill a new training at every moment, do something, and yield what is found."""
    copies = tmp_path / "copies"
    survived = False
    for moment in moments():
        shutil.rmtree(copies, ignore_errors=True)
        own = [copies / folder.name for folder in folders]
        for folder, copy in zip(folders, own, strict=True):
            shutil.copytree(folder, copy)
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, moment)
            with suppress(Killed):
                train(own, "new")
                survived = True
        then(own)
        yield moment, own
    assert survived


def test_continued_after_a_kill_all_files_are_of_one_training(folders, tmp_path):
    outcomes = set()
    for _, own in killed_everywhere(folders, tmp_path, continue_training):
        files = found(own)
        (content,) = set(files.values())  # nothing is mixed
        joint = {name for name in files if name.startswith("joint/")}
        assert joint  # there is something to go on from
        if content == "old":
            assert files.keys() == found(folders).keys()  # it comes back only whole
            assert not any((folder / EARLIER).exists() for folder in own)
        elif "joint/checkpoint_final.pth" in files:
            assert {f"{name}/checkpoint_final.pth" for name in NAMES} <= files.keys()
        outcomes.add((content, "joint/checkpoint_final.pth" in files))
    assert outcomes == {("old", True), ("new", False), ("new", True)}


def test_started_again_after_a_kill_the_earlier_one_is_kept_until_the_end(folders, tmp_path):
    def start_again(own):
        EarlierTraining(own).restore_interrupted()
        EarlierTraining(own).set_aside()

    for _, own in killed_everywhere(folders, tmp_path, start_again):
        assert not found(own)  # a new training begins with nothing
        aside = {file.read_text() for f in own for file in (f / EARLIER).rglob("*.*") if file.is_file()}
        assert len(aside) == 1
        finished(own, "newer")
        EarlierTraining(own).forget()
        assert set(found(own).values()) == {"newer"}
        assert not any((folder / EARLIER).exists() for folder in own)


def test_recovery_that_is_killed_itself_is_repeated(folders, tmp_path):
    for moment, own in killed_everywhere(folders, tmp_path, lambda own: None):
        if moment % 3:
            continue
        for second in range(0, 40, 4):
            again = [tmp_path / "again" / folder.name for folder in own]
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            for folder, copy in zip(own, again, strict=True):
                shutil.copytree(folder, copy)
            with pytest.MonkeyPatch.context() as patch:
                kill_after(patch, second)
                with suppress(Killed):
                    continue_training(again)
            continue_training(again)
            files = found(again)
            assert len(set(files.values())) == 1, (moment, second)
            if "old" in files.values():
                assert files.keys() == found(folders).keys()
