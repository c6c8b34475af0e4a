"""A seeded synthetic head in several MR contrasts, written as a raw dataset with labeled, unlabeled and test cases.

Physics instead of free-hand grey values: every tissue has a proton density, T1 and T2, and every modality is the signal
equation of a pulse sequence. So lesions (long T2, T1 close to grey matter) are conspicuous in FLAIR and faint in T1 for
the reason they are in patients, and a method that lets one modality teach the other has something to gain.
Imports numpy, scipy, SimpleITK, `errors` and `files`, nothing of nnU-Net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from nnunetv2_semicml.data.files import folder_written_whole, write_json
from nnunetv2_semicml.data.image_file import write_image

# (proton density relative to water, T1 in ms, T2 in ms) at 1.5 T: round numbers within the range of published values.
TISSUES = {
    "air": (0.0, 1000.0, 100.0),
    "scalp": (0.80, 290.0, 70.0),
    "skull": (0.10, 500.0, 30.0),
    "csf": (1.00, 4000.0, 1800.0),
    "grey matter": (0.82, 1000.0, 98.0),
    "white matter": (0.70, 630.0, 80.0),
    "lesion": (0.85, 1350.0, 170.0),
    "lesion core": (0.93, 1900.0, 280.0),
}
AIR, SCALP, SKULL, CSF, GREY, WHITE, LESION, CORE = range(len(TISSUES))

Array = NDArray[np.float64]
Signal = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class PulseSequence:
    """A pulse sequence and its background: what is exactly zero in the file.

    Attributes:
        signal: proton density, T1, T2 (ms) → magnitude of the transverse magnetization at the echo.
        noise: standard deviation of the noise in each of the two receiver channels, relative to fully relaxed water.
        field_of_view: warped head radius (1 on the skin), voxel coordinates in [-1, 1], generator → voxels kept.
    """

    signal: Signal
    noise: float
    field_of_view: Callable[[Array, Array, np.random.Generator], NDArray[np.bool_]]


def _spin_echo(repetition_time: float, echo_time: float) -> Signal:
    return lambda pd, t1, t2: pd * (1 - np.exp(-repetition_time / t1)) * np.exp(-echo_time / t2)


def _inversion_recovery(repetition_time: float, inversion_time: float, echo_time: float) -> Signal:
    return lambda pd, t1, t2: (
        pd * np.abs(1 - 2 * np.exp(-inversion_time / t1) + np.exp(-repetition_time / t1)) * np.exp(-echo_time / t2)
    )


def _skull_stripped(radius: Array, grid: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    return radius < rng.uniform(0.84, 0.86)


def _shifted_ellipsoid(radius: Array, grid: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    offset = rng.uniform(0.03, 0.12, size=(3, 1, 1, 1)) * rng.choice([-1, 1], size=(3, 1, 1, 1))
    distance: Array = (((grid - offset) / 0.97) ** 2).sum(0)
    return distance < 1


def _without_end_slices(radius: Array, grid: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    z: Array = grid[0]
    return (radius < 1.04) & (z > -rng.uniform(0.78, 0.9)) & (z < rng.uniform(0.78, 0.9))


MODALITIES = {
    # The inversion time nulls cerebrospinal fluid: TI = T1·(ln 2 − ln(1 + exp(−TR/T1))).
    "FLAIR": PulseSequence(_inversion_recovery(9000, 2350, 120), 0.035, _skull_stripped),
    "T1": PulseSequence(_spin_echo(550, 14), 0.012, _shifted_ellipsoid),
    "T2": PulseSequence(_spin_echo(4500, 95), 0.022, _without_end_slices),
}


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> Array:
    """Random field of mean 0 and standard deviation 1, cubic between `knots` values per axis: the same at any shape."""
    control = rng.standard_normal((knots,) * len(shape))
    field: Array = ndimage.zoom(control, np.array(shape) / knots, order=3, mode="nearest")
    normalized: Array = (field - field.mean()) / field.std()
    return normalized


def _head(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], Array, Array]:
    """Tissue indices (z, y, x), warped head radius (z, y, x) and voxel coordinates (3, z, y, x) in [-1, 1]."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    semi_axes = np.array([0.94, 0.96, 0.82]) * rng.uniform(0.94, 1.0, size=3)
    z, y, x = grid - rng.uniform(-0.04, 0.04, size=(3, 1, 1, 1))
    z, y, x = (axis + 0.025 * _smooth_field(rng, shape, 5) for axis in (z, y, x))
    radius = np.sqrt((z / semi_axes[0]) ** 2 + (y / semi_axes[1]) ** 2 + (x / semi_axes[2]) ** 2)
    folds = _smooth_field(rng, shape, 15)

    tissue = np.full(shape, AIR, dtype=np.uint8)
    tissue[radius < 1.0] = SCALP
    tissue[radius < 0.91] = SKULL
    tissue[radius < 0.85] = CSF
    tissue[radius + 0.015 * folds < 0.81] = GREY
    tissue[radius + 0.08 * folds < 0.66] = WHITE
    tissue[(radius < 0.85) & (radius > 0.72) & (folds > 1.3)] = CSF  # sulci
    tissue[(radius < 0.85) & (radius > 0.52) & (np.abs(x) < 0.03) & (z > -0.3)] = CSF  # between the hemispheres
    width = rng.uniform(0.8, 1.4)
    lateral = np.abs(x)
    basal_ganglia = ((z + 0.05) / 0.22) ** 2 + ((y + 0.02) / 0.26) ** 2 + ((lateral - 0.28) / 0.09) ** 2
    tissue[basal_ganglia < 1] = GREY
    ventricles = ((z - 0.10) / 0.20) ** 2 + (y / 0.40) ** 2 + ((lateral - 0.09 - 0.5 * y**2) / (0.065 * width)) ** 2
    tissue[ventricles < 1] = CSF
    return tissue, radius, grid


