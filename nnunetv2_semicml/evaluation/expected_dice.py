"""Which predictions not to trust: `nnUNetv2_semicml_expected_dice`.

What networks say of their predictions of new scans is compared with what those of every fold say of its validation
cases, whose Dice is known. Writes expected_dice.csv and .json, and the predictions that the numbers are about. May
import nnU-Net, `errors`, `data`; knows trainers by name alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from mapie.regression import CrossConformalRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import explains_failed_writes, write_json, written_whole
from nnunetv2_semicml.data.folds import SPLITS_FILE, read_folds
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup, preprocessed_folder
from nnunetv2_semicml.data.raw_dataset import Cases, RawDataset, read_raw_dataset
from nnunetv2_semicml.data.result_folders import model_folder
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.metrics import evaluate_files, fill_undefined
from nnunetv2_semicml.evaluation.uncertainty import Measured, Networks, measure_cases, present_modalities

MIN_CASES = 5  # of validation, with which anything can be said


def predictors_of(cases: Mapping[str, Measured], modality: str, present: Sequence[str]) -> pd.DataFrame:
    """What the Dice of a modality is told from.

    Args:
        cases: name -> what was measured; cases without these modalities are left out.
        modality: whose prediction it is about.
        present: the modalities whose measures are used, `modality` among them.

    Returns:
        One row per case: entropy (1 where nothing is predicted), the logarithm of the volume (ml + 0.001), and the
        disagreement with every other present modality.
    """
    rows = {}
    for case, measured in cases.items():
        if not {*present} <= measured.measures.keys():
            continue
        own = measured.measures[modality]
        entropy = 1.0 if np.isnan(own["entropy"]) else own["entropy"]
        rows[case] = {"entropy": entropy, "volume": np.log(own["volume"] + 1e-3)}
        for pair, of_pair in measured.measures.items():
            names = pair.split(" | ")
            if len(names) == 2 and modality in names and {*names} <= {*present}:
                rows[case][pair] = of_pair["disagreement"]
    return pd.DataFrame.from_dict(rows, orient="index")


def expect(known: pd.DataFrame, dice: pd.Series, new: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Tell the Dice of new cases from those whose Dice is known.

    A ridge regression on standardized predictors, and the conformal interval of the jackknife+ (Barber et al., Ann.
    Stat. 49:486, 2021), which holds the Dice of a new case about as often as it says, whatever the regression is worth,
    as long as new cases are like the known ones.

    Args:
        known: predictors of the known cases.
        dice: of these.
        new: predictors of the new cases.
        confidence: of the interval, e.g. 0.9.

    Returns:
        For every new case "expected", "low" and "high", within 0 … 1. The interval is NaN where there are not more than
        1 / confidence and 1 / (1 − confidence) known cases, of which none follows.
    """

    def regression() -> Pipeline:
        return make_pipeline(StandardScaler(), Ridge())

    targets = dice[known.index].to_numpy()
    expected = regression().fit(known.to_numpy(), targets).predict(new[known.columns].to_numpy())
    low = high = np.full(len(new), np.nan)
    if len(known) > max(1 / confidence, 1 / (1 - confidence)):
        conformal = CrossConformalRegressor(regression(), confidence_level=confidence, method="plus", cv=-1)
        conformal.fit_conformalize(known.to_numpy(), targets)
        _, intervals = conformal.predict_interval(new[known.columns].to_numpy())
        low, high = intervals[:, 0, 0], intervals[:, 1, 0]
    table = pd.DataFrame({"expected": expected, "low": low, "high": high}, index=new.index)
    return table.clip(0, 1)


def validation_cases(raw: RawDataset, group: ModalityGroup, folds: Sequence[str], scans: Cases) -> dict[str, list[str]]:
    """Fold -> its validation cases.

    Raises:
        UserError: there are none, or too few to tell the Dice of these scans from.
    """
    known = read_folds(preprocessed_folder(raw.name) / SPLITS_FILE)
    for fold in folds:
        if not fold.isdecimal() or int(fold) >= len(known):
            raise UserError(f"-f {fold}", "no validation cases", f"folds from 0 to {len(known) - 1}", "Name these.")
    found = {fold: known[int(fold)]["val"] for fold in folds}
    needed = {modality for files in scans.values() for modality in present_modalities(files, group.modalities)}
    for modality in group.modalities:
        number = sum(case in modality.labeled for cases in found.values() for case in cases)
        if modality.name in needed and number < MIN_CASES:
            raise UserError(
                f"validation cases of folds {', '.join(folds)} with {modality.name}",
                f"{number}",
                f"{MIN_CASES} at least, from which the Dice of others can be told",
                "Name more folds with -f.",
            )
    return found


