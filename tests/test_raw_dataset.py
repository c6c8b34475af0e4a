"""Every way in which a raw semi-supervised dataset can be wrong is refused with a sentence that helps."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semicml.data import raw_dataset
from nnunetv2_semicml.data.raw_dataset import check_images, read_raw_dataset
from nnunetv2_semicml.errors import UserError

DATASET_JSON = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "tumour": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def write(file: Path, voxels: np.ndarray, spacing=(1, 2, 3), origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    image = sitk.GetImageFromArray(voxels, isVector=False)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def noise(seed: int, shape=(4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mask(value: int = 1, shape=(4, 5, 6)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[1, 1, 1] = value
    return label


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dataset500_Toy with the cases a, b (labeled), u, v (unlabeled) and t (test) of 4 × 5 × 6 voxels."""
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    folder = tmp_path / "raw" / "Dataset500_Toy"
    cases = [("imagesTr", "a"), ("imagesTr", "b"), ("imagesUn", "u"), ("imagesUn", "v"), ("imagesTs", "t")]
    for i, (images, case) in enumerate(cases):
        for channel in range(2):
            write(folder / images / f"{case}_000{channel}.nii.gz", noise(2 * i + channel))
    for case in "ab":
        write(folder / "labelsTr" / f"{case}.nii.gz", mask())
    change_json(folder)
    return folder


def change_json(folder: Path, remove: str | None = None, **changes) -> None:
    content = {key: value for key, value in (DATASET_JSON | changes).items() if key != remove}
    (folder / "dataset.json").write_text(json.dumps(content))


def list_cases_in_json(folder: Path) -> None:
    """Move the labeled files away, and list them in dataset.json in nnU-Net's two ways: relative and by a variable."""
    (folder / "imagesTr").rename(folder.parent / "images")
    (folder / "labelsTr").rename(folder.parent / "labels")
    entries = {
        case: {
            "images": [f"../images/{case}_0000.nii.gz", f"$nnUNet_raw/images/{case}_0001.nii.gz"],
            "label": f"../labels/{case}.nii.gz",
        }
        for case in "ba"
    }
    change_json(folder, dataset=entries)


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(command, *args) -> str:
    with pytest.raises(UserError) as error:
        command(*args)
    return str(error.value)


def test_reads_all_files_in_order(folder: Path):
    raw = read_raw_dataset(500)
    assert (raw.name, raw.folder, raw.channel_names) == ("Dataset500_Toy", folder, ["CT", "PET"])
    assert raw.dataset_json == DATASET_JSON
    assert raw.labeled == {
        case: {
            "images": [str(folder / "imagesTr" / f"{case}_000{channel}.nii.gz") for channel in range(2)],
            "label": str(folder / "labelsTr" / f"{case}.nii.gz"),
        }
        for case in "ab"
    }
    assert list(raw.unlabeled) == ["u", "v"]
    assert raw.unlabeled["u"] == {"images": [str(folder / "imagesUn" / f"u_000{channel}.nii.gz") for channel in (0, 1)]}
    assert list(raw.test) == ["t"]


def test_reads_the_cases_that_dataset_json_lists(folder: Path):
    list_cases_in_json(folder)
    raw = read_raw_dataset(500)
    assert list(raw.labeled) == ["a", "b"]
    assert [Path(file) for file in raw.labeled["a"]["images"]] == [
        folder.parent / "images" / f"a_000{channel}.nii.gz" for channel in range(2)
    ]
    assert raw.dataset_json["dataset"]["a"]["label"] == "../labels/a.nii.gz"  # as on disk
    check_images(raw, 2, show_progress=False)


def test_fully_labeled_dataset_only_on_demand(folder: Path):
    shutil.rmtree(folder / "imagesUn")
    assert read_raw_dataset(500, require_unlabeled=False).unlabeled == {}


def remove(file: str):
    return lambda folder: (folder / file).unlink()


def copy(source: str, target: str):
    return lambda folder: shutil.copy(folder / source, folder / target)


def with_json(remove: str | None = None, **changes):
    return lambda folder: change_json(folder, remove, **changes)


def copy_case(target: str):
    return lambda folder: [
        shutil.copy(folder / "imagesTr" / f"a_000{channel}.nii.gz", folder / target) for channel in range(2)
    ]


def list_without(key: str):
    def change(folder: Path) -> None:
        list_cases_in_json(folder)
        entries = json.loads((folder / "dataset.json").read_text())["dataset"]
        del entries["a"][key]
        change_json(folder, dataset=entries)

    return change


