"""benchmarks/study: its variants exist and change what they say; the trainings themselves take hours."""

from pathlib import Path

import pytest
import torch
from conftest import LABELS, initialized, load_script, make_trainer, weights

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"
TRAINERS = STUDY.parent / "trainers"
pytestmark = pytest.mark.usefixtures("groups")


@pytest.fixture
def study_trainers(monkeypatch):
    monkeypatch.setenv("nnUNet_semicml_seed", "0")
    monkeypatch.syspath_prepend(TRAINERS)
    return load_script(TRAINERS / "study_trainers.py", monkeypatch)


def test_every_task_has_its_trainers_and_a_dataset_of_its_own(study_trainers, monkeypatch):
    run = load_script(STUDY / "run.py", monkeypatch)
    tasks = [task for purpose in run.SOURCE for task in run.tasks_of(purpose)]
    numbers = {split.number + i for split in {task.split for task in tasks} for i in range(3)}
    assert len(numbers) == 3 * len({task.split for task in tasks})
    assert not numbers & set(run.SOURCE.values())
    assert max(numbers) < 1000
    for task in tasks:
        *first, last = (getattr(study_trainers, name) for name in task.trainers)
        assert [getattr(last, "first_stage", None)] == (first or [None])
    # no two variants write the same file
    assert len({(task.split, task.trainers[-1]) for task in tasks}) == len(tasks)


def test_variants_change_what_they_say(study_trainers):
    for name, (base, part, first_stage, changes) in study_trainers.TRAINERS.items():
        variant = getattr(study_trainers, f"Study_{name}")
        assert issubclass(variant, base)
        assert (first_stage is None) == (part != "second")
        if part == "second":  # needs a finished first stage
            continue
        trainer, default = make_trainer(LABELS, "2d", variant), make_trainer(LABELS, "2d", base)
        for attribute, value in changes.items():
            assert getattr(trainer, attribute) == value != getattr(default, attribute)
        assert trainer.initial_lr == 10 * default.initial_lr


def test_networks_of_a_run_start_from_different_weights(study_trainers):
    """The seed is of the run, not of every network: two networks of CPS that start alike would stay alike."""
    first, *others = weights(initialized(LABELS, "2d", study_trainers.Study_CPS))
    assert len(others) == 3
    for other in others:
        assert not all(torch.equal(first[k], other[k]) for k in first)
