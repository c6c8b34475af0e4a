"""The demo: which command lines it runs, and what it does with its folder. What these do is tested elsewhere."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from nnunetv2_semicml.demo import run
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation import leaderboard

STUB = """#!{python} -S
import json, os, sys
names = "nnUNet_raw", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_semicml_seed"
with open("{calls}", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], {{name: os.environ[name] for name in names}}]) + "\\n")
print("what the program says")
sys.exit({status})
"""
PLAN, COMPARE = "nnUNetv2_semicml_plan_and_preprocess", "nnUNetv2_semicml_leaderboard"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts stub programs into the folder where Python seems to be."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    for name, value in {"NUM_LABELED": 1, "NUM_UNLABELED": 2, "NUM_TEST": 1, "SHAPE": (16, 16, 16)}.items():
        monkeypatch.setattr(run, name, value)

    def write(**status):
        for name in (PLAN, COMPARE):
            text = STUB.format(python=python, calls=folder / "calls", status=status.get(name, 0))
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    return write


def read_calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_commands_are_shown_and_can_be_repeated(programs, tmp_path, capfd):
    folder, out = programs(), tmp_path / "a demo"
    assert run.Demo(out, "cpu", 3).run() == out / "leaderboard" / "leaderboard.html"
    printed = capfd.readouterr().out
    shown = [shlex.split(line) for line in re.findall(r"^ +\$ (.*)$", printed, re.MULTILINE)]
    calls = read_calls(folder)
    assert [words[0] for words in shown] == [PLAN, COMPARE]
    assert [words[1:] for words in shown] == [words for words, _ in calls]
    # planning prints a lot, into a file; the leaderboard says how far it is
    assert printed.count("what the program says") == 1
    assert (out / "planning.txt").read_text() == "what the program says\n"
    exports = dict(re.findall(r"^export (\w+)=(.*)$", (out / "environment.sh").read_text(), re.MULTILINE))
    for _, environment in calls:
        assert environment == {name: shlex.split(exports[name])[0] for name in environment}
        assert environment["nnUNet_semicml_seed"] == "3"
        assert environment["nnUNet_raw"] == str(out / "nnUNet_raw")
    assert len(list((out / "nnUNet_raw" / "Dataset500_Phantom" / "imagesUn").iterdir())) == 2 * 2


def test_compared_trainers_are_found_and_take_as_many_steps(monkeypatch, tmp_path):
    """As nnU-Net finds them; supervised only takes as many steps as both stages together."""
    monkeypatch.setenv("nnUNet_extTrainer", run.Demo(tmp_path / "out", "cpu", 0).environment["nnUNet_extTrainer"])
    steps = {}
    for method in run.METHODS:
        name, *trainers = re.split(r"=(?:each:)?|\+", method)
        found = [leaderboard.recursive_find_trainer_class_by_name(trainer) for trainer in trainers]
        if name == "supervised only":
            plans = {"plans_name": "", "dataset_name": "", "configurations": {"2d": {}}}
            monkeypatch.setattr(found[0].__bases__[0], "__init__", lambda self, *args: None)
            found = [found[0](plans, "2d", 0, {})]
        steps[name] = sum(trainer.num_epochs * trainer.num_iterations_per_epoch for trainer in found)
    assert steps["supervised only"] == steps["PReL"] > steps["Semi-CML"] > 0


def test_an_earlier_demo_is_replaced_and_nothing_else_touched(programs, tmp_path):
    programs()
    out = tmp_path / "out"
    run.Demo(out, "cpu", 0).run()
    (out / "nnUNet_results" / "old").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    run.Demo(out, "cpu", 0)
    assert not (out / "nnUNet_results").exists()
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_no_demo_made_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    else:
        (out / "nnUNet_raw").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out: found (a file|files that no demo made); expected"):
        run.Demo(out, "cpu", 0)
    assert kind == "file" or os.listdir(out) == ["nnUNet_raw"]


@pytest.mark.parametrize(
    ("program", "said"), [(PLAN, r"planning\.txt: found"), (COMPARE, "what it printed above: found")]
)
def test_a_program_that_fails_ends_the_demo(programs, tmp_path, program, said):
    folder = programs(**{program: 3})
    with pytest.raises(UserError, match=rf"{said} exit status 3 of {program}; expected 0"):
        run.Demo(tmp_path / "out", "cpu", 0).run()
    assert len(read_calls(folder)) == (1 if program == PLAN else 2)


def test_a_program_that_is_not_installed_is_named(programs, tmp_path):
    (programs() / PLAN).unlink()
    with pytest.raises(UserError, match=rf"{PLAN}: found no such program"):
        run.Demo(tmp_path / "out", "cpu", 0).run()
    assert Path(tmp_path / "out" / "nnUNet_raw").is_dir()
