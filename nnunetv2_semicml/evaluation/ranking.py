"""Which unlabeled cases to outline next: `nnUNetv2_semicml_rank`.

Every modality's networks predict the unlabeled cases; those that they are least sure of, and differ most about, would
teach most. Writes ranking.csv, ranking.json, ranking.html and the predictions. May import nnU-Net, `errors`, `data`;
knows trainers by name alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import AgglomerativeClustering

from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import explains_failed_writes, write_json, written_whole
from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.data.raw_dataset import RawDataset, read_raw_dataset
from nnunetv2_semicml.data.result_folders import model_folder
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation import SCORES
from nnunetv2_semicml.evaluation.figures import colors_of, draw_disagreement
from nnunetv2_semicml.evaluation.page import render_page
from nnunetv2_semicml.evaluation.uncertainty import Measured, Networks, measure_cases, present_modalities

TEMPLATE = Path(__file__).with_name("ranking.html.jinja")
_SHOWN, _MOST_ROWS = 12, 200


def score_cases(cases: Mapping[str, Measured], by: str) -> pd.Series:
    """How little the networks know of every case, 0 … 1.

    The mean, over the measures that a case has, of its percentile rank in each among all cases. So a modality that a
    case lacks, or an entropy where nothing is predicted, counts neither for nor against it.

    Args:
        cases: name -> what was measured.
        by: one of `SCORES`.

    Returns:
        Case -> score, the highest first; cases without any measure last, with 0.
    """
    rows = {case: measured.flat(SCORES[by]) for case, measured in cases.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(list(cases))
    scores = table.rank(pct=True).mean(axis=1).fillna(0.0)
    return scores.sort_values(ascending=False, kind="stable")


def choose(scores: pd.Series, cases: Mapping[str, Measured], number: int, pool: float) -> list[str]:
    """Choose cases with high scores that are not alike.

    The `pool` · `number` cases with the highest scores are grouped by the features that the networks' encoders see in
    them (Ward's clustering of standardized features), and of every group the one with the highest score is chosen.

    Args:
        scores: what `score_cases` returns.
        cases: the same.
        number: of cases to choose.
        pool: 1 chooses by score alone.

    Returns:
        The chosen cases, the highest score first.
    """
    candidates = [str(case) for case in scores.index[: max(number, round(pool * number))]]
    if number >= len(candidates):
        return candidates
    parts = []
    for modality in dict.fromkeys(name for case in candidates for name in cases[case].features):
        features = [cases[case].features.get(modality) for case in candidates]
        length = max(len(f) for f in features if f is not None)
        table = np.array([f if f else [np.nan] * length for f in features], dtype=float).reshape(len(candidates), -1)
        spread = np.nanstd(table, axis=0)
        # a case without the modality is like the mean of all
        parts.append(np.nan_to_num((table - np.nanmean(table, axis=0)) / np.where(spread > 0, spread, 1)))
    if not any(part.shape[1] for part in parts):
        return candidates[:number]
    groups = AgglomerativeClustering(number).fit_predict(np.concatenate(parts, axis=1))
    first = [int(np.flatnonzero(groups == group)[0]) for group in range(number)]
    return [candidates[i] for i in sorted(first)]


def rank(args: argparse.Namespace, command: str) -> Path:
    """Rank the unlabeled cases of a dataset.

    Args:
        args: the command line.
        command: the same as text, for the page.

    Returns:
        The HTML page.

    Raises:
        UserError: an option does not fit, or a network or a scan is missing or damaged.
    """
    raw = read_raw_dataset(args.d)
    group = ModalityGroup.load(raw.name)
    if args.number < 1 or args.pool < 1:
        raise UserError("--number, --pool", f"{args.number}, {args.pool:g}", "1 or more", "Correct them.")
    results = environment_folder("nnUNet_results")
    default = results / "rankings" / model_folder(results, raw.name, args.tr, args.p, args.c).relative_to(results)
    out = (args.o or default).absolute()
    networks = Networks.of_command_line(group, args)
    if {"folds": len(args.f), "modalities": len(group.modalities)}.get(args.score, 2) < 2:
        raise UserError(f"--score {args.score}", "one of these", "two that could differ", "Choose another score.")
    unlabeled = {case: files for case, files in raw.unlabeled.items() if present_modalities(files, group.modalities)}
    with explains_failed_writes(out, "Make room, and repeat the command: it goes on from here."):
        cases = measure_cases(unlabeled, group.modalities, networks, out, raw.file_ending)
        scores = score_cases(cases, args.score)
        chosen = choose(scores, cases, min(args.number, len(cases)), args.pool)
        table = pd.DataFrame([{"case": case, "score": scores[case], **cases[case].flat()} for case in scores.index])
        table.insert(0, "rank", range(1, len(table) + 1))
        table.insert(3, "chosen", table["case"].isin(chosen))
        with written_whole(out / "ranking.csv") as file:
            table.to_csv(file, index=False, float_format="%.6g")
        record = {"dataset": raw.name, "command": command, "score": args.score, "label_next": chosen}
        write_json(out / "ranking.json", record)
        with written_whole(out / "ranking.html") as file:
            file.write_text(_page(table, chosen, raw, group, out, command, args), encoding="utf-8")
    return out / "ranking.html"


def _page(
    table: pd.DataFrame,
    chosen: Sequence[str],
    raw: RawDataset,
    group: ModalityGroup,
    out: Path,
    command: str,
    args: argparse.Namespace,
) -> str:
    reader = raw.find_reader()()
    pictures = []
    for case in chosen[:_SHOWN]:
        present = present_modalities(raw.unlabeled[case], group.modalities)
        predictions = {name: out / "predictions" / name / f"{case}{raw.file_ending}" for name in present}
        score = float(table.loc[table["case"] == case, "score"].iloc[0])
        scans = {name: images[0] for name, images in present.items()}
        pictures.append((score, draw_disagreement(case, scans, predictions, reader)))
    facts = {
        "Dataset": raw.name,
        "Networks": f"{args.tr}, {args.c}, {args.p}, folds {' '.join(args.f)}",
        "Score": f"{args.score}: {', '.join(SCORES[args.score])}",
        "Unlabeled cases": str(len(table)),
        "Command": command,
    }
    return render_page(
        TEMPLATE,
        title=f"What to outline next: {raw.name}",
        facts=facts,
        pictures=pictures,
        colors=colors_of([modality.name for modality in group.modalities]),
        rows=table.head(_MOST_ROWS).to_dict("records"),
        number=len(table),
    )
