"""benchmarks/ranking: who is labeled after each round, and what the tables say of it and of doubt."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from conftest import load_script
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.stats import spearmanr

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def protocols(monkeypatch):
    return load_script(BENCHMARKS / "study" / "protocols.py", monkeypatch)


@pytest.fixture
def labeling(monkeypatch, protocols):
    load_script(BENCHMARKS / "study" / "run.py", monkeypatch)
    return load_script(BENCHMARKS / "ranking" / "labeling.py", monkeypatch)


def test_a_year_begins_alike_and_labels_what_was_chosen(labeling, protocols, monkeypatch, tmp_path):
    seen, asked = [], []

    def choose(data, work, task, strategy):
        asked.append((task.protocol, task.labeled, strategy, task.method))
        return [f"case{i}" for i in range(task.labeled + 5)]

    monkeypatch.setattr(labeling, "run", lambda data, work, task: seen.append(task) or "done")
    monkeypatch.setattr(labeling, "choose_next", choose)
    for strategy in labeling.STRATEGIES:
        labeling.year(tmp_path, tmp_path, "lgg", (1, strategy))
    by_strategy = [seen[8 * i : 8 * i + 8] for i in range(3)]
    for strategy, tasks in zip(("random", "rank", "entropy"), by_strategy, strict=True):
        assert [task.labeled for task in tasks] == [5, 5, 10, 10, 15, 15, 20, 20]
        assert {task.draw for task in tasks} == {1}
        names = [task.protocol for task in tasks[::2]]
        assert names == [task.protocol for task in tasks[1::2]]
        if strategy == "random":  # 5 and 15 drawn cases are labeled in the study, too
            assert names == ["lgg", "lgg_labeled_by_random", "lgg", "lgg_labeled_by_random"]
        else:
            assert names == ["lgg", *[f"lgg_labeled_by_{strategy}"] * 3]
    first_draw = labeling.tasks_of_round("lgg", 0, "random", 15, []) + labeling.tasks_of_round("lgg", 0, "rank", 5, [])
    of_study = [task._replace(method="") for task in protocols.tasks_of("lgg", "test")]
    assert all(task._replace(method="") in of_study for task in first_draw)
    assert asked[:3] == [
        ("lgg", 5, "rank", "Semi-CML Plus"),
        ("lgg_labeled_by_rank", 10, "rank", "Semi-CML Plus"),
        ("lgg_labeled_by_rank", 15, "rank", "Semi-CML Plus"),
    ]
    assert len(asked) == 6  # random labeling asks nobody
    assert not labeling.PROTOCOLS["lgg_labeled_by_random"].first
    assert labeling.PROTOCOLS["lgg_labeled_by_rank"].first == tuple(f"case{i}" for i in range(20))


def test_a_failure_ends_a_year(labeling, monkeypatch, tmp_path):
    monkeypatch.setattr(labeling, "run", lambda data, work, task: f"FAILED {task}")
    assert labeling.year(tmp_path, tmp_path, "lgg", (0, "rank")).startswith("FAILED Task(protocol='lgg'")


def test_table_pairs_the_cases(labeling, monkeypatch, tmp_path):
    dice = {"random": 0.5, "rank": 0.6, "entropy of one modality": 0.4}
    for strategy in labeling.STRATEGIES:
        for labeled in labeling.ROUNDS:
            chosen = [] if labeled == 5 or strategy == "random" else ["any"]
            for task in labeling.tasks_of_round("lgg", 0, strategy, labeled, chosen):
                file = labeling.result_file(tmp_path, task)
                file.parent.mkdir(parents=True, exist_ok=True)
                rows = [
                    {
                        "modality": "FLAIR",
                        "weights": "EMA",
                        "case": f"case{i}",
                        "dice": dice[strategy] + 0.01 * i * labeled,
                    }
                    for i in range(3)
                ]
                file.write_text(json.dumps({"rows": [*rows, {**rows[0], "weights": "last step", "dice": 1.0}]}))
    table = labeling.collect(tmp_path, "lgg", [0])
    assert len(table) == 3 * 4 * 2 * 4
    monkeypatch.setattr(labeling, "HERE", tmp_path)
    labeling.report(table)
    lines = (tmp_path / "labeling.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| rank | Semi-CML Plus |"))
    # the first round is that of random labeling, written last: 0.4 + 0.01 · 1 · 5
    assert row.split(" | ")[2:] == [
        "0.450",
        "0.700 (+0.100, +0.100 … +0.100)",
        "0.750 (+0.100, +0.100 … +0.100)",
        "0.800 (+0.100, +0.100 … +0.100) |",
    ]
    assert (tmp_path / "labeling.png").is_file()


@pytest.fixture
def ranking(labeling, monkeypatch):
    return load_script(BENCHMARKS / "ranking" / "run.py", monkeypatch, "ranking_run")


def test_a_reference_is_measured_in_ml(ranking, tmp_path):
    for case, voxels in (("a", 10), ("b", 3)):
        labels = np.zeros((4, 5, 6), np.uint8)
        labels.flat[:voxels] = 1
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing((2.0, 5.0, 10.0))
        sitk.WriteImage(image, str(tmp_path / f"{case}.nii.gz"))
    volumes = [ranking.volume_of(tmp_path / f"{case}.nii.gz", SimpleITKIO()) for case in "ab"]
    assert volumes == pytest.approx([1.0, 0.3])


def test_sizes_are_correlated_within_draws(ranking):
    """Dice rises with the size in both draws; the predicted size falls in one and rises in the other."""
    about = {"protocol": "lgg", "purpose": "test", "share": "unlabeled", "method": "BCP", "labeled": 5}
    size = np.arange(1.0, 6.0)
    draws = [
        pd.DataFrame(
            {**about, "draw": draw, "modality": "T1", "reference": size, "dice": size / (9 - draw), "volume": v}
        )
        for draw, v in enumerate((-size, size**2))
    ]
    together = draws[0].assign(modality=ranking.TOGETHER)
    unknown = draws[0].assign(method="other", reference=np.nan)
    lines = ranking.size_lines(pd.concat([*draws, together, unknown]))
    assert [line for line in lines if line.startswith("| lgg")] == [
        "| lgg | test, unlabeled | BCP | 5 | T1 | 1.00 | 0.00 |"
    ]


def test_correlation_is_spearmans_within_draws(ranking):
    """A draw that is easier as a whole, or whose measure is higher, changes nothing; doubt and Dice are opposite."""
    rng = np.random.default_rng(1)
    draws = []
    for draw, shift in enumerate((0.0, 5.0)):
        dice = rng.permutation(np.linspace(0, 1, 20)).round(1)  # with ties
        draws.append(pd.DataFrame({"draw": draw, "dice": dice + shift, "doubt": rng.normal(-dice, 0.2) + shift}))
    mean, low, high = (
        float(number)
        for number in ranking.correlation_cell(pd.concat(draws), "doubt").translate(str.maketrans("(…)", "   ")).split()
    )
    assert mean == pytest.approx(-np.mean([spearmanr(of["doubt"], of["dice"]).statistic for of in draws]), abs=0.005)
    assert low < mean < high < 1
    sure = pd.concat(of.assign(doubt=1 - of["dice"]) for of in draws)
    assert ranking.correlation_cell(sure, "doubt") == "1.00 (1.00 … 1.00)"
