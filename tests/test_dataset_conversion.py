"""Every converter, on miniatures of the real folder layouts with their names, headers, label values and irregularities.

A miniature is written by its function into a folder, as it would be found after unpacking the download.
"""

import gzip
import json
import locale
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2_semicml.dataset_conversion import brats, chaos, common, hecktor, lgg, msd_prostate, myops

from nnunetv2_semicml.data import image_check
from nnunetv2_semicml.data.image_check import check_images
from nnunetv2_semicml.data.raw_dataset import RawDataset, read_raw_dataset
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning.withhold_labels import withhold_labels

BRATS_DIRECTION = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
BRATS_ORIGIN = (0, -239, 0)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nnUNet_raw."""
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
        (tmp_path / variable).mkdir()
    return tmp_path / "raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write(file: Path, voxels: np.ndarray, spacing=(1, 1, 1), origin=(0, 0, 0), direction=None) -> Path:
    """Write an image; the last axis of a 4D array, as of all arrays here, is x."""
    image = sitk.GetImageFromArray(voxels, isVector=False)
    image.SetSpacing(spacing + (1,) * (voxels.ndim - len(spacing)))
    image.SetOrigin(origin + (0,) * (voxels.ndim - len(origin)))
    if direction:
        image.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def noise(*seed: int, shape=(4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def labels_of(values: Iterable[int], *seed: int, shape=(4, 5, 6), dtype=np.int16) -> np.ndarray:
    """Every one of the values, at random places."""
    values = list(values)
    voxels = np.random.default_rng(seed).choice(values, shape)
    voxels.flat[: len(values)] = values
    return voxels.astype(dtype)


def read(file: Path | str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def converted(monkeypatch: pytest.MonkeyPatch, folder: Path, require_unlabeled: bool = False) -> RawDataset:
    """The new dataset, which must pass what plan_and_preprocess checks."""
    # threads start at once; here it matters what is checked, and not in which process
    monkeypatch.setattr(image_check, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
    found = read_raw_dataset(folder.name, require_unlabeled=require_unlabeled)
    check_images(found, 1, show_progress=False)
    assert found.folder == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left
    assert all(sitk.ReadImage(case["label"]).GetPixelID() == sitk.sitkUInt8 for case in found.labeled.values())
    return found


def strata(folder: Path) -> dict[str, str]:
    header, *rows = (folder / "strata.csv").read_text().splitlines()
    assert header == "case,group"
    return dict(row.split(",") for row in rows)


# ---------------------------------------------------------------------------------------------------------------- BraTS


def brats_case(folder: Path, case: str, *seed: int, labeled=True, ending=".nii.gz", label_name=None) -> None:
    """Every image holds its own numbers; the headers are those of BraTS."""
    header = {"origin": BRATS_ORIGIN, "direction": BRATS_DIRECTION}
    for i, modality in enumerate(("t1", "t1ce", "t2", "flair")):
        write(folder / case / f"{case}_{modality}{ending}", noise(*seed, i), **header)
    if labeled:
        file = folder / case / f"{label_name or f'{case}_seg'}{ending}"
        write(file, labels_of((0, 1, 2, 4), *seed), **header)


def brats_2019(folder: Path) -> None:
    brats_case(folder / "train" / "HGG", "BraTS19_CBICA_AAB_1", 1)
    brats_case(folder / "train" / "HGG", "BraTS19_2013_10_1", 2, ending=".nii")
    brats_case(folder / "train" / "LGG", "BraTS19_2013_0_1", 3)
    (folder / "train" / "name_mapping.csv").write_text("Grade\n")
    brats_case(folder / "validation", "BraTS19_CBICA_AAM_1", 4, labeled=False)


def brats_2020(folder: Path) -> None:
    training = folder / "train" / "MICCAI_BraTS2020_TrainingData"
    brats_case(training, "BraTS20_Training_001", 1, ending=".nii")
    brats_case(training, "BraTS20_Training_355", 2, ending=".nii", label_name="W39_1998.09.19_Segm")
    (training / "survival_info.csv").write_text("Brats20ID,Age\n")
    brats_case(folder / "validation", "BraTS20_Validation_001", 3, labeled=False, ending=".nii")


def brats_2021(folder: Path) -> None:
    brats_case(folder / "train", "BraTS2021_00000", 1)
    brats_case(folder / "train", "BraTS2021_00002", 2)
    brats_case(folder / "validation", "BraTS2021_00001", 3, labeled=False)


BRATS = {
    2019: (
        brats_2019,
        ["BraTS19_2013_0_1", "BraTS19_2013_10_1", "BraTS19_CBICA_AAB_1"],
        ["BraTS19_CBICA_AAM_1"],
    ),
    2020: (brats_2020, ["BraTS20_Training_001", "BraTS20_Training_355"], ["BraTS20_Validation_001"]),
    2021: (brats_2021, ["BraTS2021_00000", "BraTS2021_00002"], ["BraTS2021_00001"]),
}


@pytest.mark.parametrize("year", BRATS)
def test_brats(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch, year: int):
    write_miniature, labeled, unlabeled = BRATS[year]
    write_miniature(source)
    folder = brats.convert_brats(
        source / "train", 500, year, ["FLAIR", "T1ce", "T1"], "classes", unlabeled_folder=source / "validation"
    )
    assert folder == raw / f"Dataset500_BraTS{year}"
    found = converted(monkeypatch, folder)
    assert (list(found.labeled), list(found.unlabeled), found.test) == (labeled, unlabeled, {})
    assert found.channel_names == ["FLAIR", "T1ce", "T1"]
    assert not [*folder.rglob(f"labels*/{unlabeled[0]}*")]
    assert (folder / "strata.csv").is_file() == (year == 2019)

    for case, files in (found.labeled | found.unlabeled).items():
        for name, file in zip(("flair", "t1ce", "t1"), files["images"], strict=True):
            (original,) = source.rglob(f"{case}_{name}.nii*")
            assert np.array_equal(read(file), read(original))
            image = sitk.ReadImage(file)
            assert (image.GetOrigin(), image.GetDirection()) == (BRATS_ORIGIN, BRATS_DIRECTION)
            assert image.GetPixelID() == sitk.sitkInt16


@pytest.mark.parametrize(
    ("labels", "values", "in_json", "order"),
    [
        ("whole_tumour", [0, 1, 1, 1], {"background": 0, "whole_tumour": 1}, None),
        ("classes", [0, 2, 1, 3], {"background": 0, "edema": 1, "necrotic_core": 2, "enhancing_tumour": 3}, None),
        (
            "regions",
            [0, 2, 1, 3],
            {"background": 0, "whole_tumour": [1, 2, 3], "tumour_core": [2, 3], "enhancing_tumour": [3]},
            [1, 2, 3],
        ),
    ],
)
def test_brats_labels(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch, labels, values, in_json, order):
    """`values` are what 0, 1, 2 and 4 become; 355 shows that the misnamed label is the one that is read."""
    brats_2020(source)
    found = converted(monkeypatch, brats.convert_brats(source / "train", 500, 2020, labels=labels))
    assert found.channel_names == ["T1", "T1ce", "T2", "FLAIR"]
    for case, files in found.labeled.items():
        for name, file in zip(("t1", "t1ce", "t2", "flair"), files["images"], strict=True):
            assert np.array_equal(read(file), read(next(source.rglob(f"{case}_{name}.nii"))))
    assert found.dataset_json["labels"] == in_json
    assert found.dataset_json.get("regions_class_order") == order
    for case, name in (("BraTS20_Training_001", "BraTS20_Training_001_seg"), ("BraTS20_Training_355", "W39*")):
        (original,) = source.rglob(f"{name}.nii")
        expected = np.select([read(original) == old for old in (0, 1, 2, 4)], values)
        assert np.array_equal(read(found.labeled[case]["label"]), expected)


def test_grades_stratify_withholding(raw: Path, source: Path):
    brats_2019(source)
    with_validation = brats.convert_brats(source / "train", 502, 2019, unlabeled_folder=source / "validation")
    folder = brats.convert_brats(source / "train", 500, 2019)
    grades = strata(folder)
    assert strata(with_validation) == grades  # the grade of the validation cases is not public
    assert list(grades.items()) == [
        ("BraTS19_2013_0_1", "LGG"),
        ("BraTS19_2013_10_1", "HGG"),
        ("BraTS19_CBICA_AAB_1", "HGG"),
    ]
    withheld = withhold_labels(500, 501, num_labeled=1, stratify=folder / "strata.csv")
    assert len(read_raw_dataset(501).unlabeled) == 2
    assert withheld.name == "Dataset501_BraTS2019"


def test_rounded_headers_become_equal(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    """nnU-Net would refuse this difference."""
    brats_2021(source)
    file = source / "train" / "BraTS2021_00000" / "BraTS2021_00000_t2.nii.gz"
    rounded = {"spacing": (1.001, 1, 0.999), "origin": (0.01, -239, 0), "direction": BRATS_DIRECTION}
    write(file, noise(1, 2), **rounded)
    folder = brats.convert_brats(source / "train", 500, 2021)
    assert sitk.ReadImage(str(folder / "imagesTr" / "BraTS2021_00000_0002.nii.gz")).GetSpacing() == (1, 1, 1)
    converted(monkeypatch, folder)


def test_types_of_voxels(raw: Path, source: Path):
    """Double precision becomes single precision, other types stay; a label may be stored as decimal numbers."""
    brats_2021(source)
    stem = source / "train" / "BraTS2021_00000" / "BraTS2021_00000"
    header = {"origin": BRATS_ORIGIN, "direction": BRATS_DIRECTION}
    stored = noise(5) / 7
    write(stem.with_name(f"{stem.name}_t1ce.nii.gz"), stored, **header)
    write(stem.with_name(f"{stem.name}_t2.nii.gz"), noise(6).astype(np.uint16), **header)
    label = labels_of((0, 1, 2, 4), 7, dtype=np.float64)
    write(stem.with_name(f"{stem.name}_seg.nii.gz"), label, **header)
    folder = brats.convert_brats(source / "train", 500, 2021)
    t1ce, t2 = (read(folder / "imagesTr" / f"BraTS2021_00000_000{channel}.nii.gz") for channel in (1, 2))
    assert (t1ce.dtype, t2.dtype) == (np.float32, np.uint16)
    assert np.array_equal(t1ce, stored.astype(np.float32))
    assert np.array_equal(read(folder / "labelsTr" / "BraTS2021_00000.nii.gz"), label > 0)


def test_simpleitk_decides_what_is_readable(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    """nibabel refuses this quaternion, which is longer than 1 by rounding."""
    brats_2021(source)
    for file in sorted((source / "train" / "BraTS2021_00002").iterdir()):
        voxels = read(file)
        header = nibabel.Nifti1Header()
        header.set_data_shape(voxels.shape[::-1])
        header.set_data_dtype(voxels.dtype)
        header["magic"], header["vox_offset"] = b"n+1", 352
        header["qform_code"], header["quatern_d"] = 1, 1.000002  # half a turn, as in BraTS
        header["qoffset_y"] = 239
        file.write_bytes(gzip.compress(header.binaryblock + bytes(4) + voxels.tobytes()))
        with pytest.raises(ValueError, match="w2 should be positive"):
            nibabel.load(file)
    found = converted(monkeypatch, brats.convert_brats(source / "train", 500, 2021))
    for name, file in zip(("t1", "t1ce", "t2", "flair"), found.labeled["BraTS2021_00002"]["images"], strict=True):
        original = sitk.ReadImage(str(source / "train" / "BraTS2021_00002" / f"BraTS2021_00002_{name}.nii.gz"))
        assert np.array_equal(read(file), sitk.GetArrayFromImage(original))
        assert sitk.ReadImage(file).GetOrigin() == pytest.approx(original.GetOrigin())


# --------------------------------------------------------------------------------------------------------------- MyoPS


def myops_2020(folder: Path) -> None:
    values = (0, 200, 500, 600, 1220, 2221)
    header = {"spacing": (0.73, 0.73, 14), "origin": (12.5, -3, 7), "direction": (0, 1, 0, 0, 0, -1, -1, 0, 0)}
    for case in (101, 102):
        for i, name in enumerate(("C0", "DE", "T2")):
            write(folder / "train25" / f"myops_training_{case}_{name}.nii.gz", noise(case, i), **header)
        label = labels_of(values, case)
        write(folder / "train25_myops_gd" / f"myops_training_{case}_gd.nii.gz", label, **header)
    for i, name in enumerate(("C0", "DE", "T2")):
        write(folder / "test20" / f"myops_test_201_{name}.nii.gz", noise(201, i), **header)
    encrypted = folder / "MyoPS2020_EvaluateByYourself" / "test_data_gd" / "myops_test_201_gdencrypt.nii.gz"
    write(encrypted, noise(201, 9))


def test_myops(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    myops_2020(source)
    found = converted(monkeypatch, myops.convert_myops(source, 510, unlabeled_folder=source / "test20"))
    assert found.name == "Dataset510_MyoPS2020"
    assert (list(found.labeled), list(found.unlabeled)) == (
        ["myops_training_101", "myops_training_102"],
        ["myops_test_201"],
    )
    assert found.channel_names == ["bSSFP", "LGE", "T2"]
    meaning = {
        0: "background",
        500: "left_ventricular_blood_pool",
        600: "right_ventricular_blood_pool",
        200: "normal_myocardium",
        1220: "edema",
        2221: "scar",
    }
    original = read(source / "train25_myops_gd" / "myops_training_102_gd.nii.gz")
    label = read(found.labeled["myops_training_102"]["label"])
    for value, name in meaning.items():
        assert np.array_equal(label == found.dataset_json["labels"][name], original == value)
    for channel, name in enumerate(("C0", "DE", "T2")):
        copied = found.labeled["myops_training_102"]["images"][channel]
        assert np.array_equal(read(copied), read(source / "train25" / f"myops_training_102_{name}.nii.gz"))


# ------------------------------------------------------------------------------------------------------- MSD, prostate


def task05_prostate(folder: Path) -> None:
    header = {"spacing": (0.6, 0.6, 4), "origin": (9, 8, 7)}
    for case in ("00", "01"):
        write(folder / "imagesTr" / f"prostate_{case}.nii.gz", noise(int(case), shape=(2, 4, 5, 6)), **header)
        write(folder / "labelsTr" / f"prostate_{case}.nii.gz", labels_of((0, 1, 2), int(case)), **header)
    write(folder / "imagesTs" / "prostate_03.nii.gz", noise(3, shape=(2, 4, 5, 6)), **header)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name / "._prostate_00.nii.gz").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    content = {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 32,
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def test_msd_prostate(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    task05_prostate(source)
    found = converted(monkeypatch, msd_prostate.convert_msd_prostate(source, 520, unlabeled_folder=source / "imagesTs"))
    assert (list(found.labeled), list(found.unlabeled)) == (["prostate_00", "prostate_01"], ["prostate_03"])
    assert found.channel_names == ["T2", "ADC"]
    assert found.dataset_json["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    original = read(source / "imagesTr" / "prostate_01.nii.gz")
    for channel, file in enumerate(found.labeled["prostate_01"]["images"]):
        assert np.array_equal(read(file), original[channel])
        assert sitk.ReadImage(file).GetOrigin() == (9, 8, 7)
    label = read(source / "labelsTr" / "prostate_01.nii.gz")
    assert np.array_equal(read(found.labeled["prostate_01"]["label"]), label)


# ------------------------------------------------------------------------------------------------------------- HECKTOR

# The CT shows x -10 … 3, y -20 … -5, z 100 … 121. The PET shows more in x and y, in z only from 101.3 on; its voxels
# are larger and their centers lie elsewhere.
CT_GRID = {"spacing": (1.0, 1.0, 3.0), "origin": (-10.0, -20.0, 100.0)}
PET_GRID = {"spacing": (4.0, 4.0, 3.27), "origin": (-14.5, -23.25, 101.3)}
CT_SHAPE, PET_SHAPE = (8, 16, 14), (9, 6, 6)


def positions(image: sitk.Image) -> np.ndarray:
    """Physical positions of all voxels, shape (z, y, x, 3), mm."""
    shape = image.GetSize()[::-1]
    points = [image.TransformIndexToPhysicalPoint(index[::-1]) for index in product(*map(range, shape))]
    return np.reshape(points, (*shape, 3))


def uptake(points: np.ndarray) -> np.ndarray:
    """A function that linear interpolation reproduces exactly."""
    return (points @ [0.3, -0.2, 0.05] + 20).astype(np.float32)


def write_ct_and_pet(stem: Path, names: tuple[str, str], seed: int) -> None:
    ct_file, pet_file = (stem.with_name(f"{stem.name}{name}.nii.gz") for name in names)
    write(ct_file, noise(seed, shape=CT_SHAPE) - 1000, **CT_GRID)
    write(pet_file, np.zeros(PET_SHAPE, np.float32), **PET_GRID)
    write(pet_file, uptake(positions(sitk.ReadImage(str(pet_file)))) + seed, **PET_GRID)


def tumour(*values: int) -> np.ndarray:
    label = np.zeros(CT_SHAPE, np.uint8)
    for i, value in enumerate(values):
        label[3:5, 6:9, 4 + 3 * i : 6 + 3 * i] = value
    return label


BOXES = "PatientID,x1,x2,y1,y2,z1,z2\n"
BOX = "-7.4,1.6,-17.0,-8.0,103.0,118.0\n"  # x -7 … 1, y -17 … -8, z 103 … 118: some faces on voxel centers


def hecktor_2020(folder: Path) -> None:
    for i, case in enumerate(("CHUM001", "CHGJ007")):
        write_ct_and_pet(folder / "train" / case / case, ("_ct", "_pt"), i)
        write(folder / "train" / case / f"{case}_ct_gtvt.nii.gz", tumour(1), **CT_GRID)
    write_ct_and_pet(folder / "test" / "CHUV001" / "CHUV001", ("_ct", "_pt"), 7)
    (folder / "train.csv").write_text(BOXES + f"CHUM001,{BOX}CHGJ007,{BOX}")
    (folder / "test.csv").write_text(BOXES + f"CHUV001,{BOX}")


def hecktor_2021(folder: Path) -> None:
    for i, case in enumerate(("CHUM001", "CHGJ007")):
        write_ct_and_pet(folder / "train" / case, ("_ct", "_pt"), i)
        write(folder / "train" / f"{case}_gtvt.nii.gz", tumour(1), **CT_GRID)
    write_ct_and_pet(folder / "test" / "CHUP025", ("_ct", "_pt"), 7)
    (folder / "train.csv").write_text(BOXES + f"CHUM001,{BOX}CHGJ007,{BOX}")
    (folder / "test.csv").write_text("\ufeff" + BOXES + f"CHUP025,{BOX}", encoding="utf-8")


def hecktor_2022(folder: Path) -> None:
    for i, case in enumerate(("CHUM-001", "MDA-005")):
        write_ct_and_pet(folder / "train" / "imagesTr" / case, ("__CT", "__PT"), i)
        write(folder / "train" / "labelsTr" / f"{case}.nii.gz", tumour(1, 2), **CT_GRID)
    (folder / "train" / "hecktor2022_clinical_info_training.csv").write_text("PatientID\n")
    write_ct_and_pet(folder / "test" / "USZ-001", ("__CT", "__PT"), 7)


def convert_hecktor(folder: Path, year: int, unlabeled: bool = False) -> Path:
    boxes = [] if year == 2022 else [folder / "train.csv", folder / "test.csv"]
    return hecktor.convert_hecktor(folder / "train", 530, year, boxes, folder / "test" if unlabeled else None)


@pytest.mark.parametrize(
    ("year", "write_miniature", "labeled", "unlabeled", "labels", "ct_of_last", "first", "last"),
    [
        (
            2020,
            hecktor_2020,
            ["CHGJ007", "CHUM001"],
            ["CHUV001"],
            {"background": 0, "GTVt": 1},
            "CHUM001/CHUM001_ct.nii.gz",
            (-7, -17, 103),
            (1, -8, 118),
        ),
        (
            2021,
            hecktor_2021,
            ["CHGJ007", "CHUM001"],
            ["CHUP025"],
            {"background": 0, "GTVt": 1},
            "CHUM001_ct.nii.gz",
            (-7, -17, 103),
            (1, -8, 118),
        ),
        (
            2022,
            hecktor_2022,
            ["CHUM-001", "MDA-005"],
            ["USZ-001"],
            {"background": 0, "GTVp": 1, "GTVn": 2},
            "imagesTr/MDA-005__CT.nii.gz",
            (-10, -20, 103),
            (3, -5, 121),
        ),
    ],
)
def test_hecktor(
    raw: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    year: int,
    write_miniature: Callable,
    labeled: list[str],
    unlabeled: list[str],
    labels: dict,
    ct_of_last: str,
    first: tuple,
    last: tuple,
):
    """`first` and `last` are the corners of what should be cut out of the CT, in mm, worked out by hand."""
    write_miniature(source)
    folder = convert_hecktor(source, year, unlabeled=True)
    found = converted(monkeypatch, folder)
    assert folder.name == f"Dataset530_HECKTOR{year}"
    assert (list(found.labeled), list(found.unlabeled)) == (labeled, unlabeled)
    assert found.channel_names == ["CT", "PET"]
    assert found.dataset_json["labels"] == labels
    assert strata(folder) == {case: case.rstrip("0123456789-") for case in labeled + unlabeled}

    ct, pet = (sitk.ReadImage(file) for file in found.labeled[labeled[-1]]["images"])
    assert (ct.GetOrigin(), ct.GetSpacing()) == (first, (1, 1, 3))
    assert ct.TransformIndexToPhysicalPoint([size - 1 for size in ct.GetSize()]) == last
    region = tuple(
        slice(int((a - origin) / spacing), int((b - origin) / spacing) + 1)
        for a, b, origin, spacing in zip(first, last, CT_GRID["origin"], CT_GRID["spacing"], strict=True)
    )[::-1]
    assert np.array_equal(sitk.GetArrayFromImage(ct), read(source / "train" / ct_of_last)[region])
    label = read(found.labeled[labeled[-1]]["label"])
    assert np.array_equal(label, tumour(*(value for value in labels.values() if value))[region])
    seed = labeled[-1] == "MDA-005"
    np.testing.assert_allclose(sitk.GetArrayFromImage(pet), uptake(positions(pet)) + seed, atol=1e-4)


def test_pet_is_zero_outside_its_field_of_view(raw: Path, source: Path):
    hecktor_2021(source)
    higher = PET_GRID | {"origin": (-14.5, -23.25, 107)}
    write(source / "train" / "CHUM001_pt.nii.gz", np.full(PET_SHAPE, 5, np.float32), **higher)
    pet = read(convert_hecktor(source, 2021) / "imagesTr" / "CHUM001_0001.nii.gz")
    assert pet.reshape(len(pet), -1).max(axis=1).tolist() == [0, 5, 5, 5, 5, 5]  # z from 103: within half a voxel
    assert pet.reshape(len(pet), -1).min(axis=1).tolist() == [0, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(
    "direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)]
)
def test_box_in_any_orientation(direction: tuple):
    image = sitk.Image(10, 10, 10, sitk.sitkUInt8)
    image.SetDirection(direction)
    image.SetSpacing((1, 2, 3))
    image.SetOrigin((5, -7, 3))
    points = positions(image)
    box = np.array([np.quantile(points.reshape(-1, 3), q, axis=0) for q in (0.3, 0.8)])
    inside = ((points >= box[0] - 1e-6) & (points <= box[1] + 1e-6)).all(axis=-1)
    found = np.zeros_like(inside)
    found[hecktor.voxels_in(box, image, Path("ct"))[::-1]] = True
    assert inside.any()
    assert np.array_equal(found, inside)


# --------------------------------------------------------------------------------------------------------------- CHAOS

GRAY = np.array([0, 63, 126, 189, 252])


def write_series(folder: Path, stems: list[str], voxels: np.ndarray, positions_of_slices: list[float]) -> None:
    """A DICOM series, slice by slice in the order of names; all slices carry the same UID of their series."""
    folder.mkdir(parents=True)
    before = locale.setlocale(locale.LC_ALL)
    for number, (stem, pixels, z) in enumerate(zip(stems, voxels, positions_of_slices, strict=True)):
        image = sitk.GetImageFromArray(pixels.astype(np.uint16))
        image.SetSpacing((1.5, 1.25))
        tags = {
            "0008|0060": "MR",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": f"-180\\-90\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{stem}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)  # writing DICOM sets it to C, in which later tests could read no UTF-8


def chaos_patient(folder: Path, seed: int, downwards: bool, labeled: bool = True, shape=(11, 6, 5)) -> None:
    """The label of every voxel follows from its in-phase value: it is the remainder modulo 5."""
    heights = [float(-20 + 5.5 * i) for i in range(shape[0])][:: -1 if downwards else 1]
    in_phase = noise(seed, 0, shape=shape)
    odd, even = ([f"IMG-0004-{2 * i + first:05d}" for i in range(shape[0])] for first in (1, 2))
    write_series(folder / "T1DUAL" / "DICOM_anon" / "InPhase", even, in_phase, heights)
    write_series(folder / "T1DUAL" / "DICOM_anon" / "OutPhase", odd, noise(seed, 1, shape=shape), heights)
    write_series(folder / "T2SPIR" / "DICOM_anon", even[:3], noise(seed, 2, shape=(3, 4, 4)), [-20, -11, -2])
    if labeled:
        ground = folder / "T1DUAL" / "Ground"
        ground.mkdir()
        for stem, pixels in zip(even, GRAY[in_phase % 5], strict=True):
            sitk.WriteImage(sitk.GetImageFromArray(pixels.astype(np.uint8)), str(ground / f"{stem}.png"))


def chaos_mr(folder: Path) -> None:
    chaos_patient(folder / "Train_Sets" / "MR" / "1", 1, downwards=True)
    chaos_patient(folder / "Train_Sets" / "MR" / "10", 2, downwards=False)
    chaos_patient(folder / "Test_Sets" / "MR" / "4", 3, downwards=True, labeled=False)


def test_chaos(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    chaos_mr(source)
    found = converted(
        monkeypatch,
        chaos.convert_chaos(source / "Train_Sets" / "MR", 540, unlabeled_folder=source / "Test_Sets" / "MR"),
    )
    assert (list(found.labeled), list(found.unlabeled)) == (["CHAOS_01", "CHAOS_10"], ["CHAOS_04"])
    assert found.channel_names == ["T1_in_phase", "T1_out_of_phase"]
    assert list(found.dataset_json["labels"]) == ["background", "liver", "right_kidney", "left_kidney", "spleen"]
    for case, seed, step in (("CHAOS_01", 1, -1), ("CHAOS_10", 2, 1), ("CHAOS_04", 3, -1)):
        images = (found.labeled | found.unlabeled)[case]["images"]
        for channel, file in enumerate(images):
            image = sitk.ReadImage(file)
            # the lowest slice comes first, whatever its name
            assert np.array_equal(sitk.GetArrayFromImage(image), noise(seed, channel, shape=(11, 6, 5))[::step])
            np.testing.assert_allclose(image.GetOrigin(), (-180, -90, -20))
            np.testing.assert_allclose(image.GetSpacing(), (1.5, 1.25, 5.5))
            np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())
        if case in found.labeled:
            assert np.array_equal(read(found.labeled[case]["label"]), read(images[0]) % 5)


@pytest.mark.parametrize(
    ("organ", "inside", "outside"),
    [
        ("liver", (55, 70), (54, 71)),
        ("right_kidney", (110, 135), (109, 136)),
        ("left_kidney", (175, 200), (174, 201)),
        ("spleen", (240, 255), (239,)),
    ],
)
def test_gray_values_of_organs(organ: str, inside: tuple, outside: tuple):
    """The ranges are those of the organizers."""
    for gray in inside:
        pixels = sitk.GetImageFromArray(np.full((2, 2), gray, np.uint8))
        assert (read_array(common.relabel(pixels, Path("a.png"), chaos.VALUES)) == chaos.LABELS[organ]).all()
    for gray in outside:
        with pytest.raises(UserError, match=f"a.png: found the label values {gray};"):
            common.relabel(sitk.GetImageFromArray(np.full((2, 2), gray, np.uint8)), Path("a.png"), chaos.VALUES)


def read_array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


# ----------------------------------------------------------------------------------------------------------------- LGG


def lgg_patient(folder: Path, seed: int, missing: int | None = None, num_slices: int = 11) -> None:
    """As in the source, FLAIR stands in for a missing sequence. Eleven slices: 10 must not come before 2."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(1, num_slices + 1):
        pixels = rng.integers(0, 256, (8, 7, 3), np.uint8)
        if missing is not None:
            pixels[..., missing] = pixels[..., 1]
        tifffile.imwrite(folder / f"{folder.name}_{number}.tif", pixels, photometric="rgb")
        mask = 255 * rng.integers(0, 2, (8, 7), np.uint8)
        tifffile.imwrite(folder / f"{folder.name}_{number}_mask.tif", mask)


