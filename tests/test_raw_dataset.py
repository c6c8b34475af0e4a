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
import tifffile
from skimage import io
from toy import set_folders

from nnunetv2_semicml.data import image_check, raw_dataset
from nnunetv2_semicml.data.image_check import check_images
from nnunetv2_semicml.data.raw_dataset import confusable_with_id, datasets_with_id, read_raw_dataset
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


def test_reads_the_cases_that_dataset_json_lists(folder: Path, threads):
    list_cases_in_json(folder)
    raw = read_raw_dataset(500)
    assert list(raw.labeled) == ["a", "b"]
    assert [Path(file) for file in raw.labeled["a"]["images"]] == [
        folder.parent / "images" / f"a_000{channel}.nii.gz" for channel in range(2)
    ]
    assert raw.dataset_json["dataset"]["a"]["label"] == "../labels/a.nii.gz"  # as on disk
    check_images(raw, 1, show_progress=False)


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


def list_as(name: str):
    """List case a by another name."""

    def change(folder: Path) -> None:
        list_cases_in_json(folder)
        entries = json.loads((folder / "dataset.json").read_text())["dataset"]
        change_json(folder, dataset={**entries, name: entries.pop("a")})

    return change


def list_with(**values):
    """List case a with other values."""

    def change(folder: Path) -> None:
        list_cases_in_json(folder)
        entries = json.loads((folder / "dataset.json").read_text())["dataset"]
        change_json(folder, dataset={**entries, "a": {**entries["a"], **values}})

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
        "a label and images of every labeled case",
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
    **{
        f"listed case called {name!r}": (
            list_as(name),
            "dataset.json",
            f"the names {name!r}",
            "names for files",
            "Choose other names",
        )
        for name in ("../../../evil", "/evil", "a/b", "a\\b", "", ".", "..", ".a", "a\0", "a\nb", "\udce4", "a" * 201)
    },
    **{
        f"{key} of a listed case is {value!r}": (
            list_with(**{key: value}),
            "dataset.json",
            "case a without a label or without 2 images",
            "one label, and one image for each channel",
            "List the missing files",
        )
        for key, value in (("label", None), ("label", ["a"]), ("images", "ab"), ("images", {}), ("images", [1, 2]))
    },
    "listed cases are a list": (
        with_json(dataset=["a"]),
        "dataset.json",
        '"dataset" of type list',
        "{case: files}",
        "",
    ),
    "listed case is a list": (
        with_json(dataset={"a": []}),
        "dataset.json",
        "case a without a label or without 1 images",
        "one label",
        "List the missing files",
    ),
    **{
        f"file_ending {ending!r}": (with_json(file_ending=ending), "dataset.json", repr(ending), "e.g. .nii.gz", "")
        for ending in ("", "/../../x.nii.gz", "\0", "*\\")
    },
    "reader without a name": (
        with_json(overwrite_image_reader_writer=None),
        "dataset.json",
        "the overwrite_image_reader_writer None",
        "one of nnU-Net's readers",
        "Correct it",
    ),
    "channel without a name": (with_json(channel_names={"0": None}), "dataset.json", "None", "T1", "Correct it"),
    "case with a line break": (
        lambda folder: [file.rename(file.with_name(f"a\n{file.name}")) for file in folder.glob("imagesUn/*")],
        "imagesUn",
        "the names 'a\\n",
        "names for files",
        "Choose other names",
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
    assert_sentence(refusal(read_raw_dataset, 500), "nnUNet_raw", "nothing", "a folder", "Set it")


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
        "shape [4, 5, 7]",
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
        "direction [[-1.0",
        "as in a_0000",
        GRID,
    ),
    "affine": (
        lambda folder: (
            write(folder / "imagesTr" / "a_0001.nii.gz", noise(9), origin=(0, 1, 0)),
            change_json(folder, overwrite_image_reader_writer="NibabelIO"),
        ),
        "a_0001.nii.gz",
        "origin [0.0, -1.0, 0.0]",
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
        "an unreadable file (a gzip stream without its end)",
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
    "NaN in a label, which ITK reads as background": (
        changed("labelsTr/a.nii.gz", with_voxel(np.nan)),
        "labelsTr/a.nii.gz",
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
        "in every modality",
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


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """They start at once; two tests below use processes."""
    monkeypatch.setattr(image_check, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))


@pytest.mark.parametrize(("change", "where", "found", "expected", "remedy"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_refuses_wrong_images(folder: Path, threads, change, where: str, found: str, expected: str, remedy: str):
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
    monkeypatch.setattr(raw_dataset, "_find_reader", lambda dataset_json, example: KillsItsProcess)
    message = refusal(check_images, raw, 1, False)
    assert_sentence(message, "Dataset500_Toy", "was killed", "enough memory", "Use fewer processes")
    assert not multiprocessing.active_children()


class KillsItsProcess:
    def read_images(self, files):
        os._exit(9)  # as when the system runs out of memory


# cases that lack files


def test_a_case_may_lack_files_but_not_all(folder: Path, threads):
    for file in ("imagesTr/b_0001", "imagesUn/u_0000", "imagesTs/t_0001"):
        (folder / f"{file}.nii.gz").unlink()
    raw = read_raw_dataset(500)
    lacking = {case: [i is None for i in files["images"]] for of in raw.folders.values() for case, files in of.items()}
    both = [False, False]
    assert lacking == {"a": both, "b": [False, True], "u": [True, False], "v": both, "t": [False, True]}
    checked = check_images(raw, 1, show_progress=False)
    # what training depends on: not the test images
    assert set(checked.files) == {
        str(folder / f"{name}.nii.gz")
        for name in [f"imagesTr/{i}" for i in ("a_0000", "a_0001", "b_0000")]
        + [f"imagesUn/{i}" for i in ("u_0001", "v_0000", "v_0001")]
        + ["labelsTr/a", "labelsTr/b"]
    }
    assert checked.label_values == {"a": {0, 1}, "b": {0, 1}}


def test_a_channel_that_no_labeled_case_has_is_not_taken_for_color(folder: Path):
    for case in "ab":
        (folder / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    raw = read_raw_dataset(500)
    assert raw.channels_of_files == [(0,), (1,)]
    assert [files["images"][1] for files in raw.labeled.values()] == [None, None]


def test_digests_are_those_of_the_bytes(folder: Path, threads):
    before = check_images(read_raw_dataset(500), 1, False).files
    file = str(folder / "labelsTr" / "a.nii.gz")
    status = Path(file).stat()
    assert before[file][:2] == (status.st_size, status.st_mtime_ns)
    write(Path(file), mask(shape=(4, 5, 6))[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = check_images(read_raw_dataset(500), 1, False).files
    assert [name for name in before if before[name][2] != after[name][2]] == [file]


# what nnU-Net reads is accepted


def test_names_that_contain_others(folder: Path):
    """Prefixes, blanks, dots, umlauts, and a name that ends like a channel."""
    names = ["a", "a_0000", "a_1", "a b", "a.b", "Müller", "ab"]
    for file in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        file.unlink()
    for i, case in enumerate(names):
        for channel in range(2):
            write(folder / "imagesTr" / f"{case}_000{channel}.nii.gz", noise(50 + 2 * i + channel))
        write(folder / "labelsTr" / f"{case}.nii.gz", mask())
    change_json(folder, numTraining=len(names))
    raw = read_raw_dataset(500)
    assert list(raw.labeled) == sorted(names)
    for case, files in raw.labeled.items():
        assert [Path(file).name for file in files["images"]] == [f"{case}_000{channel}.nii.gz" for channel in range(2)]
        assert Path(files["label"]).name == f"{case}.nii.gz"


def test_hidden_files_are_passed_over(folder: Path):
    before = read_raw_dataset(500)
    for file in list(folder.glob("*/*.nii.gz")):
        (file.parent / f"._{file.name}").write_bytes(b"Mac OS X")
    assert read_raw_dataset(500) == before


@pytest.mark.parametrize("ending", ["2D images", "2D labels", "one frame"])
def test_one_slice_in_any_form(folder: Path, threads, ending: str):
    """A single slice as a volume, as a 2D image or as a series of one frame: nnU-Net reads them all."""
    for seed, file in enumerate(folder.glob("*/*.nii.gz")):
        label = "labels" in str(file)
        voxels = (mask()[1:2] if label else noise(seed, (1, 5, 6))).astype(np.float32)
        write(file, voxels)
        if ending == "one frame" and not label:
            write(file, voxels[None], (1, 2, 3, 1), (0,) * 4, np.eye(4).ravel())
        elif label == (ending == "2D labels") and ending != "one frame":
            write(file, voxels[0], (1, 2), (0, 0), (1, 0, 0, 1))
    assert check_images(read_raw_dataset(500), 1, False).apart == {}


def test_a_flat_label_that_is_shifted_is_refused(folder: Path, threads):
    for seed, file in enumerate(folder.glob("*/*.nii.gz")):
        write(file, mask()[1:2] if "labels" in str(file) else noise(seed, (1, 5, 6)))
    write(folder / "labelsTr" / "b.nii.gz", mask()[1], (1, 2), (0, 3), (1, 0, 0, 1))
    message = refusal(check_images, read_raw_dataset(500), 1, False)
    assert_sentence(message, "b.nii.gz", "origin [0.0, 3.0]", "[0.0, 0.0] as in b_0000", GRID)


def test_modalities_that_nnunet_does_not_read_at_once(folder: Path, threads):
    """Rounded spacings: reported for labeled cases with both modalities, refused within one modality."""
    for seed, file in enumerate(["imagesTr/a_0001", "imagesUn/u_0001"]):
        write(folder / f"{file}.nii.gz", noise(90 + seed), spacing=(1, 2, 3.0004))
    raw = read_raw_dataset(500)
    checked = check_images(raw, 1, False)
    assert checked.apart == {"a": "spacing [3.0, 2.0, 1.0] and [3.0004, 2.0, 1.0]"}
    message = refusal(lambda: check_images(raw, 1, False, modalities=[(0, 1)]))
    assert_sentence(message, "imagesTr/a_0001.nii.gz", "[3.0004,", "[3.0, 2.0, 1.0] as in a_0000", "CopyInformation")


# several channels in a file


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dataset600_Pictures: RGB images and a depth image of each of five cases, as PNG."""
    folder = set_folders(monkeypatch, tmp_path) / "Dataset600_Pictures"
    random = np.random.default_rng(0)
    for images, case in [("imagesTr", "a"), ("imagesTr", "b"), ("imagesUn", "u"), ("imagesUn", "v")]:
        (folder / images).mkdir(parents=True, exist_ok=True)
        save_picture(folder / images / f"{case}_0000.png", random.integers(0, 255, (8, 9, 3), np.uint8))
        save_picture(folder / images / f"{case}_0001.png", random.integers(0, 255, (8, 9), np.uint8))
    for case in "ab":
        (folder / "labelsTr").mkdir(exist_ok=True)
        save_picture(folder / "labelsTr" / f"{case}.png", mask(shape=(4, 8, 9))[1])
    channels = {"0": "R", "1": "G", "2": "B", "3": "depth"}
    change_json(folder, channel_names=channels, file_ending=".png")
    return folder


def save_picture(file: Path, voxels: np.ndarray) -> None:
    io.imsave(file, voxels, check_contrast=False)


def test_color_beside_depth(pictures: Path, threads):
    raw = read_raw_dataset(600)
    assert raw.channels_of_files == [(0, 1, 2), (3,)]
    checked = check_images(raw, 1, False)
    assert checked.apart == dict.fromkeys("ab", "3 and 1 channels in a file")
    assert raw.files_of_channels([0, 1, 2]) == [0]
    assert raw.files_of_channels([3, 0, 1, 2]) == [1, 0]
    assert raw.files_of_channels([0, 1]) == []


@pytest.mark.parametrize("lacking", [("a_0001", "b_0000"), ("a_0001", "b_0001")])
def test_color_beside_depth_where_no_labeled_case_has_both(pictures: Path, lacking: tuple[str, ...]):
    for name in lacking:
        (pictures / "imagesTr" / f"{name}.png").unlink()
    assert read_raw_dataset(600).channels_of_files == [(0, 1, 2), (3,)]


def test_color_alone(pictures: Path, threads):
    for file in pictures.glob("*/*_0001.png"):
        file.unlink()
    change_json(pictures, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png")
    raw = read_raw_dataset(600)
    assert raw.channels_of_files == [(0, 1, 2)]
    assert check_images(raw, 1, False).apart == {}


def test_refuses_colors_without_names_and_labels_in_color(pictures: Path, threads):
    save_picture(pictures / "labelsTr" / "b.png", np.zeros((8, 9, 3), np.uint8))
    message = refusal(check_images, read_raw_dataset(600), 1, False)
    assert_sentence(message, "labelsTr/b.png", "3 channels", "one, with a whole number", "Store the label like that")
    save_picture(pictures / "imagesUn" / "u_0000.png", np.zeros((8, 9, 4), np.uint8))
    save_picture(pictures / "labelsTr" / "b.png", mask(shape=(4, 8, 9))[1])
    message = refusal(check_images, read_raw_dataset(600), 1, False)
    assert_sentence(message, "u_0000.png", "4 channels", "the 3 channels R, G, B", "name all channels")
    change_json(pictures, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png")
    message = refusal(read_raw_dataset, 600)
    assert_sentence(message, "dataset.json", "3 channels in channel_names, but 4 in", "a name for", "Correct channel_n")


# TIFF, whose spacing stands in another file


def write_tiff(file: Path, voxels: np.ndarray) -> None:
    tifffile.imwrite(file, voxels, photometric="minisblack")


def test_tiff_with_spacing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads):
    folder = set_folders(monkeypatch, tmp_path) / "Dataset500_Toy"
    for i, (images, case) in enumerate([("imagesTr", "a"), ("imagesTr", "b"), ("imagesUn", "u")]):
        (folder / images).mkdir(parents=True, exist_ok=True)
        for channel in range(2):
            write_tiff(folder / images / f"{case}_000{channel}.tif", noise(2 * i + channel, (5, 6, 7)))
        (folder / images / f"{case}.json").write_text('{"spacing": [3, 2, 1]}')
    (folder / "labelsTr").mkdir()
    for case in "ab":  # no JSON beside the labels, for which nnU-Net then assumes 1 mm
        write_tiff(folder / "labelsTr" / f"{case}.tif", mask(shape=(5, 6, 7)))
    change_json(folder, file_ending=".tif")
    raw = read_raw_dataset(500)
    read = raw.read_files(raw.labeled["a"], [1])
    assert [Path(file).relative_to(folder).as_posix() for file in read] == [
        "imagesTr/a_0001.tif",
        "labelsTr/a.tif",
        "imagesTr/a.json",
    ]
    assert str(folder / "imagesUn" / "u.json") in check_images(raw, 1, False).files
    (folder / "labelsTr" / "b.json").write_text('{"spacing": [3, 2, 2]}')
    message = refusal(check_images, raw, 1, False)
    assert_sentence(message, "b.tif", "spacing [3.0, 2.0, 2.0]", "[3.0, 2.0, 1.0] as in b_0000.tif", GRID)


# ids


@pytest.mark.parametrize(
    ("dataset_id", "names", "confusable"),
    [
        (12, ["Dataset012_A"], ["Dataset0123_B"]),
        (123, ["Dataset0123_B", "Dataset123_C"], ["Dataset1234_D"]),
        (1234, ["Dataset1234_D"], ["Dataset0123_B", "Dataset123_C"]),
        (1235, [], ["Dataset0123_B", "Dataset123_C"]),
        (99, [], []),
    ],
)
def test_ids_are_numbers_and_not_beginnings(tmp_path: Path, monkeypatch, dataset_id: int, names, confusable):
    for variable, dataset in zip(
        ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_raw"),
        ("Dataset012_A", "Dataset0123_B", "Dataset123_C", "Dataset1234_D"),
        strict=True,
    ):
        (tmp_path / variable / dataset).mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert datasets_with_id(dataset_id) == names
    assert confusable_with_id(dataset_id) == confusable


def test_a_dataset_is_found_by_its_name(folder: Path):
    (folder.parent / "Dataset500_Twin").mkdir()
    assert read_raw_dataset("Dataset500_Toy").folder == folder
    for name in ("Dataset500", "Toy", "Dataset500_Other", "Dataset500_Toy/"):
        assert_sentence(refusal(read_raw_dataset, name), "raw", f"no raw dataset {name}", "Dataset500_NAME", "Correct")
