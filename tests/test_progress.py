"""How far a leaderboard is, in words, on a clock that the test moves."""

import sys
import time
from pathlib import Path

import pytest

from nnunetv2_semicml.evaluation.progress import Progress

JOBS = {"train a": ("Train", 1), "train b": ("Train", 2), "predict a": ("Predict", 4), "predict b": ("Predict", 4)}


@pytest.fixture
def clock(monkeypatch):
    """A list with the seconds that have passed."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_time_left_is_that_of_the_same_kind_in_proportion_to_the_size(clock):
    progress = Progress(JOBS, at_once=1)
    assert str(progress) == "0 of 4 jobs done"
    progress.start("train a")
    clock[0] += 300
    assert progress.end("train a") == 300
    assert progress.seconds_left() == (600, False)
    assert str(progress) == "1 of 4 jobs done, more than 10 min left"
    progress.start("train b")
    clock[0] += 240
    assert progress.seconds_left() == (360, False)
    progress.start("predict a")
    clock[0] += 20
    progress.end("predict a")
    # 340 s of training; 20 s of the other prediction
    assert progress.seconds_left() == (360, True)
    assert str(progress) == "2 of 4 jobs done, about 6 min left"
    clock[0] += 1000  # slower than the first one
    assert progress.seconds_left() == (20, True)
    assert str(progress) == "2 of 4 jobs done, about 1 min left"


def test_jobs_side_by_side_share_the_time(clock):
    progress = Progress(JOBS, at_once=2)
    progress.start("train a")
    clock[0] += 36000
    progress.end("train a")
    assert progress.seconds_left() == (36000, False)
    assert str(progress).endswith("more than 10 h left")


def test_what_was_done_before_or_failed_tells_nothing_of_the_time(clock):
    progress = Progress(JOBS, at_once=1)
    assert progress.end("train a") == 0
    progress.start("predict a")
    clock[0] += 5
    assert progress.end("predict a", well=False) == 5
    assert progress.seconds_left() == (0, False)
    assert str(progress) == "2 of 4 jobs done"


def test_terminal_shows_the_end_of_a_log_until_the_next_line(clock, tmp_path: Path, monkeypatch, capsys):
    progress = Progress(JOBS, at_once=1)
    log = tmp_path / "log"
    progress.show(log)
    assert capsys.readouterr().out == ""  # no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress.show(log)
    log.write_text("Epoch 3\n" + "x" * 1000 + "\nEpoch 4: ü\n\n")
    progress.show(log)
    progress.show(log)
    progress.say("train a")
    out = capsys.readouterr().out
    assert out.startswith("0 of 4 jobs done · \r\033[K0 of 4 jobs done · Epoch 4: ü\r\033[K")
    assert out.endswith(" train a\n")
    assert out.count("Epoch 4") == 1
