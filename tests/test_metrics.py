"""Metrics of a case: closed forms, a slow implementation from the definition, a second library, nnU-Net's own Dice."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from skimage.io import imsave
from skimage.measure import marching_cubes, mesh_surface_area

from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.metrics import METRICS, compute_metrics, evaluate_files, fill_undefined

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.9, 0.9), (1.0, 2.5, 0.5)]


def blob(rng, shape=(14, 18, 20)):
    """A random smooth shape, possibly of several parts, that also touches the border of the image."""
    return gaussian_filter(rng.normal(size=shape), 2.5) > 0.02


def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*b) for b in bounds)] = True
    return mask


def ball(shape, spacing, center, radius):
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


def slow_elements(mask, spacing):
    """Positions and areas of surface elements: every cell between eight voxels that are not all alike, one by one."""
    padded = np.pad(mask, 1).astype(float)
    positions, areas = [], []
    for index in np.ndindex(*(n - 1 for n in padded.shape)):
        cell = padded[tuple(slice(i, i + 2) for i in index)]
        if 0 < cell.sum() < 8:
            vertices, faces, *_ = marching_cubes(cell, 0.5, spacing=spacing, method="lorensen")
            positions.append(np.multiply(index, spacing))
            areas.append(mesh_surface_area(vertices, faces))
    return np.array(positions), np.array(areas)


def weighted_percentile(distances, areas):
    """The smallest distance that 95 % of the area do not exceed."""
    return min(d for d in distances if areas[distances <= d].sum() >= 0.95 * areas.sum())


@pytest.mark.parametrize("shape", [(14, 18, 20), (2, 18, 20)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_equal_a_slow_implementation(spacing, shape):
    rng = np.random.default_rng(3)
    reference, prediction = blob(rng, shape), blob(rng, shape)
    (a, area_a), (b, area_b) = slow_elements(reference, spacing), slow_elements(prediction, spacing)
    distances = cdist(a, b)
    to_b, to_a = distances.min(1), distances.min(0)
    found = compute_metrics(reference, prediction, spacing)
    # cells with an ambiguous surface are the only difference
    asd = (to_b @ area_a + to_a @ area_b) / (area_a.sum() + area_b.sum())
    assert found["asd"] == pytest.approx(asd, rel=2e-3)
    hd95 = max(weighted_percentile(to_b, area_a), weighted_percentile(to_a, area_b))
    assert found["hd95"] == pytest.approx(hd95, rel=2e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_agree_with_those_of_simpleitk(spacing):
    """Between boundary voxels, which lie half a voxel within the surface and do not count by area."""
    shape = tuple(round(60 / s) for s in spacing)
    reference = ball(shape, spacing, (28, 28, 28), 18)
    prediction = ball(shape, spacing, (28, 31, 26), 20)
    images = [sitk.GetImageFromArray(m.astype(np.uint8)) for m in (reference, prediction)]
    for image in images:
        image.SetSpacing(spacing[::-1])
    contours = [sitk.LabelContour(image, fullyConnected=True) for image in images]
    distances = []
    for own, other in (contours, contours[::-1]):
        distance_map = sitk.Abs(sitk.SignedMaurerDistanceMap(other, squaredDistance=False, useImageSpacing=True))
        distances.append(sitk.GetArrayFromImage(distance_map)[sitk.GetArrayFromImage(own) > 0])
    found = compute_metrics(reference, prediction, spacing)
    assert found["asd"] == pytest.approx(np.concatenate(distances).mean(), abs=0.3 * max(spacing))
    assert found["hd95"] == pytest.approx(max(np.percentile(d, 95) for d in distances), abs=0.5 * max(spacing))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shifted_boxes(spacing, axis):
    """Of an 8³ box shifted by 2 voxels, the faces across the shift are 2 voxels from each other, the others partly."""
    shape, shift = (16, 16, 16), [2 if i == axis else 0 for i in range(3)]
    reference = box(shape, (3, 11), (3, 11), (3, 11))
    prediction = np.roll(reference, shift, (0, 1, 2))
    found = compute_metrics(reference, prediction, spacing)
    assert found["dice"] == found["ppv"] == found["sensitivity"] == 6 / 8
    edges = [8 * s for s in spacing]
    across = np.prod([e for i, e in enumerate(edges) if i != axis])
    surface = 2 * sum(edges[i] * edges[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    if 2 * across / surface > 0.1:  # half of that lies away from the other box: more than 5 % of the surface
        assert found["hd95"] == pytest.approx(2 * spacing[axis])
    assert 0 < found["asd"] < 2 * spacing[axis]
    assert found["n_ref"] == found["n_pred"] == 512


def test_distances_of_parallel_plates():
    """Of two plates a slice thick and three slices apart, one face is two slices from the other plate, one three."""
    shape, spacing = (20, 40, 40), (2.5, 10.0, 10.0)
    found = compute_metrics(box(shape, (5, 6), (0, 40), (0, 40)), box(shape, (8, 9), (0, 40), (0, 40)), spacing)
    assert found["asd"] == pytest.approx((5 + 7.5) / 2)
    assert found["hd95"] == pytest.approx(7.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_distance_of_concentric_balls_is_the_difference_of_their_radii(spacing):
    """To half a voxel: the elements of a slanted surface lie on the corners of voxels, on either side of it."""
    shape = tuple(round(60 / s) for s in spacing)
    found = compute_metrics(ball(shape, spacing, (29, 29, 29), 24), ball(shape, spacing, (29, 29, 29), 18), spacing)
    assert found["asd"] == pytest.approx(6, abs=max(spacing) / 2 + 0.1)
    assert found["hd95"] == pytest.approx(6, abs=max(spacing) / 2)
    assert found["sensitivity"] == pytest.approx((18 / 24) ** 3, abs=0.01)
    assert found["ppv"] == 1


def test_a_thick_face_counts_by_its_area():
    """A spot that is wrong covers a share of the surface, however many voxels that share has."""
    reference = box((8, 40, 40), (2, 6), (5, 35), (5, 35))
    prediction = reference.copy()
    prediction[6, 10:15, 10:15] = True  # a bump of one slice on the upper face
    thick = compute_metrics(reference, prediction, (1.0, 1.0, 1.0))
    thin = compute_metrics(reference, prediction, (1.0, 3.0, 3.0))
    # nine times the area of the faces, the same distance, and less of the side walls, which are right
    assert thin["asd"] > thick["asd"]


def test_identical_masks():
    mask = blob(np.random.default_rng(0))
    found = compute_metrics(mask, mask, (3.0, 1.0, 1.0))
    assert [found[name] for name in METRICS] == [metric.best for metric in METRICS.values()]


def test_empty_masks():
    mask, empty = box((10, 10, 10), (2, 5), (2, 5), (2, 5)), np.zeros((10, 10, 10), bool)
    spacing = (3.0, 4.0, 12.0)
    worst = {"dice": 0, "ppv": 0, "sensitivity": 0, "asd": 130, "hd95": 130}  # diagonal of 30 × 40 × 120 mm
    both = compute_metrics(empty, empty, spacing)
    assert all(np.isnan(both[name]) for name in METRICS)
    assert {name: fill_undefined(both)[name] for name in METRICS} == {n: m.best for n, m in METRICS.items()}
    for reference, prediction, undefined in ((mask, empty, "ppv"), (empty, mask, "sensitivity")):
        found = compute_metrics(reference, prediction, spacing)
        assert found["dice"] == 0
        assert {name for name in METRICS if np.isnan(found[name])} == {undefined, "asd", "hd95"}
        assert {name: fill_undefined(found)[name] for name in METRICS} == worst


def test_a_miss_is_never_better_than_a_find():
    shape, spacing = (10, 10, 10), (3.0, 4.0, 12.0)
    corner, opposite = box(shape, (0, 1), (0, 1), (0, 1)), box(shape, (9, 10), (9, 10), (9, 10))
    found = fill_undefined(compute_metrics(corner, opposite, spacing))
    missed = fill_undefined(compute_metrics(corner, np.zeros(shape, bool), spacing))
    assert 0.8 * missed["hd95"] < found["hd95"] <= missed["hd95"]


@pytest.mark.parametrize("thickness", [1.0, 999.0])
def test_a_single_slice_is_compared_in_its_plane(thickness):
    """As in a photograph: contours of two squares, and nothing of how thick nnU-Net takes it to be."""
    reference, prediction = box((1, 30, 30), (0, 1), (5, 25), (5, 25)), box((1, 30, 30), (0, 1), (5, 25), (8, 28))
    found = compute_metrics(reference, prediction, (thickness, 1.0, 2.0))
    # of a contour of 2 * (20 + 40) mm the outer side is 6 mm off, the inner one, too, but near its ends, and the long
    # ones are where they do not overlap, by 3 mm in the mean
    assert found["asd"] == pytest.approx((20 * 6 + (8 * 6 + 12 * 3) + 2 * 6 * 3) / 120, rel=0.01)
    assert found["hd95"] == pytest.approx(6)
    assert found["diagonal"] == pytest.approx(np.hypot(30, 60))


LABELS = {"background": 0, "tumor": 1, "edema": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}


def write(file, labels, spacing=(1.0, 1.0, 3.0)):
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


@pytest.fixture
def folders(tmp_path):
    """Reference and prediction of four cases with three values, of which the last two lack the second class."""
    rng = np.random.default_rng(0)
    for name in ("reference", "prediction"):
        (tmp_path / name).mkdir()
        for case in range(4):
            labels = blob(rng) * 1 + blob(rng) * 1
            if case == 3 or (case == 2 and name == "prediction"):
                labels[labels == 2] = 0
            write(tmp_path / name / f"case_{case}.nii.gz", labels)
    return tmp_path


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions and ignore label"])
def test_dice_equals_that_of_nnunet(folders, labels):
    if "ignore" in labels:
        for file in (folders / "reference").iterdir():
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            voxels[3:6, :8] = 3
            write(file, voxels)
    classes = [tuple(v) if isinstance(v, list) else v for k, v in labels.items() if k not in ("background", "ignore")]
    summary = folders / "summary.json"
    compute_metrics_on_folder(
        str(folders / "reference"),
        str(folders / "prediction"),
        str(summary),
        SimpleITKIO(),
        ".nii.gz",
        classes,
        labels.get("ignore"),
        num_processes=1,
    )
    undefined = 0
    for case in json.loads(summary.read_text())["metric_per_case"]:
        found = evaluate_files(case["reference_file"], case["prediction_file"], SimpleITKIO(), labels)
        assert len(found) == len(classes) == 2
        for own, expected in zip(found.values(), case["metrics"].values(), strict=True):
            assert own["dice"] == pytest.approx(expected["Dice"], nan_ok=True)
            assert (own["n_ref"], own["n_pred"]) == (expected["n_ref"], expected["n_pred"])
            undefined += np.isnan(own["dice"])
    assert undefined == 1


def test_spacing_is_read_along_the_axes_of_the_file(tmp_path):
    mask = np.zeros((20, 20, 20))
    mask[5:15, 5:15, 5:15] = 1
    write(tmp_path / "reference.nii.gz", mask)
    write(tmp_path / "prediction.nii.gz", np.roll(mask, 2, 0))
    found = evaluate_files(
        tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz", SimpleITKIO(), {"background": 0, "tumor": 1}
    )
    assert found["tumor"]["hd95"] == pytest.approx(6)  # two slices of 3 mm


def test_photographs(tmp_path):
    mask = np.zeros((30, 30), np.uint8)
    mask[5:25, 5:25] = 1
    for name, voxels in (("reference", mask), ("prediction", np.roll(mask, 3, 1))):
        imsave(tmp_path / f"{name}.png", voxels, check_contrast=False)
    files = tmp_path / "reference.png", tmp_path / "prediction.png"
    assert evaluate_files(*files, NaturalImage2DIO(), {"background": 0, "cell": 1})["cell"]["hd95"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i[1:], r"prediction.nii.gz: found shape \[.*\]; expected \[.*\] as in .*reference.nii.gz"),
        (lambda i: sitk.Image(i) if i.SetSpacing((1, 1, 2)) is None else i, "found spacing"),
        (lambda i: sitk.Image(i) if i.SetOrigin((0, 0, 9)) is None else i, "found origin"),
        (lambda i: sitk.Image(i) if i.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1)) is None else i, "found direction"),
        (lambda i: i * 4, "found the label values 4, 8; expected only 0, 1, 2, as in dataset.json. Convert the labels"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path, change, message):
    rng = np.random.default_rng(0)
    write(tmp_path / "reference.nii.gz", blob(rng) * 1 + blob(rng) * 1)
    changed = change(sitk.ReadImage(str(tmp_path / "reference.nii.gz")))
    sitk.WriteImage(changed, str(tmp_path / "prediction.nii.gz"))
    with pytest.raises(UserError, match=message):
        evaluate_files(tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz", SimpleITKIO(), LABELS)


@pytest.mark.parametrize("damaged", ["reference.nii.gz", "prediction.nii.gz"])
@pytest.mark.parametrize("damage", [lambda content: b"not an image", lambda content: content[: len(content) * 7 // 10]])
def test_damaged_files_are_refused(tmp_path, damaged, damage):
    rng = np.random.default_rng(0)
    for name in ("reference.nii.gz", "prediction.nii.gz"):
        write(tmp_path / name, blob(rng) * rng.integers(1, 3, (14, 18, 20)))
    (tmp_path / damaged).write_bytes(damage((tmp_path / damaged).read_bytes()))
    with pytest.raises(UserError, match=rf"{damaged}: found an unreadable file \("):
        evaluate_files(tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz", SimpleITKIO(), LABELS)


def test_values_of_no_class_are_refused_in_the_reference_too(tmp_path):
    mask = blob(np.random.default_rng(0)) * 1
    write(tmp_path / "reference.nii.gz", 3 * mask)
    write(tmp_path / "prediction.nii.gz", mask)
    files = tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz"
    with pytest.raises(UserError, match=r"reference.nii.gz: found the label values 3; expected only 0, 1, 2, as in"):
        evaluate_files(*files, SimpleITKIO(), LABELS)
    found = evaluate_files(*files, SimpleITKIO(), LABELS | {"ignore": 3})["tumor"]
    assert (found["n_ref"], found["n_pred"]) == (0, 0)


def test_a_grid_that_is_rounded_otherwise_is_the_same_one(tmp_path):
    """A tenth of a voxel at most, as in planning."""
    mask = blob(np.random.default_rng(0)) * 1
    write(tmp_path / "reference.nii.gz", mask, (0.7, 0.7, 3.0))
    files = tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz"
    write(files[1], mask, (0.7015, 0.7, 3.0))
    assert evaluate_files(*files, SimpleITKIO(), LABELS)["tumor"]["dice"] == 1
    write(files[1], mask, (0.71, 0.7, 3.0))
    with pytest.raises(UserError, match=r"found spacing \[3.0, 0.7, 0.71\]; expected \[3.0, 0.7, 0.7\] as in"):
        evaluate_files(*files, SimpleITKIO(), LABELS)
