import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunetv2_semicml.data.phantom import MODALITIES, make_case, write_phantom_dataset
from nnunetv2_semicml.errors import UserError

TINY = (24, 24, 24)
SHAPES_AND_SPACINGS = [(TINY, (6.0, 6.0, 6.0)), ((16, 40, 32), (9.0, 4.0, 4.0)), ((40, 48, 48), (4.0, 3.6, 3.6))]


def contrast_to_noise(image, label, flair):
    lesion = label > 0
    # fluid and skull are dark in FLAIR: what is left is the parenchyma that a lesion has to stand out from
    parenchyma = flair > 0.5 * np.median(flair[flair > 0])
    surroundings = ndimage.binary_dilation(lesion, iterations=3) & ~lesion & parenchyma & (image > 0)
    return abs(image[lesion].mean() - image[surroundings].mean()) / image[surroundings].std()


def nonzero_box(image):
    return ndimage.find_objects((image != 0).astype(np.uint8))[0]


@pytest.mark.parametrize(("shape", "spacing"), SHAPES_AND_SPACINGS)
@pytest.mark.parametrize("num_classes", [1, 2])
def test_case_has_every_class_inside_every_field_of_view(shape, spacing, num_classes):
    for seed in range(8):
        images, label = make_case(np.random.default_rng(seed), shape, list(MODALITIES), spacing, num_classes)
        assert list(images) == list(MODALITIES)
        assert label.dtype == np.uint8
        assert label.shape == shape
        assert np.unique(label).tolist() == list(range(num_classes + 1))
        for image in images.values():
            assert image.dtype == np.float32
            assert image.shape == shape
            assert (image == 0).any()
            assert (image[label > 0] > 0).mean() > 0.95


def test_seed_decides_and_modalities_do_not_depend_on_each_other():
    both, label = make_case(np.random.default_rng(3), TINY, ("FLAIR", "T1"))
    again, label_again = make_case(np.random.default_rng(3), TINY, ("T1",))
    other, _ = make_case(np.random.default_rng(4), TINY, ("T1",))
    np.testing.assert_array_equal(both["T1"], again["T1"])
    np.testing.assert_array_equal(label, label_again)
    assert (both["T1"] != other["T1"]).any()


@pytest.mark.parametrize(("shape", "spacing"), SHAPES_AND_SPACINGS)
def test_lesions_are_conspicuous_in_flair_and_faint_in_t1(shape, spacing):
    contrasts = {"FLAIR": [], "T1": []}
    for seed in range(10):
        images, label = make_case(np.random.default_rng(seed), shape, tuple(contrasts), spacing)
        for modality, image in images.items():
            contrasts[modality].append(contrast_to_noise(image, label, images["FLAIR"]))
    assert np.median(contrasts["FLAIR"]) > 2 * np.median(contrasts["T1"])
    assert np.median(contrasts["T1"]) > 0.1


@pytest.mark.parametrize(("shape", "spacing"), SHAPES_AND_SPACINGS)
def test_nonzero_boxes_differ_between_modalities(shape, spacing):
    different = []
    for seed in range(10):
        images, _ = make_case(np.random.default_rng(seed), shape, ("FLAIR", "T1"), spacing)
        different.append(nonzero_box(images["FLAIR"]) != nonzero_box(images["T1"]))
    assert sum(different) >= 9


@pytest.mark.parametrize("arguments", [{"modalities": ("FLAIR", "CT")}, {"modalities": ("T1",), "num_classes": 3}])
def test_unknown_modality_or_class_count_is_refused(arguments):
    with pytest.raises(ValueError, match=r"CT|num_classes"):
        make_case(np.random.default_rng(0), TINY, **arguments)


def files_below(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_dataset_layout_geometry_and_reproducibility(tmp_path):
    arguments = {"num_labeled": 2, "num_unlabeled": 2, "num_test": 1, "shape": TINY, "spacing": (6.0, 5.0, 5.5)}
    folder = write_phantom_dataset(tmp_path / "a", modalities=("FLAIR", "T1", "T2"), seed=5, **arguments)
    assert folder.name == "Dataset500_Phantom"
    assert {file.name for file in folder.iterdir()} == {
        "dataset.json", "imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs"
    }  # fmt: skip
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1", "2": "T2"}
    assert description["numTraining"] == 2

    for group in ("Tr", "Un", "Ts"):
        cases = {file.name[: -len("_0000.nii.gz")] for file in (folder / f"images{group}").iterdir()}
        for case in cases:
            files = [folder / f"images{group}" / f"{case}_{channel:04d}.nii.gz" for channel in range(3)]
            if group != "Un":
                files.append(folder / f"labels{group}" / f"{case}.nii.gz")
            images = [sitk.ReadImage(str(file)) for file in files]
            for image in images:
                assert image.GetSpacing() == pytest.approx((5.5, 5.0, 6.0))
                assert image.GetOrigin() == pytest.approx(images[0].GetOrigin())
                assert image.GetDirection() == pytest.approx(images[0].GetDirection())
            assert np.abs(images[0].GetOrigin()).min() > 0
    assert not list(folder.glob("labels*/*_un_*"))

    more = write_phantom_dataset(
        tmp_path / "b", modalities=("FLAIR", "T1", "T2"), seed=5, **(arguments | {"num_labeled": 3})
    )
    first, second = files_below(folder), files_below(more)
    for name in first.keys() - {"dataset.json"}:
        assert first[name] == second[name], name

    with pytest.raises(UserError, match="Delete it"):
        write_phantom_dataset(tmp_path / "a", **arguments)


def test_region_based_labels(tmp_path):
    counts = {"num_labeled": 1, "num_unlabeled": 0, "num_test": 0}
    folder = write_phantom_dataset(tmp_path, shape=TINY, num_classes=2, regions=True, **counts)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "whole": [1, 2], "core": 2}
    assert description["regions_class_order"] == [1, 2]
    with pytest.raises(ValueError, match="num_classes=2"):
        write_phantom_dataset(tmp_path, dataset_id=501, regions=True)
