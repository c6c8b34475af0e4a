"""Reads and checks a raw semi-supervised dataset: an nnU-Net dataset with one more folder, imagesUn (DESIGN 2).

May import nnU-Net and `errors`; nothing else of the package. Only reads, never writes.
"""

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_semicml.errors import UserError, some_of


class _Problem(Exception):
    """Holds the arguments of a UserError on their way out of another process."""


@dataclass(frozen=True)
class RawDataset:
    """The files of a raw dataset. Cases are in alphabetical order, paths are absolute.

    Attributes:
        name: e.g. "Dataset500_BraTS".
        folder: where it lies below nnUNet_raw.
        dataset_json: as on disk.
        channel_names: one per modality, in channel order.
        labeled: case -> {"images": [one file per channel], "label": file}, the shape that nnU-Net uses.
        unlabeled: case -> {"images": [one file per channel]}, from imagesUn; there is no label key.
        test: the same from imagesTs; never used in training, only kept apart from it.
    """

    name: str
    folder: Path
    dataset_json: dict
    channel_names: list[str]
    labeled: dict[str, dict]
    unlabeled: dict[str, dict]
    test: dict[str, dict]


def read_raw_dataset(dataset_id: int, require_unlabeled: bool = True) -> RawDataset:
    """Read dataset.json and the file names of a raw dataset; no image is opened.

    The labeled cases are those of imagesTr and labelsTr or, as in nnU-Net, of the "dataset" key of dataset.json.

    Raises:
        UserError: the dataset is not below nnUNet_raw, its dataset.json is incomplete, an image or label is missing or
            left over, a case is in two folders or, if `require_unlabeled`, there is no unlabeled case.
    """
    folder = _find_folder(dataset_id)
    dataset_json = _read_dataset_json(folder / "dataset.json")
    channel_names = [dataset_json["channel_names"][str(i)] for i in range(len(dataset_json["channel_names"]))]
    file_ending = dataset_json["file_ending"]

    labeled = _read_labeled_cases(folder, dataset_json)
    unlabeled = _read_images(folder / "imagesUn", file_ending, len(channel_names))
    test = _read_images(folder / "imagesTs", file_ending, len(channel_names))
    if require_unlabeled and not unlabeled:
        raise UserError(
            folder / "imagesUn",
            f"no image ending in {file_ending}",
            "the images of the unlabeled cases, named as in imagesTr",
            "Put them there, or make such a dataset from a fully labeled one with nnUNetv2_semicml_withhold_labels.",
        )
    for (first, cases), (second, others) in combinations(
        {"imagesTr": labeled, "imagesUn": unlabeled, "imagesTs": test}.items(), 2
    ):
        if shared := cases.keys() & others.keys():
            raise UserError(
                folder / second,
                f"cases that are also in {first}: {some_of(sorted(shared))}",
                "every case in one of imagesTr, imagesUn and imagesTs only",
                "Remove them from one of the two; rename them if they are different patients.",
            )
    return RawDataset(folder.name, folder, dataset_json, channel_names, labeled, unlabeled, test)


