"""Images inside of pages that need no other file: plots with ink for light and dark pages, outlines on scans.

Of nnU-Net it knows the readers of images alone, and of the package `reading`.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semicml.data.reading import read_image, require_grid

# Okabe and Ito's colors, which people with color vision deficiencies can tell apart too.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#8a6d00", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # beside the colors, for prints without them
REFERENCE_COLOR = "#ffffff"
_INK = {"light": "#3a4250", "dark": "#c9d1dc"}


@dataclass(frozen=True)
class Volumes:
    """The images of one modality, and segmentations of them.

    Attributes:
        scans: case -> image file, of the cases that have the modality; the mean of its channels is shown.
        references: case -> reference segmentation.
        predictions: method -> folder.
        file_ending: of the predictions.
        reader: for all of these.
    """

    scans: Mapping[str, str]
    references: Mapping[str, str]
    predictions: Mapping[str, Path]
    file_ending: str
    reader: BaseReaderWriter


@dataclass(frozen=True)
class Disagreement:
    """A slice of one case in all of its modalities, with what each of their networks outlines: where they differ most.

    Attributes:
        case: its name.
        slice: number of the slice, from 1.
        slices: how many there are.
        panels: modality -> its scan with the outlines of all, as data URI.
    """

    case: str
    slice: int
    slices: int
    panels: Mapping[str, str]


@dataclass(frozen=True)
class CasePanels:
    """A slice of one case for a page: the one with the largest reference area.

    Attributes:
        rank: what the case stands for, e.g. worst.
        case: its name.
        slice: number of the slice, from 1.
        slices: how many there are.
        scan: the slice, as data URI.
        panels: method -> the same with the outlines of reference and prediction.
        dice: method -> Dice of the case.
    """

    rank: str
    case: str
    slice: int
    slices: int
    scan: str
    panels: Mapping[str, str]
    dice: Mapping[str, float]


def colors_of(methods: Sequence[str]) -> dict[str, str]:
    """A color for every method, repeated where there are more methods than colors."""
    return {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}


def data_uri(png: bytes) -> str:
    """A PNG file for the inside of a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _draw(figure: Figure, transparent: bool = False) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=transparent)
    return data_uri(buffer.getvalue())


def themed(plot: Callable[[Figure], None], size: tuple[float, float]) -> dict[str, str | int]:
    """Draw a plot twice.

    Args:
        plot: draws into an empty figure.
        size: width and height, in inches; an inch is 100 pixels of the page.

    Returns:
        "light" and "dark": data URIs of transparent images with ink for such a page; "width" on the page in pixels.
    """
    images: dict[str, str | int] = {"width": round(100 * size[0])}
    for theme, ink in _INK.items():
        settings: dict[str, Any] = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "font.size": 9,
            "legend.frameon": False,
            "text.parse_math": False,  # names of methods and modalities may hold $
            "figure.constrained_layout.use": True,
        }
        with style.context(["default", settings]):  # nnU-Net sets large letters where it has plotted
            figure = Figure(figsize=size)
            plot(figure)
            images[theme] = _draw(figure, transparent=True)
    return images


def draw_case(
    rank: str, case: str, volumes: Volumes, dice: Mapping[str, float], colors: Mapping[str, str]
) -> CasePanels:
    """Draw the outlines of a case.

    Args:
        rank: what it stands for.
        case: its name.
        volumes: the images and segmentations of its modality.
        dice: method -> Dice of the case.
        colors: method -> color of its outlines.

    Raises:
        UserError: one of the files cannot be read, or a segmentation does not lie on the grid of the scan.
    """
    image, grid = read_image(volumes.scans[case], volumes.reader)
    scan, spacing = image.mean(0), grid.spacing[1:].tolist()

    def read_segmentation(file: str | Path) -> np.ndarray:
        label, own_grid = read_image(file, volumes.reader, is_label=True)
        require_grid(file, own_grid, volumes.scans[case], grid)
        return label[0]

    reference = read_segmentation(volumes.references[case])
    z = int((reference > 0).sum((1, 2)).argmax())
    panels = {}
    for method, folder in volumes.predictions.items():
        prediction = read_segmentation(folder / f"{case}{volumes.file_ending}")
        outlines = [(reference[z], REFERENCE_COLOR, 1.2), (prediction[z], colors[method], 1.8)]
        panels[method] = _overlay(scan[z], outlines, spacing)
    return CasePanels(rank, case, z + 1, len(reference), _overlay(scan[z], [], spacing), panels, dice)


def draw_disagreement(
    case: str, scans: Mapping[str, str], predictions: Mapping[str, Path], reader: BaseReaderWriter
) -> Disagreement:
    """Draw the slice in which the predictions of a case differ in most voxels or, of one modality, show most.

    Args:
        case: its name.
        scans: modality -> image file; the mean of its channels is shown.
        predictions: modality -> segmentation, all on one grid.
        reader: for all of these.

    Raises:
        UserError: one of the files cannot be read, or a segmentation does not lie on the grid of its scan.
    """
    images, segmentations = {}, {}
    for modality, file in scans.items():
        image, grid = read_image(file, reader)
        label, own_grid = read_image(predictions[modality], reader, is_label=True)
        require_grid(predictions[modality], own_grid, file, grid)
        images[modality], segmentations[modality] = (image.mean(0), grid.spacing[1:].tolist()), label[0]
    all_of = np.stack(list(segmentations.values()))
    shown = (all_of != all_of[:1]).any(0)
    z = int((shown if shown.any() else all_of.any(0)).sum((1, 2)).argmax())
    colors = colors_of(list(segmentations))
    outlines = [(segmentation[z], colors[modality], 1.6) for modality, segmentation in segmentations.items()]
    panels = {modality: _overlay(image[z], outlines, spacing) for modality, (image, spacing) in images.items()}
    return Disagreement(case, z + 1, len(shown), panels)


def _overlay(image: np.ndarray, outlines: Sequence[tuple[np.ndarray, str, float]], spacing: Sequence[float]) -> str:
    """Draw outlines on a slice, cropped to the scanned field.

    Args:
        image: shape (Y, X), 0 where nothing was scanned.
        outlines: (label map of that shape, color, line width) each; every label has an outline of its own.
        spacing: of Y and X, in mm.

    Returns:
        A square image as data URI.
    """
    rows, columns = (np.flatnonzero((image != 0).any(axis)) for axis in (1, 0))
    crop = slice(None), slice(None)
    if len(rows):
        crop = slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)
    image = image[crop]
    height, width = image.shape[0] * spacing[0], image.shape[1] * spacing[1]
    scale = max(height, width)
    figure = Figure(figsize=(2.2, 2.2), facecolor="black")
    axis = figure.add_axes((0.5 - width / scale / 2, 0.5 - height / scale / 2, width / scale, height / scale))
    axis.set_axis_off()
    # the axes already have the proportions of the slice in mm
    low, high = np.percentile(image, (0.5, 99.5))
    axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bicubic", aspect="auto")
    for labels, color, line_width in outlines:
        cropped = labels[crop]
        for label in np.unique(cropped[cropped > 0]):
            outline = axis.contour(cropped == label, [0.5], colors=color, linewidths=line_width)
            outline.set_path_effects([withStroke(linewidth=line_width + 1.2, foreground="#000000a0")])
    return _draw(figure)