def _lesions(rng: np.random.Generator, tissue: NDArray[np.uint8], grid_mm: Array, spacing: Array) -> Array:
    """Depth (z, y, x) of one to three blobs: 1 in their centres, 0 on their surface and outside the parenchyma."""
    parenchyma = (tissue == GREY) | (tissue == WHITE)
    inner = ndimage.binary_erosion(parenchyma) & (np.abs(grid_mm) < 0.62 * grid_mm.max((1, 2, 3), keepdims=True)).all(0)
    candidates = np.argwhere(inner if inner.any() else parenchyma)
    reach = grid_mm.max((1, 2, 3)).min()
    depth = np.zeros(tissue.shape)
    for largest in (0.36, 0.26, 0.20)[: rng.integers(1, 4)]:
        # Two voxels along the coarsest axis are the least that leaves room for a core and a rim.
        size = max(reach * largest * rng.uniform(0.7, 1.0), 2 * spacing.max())
        semi_axes = size * rng.uniform(0.8, 1.2, size=(3, 1, 1, 1)).clip(2 * spacing.max() / size)
        z, y, x = rng.choice(candidates)
        centre = grid_mm[:, z, y, x]
        distance = np.sqrt((((grid_mm - centre[:, None, None, None]) / semi_axes) ** 2).sum(0))
        distance *= np.exp(0.15 * _smooth_field(rng, tissue.shape, 9))
        depth = np.maximum(depth, 1 - distance)
    return np.where(parenchyma, depth, 0)


def make_case(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    modalities: Sequence[str],
    spacing: tuple[float, float, float] = (4.0, 3.6, 3.6),
    num_classes: int = 1,
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
    """One patient: the same anatomy seen by every modality.

    Args:
        rng: source of all randomness of the case; the anatomy does not depend on which modalities are asked for.
        shape: voxels along z, y, x, at least 16 each; the head fills the grid whatever its shape.
        modalities: keys of `MODALITIES`.
        spacing: mm along z, y, x; lesions are round in mm.
        num_classes: 1 (lesion) or 2 (1 = rim, 2 = core).

    Returns:
        Images, float32 (z, y, x) each and exactly zero outside the modality's own field of view, and the label map,
        uint8 (z, y, x), in which every class is present.

    Raises:
        ValueError: an unknown modality or number of classes.
    """
    if unknown := set(modalities) - set(MODALITIES):
        raise ValueError(f"Unknown modalities {sorted(unknown)}; known are {list(MODALITIES)}.")
    if num_classes not in (1, 2):
        raise ValueError(f"num_classes is {num_classes}; a phantom has 1 (lesion) or 2 (rim, core).")
    tissue, radius, grid = _head(rng, shape)
    spacing_mm = np.array(spacing)
    grid_mm = grid * (np.array(shape) * spacing_mm / 2)[:, None, None, None]
    depth = _lesions(rng, tissue, grid_mm, spacing_mm)
    label = (depth > 0).astype(np.uint8)
    tissue[depth > 0] = LESION
    if num_classes == 2:
        tissue[depth > 0.45] = CORE
        label[depth > 0.45] = 2

    variation = 1 + rng.normal(0, [0.02, 0.04, 0.06], size=(len(TISSUES), 3)).clip(-0.1, 0.1)
    density, t1, t2 = (np.array(list(TISSUES.values())) * variation).T
    texture = 1 + 0.02 * _smooth_field(rng, shape, 13)
    images = {}
    # One generator per known modality, so that an image does not depend on which others are made beside it.
    for (name, sequence), own in zip(MODALITIES.items(), rng.spawn(len(MODALITIES)), strict=True):
        if name not in modalities:
            continue
        signal = ndimage.gaussian_filter(sequence.signal(density, t1, t2)[tissue] * texture, 0.5)  # partial volume
        signal = signal * np.exp(own.uniform(0.06, 0.12) * _smooth_field(own, shape, 4))
        real, imaginary = own.normal(0, sequence.noise, size=(2, *shape))
        magnitude = np.hypot(signal + real, imaginary)  # Rician, as in magnitude images
        kept = sequence.field_of_view(radius, grid, own)
        images[name] = np.where(kept, magnitude * np.exp(own.uniform(5.5, 7.5)), 0).astype(np.float32)
    return {name: images[name] for name in modalities}, label


def _write(array: NDArray[Any], file: Path, spacing: Sequence[float], origin: Array, tilt: float) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(mm) for mm in reversed(spacing)])
    image.SetOrigin([float(mm) for mm in origin])
    cos, sin = np.cos(tilt), np.sin(tilt)
    image.SetDirection([1.0, 0.0, 0.0, 0.0, cos, -sin, 0.0, sin, cos])
    write_image(image, file)