def check_images(raw: RawDataset, num_processes: int, show_progress: bool = True) -> None:
    """Read every image and label once, in `num_processes` spawned processes that hold one image each.

    In every case, all files must be readable and lie on one grid (shape, spacing, origin, direction); the images must
    be finite, not constant and different from one another; the label may have the values of dataset.json only. No image
    may be the same, voxel for voxel, in two of imagesTr, imagesUn and imagesTs.

    Raises:
        UserError: about the first wrong case; the others are named at its end.
    """
    cases = [
        (folder, case, files)
        for folder, members in (("imagesTr", raw.labeled), ("imagesUn", raw.unlabeled), ("imagesTs", raw.test))
        for case, files in members.items()
    ]
    check = partial(_check_case, reader=_find_reader(raw), allowed_labels=_allowed_labels(raw.dataset_json))
    spawn = multiprocessing.get_context("spawn")
    try:
        # Unlike multiprocessing.Pool, this notices when the system kills a process.
        with ProcessPoolExecutor(max(1, min(num_processes, len(cases))), spawn) as executor:
            results = executor.map(check, [files for _, _, files in cases])
            checked = list(tqdm(results, "Checking images", len(cases), disable=not show_progress))
    except BrokenProcessPool as error:
        raise UserError(
            raw.folder,
            "that a process checking the images was killed, probably for lack of memory",
            "enough memory for one image in each process",
            "Use fewer processes.",
        ) from error

    problems: dict[str, tuple[str, ...]] = {}
    seen: dict[tuple[int, bytes], tuple[str, str]] = {}  # channel, digest -> the first such file and its folder
    for (folder, case, files), (digests, problem) in zip(cases, checked, strict=True):
        if problem:
            problems[case] = problem
        for channel, (file, digest) in enumerate(zip(files["images"], digests, strict=False)):
            twin, twins_folder = seen.setdefault((channel, digest), (file, folder))
            if twins_folder != folder:
                problems.setdefault(
                    case,
                    (
                        file,
                        f"the same voxels as in {twin}",
                        "every image in one of imagesTr, imagesUn and imagesTs only",
                        "Remove one of the two cases.",
                    ),
                )
    if problems:
        where, found, expected, remedy = next(iter(problems.values()))
        others = list(problems)[1:]
        raise UserError(
            where, found, expected, remedy + (f" (and {len(others)} more: {some_of(others)})" if others else "")
        )


def _find_folder(dataset_id: int) -> Path:
    if not nnUNet_raw.is_set():
        raise UserError(
            "environment variable nnUNet_raw",
            "that it is not set",
            "the folder of the raw datasets",
            "Set it as nnU-Net's documentation/setting_up_paths.md describes.",
        )
    root = Path(nnUNet_raw).absolute()
    # nnU-Net identifies datasets by their number alone and refuses later if its three folders disagree about the name.
    names = list(find_candidate_datasets(dataset_id))
    if len(names) > 1:
        raise UserError(
            root,
            f"several datasets with the id {dataset_id} in nnUNet_raw, nnUNet_preprocessed and nnUNet_results: "
            f"{some_of(names)}",
            "one",
            "Rename all but one.",
        )
    if not names or not (root / names[0]).is_dir():
        raise UserError(
            root,
            f"no raw dataset with the id {dataset_id}",
            f"a folder Dataset{dataset_id:03d}_NAME",
            "Create it, or correct the id or the environment variable nnUNet_raw.",
        )
    return root / names[0]


def _read_dataset_json(file: Path) -> dict:
    def refuse(found: str, expected: str) -> UserError:
        return UserError(file, found, expected, "Correct it as nnU-Net's documentation/dataset_format.md describes.")

    required = {"channel_names": dict, "labels": dict, "numTraining": int, "file_ending": str}
    if not file.is_file():
        raise refuse("no such file", f"a JSON file with {', '.join(required)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refuse(f"a damaged file ({error})", "valid JSON") from error
    for key, kind in required.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise refuse(f"no usable {key}", f"{key} of type {kind.__name__}")
    channels = content["channel_names"]
    if not channels or channels.keys() != {str(i) for i in range(len(channels))}:
        raise refuse(f"the channels {some_of(channels) or 'none'} in channel_names", "0, 1, … without gaps")
    try:
        _allowed_labels(content)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise refuse(f"labels that nnU-Net refuses ({error})", 'e.g. {"background": 0, "tumour": 1}') from error
    return content


def _allowed_labels(dataset_json: dict) -> list[int]:
    # Imported here because it imports torch, which would make the processes of check_images start five times slower.
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    labels = [int(i) for i in manager.all_labels] + [manager.ignore_label] * manager.has_ignore_label
    if labels != list(range(len(labels))):
        raise ValueError(f"the values {labels} are not consecutive")
    return labels


def _read_images(folder: Path, file_ending: str, num_channels: int) -> dict[str, dict]:
    """The cases of a folder of images; none if there is no such folder."""
    channels: dict[str, dict[int, str]] = {}
    for file in sorted(folder.glob("*" + file_ending)):
        match = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(file_ending))
        if not match or int(match[2]) >= num_channels:
            raise UserError(
                file,
                "a channel that dataset.json does not have" if match else "a file name without a channel",
                f"a name that ends in one of _0000{file_ending} … _{num_channels - 1:04d}{file_ending}",
                "Rename or remove the file, or correct channel_names and file_ending in dataset.json.",
            )
        channels.setdefault(match[1], {})[int(match[2])] = str(file)
    for case, files in sorted(channels.items()):
        for channel in range(num_channels):
            if channel not in files:
                raise UserError(
                    folder / f"{case}_{channel:04d}{file_ending}",
                    "no such file",
                    f"one file for each of the {num_channels} channels of dataset.json",
                    f"Add the missing image of {case}, or remove the case.",
                )
    return {case: {"images": [files[i] for i in range(num_channels)]} for case, files in sorted(channels.items())}


