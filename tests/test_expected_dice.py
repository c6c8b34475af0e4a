"""What is told of the quality of predictions: against formulas, and as a command line."""

import json
import shutil
from math import ceil, floor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from conftest import LABELS, make_trainer

from nnunetv2_semicml.command_line import run_expected_dice
from nnunetv2_semicml.data.raw_dataset import read_raw_dataset
from nnunetv2_semicml.data.result_folders import model_folder
from nnunetv2_semicml.evaluation import expected_dice
from nnunetv2_semicml.evaluation.expected_dice import expect, expect_all, predictors_of
from nnunetv2_semicml.evaluation.uncertainty import FoldPredictor, Measured
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA

NAN = float("nan")
MODALITIES = [SimpleNamespace(name=name) for name in "ABC"]


def measured(**entropies):
    """A case with these modalities; every pair disagrees by the product of their entropies."""
    of = {name: {"entropy": entropy, "volume": 2.0} for name, entropy in entropies.items()}
    names = list(entropies)
    pairs = {
        f"{a} | {b}": {"disagreement": entropies[a] * entropies[b], "hd95": 1.0}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return Measured({**of, **pairs}, {})


def test_predictors_are_of_the_modality_and_of_its_pairs():
    cases = {"p": measured(A=0.5, B=0.2, C=0.1), "q": measured(A=0.4, B=0.3), "r": measured(B=0.3)}
    found = predictors_of(cases, "B", ["A", "B"])
    assert list(found.index) == ["p", "q"]
    assert found["A | B"].tolist() == pytest.approx([0.1, 0.12])
    assert found["entropy"].tolist() == [0.2, 0.3]
    assert found["volume"].tolist() == pytest.approx([np.log(2.001)] * 2)
    assert "B | C" not in found
    assert list(predictors_of(cases, "B", ["B"]).index) == ["p", "q", "r"]
    nothing = Measured({"A": {"entropy": NAN, "volume": 0.0}}, {})
    assert predictors_of({"s": nothing}, "A", ["A"]).to_numpy().tolist() == [[1.0, pytest.approx(np.log(1e-3))]]


def ridge(known, targets, new):
    """Weights of penalty 1 on standardized columns, by the normal equations."""
    mean, spread = known.mean(0), known.std(0)
    z = (known - mean) / spread
    weights = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ (targets - targets.mean()))
    return (new - mean) / spread @ weights + targets.mean()


def test_dice_is_expected_by_ridge_regression_and_bounded_by_the_jackknife():
    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(25, 2)), rng.normal(size=(3, 2))
    dice = 0.6 + known @ [0.05, -0.1] + rng.normal(scale=0.03, size=25)
    names = [f"case{i}" for i in range(25)]
    tables = [pd.DataFrame(known, names, ["entropy", "volume"]), pd.Series(dice, names), pd.DataFrame(new)]
    tables[2].columns = tables[0].columns
    found = expect(*tables, confidence=0.9)
    assert found["expected"].tolist() == pytest.approx(ridge(known, dice, new))
    # Barber et al. 2021: order statistics of the predictions without case i, and its own residual
    below, above = [], []
    for i in range(25):
        rest = np.arange(25) != i
        residual = abs(dice[i] - ridge(known[rest], dice[rest], known[i : i + 1])[0])
        prediction = ridge(known[rest], dice[rest], new)
        below.append(prediction - residual)
        above.append(prediction + residual)
    low, high = np.sort(below, axis=0)[floor(0.1 * 26) - 1], np.sort(above, axis=0)[ceil(0.9 * 26) - 1]
    assert found["low"].tolist() == pytest.approx(low)
    assert found["high"].tolist() == pytest.approx(high)


def test_ten_cases_give_no_interval_of_90_percent_and_nothing_leaves_0_to_1():
    known = pd.DataFrame({"entropy": np.linspace(0, 1, 10), "volume": np.linspace(1, 0, 10)})
    dice = 1 - known["entropy"] / 2
    new = pd.DataFrame({"entropy": [-9.0, 9.0], "volume": [9.0, -9.0]})
    found = expect(known, dice, new, 0.9)
    assert found["expected"].tolist() == [1, 0]
    assert found[["low", "high"]].isna().all(axis=None)
    assert expect(known, dice, new, 0.8)[["low", "high"]].notna().all(axis=None)
    assert expect(known, dice, new, 0.05)[["low", "high"]].isna().all(axis=None)


