"""Reads a raw semi-supervised dataset: an nnU-Net dataset with one more folder, imagesUn; cases may lack modalities.

Names of files only, and of dataset.json; `image_check` opens the images. May import nnU-Net, `errors` and of data/ what
imports no torch, so that the processes of `image_check` start fast. Only reads, never writes.
"""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from os import environ
from pathlib import Path
from typing import TypedDict

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semicml.data.environment import FOLDER_VARIABLES, environment_folder
from nnunetv2_semicml.data.files import Json, is_sound_name, read_json, require_sound_names
from nnunetv2_semicml.data.reading import read_image
from nnunetv2_semicml.errors import UserError, some_of


class _Images(TypedDict):
    images: list[str | None]


class CaseFiles(_Images, total=False):
    """The files of a case.

    Attributes:
        images: as many for every case; one that the case lacks is None.
        label: of a labeled case; there is no such key in others.
    """

    label: str


Cases = dict[str, CaseFiles]


@dataclass(frozen=True)
class RawDataset:
    """The files of a raw dataset. Cases are in alphabetical order, paths are absolute.

    Attributes:
        name: e.g. "Dataset500_BraTS".
        folder: where it lies below nnUNet_raw.
        dataset_json: as on disk.
        channel_names: in channel order.
        channels_of_files: the channels that each file of a case holds, e.g. [(0,), (1,)], or [(0, 1, 2)] for RGB.
        labeled: case -> its images and its label.
        unlabeled: case -> its images, from imagesUn.
        test: the same from imagesTs; never used in training, only kept apart from it.
    """

    name: str
    folder: Path
    dataset_json: Json
    channel_names: list[str]
    channels_of_files: list[tuple[int, ...]]
    labeled: Cases
    unlabeled: Cases
    test: Cases

    @property
    def file_ending(self) -> str:
        """Of images and labels."""
        return str(self.dataset_json["file_ending"])

    @property
    def folders(self) -> dict[str, Cases]:
        """Folder of images -> its cases."""
        return {"imagesTr": self.labeled, "imagesUn": self.unlabeled, "imagesTs": self.test}

    def find_reader(self) -> type[BaseReaderWriter]:
        """The reader that nnU-Net's fingerprint extraction and planning will choose.

        Raises:
            UserError: none can open the first image.
        """
        first = next(iter(self.labeled.values()))
        return _find_reader(self.dataset_json, next(file for file in first["images"] if file))

    def find_channel(self, text: str, option: str) -> int:
        """The channel of a name or number; names come first.

        Args:
            text: the name or number.
            option: of the command line, for the error.

        Raises:
            UserError: there is no such channel, or several have the name.
        """
        found = [i for i, known in enumerate(self.channel_names) if known == text]
        if not found and text.isdecimal() and int(text) < len(self.channel_names):
            found = [int(text)]
        if len(found) != 1:
            raise UserError(
                option,
                f"{text}, the name of channels {', '.join(map(str, found))}" if found else text or "no channel after =",
                f"one of {some_of(self.channel_names)} ({self.folder / 'dataset.json'}), or its number",
                f"Give the number, e.g. {found[0]}." if found else "Correct it.",
            )
        return found[0]

    def files_of_channels(self, channels: Sequence[int]) -> list[int]:
        """The files of a case that hold these channels, in this order; none if these are no whole files."""
        files = list(dict.fromkeys(i for c in channels for i, held in enumerate(self.channels_of_files) if c in held))
        return files if [c for i in files for c in self.channels_of_files[i]] == list(channels) else []

    def find_scans(self, folder: Path) -> Cases:
        """Cases of another folder whose images are named as in this dataset; any may lack files.

        Raises:
            UserError: there is none, or a file has another name.
        """
        found = _find_images(folder, self.file_ending)
        number = len(self.channels_of_files)
        _require_known_channels(found, number, self.file_ending)
        if not found:
            raise UserError(
                folder, f"no image ending in {self.file_ending}", "scans, named as in imagesTs", "Add them."
            )
        cases: Cases = {c: {"images": [files.get(i) for i in range(number)]} for c, files in sorted(found.items())}
        require_sound_names(cases, folder)
        return cases

    def read_files(self, files: CaseFiles, indices: Sequence[int]) -> list[str]:
        """All files that nnU-Net reads of a case.

        Args:
            files: an entry of `labeled`, `unlabeled` or `test`.
            indices: which of its images, none of which it lacks.
        """
        images = [image for i in indices if (image := files["images"][i])]
        read = [*images, *([files["label"]] if "label" in files else [])]
        if self.file_ending.lower() in Tiff3DIO.supported_file_endings:
            # nnU-Net reads the spacing of a TIFF from CASE.json beside it
            n = len(self.file_ending)
            stems = [image[: -n - len("_0000")] for image in images[:1]] + [label[:-n] for label in read[len(images) :]]
            read += [f"{stem}.json" for stem in stems if Path(f"{stem}.json").is_file()]
        return read


