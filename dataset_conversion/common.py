"""What the converters share: finding and reading NIfTI files, checks of grids and labels, and writing a raw dataset.

May import nnU-Net and of the package `errors` and data/.
"""

import argparse
import csv
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from nnunetv2_semicml.data.files import folder_written_whole, read_json, require_sound_names
from nnunetv2_semicml.data.grid import Grid
from nnunetv2_semicml.data.image_file import write_image
from nnunetv2_semicml.data.raw_dataset import raw_root, require_free_id
from nnunetv2_semicml.data.stored_file import check_stored_file
from nnunetv2_semicml.errors import UserError, some_of

Labels = Mapping[str, int | tuple[int, ...]]  # of dataset.json: name -> value, or values of a region


def check_modalities(modalities: Sequence[str], known: Sequence[str]) -> None:
    """Raise a UserError unless these are two or more different ones of the known modalities."""
    if len(modalities) < 2 or len({*modalities}) < len(modalities) or not {*modalities} <= {*known}:
        raise UserError(
            "--modalities",
            some_of(modalities) or "none",
            f"two or more different ones of {some_of(known)}",
            "The modalities of this package teach each other: choose at least two.",
        )


def find_cases(
    folder: Path,
    pattern: str,
    images: Sequence[str],
    example: str,
    subfolders: Sequence[str] = (".",),
    labeled: bool = True,
) -> dict[str, dict[str, Path]]:
    """The NIfTI files of all cases below a folder.

    Args:
        folder: the folder; hidden files, which macOS leaves in archives, are passed over.
        pattern: regular expression of all paths relative to the folder, without .nii or .nii.gz. Its group "case" names
            the case, its group "image" which image it is; a file without the latter is the label.
        images: the images that every case must have; it may have others.
        example: a path that fits the pattern, for error messages.
        subfolders: where below the folder to look, at any depth.
        labeled: whether every case must have a label, or none.

    Returns:
        case -> {one of images or "label": file}, in alphabetical order.

    Raises:
        UserError: a folder is missing or empty, a file has an unknown name, a case lacks a file or has two candidates
            for one, or an unlabeled case has a label.
    """
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            raise UserError(folder / subfolder, "no such folder", f"files such as {example}", "Correct the path.")
    cases: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in sorted(file for subfolder in subfolders for file in (folder / subfolder).rglob("*.nii*")):
        if file.name.startswith("."):
            continue
        match = re.fullmatch(rf"{pattern}\.nii(\.gz)?", file.relative_to(folder).as_posix())
        if not match:
            raise UserError(
                file,
                "a name that this dataset does not have",
                f"only files such as {example}",
                "Correct the folder or the options, or remove the file.",
            )
        kind = match["image"] or "label"
        if kind == "label" and not labeled:
            raise UserError(
                file,
                "a label",
                "images only in the folder of unlabeled cases",
                "Convert these cases as labeled ones and withhold labels with nnUNetv2_semicml_withhold_labels.",
            )
        first = cases[match["case"]].setdefault(kind, file)
        if first != file:
            raise UserError(file, f"a second file beside {first}", f"one {kind} of {match['case']}", "Remove one.")
    if not cases:
        raise UserError(folder, "no NIfTI file", f"files such as {example}", "Correct the path.")
    for case, files in cases.items():
        for kind in [*images, *(["label"] if labeled else [])]:
            if kind not in files:
                raise UserError(
                    next(iter(files.values())).parent,
                    f"no {kind} of {case}",
                    f"files such as {example} for every case",
                    f"Add the missing file, or remove {case}.",
                )
    return dict(sorted(cases.items()))


