"""HECKTOR 2020, 2021 and 2022: head and neck tumours in CT and FDG-PET (SUV).

Source: registration at https://www.aicrowd.com/challenges/miccai-2020-hecktor, …/miccai-2021-hecktor and
https://hecktor.grand-challenge.org (2022). Terms: the end user agreement that is signed there. Cite
Oreiller et al., Med. Image Anal. 77:102336, 2022; Andrearczyk et al., LNCS 12603 (2020), 13209 (2021), 13626 (2022).

Expected:
    2020    FOLDER/CHUM001/CHUM001_{ct,pt,ct_gtvt}.nii.gz, FOLDER = hecktor_nii
    2021    FOLDER/CHUM001_{ct,pt,gtvt}.nii.gz, FOLDER = hecktor_nii
    2022    FOLDER/imagesTr/CHUM-001__{CT,PT}.nii.gz and FOLDER/labelsTr/CHUM-001.nii.gz
and, of 2020 and 2021, the organizers' bounding boxes: CSV files with the columns PatientID, x1, x2, y1, y2, z1, z2, mm.
The common grid is that of the CT, on which the labels were drawn, so that CT and label are cropped to whole voxels and
otherwise stay as they are: to the bounding box; in 2022, for which there is none, to the field of view of the PET. The
PET is resampled to that grid by linear interpolation: unlike splines, it neither turns an SUV negative nor rings around
a hot spot, and the CT's voxels are smaller than those of the PET. Outside its field of view the PET becomes 0.
Labels: primary tumour 1 (GTVt, from 2022 on GTVp); of 2022 also lymph nodes 2 (GTVn).
The center of every case, e.g. CHUM, stands in strata.csv, for withhold_labels --stratify.

    python -m nnunetv2_semicml.dataset_conversion.hecktor hecktor_nii -d 530 --year 2021 \\
        --bounding_boxes hecktor2021_bbox_training.csv [hecktor2021_bbox_testing.csv] [--unlabeled hecktor_nii_test]
    python -m nnunetv2_semicml.dataset_conversion.hecktor hecktor2022_training -d 531 --year 2022 \\
        [--unlabeled hecktor2022_testing/imagesTs]
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_semicml.data.grid import Grid
from nnunetv2_semicml.errors import UserError, reports_user_errors

from .common import (
    argument_parser,
    find_cases,
    new_dataset,
    on_grid_of,
    read_image,
    relabel,
    run,
)


@dataclass(frozen=True)
class Edition:
    """What differs between the years.

    Attributes:
        source: where the data come from.
        pattern: as `find_cases` wants it.
        example: a path that fits it.
        images: CT and PET in file names.
        subfolders: where the labeled cases are.
        labels: of dataset.json.
        has_boxes: whether bounding boxes were provided.
    """

    source: str
    pattern: str
    example: str
    images: tuple[str, str]
    subfolders: tuple[str, ...]
    labels: dict[str, int]
    has_boxes: bool


EDITIONS = {
    2020: Edition(
        "https://www.aicrowd.com/challenges/miccai-2020-hecktor",
        r"(?:.*/)?(?P<case>[A-Z]{4}\d{3})_(?:(?P<image>ct|pt)|ct_gtvt)",
        "CHUM001/CHUM001_ct_gtvt.nii.gz",
        ("ct", "pt"),
        (".",),
        {"background": 0, "GTVt": 1},
        True,
    ),
    2021: Edition(
        "https://www.aicrowd.com/challenges/miccai-2021-hecktor",
        r"(?:.*/)?(?P<case>[A-Z]{4}\d{3})_(?:(?P<image>ct|pt)|gtvt)",
        "CHUM001_gtvt.nii.gz",
        ("ct", "pt"),
        (".",),
        {"background": 0, "GTVt": 1},
        True,
    ),
    2022: Edition(
        "https://hecktor.grand-challenge.org",
        r"(?:.*/)?(?P<case>[A-Z]{3,4}-\d{3})(?:__(?P<image>CT|PT))?",
        "CHUM-001__CT.nii.gz",
        ("CT", "PT"),
        ("imagesTr", "labelsTr"),
        {"background": 0, "GTVp": 1, "GTVn": 2},
        False,
    ),
}


def convert_hecktor(
    folder: Path,
    dataset_id: int,
    year: int,
    bounding_boxes: Sequence[Path] = (),
    unlabeled_folder: Path | None = None,
) -> Path:
    """Convert HECKTOR.

    Args:
        folder: the training data.
        dataset_id: free id for the new dataset.
        year: 2020, 2021 or 2022.
        bounding_boxes: the organizers' files for all cases, of 2020 and 2021.
        unlabeled_folder: images without labels, e.g. the test data.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: something is missing, twice or not as expected. Then nothing has been written.
    """
    edition = EDITIONS[year]
    if bool(bounding_boxes) != edition.has_boxes:
        raise UserError(
            "--bounding_boxes",
            "none" if edition.has_boxes else f"{bounding_boxes[0]}",
            f"{'the' if edition.has_boxes else 'no'} bounding boxes of the organizers in {year}",
            "Give their files, e.g. hecktor2021_bbox_training.csv." if edition.has_boxes else "Leave the option out.",
        )
    find = edition.pattern, edition.images, edition.example
    cases = [*find_cases(folder, *find, edition.subfolders).items()]
    if unlabeled_folder:
        cases += find_cases(unlabeled_folder, *find, labeled=False).items()
    boxes = read_bounding_boxes(bounding_boxes)
    ct, pet = edition.images
    if edition.has_boxes and (missing := [case for case, _ in cases if case not in boxes]):
        raise UserError(
            ", ".join(map(str, bounding_boxes)), f"no box of {missing[0]}", "one for every case", "Add the other files."
        )
    with new_dataset(
        dataset_id,
        f"HECKTOR{year}",
        ["CT", "PET"],  # nnU-Net normalizes channels of the name CT by Hounsfield units
        edition.labels,
        reference=edition.source,
        licence="the end user agreement of the challenge",
    ) as dataset:
        for case, files in tqdm(cases, f"HECKTOR {year}"):
            images, label = read_on_grid_of_ct(
                files[ct],
                files[pet],
                files.get("label"),
                {value: value for value in edition.labels.values()},
                boxes.get(case),
            )
            dataset.add(case, images, label, group=case.rstrip("-0123456789"))
    return dataset.folder


def read_bounding_boxes(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Case -> box, shape (2, 3): the lower and the upper corner in physical coordinates, mm."""
    boxes = {}
    for file in files:
        try:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                rows = list(csv.DictReader(stream))
            for row in rows:
                box = np.array([[float(row[f"{axis}{end}"]) for axis in "xyz"] for end in (1, 2)])
                if not (box[0] < box[1]).all() or row["PatientID"] in boxes:
                    raise ValueError(f"an empty or second box of {row['PatientID']}")
                boxes[row["PatientID"]] = box
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                file,
                f"no usable table ({type(error).__name__}: {error})",
                "the columns PatientID, x1, x2, y1, y2, z1, z2 and one line for each case",
                "Give the file of the organizers.",
            ) from error
    return boxes


