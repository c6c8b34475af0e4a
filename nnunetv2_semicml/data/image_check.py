"""Opens every image and label of a raw dataset once: what cannot work is refused before anything is written.

The judge of what is readable is nnU-Net's reader; `stored_file` knows what that reader passes over. May import nnU-Net,
`errors` and its neighbors in data/. Only reads, never writes.
"""

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from tqdm import tqdm

from nnunetv2_semicml.data.raw_dataset import RawDataset, allowed_labels
from nnunetv2_semicml.data.stored_file import check_stored_file, digest_of
from nnunetv2_semicml.errors import UserError, some_of

# Files of a case lie on one grid if no voxel is displaced by more than this share of the voxel size: programs round
# what they store in headers differently.
GRID_TOLERANCE = 0.1


class _Problem(Exception):
    """Holds the arguments of a UserError on their way out of another process."""


@dataclass
class _Checked:
    """What is known of a case.

    Attributes:
        digests: of each modality's voxels; None if the case lacks it.
        labels: that occur.
        files: size, time of modification and digest of each file.
        apart: why nnU-Net does not read the files of all modalities at once, if so.
        problem: arguments of a UserError.
    """

    digests: list[bytes | None] = field(default_factory=list)
    labels: set[int] = field(default_factory=set)
    files: dict[str, list] = field(default_factory=dict)
    apart: str = ""
    problem: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CheckedImages:
    """What a check has found out by the way.

    Attributes:
        files: every file of imagesTr, labelsTr and imagesUn that nnU-Net reads -> [size in bytes, time of modification
            in ns, digest of its bytes].
        labels: labeled case -> the values that occur in its label.
        apart: labeled case that has all modalities, whose files nnU-Net does not read at once -> why not.
    """

    files: dict[str, list]
    labels: dict[str, set[int]]
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
    only. No modality of a case may be the same, voxel for voxel, in two of
    imagesTr, imagesUn and imagesTs.

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
        labels=allowed_labels(raw.dataset_json),
        modalities=modalities,
    )
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
            "enough memory for one case in each process",
            "Use fewer processes.",
        ) from error

    problems: dict[str, tuple[str, ...]] = {}
    seen: dict[tuple[int, bytes], tuple[str, str]] = {}  # modality, digest -> the first such file and its folder
    for (folder, case, files), result in zip(cases, checked, strict=True):
        if result.problem:
            problems[case] = result.problem
        for modality, digest in enumerate(result.digests):
            if digest is None:
                continue
            file = files["images"][modalities[modality][0]]
            twin, twins_folder = seen.setdefault((modality, digest), (file, folder))
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
    found = list(zip(cases, checked, strict=True))
    labeled = {case: result for (folder, case, _), result in found if folder == "imagesTr"}
    return CheckedImages(
        files={f: state for (folder, *_), result in found if folder != "imagesTs" for f, state in result.files.items()},
        labels={case: result.labels for case, result in labeled.items()},
        apart={case: result.apart for case, result in labeled.items() if result.apart and None not in result.digests},
    )


def _check_case(
    files: dict,
    raw: RawDataset,
    reader: type[BaseReaderWriter],
    labels: list[int],
    modalities: Sequence[Sequence[int]],
) -> _Checked:
    checked = _Checked()
    try:
        _check_voxels(checked, files, raw, reader, labels, modalities)
    except _Problem as problem:
        return _Checked(problem=problem.args)
    return checked