def write_phantom_dataset(
    nnunet_raw: Path,
    dataset_id: int = 500,
    name: str = "Phantom",
    num_labeled: int = 6,
    num_unlabeled: int = 14,
    num_test: int = 6,
    shape: tuple[int, int, int] = (40, 48, 48),
    spacing: tuple[float, float, float] = (4.0, 3.6, 3.6),
    modalities: Sequence[str] = ("FLAIR", "T1"),
    num_classes: int = 1,
    regions: bool = False,
    seed: int = 0,
) -> Path:
    """Write a raw dataset with imagesTr, labelsTr, imagesUn (no labels exist), imagesTs, labelsTs and dataset.json.

    A case depends on the seed, its group (labeled, unlabeled, test) and its number, not on how many others there are.

    Args:
        nnunet_raw: the folder that `nnUNet_raw` names; it is created if missing.
        dataset_id: nnU-Net's number of the dataset.
        name: name of the dataset, without number.
        num_labeled: cases in imagesTr and labelsTr.
        num_unlabeled: cases in imagesUn.
        num_test: cases in imagesTs and labelsTs.
        shape: voxels along z, y, x.
        spacing: mm along z, y, x.
        modalities: keys of `MODALITIES`, in channel order.
        num_classes: 1 (lesion) or 2 (rim, core).
        regions: declare the two classes as overlapping regions, whole (1 and 2) and core (2).
        seed: seed of everything.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: the folder of the dataset exists and is not empty, or cannot be written.
        ValueError: regions without two classes; what `make_case` raises.
    """
    if regions and num_classes != 2:
        raise ValueError("regions=True needs num_classes=2.")
    folder = Path(nnunet_raw) / f"Dataset{dataset_id:03d}_{name}"
    labels: dict[str, int | list[int]] = {"background": 0, "lesion": 1}
    if num_classes == 2:
        labels = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "rim": 1, "core": 2}
    description = {
        "channel_names": {str(channel): modality for channel, modality in enumerate(modalities)},
        "labels": labels,
        **({"regions_class_order": [1, 2]} if regions else {}),
        "numTraining": num_labeled,
        "file_ending": ".nii.gz",
    }
    with folder_written_whole(folder) as new:
        write_json(new / "dataset.json", description)
        groups = {"Tr": num_labeled, "Un": num_unlabeled, "Ts": num_test}
        for (group, count), group_seed in zip(groups.items(), np.random.SeedSequence(seed).spawn(3), strict=True):
            images_folder, labels_folder = new / f"images{group}", new / f"labels{group}"
            images_folder.mkdir(parents=True)
            if group != "Un":
                labels_folder.mkdir()
            for number, case_seed in enumerate(group_seed.spawn(count)):
                rng = np.random.default_rng(case_seed)
                geometry = spacing, rng.uniform(-120, 120, size=3), rng.uniform(-0.15, 0.15)
                images, label = make_case(rng, shape, modalities, spacing, num_classes)
                case = f"{name.lower()}_{group.lower()}_{number:03d}"
                for channel, image in enumerate(images.values()):
                    _write(image, images_folder / f"{case}_{channel:04d}.nii.gz", *geometry)
                if group != "Un":
                    _write(label, labels_folder / f"{case}.nii.gz", *geometry)
    return folder
