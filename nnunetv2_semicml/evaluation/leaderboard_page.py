"""The leaderboard for reading: Markdown, and one self-contained HTML page with plots and overlays.

From a table of cases and the image files alone; numbers come from `statistics`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from nnunetv2_semicml.evaluation.figures import (
    COLORS,
    MARKERS,
    CasePanels,
    Volumes,
    colors_of,
    data_uri,
    draw_case,
    themed,
)
from nnunetv2_semicml.evaluation.metrics import METRICS
from nnunetv2_semicml.evaluation.page import render_page
from nnunetv2_semicml.evaluation.statistics import (
    average_seeds,
    compare,
    interval,
    score,
    summarize,
)

PLOTTED = ("dice", "hd95")  # overlap and distance; the tables have all metrics
# the axis of a distance: linear up to here, and what is written at it beyond
MM_LINEAR, MM_TICKS = 10, (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LOGGED = {"mean_fg_dice": "pseudo Dice of validation patches", "train_losses": "training loss on labels"}
DEFINITIONS = (
    "Every number is per patient, in 3D. Dice, PPV and sensitivity count voxels. ASD is the average symmetric surface "
    "distance, HD95 the larger of the 95th percentiles of the distances from either surface to the other; surface "
    "elements count by their area.",
    "A patient with nothing to find in whom nothing was found counts as perfect: 1, or 0 mm. Where only one of "
    "prediction and reference is empty, undefined metrics count as the worst: 0, or the diagonal of the image in mm. "
    "“Missed” and “invented” are the numbers of such patients. In leaderboard.csv, undefined values are left empty.",
    "Mean ± standard deviation over the patients who have the modality; seeds are averaged first, and their lowest and "
    "highest mean follows. Differences are paired by patient, with 95 % bootstrap intervals (BCa) and two-sided "
    "Wilcoxon signed-rank tests, Holm-corrected for all comparisons of the same metric on this page.",
)


@dataclass(frozen=True)
class Incomplete:
    """A method that has no results on a modality.

    Attributes:
        method: its name.
        modality: the modality.
        missing: job that is not done -> why, or what is missing.
    """

    method: str
    modality: str
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Overlaid:
    """What to look at in one modality.

    Attributes:
        modality: the modality.
        volumes: its images, and segmentations of them.
        shown: what of a scan is shown, in words; empty if all.
    """

    modality: str
    volumes: Volumes
    shown: str


@dataclass(frozen=True)
class Training:
    """How the networks of one method for one modality came about.

    Attributes:
        method: its name.
        modality: the modality.
        logs: of every fold, nnU-Net's log: key -> a value for each epoch.
        epochs_before: those of the trainings whose networks it went on from.
        terms: picture of its unsupervised terms, if there is one.
    """

    method: str
    modality: str
    logs: Sequence[Mapping[str, Sequence[float]]]
    epochs_before: int
    terms: Path | None


@dataclass(frozen=True)
class Report:
    """What Markdown and HTML are made of.

    Attributes:
        title: the heading.
        command: the command line.
        facts: what was run, name -> value.
        reference_method: the method that the others are compared with.
        cases: rows of leaderboard.csv.
        incomplete: what is not in these rows.
        others: leaderboard.csv of datasets with other labeled shares.
        files: of every modality that has results.
        trainings: of the methods that have results and were trained here.
        note: what to read first; empty if nothing.
    """

    title: str
    command: str
    facts: Mapping[str, str]
    reference_method: str
    cases: pd.DataFrame
    incomplete: Sequence[Incomplete]
    others: Sequence[pd.DataFrame]
    files: Sequence[Overlaid]
    trainings: Sequence[Training] = ()
    note: str = ""

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What enters means and tests."""
        return score(self.cases)

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """Rows of `summarize`."""
        return summarize(self.scores).to_dict("records")

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Of every method to the reference method."""
        return compare(self.scores, self.reference_method)

    @cached_property
    def not_compared(self) -> str:
        """The modalities with results but none of the reference method, in a sentence; empty if there are none."""
        compared = {*self.cases.loc[self.cases["method"] == self.reference_method, "modality"]}
        others = [modality for modality in self.cases["modality"].unique() if modality not in compared]
        if not others:
            return ""
        return f"{self.reference_method} has no results on {', '.join(others)}, where nothing is compared with it."


def write_markdown(file: Path, report: Report) -> None:
    """Write all tables as Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.command)), default=0))
    lines = [f"# {_plain(report.title)}", "", *([_plain(report.note), ""] if report.note else [])]
    lines += [fence, report.command, fence, ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in report.facts.items()]
    if report.incomplete:
        lines += ["", "**Incomplete, and therefore not in the tables:**", ""]
        lines += [
            _plain(f"- {entry.method}, {entry.modality}: {job}: {why}")
            for entry in report.incomplete
            for job, why in entry.missing.items()
        ]
    titles = [_title(metric) for metric in METRICS]
    lines += ["", "## Results", "", _line(["modality", "class", "method", "patients", *titles, "missed", "invented"])]
    lines.append("|---" * (len(METRICS) + 6) + "|")
    for row in report.summary:
        cells = [row["modality"], row["class"], row["method"], str(row["cases"])]
        for metric in METRICS:
            mean, sd = number_text(row[metric], metric), number_text(row[f"{metric}_sd"], metric)
            cells.append(f"{mean} ± {sd} {_seed_range(row, metric)}".rstrip())
        lines.append(_line([*cells, _count(row["missed"]), _count(row["invented"])]))
    lines += ["", f"## Differences to {_plain(report.reference_method)}", ""]
    lines += [_plain(report.not_compared), ""] if report.not_compared else []
    columns = [
        "metric",
        "modality",
        "class",
        "method",
        "difference",
        "95 % interval",
        "better / worse",
        "p",
        "p (Holm)",
    ]
    lines += [_line(columns), "|---" * len(columns) + "|"]
    for row in report.differences.to_dict("records"):
        of = [_title(row["metric"]), row["modality"], row["class"], row["method"]]
        counts = f"{row['better']} / {row['worse']}"
        lines.append(
            _line([*of, signed(row, "difference"), interval_text(row), counts, p_text(row["p"]), p_text(row["p_holm"])])
        )
    lines += ["", "## Definitions", "", *(line for text in DEFINITIONS for line in (text, ""))]
    file.write_text("\n".join(lines), encoding="utf-8")