def _check_voxels(
    checked: _Checked,
    files: dict,
    raw: RawDataset,
    reader: type[BaseReaderWriter],
    labels: list[int],
    modalities: Sequence[Sequence[int]],
) -> None:
    images, reference = files["images"], None  # the first image, its channels and grid
    for indices in modalities:
        if None in [images[i] for i in indices]:
            checked.digests.append(None)
            continue
        voxels, constant, grids = hashlib.blake2b(), True, []
        for i in indices:
            image, grid = _check_image(images[i], [raw.channel_names[c] for c in raw.channels_of_files[i]], reader)
            reference = reference or (images[i], len(image), grid)
            _require_grid(images[i], grid, reference[0], reference[2])
            if grids and not _read_at_once(grid, grids[0]):
                raise _differ(
                    images[i],
                    "spacing",
                    grid,
                    images[indices[0]],
                    grids[0],
                    "No voxel lies elsewhere by that, but nnU-Net does not read such files of one modality together: "
                    "copy the header of one file to the others, e.g. with SimpleITK's CopyInformation.",
                )
            grids.append(grid)
            if not _read_at_once(grid, reference[2]):
                checked.apart = "spacing " + " and ".join(_differing("spacing", reference[2], grid))
            elif len(image) != reference[1]:
                checked.apart = f"{reference[1]} and {len(image)} channels in a file"
            voxels.update(np.ascontiguousarray(image))
            constant = constant and all(channel.min() == channel.max() for channel in image)
        first = images[indices[0]]
        if constant:
            raise _Problem(
                first,
                f"the value {image.flat[0]:g} in every voxel",
                "an image",
                "Export it again, or remove the file: a case may lack a modality.",
            )
        digest = voxels.digest()
        if digest in checked.digests:
            twin = images[modalities[checked.digests.index(digest)][0]]
            raise _Problem(
                first,
                f"the same voxels as in {Path(twin).name}",
                "another image of the patient in every modality",
                "Replace one of the two files.",
            )
        checked.digests.append(digest)
        for file in raw.read_files(files, indices):
            if file not in checked.files:
                status = Path(file).stat()
                checked.files[file] = [status.st_size, status.st_mtime_ns, digest_of(file)]
    if "label" in files and reference is not None:
        label, grid = _read(files["label"], reader, is_label=True)
        if reader is Tiff3DIO and raw.read_files(files, []) == [files["label"]]:
            grid["spacing"] = reference[2]["spacing"]  # of CASE.json, which need not lie beside a label, too
        checked.labels = _check_label(files["label"], label, labels)
        _require_grid(files["label"], grid, reference[0], reference[2])


def _check_image(file: str, channel_names: Sequence[str], reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict]:
    """Read an image: its voxels (channels, *spatial) and its grid."""
    image, grid = _read(file, reader)
    if len(image) != len(channel_names):
        single = len(channel_names) == 1
        raise _Problem(
            file,
            f"{len(image)} channels",
            "one channel per file" if single else f"the {len(channel_names)} channels {some_of(channel_names)}",
            "Store every channel in its own file, or name all channels of such files in dataset.json.",
        )
    if not_finite := np.count_nonzero(~np.isfinite(image)):
        raise _not_finite(file, not_finite)
    return image, grid


def _check_label(file: str, label: np.ndarray, allowed: Sequence[int]) -> set[int]:
    """Find the values that occur in a label."""
    if len(label) != 1:
        raise _Problem(
            file, f"{len(label)} channels", "one, with a whole number in every voxel", "Store the label like that."
        )
    values = np.unique(label)
    if (unexpected := values[~np.isin(values, allowed)]).size:
        nearly = np.isin(np.rint(unexpected), allowed).all()
        raise _Problem(
            file,
            f"the label values {some_of(f'{i:.9g}' for i in unexpected)}",
            f"only the values of dataset.json: {some_of(map(str, allowed))}",
            "Store whole numbers, without a scale factor in the header."
            if nearly
            else "Correct the label, or the labels in dataset.json.",
        )
    return set(values.astype(int).tolist())


def _not_finite(file: str, number: int) -> _Problem:
    return _Problem(
        file,
        f"{number} voxels that are NaN or infinite",
        "finite numbers",
        "Replace them by a meaningful value, e.g. that of the background.",
    )


def _read(file: str, reader: type[BaseReaderWriter], is_label: bool = False) -> tuple[np.ndarray, dict]:
    """Read one file: its voxels (channels, *spatial) and its grid."""

    def unreadable(why: str) -> _Problem:
        return _Problem(file, f"an unreadable file ({why})", "an image", "Replace the file.")

    try:
        stored = check_stored_file(file)
        voxels, properties = reader().read_seg(file) if is_label else reader().read_images([file])
    except Exception as error:  # every reader raises the errors of its own library
        raise unreadable(f"{type(error).__name__}: {error}") from error
    if stored.damage:
        raise unreadable(stored.damage)
    if stored.not_finite:
        raise _not_finite(file, stored.not_finite)
    if issubclass(reader, SimpleITKIO) and (components := _components(file)) > 1:
        raise _Problem(
            file,
            f"{components} values in every voxel (a color or vector image), which nnU-Net takes for slices",
            "one value",
            "Store every channel in its own file.",
        )
    return voxels, _grid(voxels, properties)


