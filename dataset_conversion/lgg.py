"""LGG Segmentation Dataset: lower-grade glioma of TCGA, FLAIR and T1 before and after contrast, slices of 256 × 256.

Source: https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation; images of The Cancer Imaging Archive
(TCGA-LGG). Licence: CC BY-NC-SA 4.0. Cite Buda et al., Comput. Biol. Med. 109:218-225, 2019, and Mazurowski et al.,
J. Neuro-Oncol. 133:27-35, 2017.

Expected: FOLDER, kaggle_3m, with TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif, one file for each slice whose three
channels are T1 before contrast, FLAIR, T1 after contrast (8 bits), and …_1_mask.tif with 0 and 255 (abnormal in FLAIR).
The slices, in the order of their numbers, become 3D images, voxel by voxel; 255 becomes 1.
- Some patients lack a sequence; the source puts FLAIR in its place. Where one that was asked for is missing, the
  patient is left out and named at the end.
- The files have no spacing. (1, 1, 5) mm is nominal: distances in mm are not physical, and the 2d configuration is the
  natural one.
- The institution of every case, e.g. CS, stands in strata.csv, for withhold_labels --stratify.

    python -m nnunetv2_semicml.dataset_conversion.lgg kaggle_3m -d 550 [--modalities FLAIR T1post]
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import tifffile
from tqdm import tqdm

from nnunetv2_semicml.errors import UserError, reports_user_errors

from .common import argument_parser, check_modalities, new_dataset, relabel, run

CHANNELS = {"T1": 0, "FLAIR": 1, "T1post": 2}  # place in the file
NOMINAL_SPACING = (1.0, 1.0, 5.0)
PATIENT = re.compile(r"TCGA_[A-Z0-9]{2}_[A-Z0-9]{4}_\d{8}")


def convert_lgg(folder: Path, dataset_id: int, modalities: Sequence[str] = ("FLAIR", "T1post")) -> Path:
    """Convert the LGG Segmentation Dataset.

    Args:
        folder: kaggle_3m.
        dataset_id: free id for the new dataset.
        modalities: two or more of CHANNELS, in channel order.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: something is missing or not as expected. Then nothing has been written.
    """
    check_modalities(modalities, list(CHANNELS))
    patients = find_patients(folder)
    left_out = []
    with new_dataset(
        dataset_id,
        "LGG",
        modalities,
        {"background": 0, "FLAIR_abnormality": 1},
        reference="https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation",
        licence="CC BY-NC-SA 4.0",
    ) as dataset:
        for patient in tqdm(patients, "LGG"):
            volumes, label = read_patient(patient)
            if any(name != "FLAIR" and np.array_equal(volumes[name], volumes["FLAIR"]) for name in modalities):
                left_out.append(patient.name)
                continue
            images = [to_image(volumes[name]) for name in modalities]
            institution = patient.name.split("_")[1]
            dataset.add(patient.name, images, to_image(label), group=institution)
        if not dataset.labeled:
            raise UserError(
                folder,
                f"no patient with {' and '.join(modalities)}",
                "at least one",
                "Choose other modalities with --modalities.",
            )
    if left_out:
        print(f"Left out, since a sequence is missing: {', '.join(left_out)}")
    return dataset.folder


def find_patients(folder: Path) -> list[Path]:
    """The folders of the patients, in alphabetical order."""
    patients = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    for patient in patients:
        if not PATIENT.fullmatch(patient.name):
            raise UserError(
                patient,
                "a folder that this dataset does not have",
                "only folders such as TCGA_CS_4941_19960909",
                "Give the folder kaggle_3m, or remove the other one.",
            )
    if not patients:
        raise UserError(folder, "no folder of a patient", "e.g. TCGA_CS_4941_19960909", "Give the folder kaggle_3m.")
    return patients


def read_patient(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All sequences of a patient and the label, each of the shape (slices, 256, 256), 8 bits.

    Raises:
        UserError: a file is missing, unreadable, unknown or of another shape or type, or a mask has an unknown value.
    """
    files = {file.name: file for file in folder.iterdir() if not file.name.startswith(".")}
    number = 0
    slices: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    while files:
        number += 1
        for name, parts, ndim in (
            (f"{folder.name}_{number}.tif", slices, 3),
            (f"{folder.name}_{number}_mask.tif", masks, 2),
        ):
            if name not in files:
                raise UserError(
                    folder / name,
                    f"no such file, but {min(files)}" if files else "no such file",
                    "two files for each slice, numbered from 1 without gaps",
                    "Extract the archive again.",
                )
            parts.append(_read_slice(files.pop(name), ndim))
            if parts[-1].shape[:2] != slices[0].shape[:2]:
                raise UserError(
                    folder / name,
                    f"the shape {parts[-1].shape}",
                    f"{slices[0].shape[:2]} as in slice 1",
                    "Extract the archive again.",
                )
    if not slices:
        raise UserError(folder, "no file", f"{folder.name}_1.tif, …", "Extract the archive again.")
    stack = np.stack(slices)
    # one by one, so that an unknown value is reported with its file
    labels = [
        relabel(sitk.GetImageFromArray(mask), folder / f"{folder.name}_{number}_mask.tif", {0: 0, 255: 1})
        for number, mask in enumerate(masks, 1)
    ]
    label = np.stack([sitk.GetArrayFromImage(image) for image in labels])
    return {name: stack[..., channel] for name, channel in CHANNELS.items()}, label


def _read_slice(file: Path, ndim: int) -> np.ndarray:
    expected = "8 bits per value and " + ("3 channels" if ndim == 3 else "one channel")
    try:
        pixels = tifffile.imread(file)
    except Exception as error:  # tifffile raises errors of its own and of the decompressor
        raise UserError(
            file, f"an unreadable file ({type(error).__name__}: {error})", expected, "Extract the archive again."
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[2:] not in ((), (3,)):
        raise UserError(file, f"{pixels.dtype} of the shape {pixels.shape}", expected, "Extract the archive again.")
    return pixels


def to_image(volume: np.ndarray) -> sitk.Image:
    """An image with the nominal spacing from an array of the shape (slices, rows, columns)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume))
    image.SetSpacing(NOMINAL_SPACING)
    return image


@reports_user_errors
def main() -> None:
    """Command line of `convert_lgg`."""
    parser = argument_parser("Convert the LGG Segmentation Dataset.", "kaggle_3m")
    parser.add_argument(
        "--modalities",
        nargs="+",
        choices=CHANNELS,
        default=["FLAIR", "T1post"],
        help="two or more (default: FLAIR T1post)",
    )
    run(convert_lgg, parser)


if __name__ == "__main__":
    main()