def write_page(file: Path, report: Report) -> None:
    """Write the HTML page."""
    scores, differences = report.scores, report.differences
    methods = list(dict.fromkeys(report.cases["method"]))
    *single, last = dict.fromkeys(scores["class"]) or [""]
    classes = [last, *single]  # the mean of several comes first
    shown = scores[scores["class"] == classes[0]]
    patients = average_seeds(shown)
    modalities = list(dict.fromkeys(patients["modality"]))
    colors = colors_of(methods)
    curves = read_curves(report, classes[0])
    width = 4.2 * len(modalities) + 0.6
    plots = {}
    if methods:
        size = (width, 2.6 * len(PLOTTED) + 0.07 * max(map(len, methods)))
        plots["distributions"] = themed(lambda figure: plot_distributions(figure, patients, methods), size)
    if not (plotted := differences[differences["class"] == classes[0]]).empty:
        rows = len(plotted) // len(METRICS)
        plots["differences"] = themed(lambda figure: plot_differences(figure, plotted, methods), (9, 1 + 0.32 * rows))
    # modalities differ in their shares if cases lack some, but each of them needs two for a curve
    if (curves.groupby("modality")["share"].nunique() > 1).any():
        size = (width, 2.8 * len(PLOTTED) + 0.4)
        plots["curves"] = themed(lambda figure: plot_curves(figure, curves), size)
    if logged := [training for training in report.trainings if any(training.logs)]:
        size = (width, 2.6 * len(LOGGED) + 0.4)
        plots["trainings"] = themed(lambda figure: plot_trainings(figure, logged, colors), size)
    page = render_page(
        Path(__file__).with_name("leaderboard.html.jinja"),
        title=report.title,
        facts=report.facts,
        report=report,
        metrics=list(METRICS),
        definitions=DEFINITIONS,
        methods=methods,
        colors=colors,
        modalities=modalities,
        patients=patients.groupby("modality")["case"].nunique().to_dict(),
        classes=classes,
        several_seeds=any(row["seeds"] > 1 for row in report.summary),
        differences=differences.to_dict("records"),
        plots=plots,
        terms=_pictures_of_terms(report.trainings),
        overlays=[
            (of_modality, _draw_cases(of_modality.volumes, shown[shown["modality"] == of_modality.modality], colors))
            for of_modality in report.files
        ],
        title_of=_title,
        number=number_text,
        seed_range=_seed_range,
        count=_count,
        signed=signed,
        interval=interval_text,
        p=p_text,
    )
    file.write_text(page, encoding="utf-8")