def measure_validation(
    raw: RawDataset, group: ModalityGroup, networks: Networks, folds: Mapping[str, Sequence[str]], out: Path
) -> tuple[dict[str, Measured], dict[str, dict[str, float]]]:
    """What the networks of every fold say of its validation cases, and how good they are there.

    Returns:
        Case -> what was measured; modality -> case -> mean Dice of the classes.
    """
    reader = raw.find_reader()()
    cases: dict[str, Measured] = {}
    dice: dict[str, dict[str, float]] = {modality.name: {} for modality in group.modalities}
    for fold, of_fold_cases in folds.items():
        own = {case: raw.labeled[case] for case in of_fold_cases}
        of_fold = networks.of_fold(fold)
        cases |= measure_cases(own, group.modalities, of_fold, out / f"fold_{fold}", raw.file_ending)
        for case, files in own.items():
            for modality in present_modalities(files, group.modalities):
                prediction = out / f"fold_{fold}" / "predictions" / modality / f"{case}{raw.file_ending}"
                found = evaluate_files(Path(files["label"]), prediction, reader, raw.dataset_json["labels"])
                dice[modality][case] = float(np.mean([fill_undefined(m)["dice"] for m in found.values()]))
    return cases, dice


def expected_dice(args: argparse.Namespace, command: str) -> Path:
    """Predict scans, and say how good the predictions probably are.

    Args:
        args: the command line.
        command: the same as text, for the record.

    Returns:
        The table.

    Raises:
        UserError: an option does not fit, or a network or a scan is missing or damaged.
    """
    if not 0 < args.confidence < 1 or not 0 <= args.flag_below <= 1:
        where, found = "--confidence, --flag_below", f"{args.confidence:g}, {args.flag_below:g}"
        raise UserError(where, found, "numbers between 0 and 1", "Correct them.")
    raw = read_raw_dataset(args.d, require_unlabeled=False)
    group = ModalityGroup.load(raw.name)
    scans = raw.find_scans(args.i)
    folds = validation_cases(raw, group, args.f, scans)
    results = environment_folder("nnUNet_results")
    networks = Networks.of_command_line(group, args)
    with explains_failed_writes(args.o, "Make room, and repeat the command: it goes on from here."):
        of_model = model_folder(results, raw.name, args.tr, args.p, args.c).relative_to(results)
        calibration = (results / "calibration" / of_model).absolute()
        known, dice = measure_validation(raw, group, networks, folds, calibration)
        cases = measure_cases(scans, group.modalities, networks, args.o.absolute(), raw.file_ending)
        table = expect_all(known, dice, cases, group.modalities, args.confidence)
        table["flagged"] = table["expected"] < args.flag_below
        with written_whole(args.o / "expected_dice.csv") as file:
            table.to_csv(file, index=False, float_format="%.4g")
        record = {
            "dataset": raw.name,
            "command": command,
            "confidence": args.confidence,
            "validation_cases": {modality: len(of) for modality, of in dice.items()},
            "flagged": [f"{row['case']} {row['modality']}" for row in table[table["flagged"]].to_dict("records")],
        }
        write_json(args.o / "expected_dice.json", record)
    return args.o / "expected_dice.csv"


def expect_all(
    known: Mapping[str, Measured],
    dice: Mapping[str, Mapping[str, float]],
    cases: Mapping[str, Measured],
    modalities: Sequence[Modality],
    confidence: float,
) -> pd.DataFrame:
    """Tell the Dice of every modality's prediction of every case from all modalities that the case has.

    Where too few validation cases have all of these, from the modality alone.

    Returns:
        The columns case, modality, expected, low, high and told_from, the modalities.
    """
    names, parts = [modality.name for modality in modalities], []
    patterns: dict[tuple[str, ...], list[str]] = {}
    for case, measured in cases.items():
        patterns.setdefault(tuple(name for name in names if name in measured.measures), []).append(case)
    for present, of_pattern in patterns.items():
        for modality in present:
            told_from: Sequence[str] = present
            of_known = predictors_of(known, modality, told_from)
            if len(of_known) < MIN_CASES:
                told_from = [modality]
                of_known = predictors_of(known, modality, told_from)
            new = predictors_of({case: cases[case] for case in of_pattern}, modality, told_from)
            part = expect(of_known, pd.Series(dice[modality]), new, confidence)
            part = part.rename_axis("case").reset_index()
            part.insert(1, "modality", modality)
            parts.append(part.assign(told_from=" + ".join(told_from)))
    return pd.concat(parts).sort_values(["case", "modality"], kind="stable", ignore_index=True)
