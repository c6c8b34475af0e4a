"""One self-contained HTML page that compares methods, each with the one before it, on the test cases of every modality.

It reads nnU-Net's `summary.json` files, the images and segmentations they name, and training logs as plain dicts; it
knows nothing of trainers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation import figures
from nnunetv2_semicml.evaluation.figures import COLORS, REFERENCE_COLOR, overlay, themed

METHOD_COLOURS = COLORS[:4]
TERM_COLOURS = ("#cc79a7", "#009e73", "#0072b2", "#d55e00", "#8a6d00", "#7a7a7a")


@dataclass(frozen=True)
class ModalityResults:
    """What the page shows of one modality.

    Attributes:
        name: the modality.
        images: folder of its test scans, CASE_0000.nii.gz.
        summaries: for each method, nnU-Net's summary.json of the test cases; at most four methods.
        logs: for each method, the log of its training as nnU-Net keeps it (`checkpoint["logging"]`).
        epochs_before: for a method that goes on from another's networks, the epochs of that one.
    """

    name: str
    images: Path
    summaries: Mapping[str, Path]
    logs: Mapping[str, Mapping[str, Sequence]]
    epochs_before: Mapping[str, int]


@dataclass(frozen=True)
class _Case:
    """Dice of one test case by method, and the files to look at."""

    name: str
    dice: dict[str, float]
    reference: Path
    predictions: dict[str, Path]


def write_report(
    file: Path,
    title: str,
    facts: Mapping[str, str],
    modalities: Sequence[ModalityResults],
    explanation: str,
    joint_logs: Mapping[str, tuple[str, Mapping[str, Sequence[float]]]],
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
        joint_logs: for each method that has one, what to see in the log of the joint training, and that log; every list
            under a key "unsupervised/…" (mean loss term per epoch) and "weight/…" (its weight) is plotted.
        exports: shell lines that set the environment of the commands.
        commands: the command lines that led here, with their seconds.

    Returns:
        The file.

    Raises:
        UserError: the summaries of a modality do not have the same cases.
    """
    methods = list(modalities[0].summaries)
    cases = {modality.name: _read_cases(modality) for modality in modalities}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(module).parent for module in (__file__, figures.__file__)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    page = environment.get_template("report.html.jinja").render(
        title=title,
        facts=facts,
        methods=methods,
        steps=list(pairwise(methods)),
        colours={**dict(zip(methods, METHOD_COLOURS, strict=False)), "reference": REFERENCE_COLOR},
        rows=[_row(name, of_modality, methods) for name, of_modality in cases.items()],
        cases=cases,
        paired=themed(lambda figure: _plot_paired(figure, cases, methods), (4.2 * len(cases) + 0.6, 3.4)),
        curves={m.name: themed(lambda figure, m=m: _plot_curves(figure, m), (8.4, 2.8)) for m in modalities},
        explanation=explanation,
        terms={
            method: (note, themed(lambda figure, log=log: _plot_terms(figure, log), (8.4, 2.8)))
            for method, (note, log) in joint_logs.items()
        },
        overlays={m.name: _overlays(m, cases[m.name], methods[-1]) for m in modalities},
        exports=exports,
        commands=commands,
    )
    file.write_text(page, encoding="utf-8")
    return file


def _read_cases(modality: ModalityResults) -> list[_Case]:
    read: dict[str, dict[str, dict]] = {}
    for method, file in modality.summaries.items():
        for entry in json.loads(file.read_text())["metric_per_case"]:
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
            Path(next(iter(by_method.values()))["reference_file"]),
            {method: Path(by_method[method]["prediction_file"]) for method in modality.summaries},
        )
        for name, by_method in sorted(read.items())
    ]


def _mean_dice(metrics: dict[str, dict[str, float]]) -> float:
    """Mean over classes or regions; nnU-Net writes NaN for a class that neither has, which is left out."""
    return float(np.nanmean([values["Dice"] for values in metrics.values()]))