def read_image(file: Path, dimension: int = 3) -> sitk.Image:
    """Read a NIfTI file; double precision becomes single precision, in which nnU-Net computes.

    Raises:
        UserError: the file is damaged, has another number of dimensions, or voxels that are NaN or infinite.
    """
    try:
        # ITK alone would fill up what is cut off, and replace NaN by zeros
        damage, not_finite = check_stored_file(file)
        if not damage:
            image = sitk.ReadImage(str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(
            file, f"an unreadable file ({type(error).__name__}: {error})", "a NIfTI image", "Get it again."
        ) from error
    if damage:
        raise UserError(file, damage, "a whole file", "Get it again.")
    if image.GetDimension() != dimension or image.GetNumberOfComponentsPerPixel() > 1:
        raise UserError(
            file,
            f"the shape {image.GetSize()} and values per voxel: {image.GetNumberOfComponentsPerPixel()}",
            f"{dimension} dimensions and one value",
            "Get the original file.",
        )
    if not_finite:
        raise UserError(
            file, f"{not_finite} voxels that are NaN or infinite", "finite numbers", "Get the original file."
        )
    return sitk.Cast(image, sitk.sitkFloat32) if image.GetPixelID() == sitk.sitkFloat64 else image


def on_grid_of(image: sitk.Image, file: Path, reference: sitk.Image, reference_file: Path) -> sitk.Image:
    """The image with exactly the spacing, origin and direction of the reference.

    Raises:
        UserError: it has another size, or voxels of it lie elsewhere.
    """
    if difference := Grid.of_image(image).difference(Grid.of_image(reference)):
        attribute, found, expected = difference
        raise UserError(
            file,
            f"{attribute} {found}",
            f"{expected} as in {reference_file}",
            "Get the original files of this case.",
        )
    image = sitk.Image(image)
    image.CopyInformation(reference)
    return image


def relabel(label: sitk.Image, file: Path, values: Mapping[int, int]) -> sitk.Image:
    """The label with its values replaced, 8 bits per voxel.

    Args:
        label: any type of voxels.
        file: where it comes from, for error messages.
        values: value in the file -> value in the dataset, for every value that may occur.

    Raises:
        UserError: another value occurs.
    """
    voxels = sitk.GetArrayFromImage(label)
    if (unknown := np.unique(voxels[~np.isin(voxels, list(values))])).size:
        raise UserError(
            file,
            f"the label values {some_of(f'{value:g}' for value in unknown)}",
            f"only {some_of(map(str, values))}",
            "Get the original file.",
        )
    relabeled = np.zeros(voxels.shape, np.uint8)
    for old, new in values.items():
        relabeled[voxels == old] = new
    result = sitk.GetImageFromArray(relabeled)
    result.CopyInformation(label)
    return result


def read_case(
    files: Mapping[str, Path], images: Sequence[str], values: Mapping[int, int]
) -> tuple[list[sitk.Image], sitk.Image | None]:
    """Images and label (None: unlabeled) of a case whose files lie on one grid, that of the first image.

    Args:
        files: as `find_cases` returns them.
        images: which images, in channel order.
        values: as for `relabel`.
    """
    reference = read_image(files[images[0]])
    channels = [on_grid_of(read_image(files[name]), files[name], reference, files[images[0]]) for name in images]
    if "label" not in files:
        return channels, None
    label = relabel(read_image(files["label"]), files["label"], values)
    return channels, on_grid_of(label, files["label"], reference, files[images[0]])


class NewDataset:
    """A raw dataset (docs/data.md) while it is written; made by `new_dataset`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.labeled: list[str] = []
        self.unlabeled: list[str] = []
        self.groups: dict[str, str] = {}
        for subfolder in ("imagesTr", "labelsTr"):
            (folder / subfolder).mkdir(parents=True)

    def add(
        self, case: str, images: Sequence[sitk.Image], label: sitk.Image | None = None, group: str | None = None
    ) -> None:
        """Write a case.

        Args:
            case: its name.
            images: one per channel, on one grid.
            label: None for an unlabeled case.
            group: e.g. the hospital; stands in strata.csv, which nnUNetv2_semicml_withhold_labels reads.

        Raises:
            UserError: there is such a case already, or its name is none for a file.
        """
        require_sound_names([case], self.folder.name)
        if case in self.labeled or case in self.unlabeled:
            raise UserError(
                "--unlabeled", f"{case}, which is also a labeled case", "other patients", "Correct the folder."
            )
        subfolder = self.folder / ("imagesUn" if label is None else "imagesTr")
        subfolder.mkdir(exist_ok=True)
        for channel, image in enumerate(images):
            write_image(image, subfolder / f"{case}_{channel:04d}.nii.gz")
        if label is not None:
            write_image(label, self.folder / "labelsTr" / f"{case}.nii.gz")
        (self.unlabeled if label is None else self.labeled).append(case)
        if group is not None:
            self.groups[case] = group


@contextmanager
def new_dataset(
    dataset_id: int,
    name: str,
    channel_names: Sequence[str],
    labels: Labels,
    *,
    reference: str,
    licence: str,
    regions_class_order: tuple[int, ...] | None = None,
) -> Iterator[NewDataset]:
    """A new dataset to add cases to; it appears in nnUNet_raw when the block is left, and not at all after an error.

    Args:
        dataset_id: must be free, see `require_free_id`.
        name: without "DatasetXXX_".
        channel_names: in channel order.
        labels: as in dataset.json.
        reference: where the data come from.
        licence: under which.
        regions_class_order: as in dataset.json, for labels that are regions.

    Raises:
        UserError: nnUNet_raw is not set, or the id is not free.
    """
    root = raw_root()
    require_free_id(dataset_id, "-d")
    folder = root / f"Dataset{dataset_id:03d}_{name}"
    root.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(folder) as new:
        dataset = NewDataset(new)
        yield dataset
        generate_dataset_json(
            str(dataset.folder),
            channel_names=dict(enumerate(channel_names)),
            labels=dict(labels),
            num_training_cases=len(dataset.labeled),
            file_ending=".nii.gz",
            regions_class_order=regions_class_order,
            dataset_name=name,
            reference=reference,
            license=licence,
            converted_by="dataset_conversion of nnunetv2_semicml",
        )
        if dataset.groups:
            with (dataset.folder / "strata.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("case", "group"), *dataset.groups.items()])
    dataset.folder = folder


def argument_parser(description: str, folder: str, unlabeled_folder: str = "") -> argparse.ArgumentParser:
    """A parser with the arguments that converters share.

    Args:
        description: of the program.
        folder: in words, what FOLDER is.
        unlabeled_folder: in words, what the folder of --unlabeled is; there is no such option without.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=folder)
    parser.add_argument(
        "-d", dest="dataset_id", type=int, required=True, metavar="ID", help="free id for the new dataset"
    )
    if unlabeled_folder:
        parser.add_argument(
            "--unlabeled",
            dest="unlabeled_folder",
            type=Path,
            metavar="FOLDER",
            help=f"images without labels: {unlabeled_folder}",
        )
    return parser


