"""Opens every image and label of a raw dataset once: what cannot work is refused before anything is written.

May import nnU-Net, `errors` and its neighbors in data/. Only reads, never writes.
"""

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from tqdm import tqdm

from nnunetv2_semicml.data.grid import Grid, describe_difference
from nnunetv2_semicml.data.raw_dataset import CaseFiles, RawDataset, allowed_labels
from nnunetv2_semicml.data.reading import Voxels, another_grid, not_finite, read_image, require_grid
from nnunetv2_semicml.data.stored_file import FileState, state_of
from nnunetv2_semicml.errors import UserError, some_of

_REGISTER = "Register and resample all images and the label of a case to one grid."


@dataclass
class _Checked:
    """What is known of a case.

    Attributes:
        digests: of each modality its first file and the digest of its voxels; None if the case lacks it.
        label_values: that occur.
        files: file -> its state.
        apart: why nnU-Net does not read the files of all modalities at once, if so.
        problem: what cannot work, if anything.
    """

    digests: list[tuple[str, bytes] | None] = field(default_factory=list)
    label_values: set[int] = field(default_factory=set)
    files: dict[str, FileState] = field(default_factory=dict)
    apart: str = ""
    problem: UserError | None = None


@dataclass(frozen=True)
class CheckedImages:
    """What a check has found out by the way.

    Attributes:
        files: every file of imagesTr, labelsTr and imagesUn that nnU-Net reads -> its state.
        label_values: labeled case -> the values that occur in its label.
        apart: labeled case that has all modalities, whose files nnU-Net does not read at once -> why not.
    """

    files: dict[str, FileState]
    label_values: dict[str, set[int]]
    apart: dict[str, str]


def check_images(
    raw: RawDataset,
    num_processes: int,
    show_progress: bool = True,
    modalities: Sequence[Sequence[int]] | None = None,
) -> CheckedImages:
    """Read every image and label once, in `num_processes` spawned processes that hold one case each.

    In every case, all files must be readable, hold the channels that they should, and lie on one grid; the images must
    be finite, a modality not constant and different from the others; the label may have the values of dataset.json
    only. No modality of a case may be the same, voxel for voxel, in two of imagesTr, imagesUn and imagesTs.

    Args:
        raw: the dataset.
        num_processes: at most as many.
        show_progress: on the console.
        modalities: files of each modality, as indices; by default every file is one by itself. Files of none are not
            opened.

    Raises:
        UserError: about the first wrong case; the others are named at its end.
    """
    modalities = modalities or [(i,) for i in range(len(raw.channels_of_files))]
    cases = [(folder, case, files) for folder, members in raw.folders.items() for case, files in members.items()]
    check = partial(
        _check_case,
        raw=RawDataset(raw.name, raw.folder, raw.dataset_json, raw.channel_names, raw.channels_of_files, {}, {}, {}),
        reader=raw.find_reader(),
        allowed=allowed_labels(raw.dataset_json),
        modalities=modalities,
    )
    spawn = multiprocessing.get_context("spawn")
    try:
        # Unlike multiprocessing.Pool, this notices when the system kills a process.
        with ProcessPoolExecutor(max(1, min(num_processes, len(cases))), spawn) as executor:
            running = executor.map(check, [files for _, _, files in cases])
            checked = list(tqdm(running, "Checking images", len(cases), disable=not show_progress))
    except BrokenProcessPool as error:
        raise UserError(
            raw.folder,
            "that a process checking the images was killed, probably for lack of memory",
            "enough memory for one case in each process",
            "Use fewer processes.",
        ) from error

    problems: dict[str, UserError] = {}
    seen: dict[tuple[int, bytes], tuple[str, str]] = {}  # modality, digest -> the first such file and its folder
    for (folder, case, _), result in zip(cases, checked, strict=True):
        if result.problem:
            problems[case] = result.problem
        for modality, of_modality in enumerate(result.digests):
            if of_modality is None:
                continue
            file, digest = of_modality
            twin, twins_folder = seen.setdefault((modality, digest), (file, folder))
            if twins_folder != folder:
                problems.setdefault(
                    case,
                    UserError(
                        file,
                        f"the same voxels as in {twin}",
                        "every image in one of imagesTr, imagesUn and imagesTs only",
                        "Remove one of the two cases.",
                    ),
                )
    if problems:
        where, found, expected, remedy = next(iter(problems.values())).parts
        others = list(problems)[1:]
        raise UserError(
            where, found, expected, remedy + (f" (and {len(others)} more: {some_of(others)})" if others else "")
        )
    results = [(folder, case, result) for (folder, case, _), result in zip(cases, checked, strict=True)]
    labeled = {case: result for folder, case, result in results if folder == "imagesTr"}
    return CheckedImages(
        files={f: state for folder, _, result in results if folder != "imagesTs" for f, state in result.files.items()},
        label_values={case: result.label_values for case, result in labeled.items()},
        apart={case: result.apart for case, result in labeled.items() if result.apart and None not in result.digests},
    )


def _check_case(
    files: CaseFiles,
    raw: RawDataset,
    reader: type[BaseReaderWriter],
    allowed: Sequence[int],
    modalities: Sequence[Sequence[int]],
) -> _Checked:
    checked = _Checked()
    try:
        _check_voxels(checked, files, raw, reader, allowed, modalities)
    except UserError as problem:
        return _Checked(problem=problem)
    return checked