def _read_labeled_cases(folder: Path, dataset_json: dict) -> dict[str, dict]:
    if "dataset" in dataset_json:
        cases = _read_listed_cases(folder, dataset_json)
    else:
        file_ending = dataset_json["file_ending"]
        images = _read_images(folder / "imagesTr", file_ending, len(dataset_json["channel_names"]))
        labels = {
            file.name.removesuffix(file_ending): str(file) for file in (folder / "labelsTr").glob("*" + file_ending)
        }
        for case in sorted(images.keys() ^ labels.keys()):
            lacking = "labelsTr" if case in images else "imagesTr"
            raise UserError(
                folder / lacking / (f"{case}{file_ending}" if case in images else f"{case}_0000{file_ending}"),
                "no such file",
                "a label and all images of every labeled case",
                f"Add what {case} lacks in {lacking}; a case without a label belongs into imagesUn.",
            )
        cases = {case: {**files, "label": labels[case]} for case, files in images.items()}
    if not cases or dataset_json["numTraining"] != len(cases):
        raise UserError(
            folder / "dataset.json",
            f"numTraining {dataset_json['numTraining']}",
            f"the number of labeled cases, {len(cases)}" if cases else "labeled cases, but there are none",
            "Correct numTraining, or add the missing cases (unlabeled cases do not count).",
        )
    return cases


def _read_listed_cases(folder: Path, dataset_json: dict) -> dict[str, dict]:
    """The cases of nnU-Net's "dataset" key in dataset.json."""
    num_channels = len(dataset_json["channel_names"])
    for case, files in dataset_json["dataset"].items():
        if not {"images", "label"} <= files.keys() or len(files["images"]) != num_channels:
            raise UserError(
                folder / "dataset.json",
                f'case {case} without a label or without {num_channels} images in "dataset"',
                "one label, and one image for each channel",
                "List the missing files, or remove the case.",
            )
    # a copy, since nnU-Net resolves the paths in place
    cases = get_filenames_of_train_images_and_targets(str(folder), deepcopy(dataset_json))
    for case, files in cases.items():
        for file in [*files["images"], files["label"]]:
            if not Path(file).is_file():
                raise UserError(
                    file,
                    "no such file",
                    f'the file that "dataset" in {folder / "dataset.json"} lists for {case}',
                    "Correct the path or remove the case.",
                )
    return dict(sorted(cases.items()))


def _find_reader(raw: RawDataset) -> type[BaseReaderWriter]:
    """The reader that nnU-Net's fingerprint extraction and planning will choose."""
    example = next(iter(raw.labeled.values()))["images"][0]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for every reader that fails
            return determine_reader_writer_from_dataset_json(raw.dataset_json, example, verbose=False)
    except RuntimeError as error:
        raise UserError(
            example,
            f"a file that no nnU-Net reader for {raw.dataset_json['file_ending']} can open",
            "a readable image",
            "Replace the file, or correct file_ending in dataset.json.",
        ) from error


def _check_case(
    files: dict, reader: type[BaseReaderWriter], allowed_labels: list[int]
) -> tuple[list[bytes], tuple[str, ...] | None]:
    """Digests of the voxels of each channel, and what is wrong with the case, if anything (then without digests)."""
    try:
        return _digest_channels(files, reader, allowed_labels), None
    except _Problem as problem:
        return [], problem.args