def kaggle_3m(folder: Path) -> None:
    lgg_patient(folder / "TCGA_CS_4941_19960909", 1)
    lgg_patient(folder / "TCGA_HT_A61B_19991127", 2)
    lgg_patient(folder / "TCGA_DU_5849_19950405", 3, missing=2)
    lgg_patient(folder / "TCGA_FG_6688_20020215", 4, missing=0)
    (folder / "data.csv").write_text("Patient\n")
    (folder / "README.md").write_text("LGG\n")


@pytest.mark.parametrize(
    ("modalities", "left_out"),
    [
        (("FLAIR", "T1post"), ["TCGA_DU_5849_19950405"]),
        (("T1", "FLAIR"), ["TCGA_FG_6688_20020215"]),
        (("T1post", "FLAIR", "T1"), ["TCGA_DU_5849_19950405", "TCGA_FG_6688_20020215"]),
    ],
)
def test_lgg(
    raw: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modalities: tuple,
    left_out: list[str],
):
    kaggle_3m(source)
    folder = lgg.convert_lgg(source, 550, modalities)
    found = converted(monkeypatch, folder)
    assert capsys.readouterr().out == f"Left out, since a sequence is missing: {', '.join(left_out)}\n"
    patients = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name not in left_out)
    assert list(found.labeled) == patients
    assert found.channel_names == list(modalities)
    assert strata(folder) == {patient: patient[5:7] for patient in patients}
    for patient, files in found.labeled.items():
        slices = [tifffile.imread(source / patient / f"{patient}_{n}.tif") for n in range(1, 12)]
        masks = [tifffile.imread(source / patient / f"{patient}_{n}_mask.tif") for n in range(1, 12)]
        for name, file in zip(modalities, files["images"], strict=True):
            place = {"T1": 0, "FLAIR": 1, "T1post": 2}[name]
            assert np.array_equal(read(file), np.stack(slices)[..., place])
        assert np.array_equal(read(files["label"]), np.stack(masks) == 255)
        assert sitk.ReadImage(files["label"]).GetSpacing() == (1, 1, 5)


