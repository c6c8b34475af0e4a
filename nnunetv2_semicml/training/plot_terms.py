"""The picture of the unsupervised terms and of the pseudo-labels, beside nnU-Net's progress.png."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from nnunetv2_semicml.data.files import written_whole
from nnunetv2_semicml.training.class_volumes import LABELED, PSEUDO


def plot_terms(logging: Mapping[str, Sequence[Any]], filename: str) -> None:
    """Plot what a method has logged; nothing is written if that is nothing.

    Args:
        logging: nnU-Net's log with the keys "unsupervised/<term>" and "weight/<term>" of every term, and those of
            `class_volumes` of every network that learns from pseudo-labels, one value or list per epoch each.
        filename: the PNG to write.
    """
    terms = [key.split("/", 1)[1] for key in logging if key.startswith("unsupervised/")]
    taught = [key.removeprefix(PSEUDO) for key in logging if key.startswith(PSEUDO)]
    rows = len(terms) + len(taught)
    if not rows:
        return
    with plt.style.context("default"):  # nnU-Net has set letters for a picture many times as large
        figure, axes = plt.subplots(rows, 1, figsize=(8, 3 * rows), squeeze=False, layout="constrained")
        for axis, term in zip(axes[: len(terms), 0], terms, strict=True):
            epochs = range(len(logging[f"unsupervised/{term}"]))
            # a term of a single epoch is a point
            axis.plot(epochs, logging[f"unsupervised/{term}"], ".-", color="tab:blue", label=f"{term} (unweighted)")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="epoch", ylabel="loss")
            weight_axis = axis.twinx()
            weight_axis.plot(epochs, logging[f"weight/{term}"], color="tab:gray", linestyle="dashed", label="weight")
            weight_axis.set(ylabel="weight", ylim=(0, None))
            weight_axis.grid(False)
            lines = axis.get_lines() + weight_axis.get_lines()
            axis.legend(lines, [line.get_label() for line in lines], loc="best")
        for axis, name in zip(axes[len(terms) :, 0], taught, strict=True):
            for kind, style in ((PSEUDO, ".-"), (LABELED, ".:")):
                for number, shares in enumerate(zip(*logging[kind + name], strict=True)):
                    label = f"class {number + 1}, {'pseudo-labels' if kind == PSEUDO else 'labels'}"
                    axis.plot(range(len(shares)), shares, style, color=f"C{number}", label=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="epoch", ylabel="share of voxels", title=f"what {name} learns from", ylim=(0, None))
            axis.legend(loc="best")
        with written_whole(filename) as unfinished:
            figure.savefig(unfinished, format="png")
        plt.close(figure)