def read_raw_dataset(dataset: int | str, require_unlabeled: bool = True) -> RawDataset:
    """Read dataset.json and the file names of a raw dataset.

    The labeled cases are those of imagesTr and labelsTr or, as in nnU-Net, of the "dataset" key of dataset.json. If
    there are fewer files than channels, one case is opened, to see whether a file holds several channels.

    Args:
        dataset: its number, or its name in full.
        require_unlabeled: whether it must have unlabeled cases.

    Raises:
        UserError: the dataset is not below nnUNet_raw, its dataset.json is incomplete, a label or all images of a case
            are missing or left over, a case is in two folders or has a name that nnU-Net understands otherwise or, if
            `require_unlabeled`, there is no unlabeled case.
    """
    folder = _find_folder(dataset)
    dataset_json = _read_dataset_json(folder / "dataset.json")
    channel_names = [dataset_json["channel_names"][str(i)] for i in range(len(dataset_json["channel_names"]))]
    file_ending = dataset_json["file_ending"]

    found = {name: _find_images(folder / name, file_ending) for name in ("imagesTr", "imagesUn", "imagesTs")}
    if "dataset" in dataset_json:
        found["imagesTr"], labels = _read_listed_cases(folder, dataset_json)
    else:
        labels = {file.name.removesuffix(file_ending): str(file) for file in _files(folder / "labelsTr", file_ending)}
        _require_pairs(folder, found["imagesTr"], labels, file_ending)
    if not labels or dataset_json["numTraining"] != len(labels):
        raise UserError(
            folder / "dataset.json",
            f"numTraining {dataset_json['numTraining']}",
            f"the number of labeled cases, {len(labels)}" if labels else "labeled cases, but there are none",
            "Correct numTraining, or add the missing cases (unlabeled cases do not count).",
        )
    every_case = found["imagesTs"] | found["imagesUn"] | found["imagesTr"]
    channels_of_files = _find_channels(folder, dataset_json, every_case)
    cases: dict[str, Cases] = {
        name: {
            case: {"images": [files.get(i) for i in range(len(channels_of_files))]}
            for case, files in sorted(of_folder.items())
        }
        for name, of_folder in found.items()
    }
    for of_folder in found.values():
        _require_known_channels(of_folder, len(channels_of_files), file_ending)
    for case, label in labels.items():
        cases["imagesTr"][case]["label"] = label
    if require_unlabeled and not cases["imagesUn"]:
        raise UserError(
            folder / "imagesUn",
            f"no image ending in {file_ending}",
            "the images of the unlabeled cases, named as in imagesTr",
            "Put them there, or make such a dataset from a fully labeled one with nnUNetv2_semicml_withhold_labels.",
        )
    _require_sound_names(folder, cases)
    return RawDataset(
        folder.name,
        folder,
        dataset_json,
        channel_names,
        channels_of_files,
        cases["imagesTr"],
        cases["imagesUn"],
        cases["imagesTs"],
    )