def _row(modality: str, cases: Sequence[_Case], methods: Sequence[str]) -> dict:
    dice = {method: np.array([case.dice[method] for case in cases]) for method in methods}
    differences = {(first, second): dice[second] - dice[first] for first, second in pairwise(methods)}
    return {
        "modality": modality,
        "dice": {method: (values.mean(), values.std(ddof=1)) for method, values in dice.items()},
        "differences": {step: (d.mean(), d.std(ddof=1), int((d > 0).sum())) for step, d in differences.items()},
        "cases": len(cases),
    }


def _plot_paired(figure: Figure, cases: Mapping[str, Sequence[_Case]], methods: Sequence[str]) -> None:
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    columns = np.arange(len(methods))
    for axis, (modality, of_modality) in zip(axes, cases.items(), strict=True):
        dice = np.array([[case.dice[method] for method in methods] for case in of_modality])
        axis.plot(columns, dice.T, color="#8a94a3", linewidth=1, zorder=1)
        for column, colour in zip(columns, METHOD_COLOURS, strict=False):
            axis.scatter(np.full(len(dice), column), dice[:, column], color=colour, s=34, zorder=2)
            axis.plot([column - 0.22, column + 0.22], [dice[:, column].mean()] * 2, color=colour, linewidth=3)
        axis.set(title=modality, xlim=(-0.5, columns[-1] + 0.5), ylim=(-0.02, 1.02))
        axis.set_xticks(columns, methods)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("Dice per test case")


def _plot_curves(figure: Figure, modality: ModalityResults) -> None:
    panels = (("mean_fg_dice", "pseudo Dice (validation patches)"), ("train_losses", "supervised training loss"))
    for axis, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for (method, log), colour in zip(modality.logs.items(), METHOD_COLOURS, strict=False):
            before = modality.epochs_before.get(method, 0)
            _plot_epochs(axis, log[key], color=colour, label=method, before=before)
        axis.set(title=label)
        if key == "mean_fg_dice":
            axis.set_ylim(0, 1)
            axis.legend(loc="lower right")


def _plot_terms(figure: Figure, log: Mapping[str, Sequence[float]]) -> None:
    panels = (("unsupervised/", "unweighted terms ÷ their largest value"), ("weight/", "weights"))
    for axis, (prefix, title) in zip(figure.subplots(1, 2), panels, strict=True):
        terms = [key.removeprefix(prefix) for key in log if key.startswith(prefix)]
        for number, term in enumerate(terms):
            values = np.array(log[prefix + term])
            label = term
            if prefix == "unsupervised/":
                # Terms differ by orders of magnitude: each is drawn relative to its own largest value, which is named.
                largest = np.nanmax(np.abs(values), initial=0)
                label = f"{term} (1 is {largest:.3g})"
                values = values / largest if largest > 0 else values
            _plot_epochs(axis, values, color=TERM_COLOURS[number % len(TERM_COLOURS)], label=label)
        axis.set(title=title)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)


def _plot_epochs(axis: Axes, values: Sequence[float], color: str, label: str, before: int = 0) -> None:
    axis.plot(
        range(before + 1, before + len(values) + 1),
        values,
        color=color,
        label=label,
        linewidth=2,
        marker="o",
        markersize=3,
    )
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)


def _overlays(modality: ModalityResults, cases: Sequence[_Case], judged_by: str) -> list[dict]:
    """Worst, median and best case by one method's Dice, each in the slice with the largest reference area."""
    ranked = sorted(cases, key=lambda case: case.dice[judged_by])
    chosen = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    overlays = []
    for rank, case in chosen.items():
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(modality.images / f"{case.name}_0000.nii.gz")))
        reference_image = sitk.ReadImage(str(case.reference))
        spacing = reference_image.GetSpacing()[1::-1]
        reference = sitk.GetArrayFromImage(reference_image) > 0
        z = int(reference.sum((1, 2)).argmax())
        panels = {"scan": overlay(image[z], [], spacing)}
        for (method, file), colour in zip(case.predictions.items(), METHOD_COLOURS, strict=False):
            prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(file))) > 0
            outlines = [(reference[z], REFERENCE_COLOR, 1.2), (prediction[z], colour, 1.8)]
            panels[method] = overlay(image[z], outlines, spacing)
        place = {"rank": rank, "case": case.name, "slice": z + 1, "slices": len(image)}
        overlays.append({**place, "dice": case.dice, "panels": panels})
    return overlays
