"""CHAOS, MR: four abdominal organs in T1-DUAL, in phase and out of phase, of healthy people.

Source: https://chaos.grand-challenge.org and https://doi.org/10.5281/zenodo.3431873, where the licence stands. Cite
Kavur et al., Med. Image Anal. 69:101950, 2021.

Expected, FOLDER being Train_Sets/MR or Test_Sets/MR:
    FOLDER/1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00002.dcm     one file per slice; all slices have UIDs of little use
    FOLDER/1/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00001.dcm
    FOLDER/1/T1DUAL/Ground/IMG-0004-00002.png                 one per slice, for both phases; not in Test_Sets
The two phases come from one acquisition: they must lie on one grid, and nothing is resampled. Other sequences (T2SPIR)
are passed over.
Slices: the organizers go by file names, so that the n-th label belongs to the n-th slice in the order of names, row by
row. That order often runs from head to feet, against the order in space in which ITK wants them; labels are therefore
turned over together with their slices.
Labels: gray values 55 to 70 (nominally 63) liver 1, 110 to 135 (126) right kidney 2, 175 to 200 (189) left kidney 3,
240 to 255 (252) spleen 4, the ranges that the organizers give; 0 is background, and nothing else may occur.

    python -m nnunetv2_semicml.dataset_conversion.chaos Train_Sets/MR -d 540 [--unlabeled Test_Sets/MR]
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_semicml.data.grid import GRID_TOLERANCE
from nnunetv2_semicml.errors import UserError, reports_user_errors

from .common import argument_parser, new_dataset, on_grid_of, relabel, run

PHASES = ("InPhase", "OutPhase")
LABELS = {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
GRAY_VALUES = {"liver": (55, 70), "right_kidney": (110, 135), "left_kidney": (175, 200), "spleen": (240, 255)}
VALUES = {0: 0} | {
    gray: LABELS[organ] for organ, (first, last) in GRAY_VALUES.items() for gray in range(first, last + 1)
}


def convert_chaos(folder: Path, dataset_id: int, unlabeled_folder: Path | None = None) -> Path:
    """Convert the T1-DUAL images of CHAOS.

    Args:
        folder: Train_Sets/MR.
        dataset_id: free id for the new dataset.
        unlabeled_folder: patients without labels in the same layout, e.g. Test_Sets/MR.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: something is missing, twice or not as expected. Then nothing has been written.
    """
    patients = find_patients(folder)
    if unlabeled_folder:
        patients += find_patients(unlabeled_folder, labeled=False)
    with new_dataset(
        dataset_id,
        "CHAOS",
        ["T1_in_phase", "T1_out_of_phase"],
        LABELS,
        reference="https://doi.org/10.5281/zenodo.3431873",
        licence="see https://doi.org/10.5281/zenodo.3431873",
    ) as dataset:
        for patient in tqdm(patients, "CHAOS"):
            dataset.add(f"CHAOS_{int(patient.name):02d}", *read_patient(patient / "T1DUAL"))
    return dataset.folder


def find_patients(folder: Path, labeled: bool = True) -> list[Path]:
    """The folders of the patients, which all have both phases and, if `labeled`, labels; otherwise none."""
    patients = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    for patient in patients:
        if not patient.name.isdecimal():
            raise UserError(patient, "a folder that CHAOS does not have", "one for each number", "Give the folder MR.")
    if not patients:
        raise UserError(folder, "no folder of a patient", "e.g. 1/T1DUAL", "Give the folder Train_Sets/MR.")
    for patient in patients:
        ground = patient / "T1DUAL" / "Ground"
        needed = [patient / "T1DUAL" / "DICOM_anon" / phase for phase in PHASES] + [ground] * labeled
        for path in needed:
            if not path.is_dir():
                raise UserError(
                    path, "no such folder", "both phases and Ground of every patient", "Add it, or remove the patient."
                )
        if not labeled and ground.exists():
            raise UserError(
                ground,
                "labels",
                "images only in the folder of unlabeled patients",
                "Convert these patients as labeled ones and withhold labels with nnUNetv2_semicml_withhold_labels.",
            )
    return patients


def read_patient(folder: Path) -> tuple[list[sitk.Image], sitk.Image | None]:
    """In-phase and out-of-phase image and the label, which is None if there is no folder Ground."""
    in_phase, order = read_series(folder / "DICOM_anon" / "InPhase")
    out_phase, _ = read_series(folder / "DICOM_anon" / "OutPhase")
    out_phase = on_grid_of(out_phase, folder / "DICOM_anon" / "OutPhase", in_phase, folder / "DICOM_anon" / "InPhase")
    ground = folder / "Ground"
    return [in_phase, out_phase], read_label(ground, in_phase, order) if ground.is_dir() else None


def read_series(folder: Path) -> tuple[sitk.Image, Sequence[int]]:
    """An image made of all DICOM files in a folder, whatever UID they have.

    Returns:
        The image, and the place in the order of file names of each of its slices, from bottom to top.

    Raises:
        UserError: files are missing, unreadable or not parallel slices at equal distances.
    """
    files = sorted(file for file in folder.glob("*.dcm") if not file.name.startswith("."))
    if len(files) < 2:
        raise UserError(folder, f"{len(files)} DICOM files", "one for each slice", "Extract the archive again.")
    positions, frames = [], set()
    for file in files:
        header = sitk.ImageFileReader()
        header.SetFileName(str(file))
        try:
            header.ReadImageInformation()
        except RuntimeError as error:
            raise UserError(
                file, f"an unreadable file ({error})", "a DICOM image", "Extract the archive again."
            ) from error
        direction = np.reshape(header.GetDirection(), (3, 3))
        positions.append(np.dot(header.GetOrigin(), direction[:, 2]))
        frames.add((header.GetSize(), header.GetSpacing()[:2], tuple(direction.ravel().round(4))))
    order = np.argsort(positions)
    gaps = np.diff(np.sort(positions))
    if len(frames) > 1 or gaps.min() <= 0 or gaps.min() < (1 - GRID_TOLERANCE) * gaps.max():
        raise UserError(
            folder,
            f"slices of {len(frames)} sizes and orientations, {gaps.min():g} to {gaps.max():g} mm apart",
            "parallel slices of one size at equal distances",
            "Extract the archive again; every slice must be there once.",
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(files[i]) for i in order])
    return reader.Execute(), order.tolist()


def read_label(folder: Path, image: sitk.Image, order: Sequence[int]) -> sitk.Image:
    """The label of an image whose slices have these places in the order of file names."""
    files = sorted(file for file in folder.glob("*.png") if not file.name.startswith("."))
    if len(files) != len(order):
        raise UserError(
            folder,
            f"{len(files)} PNG files",
            f"one for each of the {len(order)} slices of InPhase",
            "Extract the archive again.",
        )
    slices = []
    for file in (files[i] for i in order):
        try:
            gray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        except RuntimeError as error:
            raise UserError(
                file, f"an unreadable file ({error})", "a PNG image", "Extract the archive again."
            ) from error
        if gray.shape != image.GetSize()[1::-1]:
            raise UserError(
                file, f"the shape {gray.shape}", f"{image.GetSize()[1::-1]} as in InPhase", "Extract the archive again."
            )
        # one by one, so that an unknown gray value is reported with its file
        slices.append(relabel(sitk.GetImageFromArray(gray), file, VALUES))
    label = sitk.JoinSeries(slices)
    label.CopyInformation(image)
    return label


@reports_user_errors
def main() -> None:
    """Command line of `convert_chaos`."""
    parser = argument_parser("Convert the T1-DUAL images of CHAOS.", "Train_Sets/MR", unlabeled_folder="Test_Sets/MR")
    run(convert_chaos, parser)


if __name__ == "__main__":
    main()
