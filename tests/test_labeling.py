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
def labeling(monkeypatch, protocols, tmp_path):
    """The script, whose tables and the study's are in `tmp_path`."""
    study = load_script(BENCHMARKS / "study" / "run.py", monkeypatch)
    script = load_script(BENCHMARKS / "ranking" / "labeling.py", monkeypatch)
    for module, name in ((study, "HERE"), (script, "HERE"), (script, "STUDY")):
        monkeypatch.setattr(module, name, tmp_path)
    return script


GAIN = {"random": 0.5, "rank": 0.6, "entropy": 0.4}


@pytest.fixture
def years(labeling, protocols, monkeypatch, tmp_path):
    """Runs the years of a draw with trainings and choices that take no time; tells of both."""

    def run(data, work, task):
        trained.append(task)
        file = labeling.result_file(work, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        name = task.protocol.rpartition("_")[2] if task.labeled > 5 else "random"
        dice = GAIN.get(name, GAIN["random"])  # 15 drawn cases are the study's
        rows = [
            {"modality": "FLAIR", "weights": "EMA", "case": f"case{i}", "dice": dice + 0.01 * i * task.labeled}
            for i in range(3)
        ]
        rows += [{**rows[0], "weights": "last step", "dice": 0.75}]
        file.write_text(json.dumps({"rows": [row | {"hd95": 1.0} for row in rows]}))
        return "done"

    def choose(data, work, task, strategy):
        asked.append((task.protocol, task.labeled, strategy, task.method))
        before = labeling.PROTOCOLS[task.protocol].first or [f"drawn{i}" for i in range(5)]
        return [*before, *(f"{strategy}{len(before) + i}" for i in range(5))]

    trained, asked = [], []
    monkeypatch.setattr(labeling, "run", run)
    monkeypatch.setattr(labeling, "choose_next", choose)

    def years(draw, strategies=labeling.STRATEGIES):
        trained.clear()
        asked.clear()
        for strategy in strategies:
            assert labeling.year(tmp_path, tmp_path, "lgg", (draw, strategy)).endswith("done")
        return list(trained), list(asked)

    return years


def test_a_year_begins_alike_and_labels_what_was_chosen(labeling, protocols, years):
    for strategy in labeling.STRATEGIES:
        short = strategy.split()[0]
        trained, asked = years(1, [strategy])
        assert [task.labeled for task in trained] == [5, 5, 10, 10, 15, 15, 20, 20]
        assert {task.draw for task in trained} == {1}
        names = [task.protocol for task in trained[::2]]
        assert names == [task.protocol for task in trained[1::2]]
        if strategy == "random":  # 5 and 15 drawn cases are labeled in the study, too
            assert names == ["lgg", "lgg_labeled_by_random", "lgg", "lgg_labeled_by_random"]
            assert not asked  # nobody
            assert not labeling.PROTOCOLS["lgg_labeled_by_random"].first
        else:
            assert names == ["lgg", *[f"lgg_labeled_by_{short}"] * 3]
            assert asked == [
                ("lgg", 5, strategy, "Semi-CML Plus"),
                (f"lgg_labeled_by_{short}", 10, strategy, "Semi-CML Plus"),
                (f"lgg_labeled_by_{short}", 15, strategy, "Semi-CML Plus"),
            ]
            first = labeling.PROTOCOLS[f"lgg_labeled_by_{short}"].first
            assert first == (
                *(f"drawn{i}" for i in range(5)),
                *(f"{strategy}{5 + i % 5 + 5 * (i // 5)}" for i in range(15)),
            )
    of_study = protocols.tasks_of("lgg", "test")
    for task in (task for labeled in (5, 15) for task in labeling.tasks_of_round("lgg", 0, "random", labeled, [])):
        assert task in of_study


def test_a_year_goes_on_on_another_machine(labeling, years, tmp_path):
    """Nothing but the tables is left: what they have is not done again, except the networks that are asked."""
    years(0)
    tables = {name: (tmp_path / name).read_text() for name in (labeling.TABLE, labeling.CHOSEN)}
    assert years(0) == ([], [])
    table = pd.read_csv(tmp_path / labeling.TABLE)
    lost = (table["strategy"] == "rank") & (table["labeled"] > 10)
    table[~lost].to_csv(tmp_path / labeling.TABLE, index=False)
    chosen = pd.read_csv(tmp_path / labeling.CHOSEN)
    unknown = (chosen["strategy"] == "rank") & (chosen["labeled"] >= 10)
    chosen[~unknown].to_csv(tmp_path / labeling.CHOSEN, index=False)
    trained, asked = years(0)
    assert [(task.labeled, task.method) for task in trained] == [
        (10, "Semi-CML Plus"),
        *((labeled, method) for labeled in (15, 20) for method in labeling.NETWORKS),
    ]
    assert [labeled for _, labeled, *_ in asked] == [10, 15]
    for name, text in tables.items():
        assert sorted((tmp_path / name).read_text().splitlines()) == sorted(text.splitlines())


def test_what_the_study_has_is_not_trained_again(labeling, protocols, years, tmp_path):
    tasks = [
        task
        for task in protocols.tasks_of("lgg", "test")
        if (task.draw, task.labeled, task.method) in ((0, 5, "few labels"), (0, 15, "Semi-CML Plus"), (0, 5, "BCP"))
    ]
    runs = [
        {key: getattr(task, key) for key in ("protocol", "purpose", "draw", "labeled", "method", "steps")}
        for task in tasks
    ]
    pd.DataFrame(runs).to_csv(tmp_path / "runs.csv", index=False)
    rows = [
        {"weights": "EMA", "steps": task.steps, "method": task.method, "modality": "FLAIR", "seed": 0, "case": "007"}
        | {"dice": 0.1 * i, "hd95": 2.0, "labeled": task.labeled}
        for i, task in enumerate(tasks)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "lgg_test.csv", index=False)
    trained, _ = years(0, ["random"])
    assert [(task.labeled, task.method) for task in trained] == [
        (5, "Semi-CML Plus"),
        *((10, method) for method in labeling.NETWORKS),
        (15, "few labels"),
        *((20, method) for method in labeling.NETWORKS),
    ]
    table = pd.read_csv(tmp_path / labeling.TABLE, dtype={"case": str})
    (taken,) = table[table["case"] == "007"].query("labeled == 5")["dice"]
    assert taken == pytest.approx(next(row["dice"] for row in rows if row["method"] == "few labels"))
    assert len(table[table["case"] == "007"]) == 2  # not BCP's


def test_a_failure_ends_a_year(labeling, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(labeling, "run", lambda data, work, task: f"FAILED {task}")
    assert labeling.year(tmp_path, tmp_path, "lgg", (0, "rank")) == "draw 0, rank: failed, see above"
    assert "rank, 5 labeled, FAILED Task(protocol='lgg'" in capsys.readouterr().out
    assert not (tmp_path / labeling.TABLE).exists()


def test_table_pairs_the_cases(labeling, years, tmp_path):
    years(0)
    labeling.report()
    lines = (tmp_path / "labeling.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| rank | Semi-CML Plus |"))
    # all begin alike: 0.5 + 0.01 · 1 · 5
    assert row.split(" | ")[2:] == [
        "0.550",
        "0.700 (+0.100, +0.100 … +0.100)",
        "0.750 (+0.100, +0.100 … +0.100)",
        "0.800 (+0.100, +0.100 … +0.100) |",
    ]
    assert (tmp_path / "labeling.png").is_file()


def test_what_is_not_yet_there_is_left_open(labeling, years, tmp_path):
    """Means and differences are of the cases and draws that both have."""
    years(0)
    years(1, ["rank"])
    table = pd.read_csv(tmp_path / labeling.TABLE)
    gone = (table["strategy"] == "random") & (table["labeled"] == 20)
    table[~gone].to_csv(tmp_path / labeling.TABLE, index=False)
    labeling.report()
    lines = (tmp_path / "labeling.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| rank | Semi-CML Plus |"))
    assert row.split(" | ")[2:] == [
        "0.550",
        "0.700 (+0.100, +0.100 … +0.100)",
        "0.750 (+0.100, +0.100 … +0.100)",
        " |",
    ]


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