def read_on_grid_of_ct(
    ct_file: Path, pet_file: Path, label_file: Path | None, values: dict[int, int], box: np.ndarray | None
) -> tuple[list[sitk.Image], sitk.Image | None]:
    """CT, PET and label of a case on the grid of the CT, cropped to a box or, without one, to what the PET shows.

    Args:
        ct_file: 3D image in Hounsfield units.
        pet_file: 3D image on any grid.
        label_file: on the grid of the CT; None: unlabeled.
        values: as for `relabel`.
        box: shape (2, 3), mm.

    Raises:
        UserError: a file is not as expected; box, CT and PET do not overlap; or the crop would cut the label.
    """
    ct, pet = read_image(ct_file), read_image(pet_file)
    corners = Grid.of_image(pet).corners()
    field_of_view = np.array([corners.min(axis=0), corners.max(axis=0)])
    region = voxels_in(field_of_view if box is None else box, ct, ct_file)
    cropped = ct[region]
    voxels_in(field_of_view, cropped, pet_file)
    pet = sitk.Resample(pet, cropped, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    if label_file is None:
        return [cropped, pet], None
    label = on_grid_of(relabel(read_image(label_file), label_file, values), label_file, ct, ct_file)
    inside, total = (np.count_nonzero(sitk.GetArrayViewFromImage(image)) for image in (label[region], label))
    if inside < total:
        limit = "field of view of the PET" if box is None else "bounding box"
        raise UserError(
            label_file,
            f"{total - inside} of {total} labeled voxels outside the {limit}",
            "all of them inside",
            "Remove the case, or correct the box.",
        )
    return [cropped, pet], label[region]


def voxels_in(box: np.ndarray, image: sitk.Image, file: Path) -> tuple[slice, slice, slice]:
    """The voxels of an image whose centers lie in a box, shape (2, 3), mm; `file` is to blame if there are none."""
    indices = np.array([image.TransformPhysicalPointToContinuousIndex(point) for point in product(*box.T)])
    # headers are rounded: a voxel whose center lies on the face of the box is inside
    first = np.maximum(np.ceil(indices.min(axis=0) - 1e-4).astype(int), 0)
    last = np.minimum(np.floor(indices.max(axis=0) + 1e-4).astype(int), np.array(image.GetSize()) - 1)
    if (first > last).any():
        raise UserError(
            file,
            f"no overlap with {np.round(box, 1).tolist()} mm",
            "CT, PET and bounding box of one patient in one place",
            "Get the original files, or remove the case.",
        )
    x, y, z = (slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))
    return x, y, z


@reports_user_errors
def main() -> None:
    """Command line of `convert_hecktor`."""
    parser = argument_parser(
        "Convert HECKTOR 2020, 2021 or 2022.", "the training data", unlabeled_folder="the test data"
    )
    parser.add_argument("--year", type=int, choices=EDITIONS, required=True)
    parser.add_argument(
        "--bounding_boxes", nargs="+", type=Path, default=[], metavar="FILE", help="of all cases; 2020 and 2021"
    )
    run(convert_hecktor, parser)


if __name__ == "__main__":
    main()