def list_and_lose_an_image(folder: Path) -> None:
    list_cases_in_json(folder)
    (folder.parent / "images" / "a_0001.nii.gz").unlink()


# what is done to the dataset -> where, found, expected, remedy in the message
WRONG_FILES = {
    "folder missing": (shutil.rmtree, "raw", "no raw dataset with the id 500", "Dataset500_NAME", "correct the id"),
    "two folders": (
        lambda folder: (folder.parent / "Dataset500_Twin").mkdir(),
        "raw",
        "several datasets with the id 500",
        "one",
        "Rename all but one",
    ),
    "another name elsewhere": (
        lambda folder: (folder.parents[1] / "results" / "Dataset500_Old").mkdir(parents=True),
        "raw",
        "Dataset500_Old, Dataset500_Toy",
        "one",
        "Rename all but one",
    ),
    "no dataset.json": (remove("dataset.json"), "dataset.json", "no such file", "a JSON file with", "Correct it"),
    "damaged dataset.json": (
        lambda folder: (folder / "dataset.json").write_text("{"),
        "dataset.json",
        "a damaged file",
        "valid JSON",
        "Correct it",
    ),
    "dataset.json is a list": (
        lambda folder: (folder / "dataset.json").write_text("[]"),
        "dataset.json",
        "no usable channel_names",
        "channel_names of type dict",
        "Correct it",
    ),
    **{
        f"no {key}": (with_json(remove=key), "dataset.json", f"no usable {key}", f"{key} of type", "Correct it")
        for key in DATASET_JSON
    },
    "no channels": (with_json(channel_names={}), "dataset.json", "the channels none", "without gaps", "Correct it"),
    "channel gap": (
        with_json(channel_names={"0": "CT", "2": "PET"}),
        "dataset.json",
        "the channels 0, 2",
        "without gaps",
        "Correct it",
    ),
    "no background": (
        with_json(labels={"tumour": 1}),
        "dataset.json",
        "labels that nnU-Net refuses",
        '"background": 0',
        "Correct it",
    ),
    "label gap": (
        with_json(labels={"background": 0, "tumour": 2}),
        "dataset.json",
        "[0, 2] are not consecutive",
        '"background": 0',
        "Correct it",
    ),
    "regions without order": (
        with_json(labels={"background": 0, "whole": [1, 2], "core": 2}),
        "dataset.json",
        "regions_class_order",
        '"background": 0',
        "Correct it",
    ),
    "numTraining": (
        with_json(numTraining=4),
        "dataset.json",
        "numTraining 4",
        "labeled cases, 2",
        "Correct numTraining",
    ),
    "no labeled case": (
        lambda folder: [shutil.rmtree(folder / name) for name in ("imagesTr", "labelsTr")],
        "dataset.json",
        "numTraining 2",
        "there are none",
        "add the missing cases",
    ),
    "labeled case lacks a modality": (
        remove("imagesTr/b_0001.nii.gz"),
        "imagesTr/b_0001.nii.gz",
        "no such file",
        "each of the 2 channels",
        "Add the missing image of b",
    ),
    "unlabeled case lacks a modality": (
        remove("imagesUn/u_0000.nii.gz"),
        "imagesUn/u_0000.nii.gz",
        "no such file",
        "each of the 2 channels",
        "Add the missing image of u",
    ),
    "unknown channel": (
        copy("imagesUn/u_0001.nii.gz", "imagesUn/u_0002.nii.gz"),
        "imagesUn/u_0002.nii.gz",
        "a channel that dataset.json does not have",
        "_0001.nii.gz",
        "Rename or remove the file",
    ),
    "no channel": (
        copy("imagesTr/a_0001.nii.gz", "imagesTr/a.nii.gz"),
        "imagesTr/a.nii.gz",
        "a file name without a channel",
        "_0000.nii.gz",
        "Rename or remove the file",
    ),
    "label without images": (
        copy("labelsTr/a.nii.gz", "labelsTr/c.nii.gz"),
        "imagesTr/c_0000.nii.gz",
        "no such file",
        "all images of every labeled case",
        "Add what c lacks in imagesTr",
    ),
    "images without label": (
        remove("labelsTr/a.nii.gz"),
        "labelsTr/a.nii.gz",
        "no such file",
        "a label",
        "belongs into imagesUn",
    ),
    "no imagesUn": (
        lambda folder: shutil.rmtree(folder / "imagesUn"),
        "imagesUn",
        "no image ending in .nii.gz",
        "the unlabeled cases",
        "nnUNetv2_semicml_withhold_labels",
    ),
    "empty imagesUn": (
        lambda folder: [file.unlink() for file in (folder / "imagesUn").iterdir()],
        "imagesUn",
        "no image ending in .nii.gz",
        "the unlabeled cases",
        "nnUNetv2_semicml_withhold_labels",
    ),
    **{
        f"labeled case also in {other}": (
            copy_case(other),
            other,
            "cases that are also in imagesTr: a",
            "one of imagesTr, imagesUn and imagesTs only",
            "Remove them from one of the two",
        )
        for other in ("imagesUn", "imagesTs")
    },
    "unlabeled case also in the test set": (
        lambda folder: [
            file.rename(folder / "imagesTs" / file.name.replace("t", "v"))
            for file in [*(folder / "imagesTs").iterdir()]
        ],
        "imagesTs",
        "cases that are also in imagesUn: v",
        "one of imagesTr, imagesUn and imagesTs only",
        "Remove them from one of the two",
    ),
    "listed case without label": (
        list_without("label"),
        "dataset.json",
        "case a without a label",
        "one label",
        "List the missing files",
    ),
    "listed file does not exist": (
        list_and_lose_an_image,
        "raw/images/a_0001.nii.gz",
        "no such file",
        'the file that "dataset"',
        "Correct the path",
    ),
}