def _check_voxels(
    checked: _Checked,
    files: CaseFiles,
    raw: RawDataset,
    reader: type[BaseReaderWriter],
    allowed: Sequence[int],
    modalities: Sequence[Sequence[int]],
) -> None:
    reference: tuple[str, int, Grid] | None = None  # the first image, its channels and grid
    for indices in modalities:
        images = [file for file in [files["images"][i] for i in indices] if file]
        if len(images) < len(indices):
            checked.digests.append(None)
            continue
        voxels, constant, first_grid = hashlib.blake2b(), True, None
        for i, file in zip(indices, images, strict=True):
            image, grid = _check_image(file, [raw.channel_names[c] for c in raw.channels_of_files[i]], reader)
            reference = reference or (file, len(image), grid)
            require_grid(file, grid, Path(reference[0]).name, reference[2], _REGISTER)
            first_grid = first_grid or grid
            if not _read_at_once(grid, first_grid):
                raise another_grid(
                    file,
                    describe_difference("spacing", grid, first_grid),
                    Path(images[0]).name,
                    "No voxel lies elsewhere by that, but nnU-Net does not read such files of one modality together: "
                    "copy the header of one file to the others, e.g. with SimpleITK's CopyInformation.",
                )
            if not _read_at_once(grid, reference[2]):
                checked.apart = "{} {} and {}".format(*describe_difference("spacing", reference[2], grid))
            elif len(image) != reference[1]:
                checked.apart = f"{reference[1]} and {len(image)} channels in a file"
            voxels.update(np.ascontiguousarray(image).data)
            constant = constant and all(channel.min() == channel.max() for channel in image)
        if constant:
            raise UserError(
                images[0],
                f"the value {image.flat[0]:g} in every voxel",
                "an image",
                "Export it again, or remove the file: a case may lack a modality.",
            )
        digest = voxels.digest()
        if twins := [other for other, of_other in filter(None, checked.digests) if of_other == digest]:
            raise UserError(
                images[0],
                f"the same voxels as in {Path(twins[0]).name}",
                "another image of the patient in every modality",
                "Replace one of the two files.",
            )
        checked.digests.append((images[0], digest))
        for file in raw.read_files(files, indices):
            if file not in checked.files:
                checked.files[file] = state_of(file)
    if "label" in files and reference is not None:
        label, grid = _read(files["label"], reader, is_label=True)
        if reader is Tiff3DIO and raw.read_files(files, []) == [files["label"]]:
            # that of CASE.json, which need not lie beside a label, too
            grid = replace(grid, spacing=reference[2].spacing)
        checked.label_values = _check_label(files["label"], label, allowed)
        require_grid(files["label"], grid, Path(reference[0]).name, reference[2], _REGISTER)


def _check_image(file: str, channel_names: Sequence[str], reader: type[BaseReaderWriter]) -> tuple[Voxels, Grid]:
    """Read an image: its voxels (channels, *spatial) and its grid."""
    image, grid = _read(file, reader)
    if len(image) != len(channel_names):
        single = len(channel_names) == 1
        raise UserError(
            file,
            f"{len(image)} channels",
            "one channel per file" if single else f"the {len(channel_names)} channels {some_of(channel_names)}",
            "Store every channel in its own file, or name all channels of such files in dataset.json.",
        )
    if number := np.count_nonzero(~np.isfinite(image)):
        raise not_finite(file, int(number))
    return image, grid


def _check_label(file: str, label: Voxels, allowed: Sequence[int]) -> set[int]:
    """Find the values that occur in a label."""
    if len(label) != 1:
        raise UserError(
            file, f"{len(label)} channels", "one, with a whole number in every voxel", "Store the label like that."
        )
    values = np.unique(label)
    if (unexpected := values[~np.isin(values, allowed)]).size:
        nearly = np.isin(np.rint(unexpected), allowed).all()
        raise UserError(
            file,
            f"the label values {some_of(f'{i:.9g}' for i in unexpected)}",
            f"only the values of dataset.json: {some_of(map(str, allowed))}",
            "Store whole numbers, without a scale factor in the header."
            if nearly
            else "Correct the label, or the labels in dataset.json.",
        )
    return set(values.astype(int).tolist())


def _read(file: str, reader: type[BaseReaderWriter], is_label: bool = False) -> tuple[Voxels, Grid]:
    """Read one file: its voxels (channels, *spatial) and its grid."""
    voxels, grid = read_image(file, reader(), is_label)
    if issubclass(reader, SimpleITKIO) and (components := _components(file)) > 1:
        raise UserError(
            file,
            f"{components} values in every voxel (a color or vector image), which nnU-Net takes for slices",
            "one value",
            "Store every channel in its own file.",
        )
    return voxels, grid


def _components(file: str) -> int:
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return int(header.GetNumberOfComponents())


def _read_at_once(grid: Grid, other: Grid) -> bool:
    """Whether nnU-Net's readers, which compare spacings so, take two files for those of one image."""
    return np.allclose(grid.spacing, other.spacing)