# ------------------------------------------------------------------------------------------------------------ refusals


def remove(path: str):
    return lambda folder: (folder / path).unlink()


def copy(path: str, target: str):
    def change(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_bytes((folder / path).read_bytes())

    return change


def rename(path: str, target: str):
    return lambda folder: (folder / path).rename(folder / target)


def truncate(path: str):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-50])


def rewrite(path: str, voxels: np.ndarray, **header):
    return lambda folder: write(folder / path, voxels, **header)


def text(path: str, content: str):
    return lambda folder: (folder / path).write_text(content)


def tif(path: str, pixels: np.ndarray):
    return lambda folder: tifffile.imwrite(folder / path, pixels, photometric="rgb" if pixels.ndim == 3 else None)


def png(path: str, pixels: np.ndarray):
    return lambda folder: sitk.WriteImage(sitk.GetImageFromArray(pixels), str(folder / path))


def nothing(folder: Path) -> None:
    pass


def as_year(year: int, **options):
    return lambda folder: brats.convert_brats(folder / "train", 500, year, **options)


def with_validation(folder: Path) -> Path:
    return brats.convert_brats(folder / "train", 500, 2021, unlabeled_folder=folder / "validation")


def hecktor_of(year: int, unlabeled: bool = False):
    return lambda folder: convert_hecktor(folder, year, unlabeled)