@pytest.mark.parametrize(("change", "where", "found", "expected", "remedy"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_refuses_wrong_files(folder: Path, change, where: str, found: str, expected: str, remedy: str):
    change(folder)
    before = snapshot(folder)
    message = refusal(read_raw_dataset, 500)
    assert_sentence(message, where, found, expected, remedy)
    assert snapshot(folder) == before


def assert_sentence(message: str, where: str, found: str, expected: str, remedy: str) -> None:
    place, rest = message.split(": found ", maxsplit=1)
    assert place.endswith(where)
    assert found in rest.split("; expected ")[0]
    assert expected in rest.split("; expected ")[1]
    assert remedy in rest.split("; expected ")[1]


def test_refuses_unset_environment(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("nnUNet_raw")
    assert_sentence(refusal(read_raw_dataset, 500), "nnUNet_raw", "not set", "the folder of the raw", "Set it")


def changed(file: str, voxels: np.ndarray, **geometry):
    return lambda folder: write(folder / file, voxels, **geometry)


def with_voxel(value: float) -> np.ndarray:
    voxels = noise(9)
    voxels[0, 0, 0] = value
    return voxels


def truncate(file: str):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:200])


FLIPPED = (-1, 0, 0, 0, 1, 0, 0, 0, 1)
GRID = "to one grid"
WRONG_IMAGES = {
    "shape": (
        changed("imagesUn/u_0001.nii.gz", noise(9, (4, 5, 7))),
        "u_0001.nii.gz",
        "shape [4.0",
        "as in u_0000",
        GRID,
    ),
    "spacing": (
        changed("imagesUn/u_0001.nii.gz", noise(9), spacing=(1, 2, 3.1)),
        "u_0001.nii.gz",
        "spacing [3.1, 2.0, 1.0]",
        "[3.0, 2.0, 1.0] as in u_0000",
        GRID,
    ),
    "origin": (
        changed("imagesTr/a_0001.nii.gz", noise(9), origin=(0, 1, 0)),
        "a_0001.nii.gz",
        "origin",
        "as in a_0000",
        GRID,
    ),
    "direction": (
        changed("imagesTr/a_0001.nii.gz", noise(9), direction=FLIPPED),
        "a_0001.nii.gz",
        "direction [-1.0",
        "as in a_0000",
        GRID,
    ),
    "affine": (
        lambda folder: (
            write(folder / "imagesTr" / "a_0001.nii.gz", noise(9), origin=(0, 1, 0)),
            change_json(folder, overwrite_image_reader_writer="NibabelIO"),
        ),
        "a_0001.nii.gz",
        "affine",
        "as in a_0000",
        GRID,
    ),
    "label on another grid": (
        changed("labelsTr/b.nii.gz", mask(), origin=(0, 0, -5)),
        "labelsTr/b.nii.gz",
        "origin [0.0, 0.0, -5.0]",
        "as in b_0000",
        GRID,
    ),
    "first image unreadable": (
        lambda folder: (folder / "imagesTr" / "a_0000.nii.gz").write_text("no image"),
        "a_0000.nii.gz",
        "no nnU-Net reader for .nii.gz",
        "a readable image",
        "Replace the file",
    ),
    "unreadable": (
        truncate("imagesUn/v_0001.nii.gz"),
        "v_0001.nii.gz",
        "an unreadable file (EOFError",
        "an image",
        "Replace the file",
    ),
    "several channels in a file": (
        changed(
            "imagesTr/b_0000.nii.gz",
            noise(9, (3, 4, 5, 6)),
            spacing=(1, 2, 3, 1),
            origin=(0,) * 4,
            direction=np.eye(4).ravel(),
        ),
        "b_0000.nii.gz",
        "3 channels",
        "one channel per file",
        "in its own file",
    ),
    "NaN": (
        changed("imagesUn/u_0000.nii.gz", with_voxel(np.nan)),
        "u_0000.nii.gz",
        "1 voxels that are NaN",
        "finite",
        "Replace",
    ),
    "infinite": (
        changed("imagesTs/t_0001.nii.gz", with_voxel(np.inf)),
        "t_0001.nii.gz",
        "infinite",
        "finite",
        "Replace",
    ),
    "constant": (
        changed("imagesUn/u_0000.nii.gz", np.zeros((4, 5, 6), np.float32)),
        "u_0000.nii.gz",
        "the value 0 in every voxel",
        "an image",
        "Export it again",
    ),
    "label value": (
        changed("labelsTr/a.nii.gz", mask(7)),
        "labelsTr/a.nii.gz",
        "the label values 7",
        "dataset.json: 0, 1",
        "Correct the label",
    ),
    "one image for both channels": (
        copy("imagesUn/u_0000.nii.gz", "imagesUn/u_0001.nii.gz"),
        "u_0001.nii.gz",
        "the same voxels as in u_0000",
        "in every channel",
        "Replace one",
    ),
    "labeled image in imagesUn": (
        copy("imagesTr/a_0001.nii.gz", "imagesUn/v_0001.nii.gz"),
        "v_0001.nii.gz",
        "imagesTr/a_0001.nii.gz",
        "in one of imagesTr",
        "Remove one of the two cases",
    ),
    "unlabeled image in imagesTs": (
        copy("imagesUn/v_0000.nii.gz", "imagesTs/t_0000.nii.gz"),
        "t_0000.nii.gz",
        "imagesUn/v_0000.nii.gz",
        "in one of imagesTr",
        "Remove one of the two cases",
    ),
}


@pytest.mark.parametrize(("change", "where", "found", "expected", "remedy"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_refuses_wrong_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change, where: str, found: str, expected: str, remedy: str
):
    # threads start at once; the tests below use processes
    monkeypatch.setattr(raw_dataset, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
    change(folder)
    before = snapshot(folder)
    message = refusal(check_images, read_raw_dataset(500), 1, False)
    assert_sentence(message, where, found, expected, remedy)
    assert "more:" not in message
    assert snapshot(folder) == before


def test_names_all_wrong_cases(folder: Path):
    for file in ("imagesUn/v_0001", "imagesUn/u_0001", "imagesTr/b_0000"):
        write(folder / f"{file}.nii.gz", np.ones((4, 5, 6)))
    message = refusal(check_images, read_raw_dataset(500), 1, False)
    assert_sentence(message, "imagesTr/b_0000.nii.gz", "the value 1", "an image", "(and 2 more: u, v)")
    assert not multiprocessing.active_children()


def test_accepts_regions_ignore_label_and_noise_in_the_header(folder: Path, capfd: pytest.CaptureFixture[str]):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    change_json(folder, labels=labels, regions_class_order=[1, 2])
    write(folder / "labelsTr" / "a.nii.gz", mask(2), origin=(1e-4, 0, 0))
    write(folder / "labelsTr" / "b.nii.gz", mask(3), spacing=(1, 2, 3.000001))
    shutil.copy(folder / "imagesUn" / "u_0000.nii.gz", folder / "imagesUn" / "v_0000.nii.gz")  # within one folder
    check_images(read_raw_dataset(500), 2)
    output = capfd.readouterr()
    assert output.out == ""
    assert "5/5" in output.err


def test_reports_a_killed_process(folder: Path, monkeypatch: pytest.MonkeyPatch):
    raw = read_raw_dataset(500)
    monkeypatch.setattr(raw_dataset, "_find_reader", lambda raw: KillsItsProcess)
    message = refusal(check_images, raw, 1, False)
    assert_sentence(message, "Dataset500_Toy", "was killed", "enough memory", "Use fewer processes")
    assert not multiprocessing.active_children()


class KillsItsProcess:
    def read_images(self, files):
        os._exit(9)  # as when the system runs out of memory