def run(convert: Callable[..., Path], parser: argparse.ArgumentParser) -> None:
    """Call a converter with the arguments of the command line, and say what it has written and what to do next."""
    options = vars(parser.parse_args())
    folder = convert(**options)
    dataset_json = read_json(folder / "dataset.json")
    num_labeled, channels = dataset_json["numTraining"], [*dataset_json["channel_names"].values()]
    num_unlabeled = len([*(folder / "imagesUn").glob("*_0000.nii.gz")])
    print(f"{folder}: {num_labeled} labeled, {num_unlabeled} unlabeled")
    if num_unlabeled:
        print(f"Next: nnUNetv2_semicml_plan_and_preprocess -d {options['dataset_id']}")
    else:
        strata = folder / "strata.csv"
        stratify = f" --stratify {shlex.quote(str(strata))}" if strata.is_file() else ""
        print(
            f"Next: nnUNetv2_semicml_withhold_labels -d {options['dataset_id']} --output_id ID --labeled_fraction 0.1"
            + stratify
        )
    if len(channels) > 2:
        joined = [f"{channels[0]}+{channels[1]}={channels[0]},{channels[1]}", *channels[2:]]
        print(
            "In nnUNetv2_semicml_plan_and_preprocess every channel is a modality by itself, unless --modalities "
            f"chooses or joins channels, e.g. --modalities {' '.join(joined)}"
        )
