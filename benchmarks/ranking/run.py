"""Do networks know how good their predictions are? Rank correlation of what they say with the true Dice.

    python benchmarks/ranking/run.py lgg validation --data FOLDER_OF_RAW_DATASETS --work SCRATCH

SCRATCH is that of ../study/run.py: networks that it has trained there are measured on the held-out cases of their
draw and on the unlabeled cases, whose labels were withheld from them; of many, on 100 drawn ones. Rows are added to
cases.csv beside this script; networks that stand there are not measured again. ranking.md is made of it. A row also has
the volume of the reference, in ml as the predicted one is, to tell why doubt may say little.

There is one network for each modality (fold "all"), hence no disagreement between folds.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, pearsonr, rankdata

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "study"))
from protocols import PROTOCOLS, Task, tasks_of  # noqa: E402
from run import cases_of, dataset_of, model_of, rows_with, set_environment, source_of  # noqa: E402

METHODS = ("few labels", "Semi-CML", "Semi-CML Plus", "BCP", "BCP Plus", "cross-modal BCP", "all labels")
TOGETHER = "mean of modalities"
MEASURES = ("entropy", "disagreement", "volume", "mean")
KEYS = ["protocol", "purpose", "method", "draw", "labeled"]
TABLE = HERE / "cases.csv"
MAX_UNLABELED = 100
CONFIDENCE, POOR = 0.9, 0.5


def measure_networks(data: Path, work: Path, task: Task) -> pd.DataFrame | None:
    """What the networks of a task say of every case, and the Dice of their predictions; None if they are not there."""
    set_environment(work, task)
    import torch

    from nnunetv2_semicml.data.modality_group import ModalityGroup
    from nnunetv2_semicml.data.raw_dataset import read_raw_dataset
    from nnunetv2_semicml.evaluation.metrics import evaluate_files, fill_undefined
    from nnunetv2_semicml.evaluation.ranking import score_cases
    from nnunetv2_semicml.evaluation.uncertainty import CHECKPOINT, Networks, measure_cases
    from nnunetv2_semicml.planning.withhold_labels import draw_order

    protocol = PROTOCOLS[task.protocol]
    models = {modality: model_of(protocol, task, modality) for modality in protocol.modalities}
    if not all((model / "fold_all" / CHECKPOINT).is_file() for model in models.values()):
        return None
    torch.set_num_threads(1)
    raw = read_raw_dataset(dataset_of(protocol, task), require_unlabeled=False)
    group = ModalityGroup.load(raw.name)
    source = source_of(protocol, data)
    _, held_out = cases_of(protocol, source, task.purpose, task.draw)
    networks = Networks(models, ["all"], torch.device("cpu"), mirroring=False)
    unlabeled = {case: raw.unlabeled[case] for case in draw_order(dict.fromkeys(raw.unlabeled, ""), 0)[:MAX_UNLABELED]}
    rows, reader = [], raw.find_reader()()
    for share, cases in (("held out", raw.test), ("unlabeled", unlabeled)):
        out = work / "ranking" / f"{task.protocol}_{task.purpose}" / f"{raw.name}_{task.trainers[-1]}_{task.draw}"
        measured = measure_cases(cases, group.modalities, networks, out, raw.file_ending)
        scores = {name: score_cases(measured, name) for name in ("mean", "entropy") if measured}
        for case, of_case in measured.items():
            pairs = [of["disagreement"] for name, of in of_case.measures.items() if " | " in name]
            about = {**{key: getattr(task, key) for key in KEYS}, "share": share, "case": case}
            about |= {"disagreement": np.mean(pairs) if pairs else np.nan, "mean": scores["mean"][case]}
            own = []
            label = source / f"labels{held_out.get(case, 'Tr')}" / f"{case}{raw.file_ending}"
            about["reference"] = volume_of(label, reader)
            for modality in protocol.modalities:
                prediction = out / "predictions" / modality / f"{case}{raw.file_ending}"
                found = evaluate_files(label, prediction, reader, raw.dataset_json["labels"])
                dice = fill_undefined(found[protocol.foreground])["dice"]
                measures = {name: of_case.measures[modality][name] for name in ("entropy", "volume")}
                own.append({**about, "modality": modality, "dice": dice, **measures})
            means = {name: np.mean([row[name] for row in own]) for name in ("dice", "volume")}
            rows += [*own, {**about, "modality": TOGETHER, **means, "entropy": scores["entropy"][case]}]
    return pd.DataFrame(rows)


def volume_of(label: Path, reader: Any) -> float:
    """Of the foreground of a label file, in ml, as nnU-Net's reader has its spacing."""
    labels, properties = reader.read_seg(str(label))
    return float((labels > 0).sum() * np.prod(properties["spacing"]) / 1000)


