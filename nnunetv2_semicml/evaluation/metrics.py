"""Metrics of one case, in 3D: Dice, PPV, sensitivity, ASD, HD95.

Overlap is counted by nnU-Net's own functions, so that Dice is that of its summary.json. Surface distances are those of
MONAI, between surface elements that are weighted by their area (Nikolov et al., J. Med. Internet Res. 23:e26151, 2021):
counting boundary voxels instead would, where slices are thick, give the few voxels of a large face too little weight.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semicml.data.reading import read_image, require_grid
from nnunetv2_semicml.errors import UserError


@dataclass(frozen=True)
class Metric:
    """One of the columns.

    Attributes:
        title: for tables and axes.
        unit: "mm" or nothing.
        best: the value of a perfect segmentation.
    """

    title: str
    unit: str
    best: float

    @property
    def higher_is_better(self) -> bool:
        """Of overlaps, not of distances."""
        return self.best == 1


METRICS = {
    "dice": Metric("Dice", "", 1),
    "ppv": Metric("PPV", "", 1),
    "sensitivity": Metric("Sensitivity", "", 1),
    "asd": Metric("ASD", "mm", 0),
    "hd95": Metric("HD95", "mm", 0),
}


def compute_metrics(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Compare two masks.

    With TP, FP, FN in voxels: Dice = 2 TP / (2 TP + FP + FN), PPV = TP / (TP + FP), sensitivity = TP / (TP + FN). With
    the distance of every surface element of one mask to the nearest one of the other:
    ASD, the average symmetric surface distance, is the mean over the elements of both surfaces together;
    HD95 is the larger of the 95th percentiles of the two directions. Both as in Metrics Reloaded (Maier-Hein et al.,
    Nat. Methods 21:195, 2024), and every element counts by its area. Elements lie on the corners of voxels, which makes
    distances exact to about half a voxel. A surface includes where a mask meets the border of the image. A single slice
    is compared in its plane, by contours and their lengths.

    Args:
        reference: bool, shape (Z, Y, X).
        prediction: bool, of the same shape.
        spacing: of the axes of these arrays, in mm.

    Returns:
        The metrics by the names of `METRICS`, distances in mm; NaN where the formula has no value, which is all of them
        if both masks are empty, and some if one is (`fill_undefined` says what such a case counts for). Besides n_ref
        and n_pred, the voxels of the two masks, and the diagonal of the image in mm.
    """
    tp, fp, fn, _ = map(int, compute_tp_fp_fn_tn(reference, prediction))
    asd, hd95 = _surface_distances(reference, prediction, spacing) if tp + fn and tp + fp else (np.nan, np.nan)
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "ppv": _ratio(tp, tp + fp),
        "sensitivity": _ratio(tp, tp + fn),
        "asd": asd,
        "hd95": hd95,
        "n_ref": tp + fn,
        "n_pred": tp + fp,
        "diagonal": float(np.linalg.norm([n * s for n, s in zip(reference.shape, spacing, strict=True) if n > 1])),
    }


def fill_undefined(metrics: Mapping[str, float]) -> dict[str, float]:
    """Give metrics that `compute_metrics` found undefined the value that enters means and tests.

    Nothing to find and nothing found is right: 1, or 0 mm. Where only one of the masks is empty, a lesion was missed or
    invented: 0, or the diagonal of the image, a distance that no found lesion can exceed. Leaving such cases out would
    reward a method for finding nothing where it is unsure, and would compare methods on different patients.
    """
    right = metrics["n_ref"] == metrics["n_pred"] == 0
    filled = dict(metrics)
    for name, metric in METRICS.items():
        if np.isnan(metrics[name]):
            worst = 0 if metric.higher_is_better else metrics["diagonal"]
            filled[name] = metric.best if right else worst
    return filled


def evaluate_files(
    reference_file: Path,
    prediction_file: Path,
    reader: BaseReaderWriter,
    labels: Mapping[str, int | Sequence[int]],
) -> dict[str, dict[str, float]]:
    """Compare two label maps.

    Args:
        reference_file: the reference segmentation.
        prediction_file: the prediction, on the same grid.
        reader: nnU-Net's reader for these files.
        labels: "labels" of dataset.json: name -> value, or values of a region; voxels of the reference that have the
            value of "ignore" are left out, as in nnU-Net.

    Returns:
        For every class or region but the background, what `compute_metrics` returns.

    Raises:
        UserError: one of the files cannot be read or has values that are not in `labels`, or the prediction lies on
            another grid than the reference.
    """
    reference, expected = read_image(reference_file, reader, is_label=True)
    prediction, found = read_image(prediction_file, reader, is_label=True)
    require_grid(prediction_file, found, reference_file, expected)
    known = np.hstack([value for name, value in labels.items() if name != "ignore"])
    _require_values(prediction_file, prediction, known)
    _require_values(reference_file, reference, np.hstack([*labels.values()]))
    counted = reference[0] != labels["ignore"] if "ignore" in labels else True
    return {
        name: compute_metrics(
            region_or_label_to_mask(reference[0], value) & counted,
            region_or_label_to_mask(prediction[0], value) & counted,
            expected.spacing.tolist(),
        )
        for name, value in classes_of(labels).items()
    }


def classes_of(labels: Mapping[str, int | Sequence[int]]) -> dict[str, int | tuple[int, ...]]:
    """The classes or regions that nnU-Net evaluates, name -> value or values."""
    return {
        name: tuple(value) if isinstance(value, Collection) else int(value)
        for name, value in labels.items()
        if name not in ("background", "ignore")
    }


def _require_values(file: Path, label: np.ndarray, known: np.ndarray) -> None:
    if unknown := np.setdiff1d(label, known).tolist():
        raise UserError(
            file,
            f"the label values {', '.join(f'{value:g}' for value in unknown)}",
            f"only {', '.join(map(str, np.unique(known).tolist()))}, as in dataset.json",
            "Convert the labels to those of the dataset.",
        )


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else np.nan


def _surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """ASD and HD95 of two masks that are not empty."""
    # Imported here because this takes seconds, which a process that only compares tables need not wait.
    import torch
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    # a single slice has no surface but a contour
    extended = [axis for axis, length in enumerate(reference.shape) if length > 1]
    spacing = [float(spacing[axis]) for axis in extended]
    shape = [reference.shape[axis] for axis in extended]
    masks = [torch.from_numpy(mask.reshape(shape)) for mask in (reference, prediction)]
    *edges, of_reference, of_prediction = get_mask_edges(*masks, spacing=spacing)
    distances, areas, percentiles = [], [], []
    for (own, other), area in zip((edges, edges[::-1]), (of_reference, of_prediction), strict=True):
        distance = np.asarray(get_surface_distance(own, other, spacing=spacing), dtype=float)
        weight = np.asarray(area[own], dtype=float)
        order = distance.argsort()
        share = weight[order].cumsum() / weight.sum()
        percentiles.append(distance[order][np.searchsorted(share, 0.95)])
        distances.append(distance)
        areas.append(weight)
    asd = np.average(np.concatenate(distances), weights=np.concatenate(areas))
    return float(asd), float(max(percentiles))