def _components(file: str) -> int:
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return header.GetNumberOfComponents()


def _grid(voxels: np.ndarray, properties: dict) -> dict[str, np.ndarray]:
    """Shape, spacing, and what places voxels in the world as far as the format has that: origin and matrix, in mm."""
    grid = {"shape": np.array(voxels.shape[1:]), "spacing": np.array(properties["spacing"], dtype=float)}
    if "sitk_stuff" in properties:
        stored = properties["sitk_stuff"]
        # a fourth axis is that of the channels, or has one entry; a 2D image has two axes
        n = min(3, len(stored["spacing"]))
        direction = np.reshape(stored["direction"], (len(stored["spacing"]),) * 2)[:n, :n]
        grid |= {"origin": np.array(stored["origin"][:n]), "direction": direction}
        grid["matrix"] = direction * np.array(stored["spacing"][:n])
    if "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
        grid |= {"affine": affine, "origin": affine[:3, 3], "matrix": affine[:3, :3]}
    return grid


def _require_grid(file: str, grid: dict, reference: str, expected: dict) -> None:
    """Refuse another grid than that of the reference, a file of the same case.

    Raises:
        _Problem: naming what differs.
    """
    register = "Register and resample all images and the label of a case to one grid."
    if grid["shape"].tolist() != expected["shape"].tolist():
        raise _differ(file, "shape", grid, reference, expected, register)
    grid, expected = _shared_axes(grid, expected), _shared_axes(expected, grid)
    if _displacement(grid, expected) > GRID_TOLERANCE:
        candidates = ("spacing", "origin", "direction", "affine")
        differing = [k for k in candidates if k in grid and not np.allclose(grid[k], expected[k], atol=1e-3)]
        raise _differ(file, next(iter(differing), "spacing"), grid, reference, expected, register)


def _shared_axes(grid: dict, other: dict) -> dict:
    """The grid of a single slice without its third axis, if the other one is that of a 2D image."""
    if "origin" not in grid or len(grid["origin"]) <= len(other["origin"]):
        return grid
    return {
        "shape": grid["shape"],
        "spacing": np.array([other["spacing"][0], *grid["spacing"][1:]]),
        "origin": grid["origin"][:2],
        "direction": grid["direction"][:2, :2],
        "matrix": grid["matrix"][:2, :2],
    }


def _read_at_once(grid: dict, other: dict) -> bool:
    """Whether nnU-Net's readers, which compare spacings so, take two files for those of one image."""
    return np.allclose(grid["spacing"], other["spacing"])


def _differ(file: str, key: str, grid: dict, reference: str, expected: dict, remedy: str) -> _Problem:
    found, other = _differing(key, grid, expected)
    return _Problem(file, f"{key} {found}", f"{other} as in {Path(reference).name}", remedy)


def _differing(key: str, *grids: dict) -> list[str]:
    """The values under a key, with as many digits as tell them apart."""
    values = [np.asarray(grid[key], dtype=float) for grid in grids]
    for digits in (0, 3, 6, 9, 17):
        rounded = [np.round(v, digits) + 0.0 for v in values]  # -0.0 becomes 0.0
        texts = [str(v.astype(float if digits else int).tolist()) for v in rounded]
        # three digits at least, unless these are counts
        if len(set(texts)) == len(texts) and (digits or key == "shape"):
            break
    return texts


def _displacement(grid: dict, expected: dict) -> float:
    """How far the corners of two grids of one shape are apart at most, as a share of the smallest spacing."""
    if "matrix" not in grid:
        # the format knows spacings alone, which are compared over the extent of the image
        apart = np.abs(grid["spacing"] - expected["spacing"]) * (grid["shape"] - 1)
        return float(apart.max() / expected["spacing"].min())
    extent = grid["shape"][::-1][: len(grid["origin"])] - 1
    corners = np.array(list(product(*((0, end) for end in extent))))
    places = [corners @ g["matrix"].T + g["origin"] for g in (grid, expected)]
    smallest = np.linalg.norm(expected["matrix"], axis=0).min()
    return float(np.linalg.norm(places[0] - places[1], axis=1).max() / smallest)