def raw_root() -> Path:
    """The folder of the raw datasets.

    Raises:
        UserError: nnUNet_raw is not set.
    """
    return environment_folder("nnUNet_raw").absolute()


def datasets_with_id(dataset_id: int) -> list[str]:
    """Names of the datasets with exactly this number in nnUNet_raw, nnUNet_preprocessed and nnUNet_results, sorted.

    nnU-Net itself compares the beginnings of names: for it, Dataset1234_X also has the id 123.
    """
    return sorted(name for name, number in _all_datasets().items() if number == dataset_id)


def confusable_with_id(dataset_id: int) -> list[str]:
    """Names of other datasets that nnU-Net takes for this number, or for which it takes a dataset of this number."""
    own = f"{dataset_id:03d}"
    others = {name: number for name, number in _all_datasets().items() if number != dataset_id}
    # nnU-Net writes numbers with three digits at least, and goes by the beginnings of names
    return sorted(n for n, number in others.items() if n.startswith(f"Dataset{own}") or own.startswith(f"{number:03d}"))


def require_free_id(dataset_id: int, option: str) -> None:
    """Refuse a number that a new dataset cannot have.

    Args:
        dataset_id: the number.
        option: of the command line, for the error.

    Raises:
        UserError: it is no number of a dataset, or not free in nnUNet_raw, nnUNet_preprocessed and nnUNet_results, for
            nnU-Net too, which takes 123 for Dataset1234_X.
    """
    if dataset_id < 1:
        raise UserError(option, str(dataset_id), "a number from 1 on", "Choose another id.")
    if taken := datasets_with_id(dataset_id):
        raise UserError(
            option,
            f"{dataset_id}, the id of {some_of(taken)}",
            f"an id that is free in {', '.join(FOLDER_VARIABLES[:-1])} and {FOLDER_VARIABLES[-1]}",
            "Choose another id, or remove the old dataset there.",
        )
    if confusable := confusable_with_id(dataset_id):
        raise UserError(
            option,
            f"{dataset_id}, beside {some_of(confusable)}",
            "an id that nnU-Net, which compares the beginnings of names, does not take for that of another dataset",
            "Choose another id.",
        )


def dataset_number(name: str) -> int:
    """1234 of Dataset1234_NAME, of which nnU-Net's own function reads 123."""
    return int(name.removeprefix("Dataset").partition("_")[0])


def _all_datasets() -> dict[str, int]:
    roots = [Path(environ[variable]) for variable in FOLDER_VARIABLES if environ.get(variable)]
    names = {folder.name for root in roots if root.is_dir() for folder in root.iterdir() if folder.is_dir()}
    return {name: dataset_number(name) for name in names if re.match(r"Dataset\d{3,}(_|$)", name)}


def _find_folder(dataset: int | str) -> Path:
    root = raw_root()
    if isinstance(dataset, str):
        if not re.fullmatch(r"Dataset\d{3,}_[^/\\]+", dataset) or not (root / dataset).is_dir():
            raise UserError(root, f"no raw dataset {dataset}", "a folder Dataset500_NAME", "Correct the name.")
        return root / dataset
    names = datasets_with_id(dataset)
    if len(names) > 1:
        # nnU-Net refuses later if its three folders disagree about the name
        raise UserError(
            root,
            f"several datasets with the id {dataset} in nnUNet_raw, nnUNet_preprocessed and nnUNet_results: "
            f"{some_of(names)}",
            "one",
            "Rename all but one.",
        )
    if not names or not (root / names[0]).is_dir():
        raise UserError(
            root,
            f"no raw dataset with the id {dataset}",
            f"a folder Dataset{dataset:03d}_NAME",
            "Create it, or correct the id or the environment variable nnUNet_raw.",
        )
    return root / names[0]


