"""One self-contained HTML page that compares methods, each with the one before it, on the test cases of every modality.

It reads nnU-Net's `summary.json` files, the images and segmentations that they name, training logs as plain dicts, and
pictures that training left; it knows nothing of trainers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_semicml.data.files import read_json, written_whole
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.figures import CasePanels, Volumes, colors_of, data_uri, draw_case, themed
from nnunetv2_semicml.evaluation.leaderboard_page import number_text
from nnunetv2_semicml.evaluation.page import render_page


@dataclass(frozen=True)
class ModalityResults:
    """What the page shows of one modality.

    Attributes:
        name: the modality.
        images: folder of its test scans, CASE_0000.nii.gz.
        summaries: for each method, nnU-Net's summary.json of the test cases, in the folder of its predictions.
        logs: for each method, the log of its training as nnU-Net keeps it (`checkpoint["logging"]`).
        epochs_before: for a method that goes on from another's networks, the epochs of that one.
    """

    name: str
    images: Path
    summaries: Mapping[str, Path]
    logs: Mapping[str, Mapping[str, Sequence[float]]]
    epochs_before: Mapping[str, int]


@dataclass(frozen=True)
class _Case:
    """Dice of one test case by method, and its reference segmentation."""

    name: str
    dice: dict[str, float]
    reference: str


class _Row(TypedDict):
    """A modality in the table of the page: method or step -> (mean, standard deviation, …)."""

    modality: str
    dice: dict[str, tuple[float, float]]
    differences: dict[tuple[str, str], tuple[float, float, int]]
    cases: int


class _CaseSummary(TypedDict):
    """An entry of "metric_per_case" in nnU-Net's summary.json."""

    reference_file: str
    prediction_file: str
    metrics: dict[str, dict[str, float]]


def write_report(
    file: Path,
    title: str,
    facts: Mapping[str, str],
    modalities: Sequence[ModalityResults],
    explanation: str,
    term_plots: Mapping[str, tuple[str, Path]],
    exports: Sequence[str],
    commands: Sequence[tuple[str, float]],
) -> Path:
    """Write the page.

    Args:
        file: the HTML file.
        title: its heading.
        facts: what was run, name → value.
        modalities: results of every modality; all have the same methods and the same cases.
        explanation: what the methods have in common and what not.
        term_plots: for each method that has one, what to see in the picture of its unsupervised terms, and that PNG.
        exports: shell lines that set the environment of the commands.
        commands: the command lines that led here, with their seconds.

    Returns:
        The file.

    Raises:
        UserError: the summaries of a modality do not have the same cases.
    """
    methods = list(modalities[0].summaries)
    cases = {modality.name: _read_cases(modality) for modality in modalities}
    colors = colors_of(methods)
    page = render_page(
        Path(__file__).with_name("report.html.jinja"),
        title=title,
        facts=facts,
        methods=methods,
        steps=list(pairwise(methods)),
        colors=colors,
        rows=[_row(name, of_modality, methods) for name, of_modality in cases.items()],
        cases=cases,
        paired=themed(lambda figure: _plot_paired(figure, cases, colors), (4.2 * len(cases) + 0.6, 3.4)),
        curves={m.name: themed(partial(_plot_curves, modality=m, colors=colors), (8.4, 2.8)) for m in modalities},
        explanation=explanation,
        terms={method: (note, data_uri(png.read_bytes())) for method, (note, png) in term_plots.items()},
        overlays={m.name: _draw_cases(m, cases[m.name], methods[-1], colors) for m in modalities},
        exports=exports,
        commands=commands,
        signed=lambda difference: number_text(difference, "dice", "+"),
    )
    with written_whole(file) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return file


def _read_cases(modality: ModalityResults) -> list[_Case]:
    read: dict[str, dict[str, _CaseSummary]] = {}
    for method, file in modality.summaries.items():
        for entry in read_json(file)["metric_per_case"]:
            read.setdefault(Path(entry["reference_file"]).name.split(".")[0], {})[method] = entry
    for name, by_method in read.items():
        if by_method.keys() != modality.summaries.keys():
            raise UserError(
                " and ".join(map(str, modality.summaries.values())),
                f"case {name} only for {', '.join(by_method)}",
                "the same cases for every method",
                "Predict and evaluate the same test scans with both.",
            )
    return [
        _Case(
            name,
            {method: _mean_dice(by_method[method]["metrics"]) for method in modality.summaries},
            next(iter(by_method.values()))["reference_file"],
        )
        for name, by_method in sorted(read.items())
    ]


def _mean_dice(metrics: dict[str, dict[str, float]]) -> float:
    """Mean over classes or regions; nnU-Net writes NaN for a class that neither has, which is left out."""
    return float(np.nanmean([values["Dice"] for values in metrics.values()]))


def _row(modality: str, cases: Sequence[_Case], methods: Sequence[str]) -> _Row:
    dice = {method: np.array([case.dice[method] for case in cases]) for method in methods}
    differences = {(first, second): dice[second] - dice[first] for first, second in pairwise(methods)}
    return {
        "modality": modality,
        "dice": {method: (values.mean(), values.std(ddof=1)) for method, values in dice.items()},
        "differences": {step: (d.mean(), d.std(ddof=1), int((d > 0).sum())) for step, d in differences.items()},
        "cases": len(cases),
    }


def _plot_paired(figure: Figure, cases: Mapping[str, Sequence[_Case]], colors: Mapping[str, str]) -> None:
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    columns = np.arange(len(colors))
    for axis, (modality, of_modality) in zip(axes, cases.items(), strict=True):
        dice = np.array([[case.dice[method] for method in colors] for case in of_modality])
        axis.plot(columns, dice.T, color="#8a94a3", linewidth=1, zorder=1)
        for column, color in zip(columns, colors.values(), strict=True):
            axis.scatter(np.full(len(dice), column), dice[:, column], color=color, s=34, zorder=2)
            axis.plot([column - 0.22, column + 0.22], [dice[:, column].mean()] * 2, color=color, linewidth=3)
        axis.set(title=modality, xlim=(-0.5, columns[-1] + 0.5), ylim=(-0.02, 1.02))
        axis.set_xticks(columns, list(colors))
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("Dice per test case")


def _plot_curves(figure: Figure, modality: ModalityResults, colors: Mapping[str, str]) -> None:
    panels = (("mean_fg_dice", "pseudo Dice (validation patches)"), ("train_losses", "supervised training loss"))
    for axis, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for method, log in modality.logs.items():
            first = modality.epochs_before.get(method, 0) + 1
            epochs = range(first, first + len(log[key]))
            axis.plot(epochs, log[key], color=colors[method], label=method, linewidth=2, marker="o", markersize=3)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.grid(alpha=0.25)
        if key == "mean_fg_dice":
            axis.set_ylim(0, 1)
            axis.legend(loc="lower right")


def _draw_cases(
    modality: ModalityResults, cases: Sequence[_Case], judged_by: str, colors: Mapping[str, str]
) -> list[CasePanels]:
    """Worst, median and best case by one method's Dice."""
    ranked = sorted(cases, key=lambda case: case.dice[judged_by])
    chosen = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    volumes = Volumes(
        {case.name: str(modality.images / f"{case.name}_0000.nii.gz") for case in cases},
        {case.name: case.reference for case in cases},
        {method: summary.parent for method, summary in modality.summaries.items()},
        ".nii.gz",
        SimpleITKIO(),
    )
    return [draw_case(rank, case.name, volumes, case.dice, colors) for rank, case in chosen.items()]
