"""Figures for pages that need no other file: plots with ink for light and dark pages, outlines on scans.

Matplotlib and NumPy alone; knows nothing of nnU-Net.
"""

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

# Okabe and Ito's colors, which people with color vision deficiencies can tell apart too.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#8a6d00", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # beside the colors, for prints without them
REFERENCE_COLOR = "#ffffff"
_INK = {"light": "#3a4250", "dark": "#c9d1dc"}


def png(figure: Figure, **options: object) -> str:
    """A figure as data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
        style = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "font.size": 9,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
        with rc_context(style):
            figure = Figure(figsize=size)
            plot(figure)
            images[theme] = png(figure, transparent=True)
    return images


def overlay(image: np.ndarray, outlines: Sequence[tuple[np.ndarray, str, float]], spacing: Sequence[float]) -> str:
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
    return png(figure)