def read_curves(report: Report, of_class: str) -> pd.DataFrame:
    """Patients of all tables whose labeled share is known, with the columns share (in %) and dataset."""
    parts = []
    for table in [report.cases, *report.others]:
        scores = score(table)
        patients = average_seeds(scores[scores["class"] == of_class])
        about = table.groupby(["method", "modality"], sort=False)[["dataset", "labeled", "unlabeled"]].first()
        about["share"] = 100 * about["labeled"] / (about["labeled"] + about["unlabeled"])
        parts.append(patients.join(about, on=["method", "modality"]).dropna(subset="share"))
    return pd.concat(parts, ignore_index=True)


def plot_distributions(figure: Figure, patients: pd.DataFrame, methods: Sequence[str]) -> None:
    """Every patient as a dot, median and quartiles as a box."""
    modalities = list(dict.fromkeys(patients["modality"]))
    colors, spread = colors_of(methods), np.random.default_rng(0)
    axes = figure.subplots(len(PLOTTED), len(modalities), sharex="col", sharey="row", squeeze=False)
    for row, metric in zip(axes, PLOTTED, strict=True):
        for axis, modality in zip(row, modalities, strict=True):
            present = patients[patients["modality"] == modality]
            shown = [method for method in methods if (present["method"] == method).any()]
            for place, method in enumerate(shown):
                values = present.loc[present["method"] == method, metric].to_numpy()
                axis.scatter(
                    place + spread.uniform(-0.18, 0.18, len(values)), values, color=colors[method], s=16, alpha=0.75
                )
                axis.boxplot(
                    values,
                    positions=[place],
                    widths=0.55,
                    showfliers=False,
                    boxprops={"color": colors[method], "linewidth": 1.5},
                    medianprops={"color": colors[method], "linewidth": 2.5},
                    whiskerprops={"color": colors[method]},
                    capprops={"color": colors[method]},
                )
            axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", rotation_mode="anchor")
            axis.set_xlim(-0.6, len(shown) - 0.4)
            _scale_axis(axis, metric)
            axis.grid(axis="y", alpha=0.25)
    for axis, modality in zip(axes[0], modalities, strict=True):
        axis.set_title(modality)
    for axis, metric in zip(axes[:, 0], PLOTTED, strict=True):
        axis.set_ylabel(f"{_title(metric)} per patient")


def _scale_axis(axis: Axes, metric: str) -> None:
    if METRICS[metric].higher_is_better:
        axis.set_ylim(-0.02, 1.02)
    else:
        alike: list[Axes] = axis.get_shared_y_axes().get_siblings(axis)
        top = 1.1 * max(0.0, *(a.dataLim.y1 for a in alike))
        if top > MM_LINEAR:  # missed patients are at the diagonal of the image, far from all others
            axis.set_yscale("symlog", linthresh=MM_LINEAR)
            axis.yaxis.set_major_locator(FixedLocator(MM_TICKS))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0, top or 1)