def size_lines(table: pd.DataFrame) -> list[str]:
    """Whether a Dice follows what there is to find, and whether the prediction tells how much that is."""
    lines = ["## Sizes", ""]
    lines += [
        "Spearman's rank correlation of the volume of the reference with the Dice, and with the predicted volume;"
    ]
    lines += [
        "mean over the draws. Where the first is high and the second low, no prediction tells which one is good.",
        "",
    ]
    lines += ["| protocol | cases | method | labeled | modality | with the Dice | with the predicted volume |"]
    lines += ["|---" * 7 + "|"]
    known = table[table["reference"].notna() & (table["modality"] != TOGETHER)]
    for key, rows in known.groupby(["protocol", "purpose", "share", "method", "labeled", "modality"], sort=False):
        protocol, purpose, share, method, labeled, modality = key
        draws = [of_draw for _, of_draw in rows.groupby("draw")]
        cells = [protocol, f"{purpose}, {share}", method, str(labeled or "all"), modality]
        for column in ("dice", "volume"):
            mean = np.mean([of["reference"].corr(of[column], method="spearman") for of in draws])
            cells.append(f"{mean:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def correlation(measure: np.ndarray, dice: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's, with the sign by which a good measure of doubt has 1."""
    ranks = (rankdata(values, axis=axis) for values in (measure, dice))
    return -pearsonr(*ranks, axis=axis).statistic


def correlation_cell(rows: pd.DataFrame, measure: str) -> str:
    """Mean over the draws, and its interval over the cases, which are resampled within every draw."""
    rng = np.random.default_rng(0)
    options = {"paired": True, "method": "percentile", "n_resamples": 999, "vectorized": True, "rng": rng}
    draws, resampled = [], []
    for _, of_draw in rows.groupby("draw"):
        samples = of_draw[measure].to_numpy(), of_draw["dice"].to_numpy()
        draws.append(correlation(*samples))
        resampled.append(bootstrap(samples, correlation, **options).bootstrap_distribution)
    low, high = np.nanpercentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return f"{np.mean(draws):.2f} ({low:.2f} … {high:.2f})"


def report(table: pd.DataFrame) -> None:
    """ranking.md: correlations over the cases of all draws, each case of a draw by itself."""
    facts = json.loads((HERE / "facts.json").read_text())
    lines = ["# Do networks know how good their predictions are?", "", f"`{facts.pop('command')}`", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "Spearman's rank correlation of doubt with 1 − Dice, mean over the draws; in brackets the 95 % bootstrap",
    ]
    lines += ["interval over the cases of every draw. Entropy: where foreground is predicted (cases without any"]
    lines += [
        "are least sure); volume: a small one as doubt; disagreement: 1 − Dice between the modalities; mean: the score"
    ]
    lines += [
        f"of `nnUNetv2_semicml_rank`. {TOGETHER.capitalize()}: of Dice and volume; entropy by the mean of its ranks.",
        "",
    ]
    heads = ["protocol", "cases", "method", "labeled", "modality", "n", *MEASURES]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    sizes = size_lines(table)
    table = table.assign(entropy=table["entropy"].fillna(1.0), volume=-table["volume"])
    by = ["protocol", "purpose", "share", "method", "labeled", "modality"]
    for key, rows in table.groupby(by, sort=False):
        protocol, purpose, share, method, labeled, modality = key
        cells = [protocol, f"{purpose}, {share}", method, str(labeled or "all"), modality, str(len(rows))]
        for measure in MEASURES:
            if rows[measure].isna().any():
                cells.append("")
                continue
            cells.append(correlation_cell(rows, measure))
        lines.append(f"| {' | '.join(cells)} |")
    (HERE / "ranking.md").write_text("\n".join([*lines, "", *expected_lines(table), "", *sizes, ""]))


def expected_lines(table: pd.DataFrame) -> list[str]:
    """What `nnUNetv2_semicml_expected_dice` would say of held-out cases, had the unlabeled ones been for validation.

    Both are cases that the networks have not learned the labels of.
    """
    from nnunetv2_semicml.evaluation.expected_dice import expect

    lines = ["## Expected Dice", ""]
    lines += [
        "Of held-out cases, told from the unlabeled ones of the same draw, as if these had been for validation: mean"
    ]
    lines += [
        f"absolute error; share of Dice values in the {CONFIDENCE:.0%} interval; of cases with a Dice below {POOR}, how"
    ]
    lines += [
        "many are flagged (expected below that), and of the others. For comparison, the error of the mean Dice. Rank",
        "correlation of 1 − the expected Dice, which combines the measures, with 1 − Dice, as above.",
        "",
    ]
    heads = ["protocol", "purpose", "method", "labeled", "modality", "n", "error", "error of the mean"]
    heads += ["in the interval", "poor ones flagged", "others flagged", "rank correlation"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, rows in table[table["modality"] != TOGETHER].groupby(
        ["protocol", "purpose", "method", "labeled", "modality"], sort=False
    ):
        parts = []
        for _, of_draw in rows.groupby("draw"):
            shares = {share: of.set_index("case") for share, of in of_draw.groupby("share")}
            if {*shares} < {"unlabeled", "held out"}:
                continue
            columns = ["entropy", "volume"] + ["disagreement"] * bool(of_draw["disagreement"].notna().all())
            x = {share: of[columns].assign(volume=np.log(of["volume"].abs() + 1e-3)) for share, of in shares.items()}
            known = shares["unlabeled"]["dice"]
            found = expect(x["unlabeled"], known, x["held out"], CONFIDENCE)
            dice = shares["held out"]["dice"]
            parts.append(found.assign(draw=of_draw["draw"].iloc[0], dice=dice, mean=known.mean()))
        if not parts:
            continue
        found = pd.concat(parts)
        poor, flagged = found["dice"] < POOR, found["expected"] < POOR
        cells = [*key[:3], str(key[3] or "all"), key[4], str(len(found))]
        cells += [f"{(found[column] - found['dice']).abs().mean():.3f}" for column in ("expected", "mean")]
        cells.append(f"{found['dice'].between(found['low'], found['high']).mean():.2f}")
        cells += [f"{(flagged & of).sum()} of {of.sum()}" for of in (poor, ~poor)]
        cells.append(correlation_cell(found.assign(doubt=1 - found["expected"]), "doubt"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure what is trained and not measured yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="the scratch folder of ../study/run.py")
    parser.add_argument("task", help="PROTOCOL PURPOSE, e.g. lgg validation", nargs=2)
    args = parser.parse_args()
    table = pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=KEYS)
    protocol = PROTOCOLS[args.task[0]]
    for task in tasks_of(*args.task):
        known = rows_with(table, {key: getattr(task, key) for key in KEYS})
        if len(known) or task.method not in METHODS or task.steps != protocol.steps:
            continue
        found = measure_networks(args.data.resolve(), args.work.resolve(), task)
        if found is not None:
            table = pd.concat([table, found]) if len(table) else found
            table.to_csv(TABLE, index=False, float_format="%.4g")
            print(task, flush=True)
    facts = {
        "command": "python benchmarks/ranking/run.py PROTOCOL PURPOSE --data FOLDER --work SCRATCH",
        "draws, which are the seeds": ", ".join(map(str, sorted(set(table["draw"])))),
        "machine": "x86_64 CPU",
        "date": str(datetime.date.today()),
    }
    (HERE / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    report(pd.read_csv(TABLE))


if __name__ == "__main__":
    main()
