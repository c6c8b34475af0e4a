"""benchmarks/study: what its tables say, of numbers that can be checked by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import load_script

from nnunetv2_semicml.evaluation.leaderboard import COLUMNS

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """report.py, which reads and writes in a folder of its own."""
    load_script(STUDY / "protocols.py", monkeypatch)
    load_script(STUDY / "run.py", monkeypatch).HERE = tmp_path
    report = load_script(STUDY / "report.py", monkeypatch)
    report.HERE, report.FIRST_PAGE = tmp_path, tmp_path / "first.md"
    report.FIRST_PAGE.write_text("Before.\n<!-- benchmarks/study/report.py -->\n| old |\n<!-- end -->\nAfter.\n")
    (tmp_path / "findings.md").write_text("What was found.\n")
    return report


def rows(method, draw, labeled, dice, weights="EMA", steps=3000):
    """Of a training: modality -> Dice of cases a, b …"""
    about = {"dataset": "any", "method": method, "seed": draw, "labeled": labeled, "class": "tumour", "steps": steps}
    about |= {name: 10 for name in COLUMNS if name not in (*about, "modality", "case", "dice", "unlabeled")}
    return [
        {**about, "weights": weights, "modality": modality, "case": case, "dice": value}
        for modality, values in dice.items()
        for case, value in zip("ab", values, strict=True)
    ]


def write_results(folder, results, purpose="test", prefix="", device="CPU"):
    table = pd.DataFrame(results)
    table.to_csv(folder / f"{prefix}lgg_{purpose}.csv", index=False)
    keys = ["method", "seed", "labeled", "steps"]
    runs = table[keys].drop_duplicates().rename(columns={"seed": "draw"})
    runs = runs.assign(protocol="lgg", purpose=purpose, cpu_seconds=900, date="2026-11-27", commit="abc")
    runs.assign(device=device).to_csv(folder / f"{prefix}runs.csv", index=False)


def cells(page, first, heading):
    """Of the first row after a heading that begins with a cell: column -> text."""
    lines = [line for line in page[page.index(heading) :].splitlines() if line.startswith("|")]
    head, row = lines[0], next(line for line in lines if line.startswith(f"| {first} |"))
    return dict(zip(*([cell.strip() for cell in re.split(r"(?<!\\)\|", of)[1:-1]] for of in (head, row)), strict=True))


def test_shares_are_of_the_draws_that_a_method_and_both_bounds_have(tmp_path, report):
    both = ("EMA", "last step")
    results = []
    for weights in both:
        worse = 0.0 if weights == "EMA" else 0.1
        for draw, gap in ((0, 0.4), (1, 0.2)):
            results += rows("few labels", draw, 5, {"FLAIR": [0.3 - worse, 0.5 - worse]}, weights)
            results += rows("all labels", draw, 0, {"FLAIR": [0.3 + gap, 0.5 + gap]}, weights)
            results += rows("Semi-CML", draw, 5, {"FLAIR": [0.4, 0.6]}, weights)
        results += rows("BCP", 0, 5, {"FLAIR": [0.5, 0.8]}, weights)
        results += rows("Semi-CML", 2, 5, {"FLAIR": [0.99, 0.99]}, weights)  # a draw without bounds
        results += rows("Semi-CML", 0, 15, {"FLAIR": [0.9, 0.9]}, weights)  # other labels
        results += rows("all labels", 0, 0, {"FLAIR": [0.95, 0.95]}, weights, steps=2000)  # another length
    write_results(tmp_path, results)
    report.main()
    page = (tmp_path / "lgg.md").read_text()
    semicml, bcp = (cells(page, name, "### 5 labeled") for name in ("Semi-CML", "BCP"))
    assert semicml["draws"] == "0, 1"
    assert semicml["FLAIR Dice, EMA"] == "0.500 (0.500 … 0.500)"
    assert semicml["FLAIR share, EMA"].startswith("0.33 (")  # 0.1 of a mean gap of 0.3
    assert semicml["FLAIR share, last step"].startswith("0.50 (")  # 0.2 of 0.4
    assert bcp["draws"] == "0"
    assert bcp["FLAIR share, EMA"] == "0.62 (0.50 … 0.75)"  # 0.25 of 0.4; of a case 0.2 or 0.3 of 0.4
    assert "### 15 labeled" not in page  # without bounds there is nothing to say
    overview = (tmp_path / "README.md").read_text()
    assert cells(overview, "BCP", "## Test cases")["Gliomas, whole volumes: FLAIR"] == "0.62 (0.50 … 0.75)"
    assert cells(overview, "Semi-CML", "## Test cases")["Gliomas, whole volumes: FLAIR"].endswith(")²")
    assert "What was found." in overview
    assert (tmp_path / "lgg.png").is_file()
    first = report.FIRST_PAGE.read_text()
    assert first.startswith("Before.\n<!-- ")
    assert first.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in first
    of_method = cells(first, "… and want the published method", "Before")
    assert of_method["gliomas: FLAIR"] == "+0.100 (**0.33**)²"
    assert of_method["left atria"] == ""
    differences = page[page.index("| − few labels |") :]
    assert cells(differences, "all labels", "| −")["FLAIR"].startswith("+0.300 (")
    assert cells(differences, "BCP", "| −")["FLAIR"].startswith("+0.250 (")
    assert "\n10 of " in page  # trainings
    assert "Cases that have half of the gap: FLAIR 1 of 2." in page
    assert ", 2.5 core-hours " in page


def test_how_far_apart_two_runs_are_is_told_apart_from_what_methods_gain(tmp_path, report):
    few = [row for w in ("EMA", "last step") for row in rows("few labels", 0, 5, {"FLAIR": [0.3, 0.5]}, w)]
    results = few + [row for w in ("EMA", "last step") for row in rows("all labels", 0, 0, {"FLAIR": [0.7, 0.9]}, w)]
    write_results(tmp_path, results)
    report.main()
    before = (tmp_path / "lgg.md").read_text()
    assert "Run twice" not in (tmp_path / "README.md").read_text()
    again = rows("few labels", 0, 5, {"FLAIR": [0.3, 0.4]}) + rows(
        "few labels", 0, 5, {"FLAIR": [0.9, 0.9]}, "last step"
    )
    again += rows("BCP", 1, 5, {"FLAIR": [0.1, 0.1]})  # once alone
    write_results(tmp_path, again, prefix="again_", device="A GPU")
    report.main()
    of = cells((tmp_path / "README.md").read_text(), "Gliomas, whole volumes: FLAIR", "## Run twice")
    assert of["training"] == "few labels, draw 0, test cases"
    assert (of["Dice"], of["again"]) == ("0.400 (CPU)", "0.350 (A GPU)")
    assert of["apart"].startswith("−0.050 (")
    assert "BCP" not in (tmp_path / "README.md").read_text()
    assert (tmp_path / "lgg.md").read_text() == before


def test_trainings_on_a_gpu_are_named_and_are_no_core_hours(tmp_path, report):
    write_results(tmp_path, rows("few labels", 0, 5, {"FLAIR": [0.3, 0.5]}))
    runs = pd.read_csv(tmp_path / "runs.csv")
    others = pd.concat([runs.assign(method=name, device="A GPU") for name in ("BCP", "UniMatch")])
    pd.concat([runs, others]).to_csv(tmp_path / "runs.csv", index=False)
    report.main()
    page = (tmp_path / "lgg.md").read_text()
    assert "3 of " in page
    assert ", 0.2 core-hours of x86_64 CPUs" in page  # 900 s, rounded
    assert "On A GPU instead, in float16: BCP (draw 0), UniMatch (draw 0)." in page


def test_half_of_the_gap_is_in_the_cases_that_gain_most(report):
    """Over the draws FLAIR gains 0.5 and 0.1, T1 0.2 and 0.2: one case is just half of that; S1 gains nothing."""
    results = []
    for draw, flair in ((0, (0.4, 0.2)), (1, (0.6, 0.0))):
        results += rows("few labels", draw, 5, {"FLAIR": [0.1, 0.2], "T1": [0.3, 0.3], "S1": [0.5, 0.5]})
        after = [0.1 + flair[0], 0.2 + flair[1]]
        results += rows("all labels", draw, 0, {"FLAIR": after, "T1": [0.5, 0.5], "S1": [0.6, 0.4]})
    assert report.where_the_gap_is(pd.DataFrame(results)) == "Cases that have half of the gap: FLAIR 1 of 2, T1 1 of 2."
    alone = pd.DataFrame([row for row in results if row["modality"] == "S1"])
    assert report.where_the_gap_is(alone) == ""


def test_a_share_that_may_be_nought_is_not_in_bold(report):
    row = {"share": -0.25, "gap": 0.2, "gap_low": 0.1, "low": -0.5, "high": 0.1, "draws": 1}
    assert report.gain_text(row) == "−0.050 (−0.25)"
    assert report.gain_text({**row, "share": 0.25}) == "+0.050 (0.25)"
    assert report.gain_text({**row, "share": 0.25, "low": 0.05}) == "+0.050 (**0.25**)"
    assert report.gain_text({**row, "draws": 3}) == "−0.050 (−0.25)³"


def test_where_all_labels_gain_nothing_there_is_no_share(tmp_path, report):
    results = []
    for weights in ("EMA", "last step"):
        for method, labeled, flair, t1 in (
            ("few labels", 5, 0.5, 0.3),
            ("all labels", 0, 0.4, 0.5),
            ("BCP", 5, 0.6, 0.4),
        ):
            results += rows(method, 0, labeled, {"FLAIR": [flair, flair + 0.1], "T1post": [t1, t1]}, weights)
    write_results(tmp_path, results)
    report.main()
    bcp = cells((tmp_path / "lgg.md").read_text(), "BCP", "### 5 labeled")
    assert (bcp["FLAIR share, EMA"], bcp["T1post share, EMA"]) == ("no sure gap", "0.50 (0.50 … 0.50)")
    row = {"share": 2.0, "gap": -0.1, "gap_low": -0.2, "low": 1.0, "high": 3.0}
    assert report.gain_text(row) == "no sure gap"
    assert report.gain_text(row | {"gap": 0.1}) == "no sure gap"
    assert report.gain_text(row | {"gap": 0.1, "gap_low": float("nan")}) == "no sure gap"  # of one patient


def test_a_validation_case_of_another_draw_is_another_case(tmp_path, report):
    results = []
    for draw, dice in ((0, 0.3), (1, 0.5)):
        for method, labeled, gain in (
            ("few labels", 5, 0.0),
            ("all labels", 0, 0.4),
            ("Semi-CML", 5, (0.1, 0.22)[draw]),
        ):
            for weights in ("EMA", "last step"):
                results += rows(method, draw, labeled, {"FLAIR": [dice + gain, dice + gain + 0.1]}, weights)
    write_results(tmp_path, results, "validation")
    report.main()
    page = (tmp_path / "lgg.md").read_text()
    # four cases that gain 0.1, 0.1, 0.22, 0.22 of 0.4, not two that gain 0.16
    assert cells(page, "Semi-CML", "### 5 labeled")["FLAIR share, EMA"] == "0.40 (0.25 … 0.55)"
    assert "Length: mean Dice of all labels, both weights, first draw: 3000 steps FLAIR 0.750." in page
    assert "Not run yet." in (tmp_path / "README.md").read_text()


def test_agreement_is_that_of_the_segmentations_with_each_other(tmp_path, report, monkeypatch):
    run = load_script(STUDY / "run.py", monkeypatch)
    protocols = load_script(STUDY / "protocols.py", monkeypatch)
    agreement = load_script(STUDY / "agreement.py", monkeypatch)
    agreement.HERE = tmp_path
    task = next(task for task in protocols.tasks_of("lgg", "validation") if task.method == "Semi-CML")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "PROTOCOL_STEPS"):
        monkeypatch.setenv(name, "")
    for name in ("nnUNet_def_n_proc", "nnUNet_n_proc_DA", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("nnUNet_semicml_seed", "0")
    run.set_environment(tmp_path, task)
    raw = tmp_path / "lgg_validation" / "raw" / "Dataset510_draw0_5labeled"
    segmentations = {  # voxels 0 … n; the reference of the second case is empty
        raw / "labelsTs": (6, 0),
        run.result_file(tmp_path, task).with_suffix("") / "FLAIR" / "EMA": (4, 2),
        run.result_file(tmp_path, task).with_suffix("") / "T1post" / "EMA": (2, 2),
    }
    for folder, sizes in segmentations.items():
        folder.mkdir(parents=True)
        for case, size in zip("ab", sizes, strict=True):
            array = (np.arange(64).reshape(4, 4, 4) < size).astype(np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"{case}.nii.gz"))
    (raw / "imagesTs").mkdir()
    described = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(described))
    state = run.model_of(protocols.PROTOCOLS["lgg"], task, None) / "fold_all"
    state.mkdir(parents=True)
    logged = {"unsupervised/mse": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]}
    monkeypatch.setattr("sys.argv", ["agreement.py", "lgg", "validation", "--work", str(tmp_path)])
    rows = []
    for compares in (True, False):  # the latter has another mean squared difference, to its teacher
        made_of = {"settings": {"compares_modalities": compares}}
        torch.save({"logging": logged, "provenance": made_of}, state / "checkpoint_final.pth")
        agreement.main()
        rows.append(cells((tmp_path / "lgg_validation_agreement.md").read_text(), "Semi-CML", "#"))
    row, other = rows
    assert other == {**row, agreement.THIRDS: ""}
    assert row["agreement"] == "0.833"  # the mean of 2 · 2 / (4 + 2) and 1
    assert [row["voxels by FLAIR"], row["voxels by T1post"], row["of the reference"]] == ["3", "2", "3"]
    assert row[agreement.THIRDS] == "0.500, 0.300, 0.100"