def plot_differences(figure: Figure, differences: pd.DataFrame, methods: Sequence[str]) -> None:
    """Mean difference and interval, a row per modality and method."""
    colors = colors_of(methods)
    for axis, metric in zip(figure.subplots(1, len(PLOTTED), sharey=True), PLOTTED, strict=True):
        rows = differences[differences["metric"] == metric].to_dict("records")
        for place, row in enumerate(rows):
            axis.plot([row["low"], row["high"]], [place, place], color=colors[row["method"]], linewidth=2.5)
            axis.plot(row["difference"], place, "o", color=colors[row["method"]], markersize=7)
        axis.axvline(0, color="#8a94a3", linewidth=1)
        axis.set_yticks(range(len(rows)), [f"{row['modality']}: {row['method']}" for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        better = "right" if METRICS[metric].higher_is_better else "left"
        axis.set_title(f"difference in {_title(metric)}, better to the {better}")
        axis.grid(axis="x", alpha=0.25)


def plot_curves(figure: Figure, patients: pd.DataFrame) -> None:
    """Mean over the patients and its interval against the labeled share."""
    modalities = list(dict.fromkeys(patients["modality"]))
    methods = list(dict.fromkeys(patients["method"]))
    axes = figure.subplots(len(PLOTTED), len(modalities), sharex=True, sharey="row", squeeze=False)
    for row, metric in zip(axes, PLOTTED, strict=True):
        for axis, modality in zip(row, modalities, strict=True):
            for i, method in enumerate(methods):
                selected = patients[(patients["modality"] == modality) & (patients["method"] == method)]
                shares = sorted(selected["share"].unique())
                values = [selected.loc[selected["share"] == share, metric].to_numpy() for share in shares]
                means = np.array([v.mean() for v in values])
                bounds = np.array([interval(v) for v in values]).reshape(-1, 2)
                axis.errorbar(
                    shares,
                    means,
                    yerr=np.abs(bounds.T - means),
                    color=COLORS[i % len(COLORS)],
                    marker=MARKERS[i % len(MARKERS)],
                    linewidth=2,
                    capsize=3,
                    label=f" {method}",  # a legend leaves out labels that begin with _
                )
            axis.grid(alpha=0.25)
            _scale_axis(axis, metric)
    for axis, modality in zip(axes[0], modalities, strict=True):
        axis.set_title(modality)
    for axis in axes[-1]:
        axis.set_xlabel("labeled share of the training cases (%)")
    for axis, metric in zip(axes[:, 0], PLOTTED, strict=True):
        axis.set_ylabel(f"mean {_title(metric)}")
    axes[0, -1].legend(fontsize=8)


def plot_trainings(figure: Figure, trainings: Sequence[Training], colors: Mapping[str, str]) -> None:
    """What nnU-Net logs, per epoch, as the mean of the folds; a second stage after the epochs of its first one."""
    modalities = list(dict.fromkeys(training.modality for training in trainings))
    axes = figure.subplots(len(LOGGED), len(modalities), sharex="col", sharey="row", squeeze=False)
    for row, (key, title) in zip(axes, LOGGED.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, modality in zip(row, modalities, strict=True):
            for training in trainings:
                if training.modality != modality or not (folds := [log[key] for log in training.logs if key in log]):
                    continue
                mean = np.mean([values[: min(map(len, folds))] for values in folds], axis=0)
                epochs = np.arange(len(mean)) + training.epochs_before + 1
                marker = "o" if len(mean) < 30 else ""
                axis.plot(epochs, mean, color=colors[training.method], marker=marker, markersize=3, linewidth=1.8)
            axis.grid(alpha=0.25)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for axis, modality in zip(axes[0], modalities, strict=True):
        axis.set_title(modality)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")


def _pictures_of_terms(trainings: Sequence[Training]) -> dict[str, str]:
    """Title -> picture, one for all modalities that a method trains together."""
    modalities: dict[tuple[str, Path], list[str]] = {}
    for training in trainings:
        if training.terms:
            modalities.setdefault((training.method, training.terms), []).append(training.modality)
    number = Counter(method for method, _ in modalities)
    return {
        method if number[method] == 1 else f"{method}, {' + '.join(of_picture)}": data_uri(picture.read_bytes())
        for (method, picture), of_picture in modalities.items()
    }


def _draw_cases(volumes: Volumes, scores: pd.DataFrame, colors: Mapping[str, str]) -> list[CasePanels]:
    """Median and worst patient by the mean Dice of all methods; Dice is that of the predictions shown (first seed)."""
    dice = scores.drop_duplicates(["method", "case"]).pivot(index="case", columns="method", values="dice")
    ranked = dice.mean(axis=1).sort_values(kind="stable").index
    chosen = {"median": ranked[(len(ranked) - 1) // 2], "worst": ranked[0]}
    shown = dice[list(volumes.predictions)]
    return [draw_case(rank, case, volumes, shown.loc[case].to_dict(), colors) for rank, case in chosen.items()]


def _title(metric: str) -> str:
    unit = METRICS[metric].unit
    return METRICS[metric].title + (f" ({unit})" if unit else "")


def number_text(value: float, metric: str, sign: str = "") -> str:
    """A value of a metric, with two digits of a millimeter or three of a share; `sign` is "+" for differences."""
    if np.isnan(value):
        return "n/a"
    return f"{value:{sign}.{2 if METRICS[metric].unit else 3}f}".replace("-", "−")


def _seed_range(row: Mapping[str, Any], metric: str) -> str:
    if row["seeds"] == 1:
        return ""
    return f"({number_text(row[f'{metric}_low'], metric)} … {number_text(row[f'{metric}_high'], metric)})"


def signed(row: Mapping[str, Any], column: str) -> str:
    """A difference, or a bound of its interval, of a row of `compare`."""
    return number_text(row[column], row["metric"], "+")


def interval_text(row: Mapping[str, Any]) -> str:
    """The interval of a row of `compare`."""
    return f"{signed(row, 'low')} … {signed(row, 'high')}"


def p_text(value: float) -> str:
    """A p value, to three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line; underscores within words mean nothing there."""
    return re.sub(r"([\\`*\[\]<>&|$~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