def _read_dataset_json(file: Path) -> Json:
    def refuse(found: str, expected: str) -> UserError:
        return UserError(file, found, expected, "Correct it as nnU-Net's documentation/dataset_format.md describes.")

    required = {"channel_names": dict, "labels": dict, "numTraining": int, "file_ending": str}
    if not file.is_file():
        raise refuse("no such file", f"a JSON file with {', '.join(required)}")
    try:
        content: Json = read_json(file)
    except ValueError as error:
        raise refuse(f"a damaged file ({error})", "valid JSON") from error
    for key, kind in required.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise refuse(f"no usable {key}", f"{key} of type {kind.__name__}")
    if not is_sound_name(f"CASE{content['file_ending']}") or not content["file_ending"]:
        raise refuse(f"the file_ending {content['file_ending']!r}", "e.g. .nii.gz")
    if not isinstance(reader := content.get("overwrite_image_reader_writer", ""), str):
        raise refuse(f"the overwrite_image_reader_writer {reader!r}", "the name of one of nnU-Net's readers, or none")
    channels = content["channel_names"]
    if wrong := [name for name in channels.values() if not isinstance(name, str)]:
        raise refuse(f"the name {wrong[0]!r} in channel_names", 'e.g. {"0": "T1", "1": "T2"}')
    if not channels or channels.keys() != {str(i) for i in range(len(channels))}:
        raise refuse(f"the channels {some_of(channels) or 'none'} in channel_names", "0, 1, … without gaps")
    try:
        allowed_labels(content)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise refuse(f"labels that nnU-Net refuses ({error})", 'e.g. {"background": 0, "tumour": 1}') from error
    return content


def allowed_labels(dataset_json: Json) -> list[int]:
    """The values that a label may have.

    Raises:
        AssertionError, RuntimeError, TypeError, ValueError: nnU-Net refuses these labels.
    """
    # Imported here because it imports torch, which would make the processes of the image check start slowly.
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    labels = [int(i) for i in manager.all_labels] + [manager.ignore_label] * manager.has_ignore_label
    if labels != list(range(len(labels))):
        raise ValueError(f"the values {labels} are not consecutive")
    return labels


def _files(folder: Path, file_ending: str) -> list[Path]:
    """The files of a folder, without hidden ones, such as macOS leaves beside every file as ._NAME."""
    return sorted(file for file in folder.glob("*" + file_ending) if not file.name.startswith("."))


def _find_images(folder: Path, file_ending: str) -> dict[str, dict[int, str]]:
    """Case -> index of a file -> the file; nothing if there is no such folder."""
    cases: dict[str, dict[int, str]] = {}
    for file in _files(folder, file_ending):
        match = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(file_ending), re.DOTALL)
        if not match:
            raise UserError(
                file,
                "a file name without a channel",
                f"a name that ends in _0000{file_ending}, _0001{file_ending}, …",
                "Rename or remove the file, or correct file_ending in dataset.json.",
            )
        cases.setdefault(match[1], {})[int(match[2])] = str(file)
    return cases


def _require_known_channels(cases: Mapping[str, Mapping[int, str]], number: int, file_ending: str) -> None:
    for index, file in (item for files in cases.values() for item in files.items()):
        if index >= number:
            raise UserError(
                file,
                "a channel that dataset.json does not have",
                f"a name that ends in one of _0000{file_ending} … _{number - 1:04d}{file_ending}",
                "Rename or remove the file, or correct channel_names and file_ending in dataset.json.",
            )


def _require_pairs(folder: Path, images: dict[str, dict[int, str]], labels: dict[str, str], file_ending: str) -> None:
    for case in sorted(images.keys() ^ labels.keys()):
        lacking = "labelsTr" if case in images else "imagesTr"
        raise UserError(
            folder / lacking / (f"{case}{file_ending}" if case in images else f"{case}_0000{file_ending}"),
            "no such file",
            "a label and images of every labeled case",
            f"Add what {case} lacks in {lacking}; a case without a label belongs into imagesUn.",
        )