def _digest_channels(files: dict, reader: type[BaseReaderWriter], allowed_labels: list[int]) -> list[bytes]:
    digests: list[bytes] = []
    grid = None
    for file in files["images"]:
        image, grid = _read_on_grid(file, reader, files["images"][0], grid)
        if not_finite := _count_not_finite(file, image):
            raise _Problem(
                file,
                f"{not_finite} voxels that are NaN or infinite",
                "finite numbers",
                "Replace them by a meaningful value, e.g. that of the background.",
            )
        if image.min() == image.max():
            raise _Problem(
                file, f"the value {image.min():g} in every voxel", "an image", "Export it again, or remove the case."
            )
        digest = hashlib.blake2b(np.ascontiguousarray(image)).digest()
        if digest in digests:
            raise _Problem(
                file,
                f"the same voxels as in {Path(files['images'][digests.index(digest)]).name}",
                "another image of the patient in every channel",
                "Replace one of the two files.",
            )
        digests.append(digest)

    if "label" in files:
        label, _ = _read_on_grid(files["label"], reader, files["images"][0], grid, is_label=True)
        if (unexpected := np.unique(label[~np.isin(label, allowed_labels)])).size:
            raise _Problem(
                files["label"],
                f"the label values {some_of(f'{i:g}' for i in unexpected)}",
                f"only the values of dataset.json: {some_of(map(str, allowed_labels))}",
                "Correct the label, or the labels in dataset.json.",
            )
    return digests


def _count_not_finite(file: str, voxels: np.ndarray) -> int:
    """Number of NaN and infinite voxels in the file, which ITK turns into zeros when it reads a NIfTI."""
    if file.endswith((".nii", ".nii.gz")):
        stored = nibabel.load(file)
        if stored.get_data_dtype().kind == "f":
            voxels = np.asanyarray(stored.dataobj)
    return np.count_nonzero(~np.isfinite(voxels))


def _read_on_grid(
    file: str, reader: type[BaseReaderWriter], reference: str, grid: dict | None, is_label: bool = False
) -> tuple[np.ndarray, dict]:
    """Read one file, shape (1, *spatial), which must lie on the `grid` of the `reference` file; None: on any."""
    try:
        if file.endswith(".gz"):
            _read_to_the_end(file)
        voxels, properties = reader().read_seg(file) if is_label else reader().read_images([file])
    except Exception as error:  # every reader raises the errors of its own library
        raise _Problem(
            file, f"an unreadable file ({type(error).__name__}: {error})", "an image", "Replace the file."
        ) from error
    if len(voxels) != 1:
        raise _Problem(file, f"{len(voxels)} channels", "one channel per file", "Store every channel in its own file.")

    found = {"shape": voxels.shape[1:], "spacing": properties["spacing"]}
    found |= {key: properties["sitk_stuff"][key] for key in ("origin", "direction") if "sitk_stuff" in properties}
    if "nibabel_stuff" in properties:
        found["affine"] = properties["nibabel_stuff"]["original_affine"]
    for key, value in found.items():
        # NIfTI stores orientations in single precision: 1e-3 mm is noise. nnU-Net itself is stricter with spacings.
        if grid and not np.allclose(value, grid[key], atol=1e-8 if key in ("shape", "spacing") else 1e-3):
            raise _Problem(
                file,
                f"{key} {_rounded(value)}",
                f"{_rounded(grid[key])} as in {Path(reference).name}",
                "Register and resample all images and the label of a case to one grid.",
            )
    return voxels, grid or found


def _read_to_the_end(file: str) -> None:
    """Raise EOFError if a gzip file is cut off, which SimpleITK would fill up with zeros."""
    with gzip.open(file) as stream:
        while stream.read(2**20):
            pass


def _rounded(values: np.ndarray | tuple | list) -> list:
    return np.round(np.asarray(values, dtype=float), 4).tolist()