def test_every_case_is_told_from_what_it_has_if_enough_others_have_that():
    known = {f"k{i}": measured(A=0.1 * i, B=0.05 * i) for i in range(1, 7)}
    known |= {f"c{i}": measured(A=0.1 * i, C=0.2) for i in range(1, 4)}
    dice = {
        "A": {**{f"k{i}": 1 - 0.1 * i for i in range(1, 7)}, **{f"c{i}": 1 - 0.1 * i for i in range(1, 4)}},
        "B": {f"k{i}": 0.5 for i in range(1, 7)},
        "C": {f"c{i}": 0.5 for i in range(1, 4)},
    }
    cases = {"x": measured(A=0.25, B=0.1), "y": measured(A=0.6), "z": measured(B=0.1)}
    table = expect_all(known, dice, cases, MODALITIES, 0.9).set_index(["case", "modality"])
    assert table["told_from"].to_dict() == {("x", "A"): "A + B", ("x", "B"): "A + B", ("y", "A"): "A", ("z", "B"): "B"}
    assert table.loc[("x", "A"), "expected"] > table.loc[("y", "A"), "expected"]
    assert table["expected"].xs("B", level="modality").tolist() == pytest.approx([0.5, 0.5])
    # three known cases have A and C: too few, but A alone has nine
    table = expect_all(known, dice, {"x": measured(A=0.25, C=0.1)}, MODALITIES[:1], 0.9)
    assert table["told_from"].tolist() == ["A"]


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["nnUNetv2_semicml_expected_dice", *map(str, words), "-device", "cpu"])
    run_expected_dice()


@pytest.fixture
def trained(groups, results):
    """The same hardly trained networks in all folds."""
    make_trainer(LABELS, "2d", nnUNetTrainerSupervisedEMA, 0, num_epochs=1, initial_lr=0.1).run_training()
    for modality in groups[LABELS].modalities:
        name = "nnUNetTrainerSupervisedEMA"
        model = model_folder(results, modality.dataset_name, name, "nnUNetPlans", "2d")
        for fold in range(1, 5):
            shutil.copytree(model / "fold_0", model / f"fold_{fold}")
    return groups[LABELS]


def test_new_scans_are_compared_with_validation_cases(trained, results, tmp_path, monkeypatch, capsys):
    raw, scans, out = read_raw_dataset(LABELS), tmp_path / "scans", tmp_path / "checked"
    scans.mkdir()
    (complete, first), (lacking, second) = list(raw.unlabeled.items())[:2]
    for case, files in ((complete, first["images"]), (lacking, second["images"][1:])):
        for file in files:
            shutil.copy(file, scans / f"{case}_{Path(file).name[-11:]}")
    words = ["-d", LABELS, "-c", "2d", "-tr", "nnUNetTrainerSupervisedEMA", "-i", scans, "-o", out]
    run(monkeypatch, *words, "--flag_below", 1)
    names = [modality.name for modality in trained.modalities]
    table = pd.read_csv(out / "expected_dice.csv").set_index(["case", "modality"])
    assert sorted(table.index) == sorted([(complete, names[0]), (complete, names[1]), (lacking, names[1])])
    assert table.loc[(lacking, names[1]), "told_from"] == names[1]
    assert table["expected"].between(0, 1).all()
    assert table["low"].isna().all()  # five validation cases
    record = json.loads((out / "expected_dice.json").read_text())
    assert record["validation_cases"] == dict.fromkeys(names, 5)
    assert len(record["flagged"]) == (table["expected"] < 1).sum()
    assert sorted(file.name for file in (out / "predictions" / names[0]).iterdir()) == [f"{complete}.nii.gz"]
    # what is done is not done again, and the Dice that all is told from is that of the files
    monkeypatch.setattr(FoldPredictor, "predict", lambda self, scan: pytest.fail("predicted again"))
    seen = []
    monkeypatch.setattr(expected_dice, "expect_all", lambda *args: seen.extend(args) or expect_all(*args))
    run(monkeypatch, *words)
    (calibration,) = (results / "calibration" / LABELS).iterdir()
    for name in names:
        for fold in range(5):
            (file,) = (calibration / f"fold_{fold}" / "predictions" / name).iterdir()
            case = file.name.removesuffix(raw.file_ending)
            predicted, label = (
                sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (file, raw.labeled[case]["label"])
            )
            both = [
                ((label == c).sum() + (predicted == c).sum(), ((label == c) & (predicted == c)).sum()) for c in (1, 2)
            ]
            assert seen[1][name][case] == pytest.approx(np.mean([2 * tp / n if n else 1 for n, tp in both]))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "-f", "all")
    assert "-f all: found no validation cases" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "-f", "0", "1")
    assert "found 2; expected 5 at least" in capsys.readouterr().err
    (scans / "x_0007.nii.gz").touch()
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert "x_0007.nii.gz: found a channel that dataset.json does not have" in capsys.readouterr().err