def _read_listed_cases(folder: Path, dataset_json: Json) -> tuple[dict[str, dict[int, str]], dict[str, str]]:
    """Images, as `_find_images` returns them, and labels of the cases of the "dataset" key, which have all files."""
    listed, file = dataset_json["dataset"], folder / "dataset.json"
    if not isinstance(listed, dict):
        raise UserError(file, f'"dataset" of type {type(listed).__name__}', "an object {case: files}", "Correct it.")
    require_sound_names(listed, file)
    paths = {
        case: files["images"]
        for case, files in listed.items()
        if isinstance(files, dict)
        and isinstance(files.get("images"), list)
        and all(isinstance(path, str) for path in [*files["images"], files.get("label")])
    }
    number = max(map(len, paths.values()), default=1) or 1
    if lacking := [case for case in listed if len(paths.get(case, ())) != number]:
        raise UserError(
            file,
            f'case {lacking[0]} without a label or without {number} images in "dataset"',
            "one label, and one image for each channel",
            "List the missing files, or remove the case.",
        )
    # a copy, since nnU-Net resolves the paths in place
    cases = get_filenames_of_train_images_and_targets(str(folder), deepcopy(dataset_json))
    for case, files in cases.items():
        for path in [*files["images"], files["label"]]:
            if not Path(path).is_file():
                raise UserError(
                    path,
                    "no such file",
                    f'the file that "dataset" in {file} lists for {case}',
                    "Correct the path or remove the case.",
                )
    images = {case: dict(enumerate(files["images"])) for case, files in cases.items()}
    return images, {case: files["label"] for case, files in cases.items()}


def _find_channels(folder: Path, dataset_json: Json, cases: dict[str, dict[int, str]]) -> list[tuple[int, ...]]:
    """See `RawDataset.channels_of_files`."""
    num_channels = len(dataset_json["channel_names"])
    examples: dict[int, str] = {}  # of each file of a case one, from whichever case has it
    for _, files in sorted(cases.items()):
        examples = files | examples
    one_each: list[tuple[int, ...]] = [(i,) for i in range(num_channels)]
    if max(examples) + 1 >= num_channels or examples.keys() != {*range(len(examples))}:
        return one_each  # files too many are refused by name; cases lack others
    reader = _find_reader(dataset_json, examples[0])
    counts = [len(read_image(file, reader())[0]) for _, file in sorted(examples.items())]
    if max(counts) == 1:
        return one_each  # cases lack the others
    if sum(counts) != num_channels:
        raise UserError(
            folder / "dataset.json",
            f"{num_channels} channels in channel_names, but {sum(counts)} in {some_of(examples.values())}",
            "a name for every channel of every file",
            "Correct channel_names.",
        )
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]


def _find_reader(dataset_json: Json, example: str) -> type[BaseReaderWriter]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for every reader that fails
            reader: type[BaseReaderWriter] = determine_reader_writer_from_dataset_json(
                dataset_json, example, verbose=False
            )
            return reader
    except RuntimeError as error:
        raise UserError(
            example,
            f"a file that no nnU-Net reader for {dataset_json['file_ending']} can open",
            "a readable image",
            "Replace the file, or correct file_ending in dataset.json.",
        ) from error


def _require_sound_names(folder: Path, cases: Mapping[str, Cases]) -> None:
    for (first, names), (second, others) in combinations(cases.items(), 2):
        if shared := names.keys() & others.keys():
            raise UserError(
                folder / second,
                f"cases that are also in {first}: {some_of(sorted(shared))}",
                "every case in one of imagesTr, imagesUn and imagesTs only",
                "Remove them from one of the two; rename them if they are different patients.",
            )
    for name, of_folder in cases.items():
        require_sound_names(of_folder, folder / name)
        # nnU-Net stores the preprocessed segmentation of CASE as CASE_seg, and takes no such file for an image
        if name != "imagesTs" and (unsound := [case for case in of_folder if case.endswith("_seg")]):
            raise UserError(
                folder / name,
                f"the case names {some_of(unsound)}",
                "names that do not end in _seg, by which nnU-Net tells segmentations from images",
                "Rename all files of these cases.",
            )