def myops_2(folder: Path) -> Path:
    return myops.convert_myops(folder, 510, unlabeled_folder=folder / "test20")


def prostate(folder: Path) -> Path:
    return msd_prostate.convert_msd_prostate(folder, 520, unlabeled_folder=folder / "imagesTs")


def chaos_1(folder: Path) -> Path:
    return chaos.convert_chaos(folder / "Train_Sets" / "MR", 540, unlabeled_folder=folder / "Test_Sets" / "MR")


def lgg_2(folder: Path) -> Path:
    return lgg.convert_lgg(folder, 550)


B = "train/BraTS2021_00002/BraTS2021_00002"
BH = {"origin": BRATS_ORIGIN, "direction": BRATS_DIRECTION}
H = "train/CHUM001"
C = "Train_Sets/MR/10/T1DUAL"
L = "TCGA_HT_A61B_19991127/TCGA_HT_A61B_19991127"
nan = np.full((4, 5, 6), np.nan, np.float32)

# name -> miniature, what is changed in it, conversion, and words of the message
REFUSED = {
    "brats: no such folder": (nothing, nothing, as_year(2021), ["train: found no such folder"]),
    "brats: empty folder": (lambda f: (f / "train").mkdir(), nothing, as_year(2021), ["train: found no NIfTI file"]),
    "brats: another year": (
        brats_2020,
        nothing,
        as_year(2021),
        ["BraTS20_Training_001_flair.nii: found a name", "BraTS2021_00000/BraTS2021_00000_t1.nii.gz"],
    ),
    "brats: unknown file": (
        brats_2021,
        copy(f"{B}_t1.nii.gz", f"{B}_t1w.nii.gz"),
        as_year(2021),
        ["BraTS2021_00002_t1w.nii.gz: found a name"],
    ),
    "brats: file of another case": (
        brats_2021,
        rename(f"{B}_t1.nii.gz", "train/BraTS2021_00002/BraTS2021_00000_t1.nii.gz"),
        as_year(2021),
        ["BraTS2021_00002/BraTS2021_00000_t1.nii.gz: found a name"],
    ),
    "brats: misnamed label of another case": (
        brats_2020,
        rename(
            "train/MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_seg.nii",
            "train/MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/W39_1998.09.19_Segm.nii",
        ),
        as_year(2020),
        ["BraTS20_Training_001/W39_1998.09.19_Segm.nii: found a name"],
    ),
    "brats: no image": (
        brats_2021,
        remove(f"{B}_t1ce.nii.gz"),
        as_year(2021),
        ["BraTS2021_00002: found no t1ce of BraTS2021_00002"],
    ),
    "brats: no label": (
        brats_2021,
        remove(f"{B}_seg.nii.gz"),
        as_year(2021),
        ["BraTS2021_00002: found no label of BraTS2021_00002"],
    ),
    "brats: two candidates": (
        brats_2021,
        rewrite(f"{B}_t2.nii", noise(5), **BH),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found a second file beside", "BraTS2021_00002_t2.nii;"],
    ),
    "brats: unknown label value": (
        brats_2021,
        rewrite(f"{B}_seg.nii.gz", labels_of((0, 3, 4)), **BH),
        as_year(2021),
        ["BraTS2021_00002_seg.nii.gz: found the label values 3; expected only 0, 1, 2, 4"],
    ),
    "brats: label between two values": (
        brats_2021,
        rewrite(f"{B}_seg.nii.gz", labels_of((0, 1, 1.5), dtype=np.float32), **BH),
        as_year(2021),
        ["BraTS2021_00002_seg.nii.gz: found the label values 1.5;"],
    ),
    "brats: image on another grid": (
        brats_2021,
        rewrite(f"{B}_t2.nii.gz", noise(5), **BH | {"origin": (0, -239, 0.2)}),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found origin [0.0, -239.0, 0.2]", "_t1.nii.gz"],
    ),
    "brats: image of another orientation": (
        brats_2021,
        rewrite(f"{B}_t2.nii.gz", noise(5), origin=BRATS_ORIGIN),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found direction [[1.0", "expected [[-1.0"],
    ),
    "brats: label of another size": (
        brats_2021,
        rewrite(f"{B}_seg.nii.gz", labels_of((0, 1), shape=(4, 5, 7)), **BH),
        as_year(2021),
        ["BraTS2021_00002_seg.nii.gz: found shape [4, 5, 7]", "expected [4, 5, 6]"],
    ),
    "brats: image of four dimensions": (
        brats_2021,
        rewrite(f"{B}_t2.nii.gz", noise(5, shape=(2, 4, 5, 6))),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found the shape (6, 5, 4, 2)", "expected 3 dimensions"],
    ),
    "brats: cut off": (
        brats_2021,
        truncate(f"{B}_t2.nii.gz"),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found a gzip stream without its end"],
    ),
    "brats: cut off, not packed": (
        brats_2020,
        truncate("train/MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_t2.nii"),
        as_year(2020),
        ["BraTS20_Training_001_t2.nii: found 190 of 240 bytes of voxels; expected a whole file"],
    ),
    "brats: three values in every voxel": (
        brats_2021,
        lambda f: sitk.WriteImage(
            sitk.GetImageFromArray(noise(5, shape=(4, 5, 6, 3)), isVector=True), str(f / f"{B}_t2.nii.gz")
        ),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found the shape (6, 5, 4) and values per voxel: 3;"],
    ),
    "brats: no image file": (
        brats_2021,
        text(f"{B}_t2.nii.gz", "404 Not Found"),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found an unreadable file ("],
    ),
    "brats: not finite": (
        brats_2021,
        rewrite(f"{B}_t2.nii.gz", nan, **BH),
        as_year(2021),
        ["BraTS2021_00002_t2.nii.gz: found 120 voxels that are NaN or infinite"],
    ),
    "brats: one modality": (
        brats_2021,
        nothing,
        as_year(2021, modalities=["T1"]),
        ["--modalities: found T1; expected"],
    ),
    "brats: no modality": (brats_2021, nothing, as_year(2021, modalities=[]), ["--modalities: found none; expected"]),
    "brats: a modality twice": (
        brats_2021,
        nothing,
        as_year(2021, modalities=["T1", "T1"]),
        ["--modalities: found T1, T1; expected"],
    ),
    "brats: unknown modality": (
        brats_2021,
        nothing,
        as_year(2021, modalities=["T1", "PD"]),
        ["--modalities: found T1, PD; expected two or more different ones of T1, T1ce, T2, FLAIR"],
    ),
    "brats: unlabeled case is labeled": (
        brats_2021,
        copy(f"{B}_seg.nii.gz", "validation/BraTS2021_00001/BraTS2021_00001_seg.nii.gz"),
        with_validation,
        ["BraTS2021_00001_seg.nii.gz: found a label", "nnUNetv2_semicml_withhold_labels"],
    ),
    "brats: case is labeled and unlabeled": (
        lambda f: [brats_2021(f), brats_case(f / "validation", "BraTS2021_00000", 9, labeled=False)],
        nothing,
        with_validation,
        ["--unlabeled: found BraTS2021_00000"],
    ),
    "brats: no unlabeled folder": (
        lambda f: brats_case(f / "train", "BraTS2021_00000", 1),
        nothing,
        with_validation,
        ["validation: found no such folder"],
    ),
    "myops: wrong folder": (
        myops_2020,
        nothing,
        lambda f: myops.convert_myops(f / "train25", 510),
        ["train25/train25: found no such folder"],
    ),
    "myops: no image": (
        myops_2020,
        remove("test20/myops_test_201_DE.nii.gz"),
        myops_2,
        ["test20: found no DE of myops_test_201"],
    ),
    "myops: unknown label value": (
        myops_2020,
        rewrite("train25_myops_gd/myops_training_102_gd.nii.gz", labels_of((0, 200, 421)), spacing=(0.73, 0.73, 14)),
        myops_2,
        ["myops_training_102_gd.nii.gz: found the label values 421; expected only 0, 500, 600, 200, 1220, 2221"],
    ),
    "myops: another grid": (
        myops_2020,
        rewrite("train25/myops_training_102_T2.nii.gz", noise(5), spacing=(0.73, 0.73, 12)),
        myops_2,
        ["myops_training_102_T2.nii.gz: found spacing [12.0,", "_C0.nii.gz"],
    ),
    "prostate: no dataset.json": (task05_prostate, remove("dataset.json"), prostate, ["dataset.json: found no usable"]),
    "prostate: another task": (
        task05_prostate,
        text("dataset.json", '{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}}'),
        prostate,
        ["dataset.json: found ({'0': 'MRI'}", "Give the folder Task05_Prostate"],
    ),
    "prostate: three dimensions": (
        task05_prostate,
        rewrite("imagesTs/prostate_03.nii.gz", noise(1)),
        prostate,
        ["prostate_03.nii.gz: found the shape (6, 5, 4) and values per voxel: 1; expected 4 dimensions"],
    ),
    "prostate: three images": (
        task05_prostate,
        rewrite("imagesTr/prostate_01.nii.gz", noise(1, shape=(3, 4, 5, 6))),
        prostate,
        ["prostate_01.nii.gz: found 3 images"],
    ),
    "prostate: unknown label value": (
        task05_prostate,
        rewrite("labelsTr/prostate_01.nii.gz", labels_of((0, 1, 3))),
        prostate,
        ["prostate_01.nii.gz: found the label values 3; expected only 0, 1, 2"],
    ),
    "prostate: label on another grid": (
        task05_prostate,
        rewrite("labelsTr/prostate_01.nii.gz", labels_of((0, 1, 2))),
        prostate,
        ["labelsTr/prostate_01.nii.gz: found spacing", "imagesTr/prostate_01.nii.gz"],
    ),
    "prostate: image without label": (
        task05_prostate,
        remove("labelsTr/prostate_01.nii.gz"),
        prostate,
        ["imagesTr: found no label of prostate_01"],
    ),
    "hecktor: 2020 as 2021": (hecktor_2020, nothing, hecktor_of(2021), ["_ct_gtvt.nii.gz: found a name"]),
    "hecktor: 2021 as 2020": (hecktor_2021, nothing, hecktor_of(2020), ["_gtvt.nii.gz: found a name"]),
    "hecktor: 2021 as 2022": (hecktor_2021, nothing, hecktor_of(2022), ["imagesTr: found no such folder"]),
    "hecktor: no PET": (hecktor_2021, remove(f"{H}_pt.nii.gz"), hecktor_of(2021), ["train: found no pt of CHUM001"]),
    "hecktor: no boxes": (
        hecktor_2021,
        nothing,
        lambda f: hecktor.convert_hecktor(f / "train", 530, 2021),
        ["--bounding_boxes: found none", "hecktor2021_bbox_training.csv"],
    ),
    "hecktor: boxes in 2022": (
        hecktor_2022,
        nothing,
        lambda f: hecktor.convert_hecktor(f / "train", 530, 2022, [f / "a.csv"]),
        ["--bounding_boxes: found", "a.csv", "Leave the option out"],
    ),
    "hecktor: no box of a case": (
        hecktor_2021,
        text("test.csv", BOXES),
        hecktor_of(2021, unlabeled=True),
        ["test.csv: found no box of CHUP025"],
    ),
    "hecktor: no file of boxes": (hecktor_2021, remove("test.csv"), hecktor_of(2021), ["test.csv: found no usable"]),
    "hecktor: boxes without a column": (
        hecktor_2021,
        text("test.csv", "PatientID,x1,x2\nCHUP025,1,2\n"),
        hecktor_of(2021),
        ["test.csv: found no usable table (KeyError: 'y1')"],
    ),
    "hecktor: box without a number": (
        hecktor_2021,
        text("test.csv", BOXES + "CHUP025,1,2,3,4,5,\n"),
        hecktor_of(2021),
        ["test.csv: found no usable table (ValueError"],
    ),
    "hecktor: box that is cut off": (
        hecktor_2021,
        text("test.csv", BOXES + "CHUP025,1,2,3\n"),
        hecktor_of(2021),
        ["test.csv: found no usable table (TypeError"],
    ),
    "hecktor: empty box": (
        hecktor_2021,
        text("test.csv", BOXES + "CHUP025,1,2,3,3,5,6\n"),
        hecktor_of(2021),
        ["test.csv: found no usable table (ValueError: an empty or second box of CHUP025"],
    ),
    "hecktor: two boxes of a case": (
        hecktor_2021,
        text("test.csv", BOXES + f"CHUM001,{BOX}"),
        hecktor_of(2021),
        ["test.csv: found no usable table (ValueError: an empty or second box of CHUM001"],
    ),
    "hecktor: box elsewhere": (
        hecktor_2021,
        text("train.csv", BOXES + f"CHGJ007,{BOX}CHUM001,500,600,-17,-8,103,118\n"),
        hecktor_of(2021),
        ["CHUM001_ct.nii.gz: found no overlap with [[500.0, -17.0, 103.0]"],
    ),
    "hecktor: box cuts the tumor": (
        hecktor_2021,
        text("train.csv", BOXES + f"CHGJ007,{BOX}CHUM001,-5.5,1,-17,-8,103,118\n"),
        hecktor_of(2021),
        ["CHUM001_gtvt.nii.gz: found 6 of 12 labeled voxels outside the bounding box"],
    ),
    "hecktor: PET elsewhere": (
        hecktor_2021,
        rewrite(f"{H}_pt.nii.gz", noise(1), origin=(0, 0, 900)),
        hecktor_of(2021),
        ["CHUM001_pt.nii.gz: found no overlap"],
    ),
    "hecktor: PET without the tumor": (
        hecktor_2022,
        rewrite("train/imagesTr/MDA-005__PT.nii.gz", noise(1), origin=(-10, -20, 115)),
        hecktor_of(2022),
        ["MDA-005.nii.gz: found 24 of 24 labeled voxels outside the field of view of the PET"],
    ),
    "hecktor: label on the grid of the PET": (
        hecktor_2021,
        rewrite(f"{H}_gtvt.nii.gz", labels_of((0, 1), shape=PET_SHAPE), **PET_GRID),
        hecktor_of(2021),
        ["CHUM001_gtvt.nii.gz: found shape [9, 6, 6]", "CHUM001_ct.nii.gz"],
    ),
    "hecktor: unknown label value": (
        hecktor_2021,
        rewrite(f"{H}_gtvt.nii.gz", tumour(1, 2), **CT_GRID),
        hecktor_of(2021),
        ["CHUM001_gtvt.nii.gz: found the label values 2; expected only 0, 1"],
    ),
    "hecktor: lymph node of an unknown kind": (
        hecktor_2022,
        rewrite("train/labelsTr/MDA-005.nii.gz", tumour(1, 3), **CT_GRID),
        hecktor_of(2022),
        ["MDA-005.nii.gz: found the label values 3; expected only 0, 1, 2"],
    ),
    "hecktor: label of a test case": (
        hecktor_2022,
        rewrite("test/USZ-001.nii.gz", tumour(1), **CT_GRID),
        hecktor_of(2022, unlabeled=True),
        ["USZ-001.nii.gz: found a label"],
    ),
    "chaos: folder CT": (
        lambda f: (f / "Train_Sets" / "MR" / "1" / "DICOM_anon").mkdir(parents=True),
        nothing,
        chaos_1,
        ["1/T1DUAL/DICOM_anon/InPhase: found no such folder"],
    ),
    "chaos: a folder too high": (
        chaos_mr,
        nothing,
        lambda f: chaos.convert_chaos(f / "Train_Sets", 540),
        ["Train_Sets/MR: found a folder that CHAOS does not have"],
    ),
    "chaos: empty folder": (
        lambda f: (f / "Train_Sets" / "MR").mkdir(parents=True),
        nothing,
        chaos_1,
        ["MR: found no folder of a patient"],
    ),
    "chaos: no label": (chaos_mr, rename(f"{C}/Ground", f"{C}/Truth"), chaos_1, ["10/T1DUAL/Ground: found no such"]),
    "chaos: label of a test case": (
        chaos_mr,
        rename(f"{C}/Ground", "Test_Sets/MR/4/T1DUAL/Ground"),
        lambda f: chaos.convert_chaos(f / "Test_Sets" / "MR", 540, unlabeled_folder=f / "Test_Sets" / "MR"),
        ["Test_Sets/MR/4/T1DUAL/Ground: found labels"],
    ),
    "chaos: no phases": (
        chaos_mr,
        lambda f: [path.unlink() for path in (f / C / "DICOM_anon" / "InPhase").iterdir()],
        chaos_1,
        ["10/T1DUAL/DICOM_anon/InPhase: found 0 DICOM files"],
    ),
    "chaos: slice missing": (
        chaos_mr,
        remove(f"{C}/DICOM_anon/InPhase/IMG-0004-00008.dcm"),
        chaos_1,
        ["InPhase: found slices of 1 sizes and orientations, 5.5 to 11 mm apart"],
    ),
    "chaos: slice twice": (
        chaos_mr,
        copy(f"{C}/DICOM_anon/InPhase/IMG-0004-00008.dcm", f"{C}/DICOM_anon/InPhase/IMG-0005-00008.dcm"),
        chaos_1,
        ["InPhase: found slices of 1 sizes and orientations, 0 to 5.5 mm apart"],
    ),
    "chaos: slice of another series": (
        chaos_mr,
        copy("Train_Sets/MR/10/T2SPIR/DICOM_anon/IMG-0004-00002.dcm", f"{C}/DICOM_anon/InPhase/IMG-0004-00002.dcm"),
        chaos_1,
        ["InPhase: found slices of 2 sizes and orientations"],
    ),
    "chaos: all slices in one place": (
        chaos_mr,
        lambda f: write_series(f / "Train_Sets" / "MR" / "11" / "T1DUAL", ["a", "b"], noise(1)[:2], [3, 3]),
        lambda f: chaos.read_series(f / "Train_Sets" / "MR" / "11" / "T1DUAL"),
        ["11/T1DUAL: found slices of 1 sizes and orientations, 0 to 0 mm apart"],
    ),
    "chaos: unreadable slice": (
        chaos_mr,
        text(f"{C}/DICOM_anon/InPhase/IMG-0004-00008.dcm", ""),
        chaos_1,
        ["IMG-0004-00008.dcm: found an unreadable file"],
    ),
    "chaos: last slice of a phase missing": (
        chaos_mr,
        remove(f"{C}/DICOM_anon/OutPhase/IMG-0004-00021.dcm"),
        chaos_1,
        ["10/T1DUAL/DICOM_anon/OutPhase: found shape [10, 6, 5]", "expected [11, 6, 5]"],
    ),
    "chaos: label of a slice missing": (
        chaos_mr,
        remove(f"{C}/Ground/IMG-0004-00008.png"),
        chaos_1,
        ["10/T1DUAL/Ground: found 10 PNG files; expected one for each of the 11 slices"],
    ),
    "chaos: unknown gray value": (
        chaos_mr,
        png(f"{C}/Ground/IMG-0004-00008.png", np.full((6, 5), 32, np.uint8)),
        chaos_1,
        ["IMG-0004-00008.png: found the label values 32"],
    ),
    "chaos: label of another size": (
        chaos_mr,
        png(f"{C}/Ground/IMG-0004-00008.png", np.zeros((5, 6), np.uint8)),
        chaos_1,
        ["IMG-0004-00008.png: found the shape (5, 6); expected (6, 5)"],
    ),
    "chaos: unreadable label": (
        chaos_mr,
        text(f"{C}/Ground/IMG-0004-00008.png", ""),
        chaos_1,
        ["IMG-0004-00008.png: found an unreadable file"],
    ),
    "lgg: unknown folder": (
        kaggle_3m,
        rename("TCGA_CS_4941_19960909", "kaggle_3m"),
        lgg_2,
        ["kaggle_3m: found a folder that this dataset does not have"],
    ),
    "lgg: empty folder": (nothing, nothing, lgg_2, ["source: found no folder of a patient"]),
    "lgg: empty patient": (
        lambda f: (f / "TCGA_CS_4941_19960909").mkdir(),
        nothing,
        lgg_2,
        ["TCGA_CS_4941_19960909: found no file"],
    ),
    "lgg: slice missing": (
        kaggle_3m,
        remove(f"{L}_3.tif"),
        lgg_2,
        ["TCGA_HT_A61B_19991127_3.tif: found no such file, but TCGA_HT_A61B_19991127_10.tif"],
    ),
    "lgg: mask missing": (kaggle_3m, remove(f"{L}_11_mask.tif"), lgg_2, ["1127_11_mask.tif: found no such file;"]),
    "lgg: unknown file": (kaggle_3m, text(f"{L}.txt", ""), lgg_2, ["_12.tif: found no such file, but TCGA_HT_A61B"]),
    "lgg: one channel": (
        kaggle_3m,
        tif(f"{L}_3.tif", np.zeros((8, 7), np.uint8)),
        lgg_2,
        ["TCGA_HT_A61B_19991127_3.tif: found uint8 of the shape (8, 7); expected 8 bits per value and 3 channels"],
    ),
    "lgg: 16 bits": (
        kaggle_3m,
        tif(f"{L}_3_mask.tif", np.zeros((8, 7), np.uint16)),
        lgg_2,
        ["TCGA_HT_A61B_19991127_3_mask.tif: found uint16 of the shape (8, 7)"],
    ),
    "lgg: another size": (
        kaggle_3m,
        tif(f"{L}_3_mask.tif", np.zeros((7, 8), np.uint8)),
        lgg_2,
        ["TCGA_HT_A61B_19991127_3_mask.tif: found the shape (7, 8); expected (8, 7)"],
    ),
    "lgg: unknown label value": (
        kaggle_3m,
        tif(f"{L}_3_mask.tif", np.full((8, 7), 128, np.uint8)),
        lgg_2,
        ["TCGA_HT_A61B_19991127_3_mask.tif: found the label values 128; expected only 0, 255"],
    ),
    "lgg: unreadable": (kaggle_3m, text(f"{L}_3.tif", "II"), lgg_2, ["1127_3.tif: found an unreadable file"]),
    "lgg: nobody has the modality": (
        lambda f: lgg_patient(f / "TCGA_DU_5849_19950405", 3, missing=2),
        nothing,
        lgg_2,
        ["source: found no patient with FLAIR and T1post"],
    ),
}


@pytest.mark.parametrize(("write_miniature", "change", "convert", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(raw: Path, source: Path, write_miniature: Callable, change: Callable, convert: Callable, words: list):
    write_miniature(source)
    change(source)
    before = {path: path.read_bytes() if path.is_file() else None for path in source.rglob("*")}
    with pytest.raises(UserError) as error:
        convert(source)
    for word in words:
        assert word in str(error.value)
    assert not [*raw.iterdir()]
    assert {path: path.read_bytes() if path.is_file() else None for path in source.rglob("*")} == before


def test_refuses_a_taken_or_impossible_id(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    """nnU-Net takes Dataset5001_Other for a dataset of the number 500."""
    brats_2021(source)
    (raw.parent / "results" / "Dataset500_Other").mkdir()
    (raw.parent / "preprocessed" / "Dataset6001_Other").mkdir()
    for dataset_id, words in (
        (500, "-d: found 500, the id of Dataset500_Other"),
        (6001, "-d: found 6001, the id of Dataset6001_Other"),
        (5001, "-d: found 5001, beside Dataset500_Other"),
        (600, "-d: found 600, beside Dataset6001_Other"),
        (0, "-d: found 0; expected a number from 1 on"),
    ):
        with pytest.raises(UserError, match=words):
            brats.convert_brats(source / "train", dataset_id, 2021)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="environment variable nnUNet_raw: found nothing; expected a folder"):
        brats.convert_brats(source / "train", 501, 2021)
    assert not [*raw.iterdir()]


@pytest.mark.parametrize(
    ("dataset_id", "name"), [(7, "Dataset007_BraTS2021"), (50, "Dataset050_BraTS2021"), (1234, "Dataset1234_BraTS2021")]
)
def test_ids(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch, dataset_id: int, name: str):
    brats_2021(source)
    (raw.parent / "results" / "Dataset500_Other").mkdir()
    assert converted(monkeypatch, brats.convert_brats(source / "train", dataset_id, 2021)).name == name
    assert read_raw_dataset(dataset_id, require_unlabeled=False).name == name


def test_interruption_leaves_nothing(raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    brats_2021(source)
    written, write = [], sitk.WriteImage

    def interrupted(image: sitk.Image, file: str, **options) -> None:
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(image, file, **options)

    monkeypatch.setattr(common.sitk, "WriteImage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        brats.convert_brats(source / "train", 500, 2021)
    assert len(written) == 3
    assert not [*raw.iterdir()]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(raw: Path, source: Path):
    """A limit on the size of files stands for it; ITK writes a part of an image then, and does not say so."""
    brats_2021(source)
    code = (
        "import resource; from nnunetv2_semicml.dataset_conversion.brats import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150)); main()"
    )
    command = [sys.executable, "-c", code, str(source / "train"), "-d", "500", "--year", "2021"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"Error: {raw}/.Dataset500_BraTS2021.unfinished/Dataset500_BraTS2021/imagesTr/BraTS2021_0000"
    )
    assert last.endswith(
        "_0000.nii.gz: found that it cannot be written (No space left on device); expected enough space and the right "
        "to write there. Make room, and repeat the command: nothing is left of what it has written."
    )
    assert not [*raw.iterdir()]


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("module", "write_miniature", "arguments", "line", "following"),
    [
        (
            brats,
            brats_2020,
            "train -d 500 --year 2020 --modalities T1ce T2 --labels regions --unlabeled validation",
            "Dataset500_BraTS2020: 2 labeled, 1 unlabeled",
            "plan_and_preprocess -d 500",
        ),
        (brats, brats_2021, "train -d 5 --year 2021", "Dataset005_BraTS2021: 2 labeled, 0 unlabeled", "labels -d 5 "),
        (
            hecktor,
            hecktor_2021,
            "train -d 530 --year 2021 --bounding_boxes train.csv test.csv --unlabeled test",
            "Dataset530_HECKTOR2021: 2 labeled, 1 unlabeled",
            "plan_and_preprocess -d 530",
        ),
        (hecktor, hecktor_2022, "train -d 7 --year 2022", "2022: 2 labeled, 0 unlabeled", "strata.csv"),
        (myops, myops_2020, ". -d 510 --unlabeled test20", "2 labeled, 1 unlabeled", "plan_and_preprocess -d 510"),
        (myops, myops_2020, ". -d 510", "2 labeled, 0 unlabeled", "labels -d 510 --output_id ID"),
        (msd_prostate, task05_prostate, ". -d 520 --unlabeled imagesTs", "2 labeled, 1 unlabeled", "process -d 520"),
        (
            chaos,
            chaos_mr,
            "Train_Sets/MR -d 540 --unlabeled Test_Sets/MR",
            "Dataset540_CHAOS: 2 labeled, 1 unlabeled",
            "plan_and_preprocess -d 540",
        ),
        (lgg, kaggle_3m, ". -d 550 --modalities FLAIR T1", "Dataset550_LGG: 3 labeled, 0 unlabeled", "strata.csv"),
    ],
)
def test_command_line(
    raw: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module,
    write_miniature: Callable,
    arguments: str,
    line: str,
    following: str,
):
    write_miniature(source)
    monkeypatch.chdir(source)
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments.split()])
    module.main()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    place = [printed.startswith(str(raw)) for printed in lines].index(True)
    written, following_line = lines[place : place + 2]
    assert line in written
    assert following_line.startswith("Next: nnUNetv2_semicml_")
    assert following in following_line
    assert "100%" in captured.err  # progress

    # once more: the id is taken
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("Error: -d: found")


@pytest.mark.parametrize(
    ("options", "example"),
    [
        ("", "--modalities T1+T1ce=T1,T1ce T2 FLAIR"),
        ("--modalities FLAIR T1ce T1", "--modalities FLAIR+T1ce=FLAIR,T1ce T1"),
        ("--modalities T1ce T2", None),
    ],
)
def test_says_that_modalities_can_be_joined(
    raw: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    example: str | None,
):
    brats_2021(source)
    monkeypatch.setattr("sys.argv", ["brats", *f"{source / 'train'} -d 500 --year 2021 {options}".split()])
    brats.main()
    *_, last = capsys.readouterr().out.splitlines()
    assert last.endswith(example) if example else "--modalities" not in last
