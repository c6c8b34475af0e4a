"""The picture of the unsupervised terms beside nnU-Net's progress.png."""

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from nnunetv2_semicml.data.files import written_whole


def plot_terms(logging: Mapping[str, Sequence[float]], filename: str) -> None:
    """Plot, for every logged unsupervised term, its mean per epoch and its ramped weight.

    Args:
        logging: nnU-Net's log with the keys "unsupervised/<term>" and "weight/<term>", one value per epoch each.
        filename: the PNG to write.
    """
    terms = [key.split("/", 1)[1] for key in logging if key.startswith("unsupervised/")]
    with plt.style.context("default"):  # nnU-Net has set letters for a picture many times as large
        figure, axes = plt.subplots(len(terms), 1, figsize=(8, 3 * len(terms)), squeeze=False, layout="constrained")
        for axis, term in zip(axes[:, 0], terms, strict=True):
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
        with written_whole(filename) as unfinished:
            figure.savefig(unfinished, format="png")
        plt.close(figure)
