"""Medical Segmentation Decathlon, Task05_Prostate: T2 and ADC of the prostate, peripheral and transition zone.

Source: http://medicaldecathlon.com. Licence: CC BY-SA 4.0. Cite Antonelli et al., Nature Communications 13:4128, 2022.

Expected: FOLDER, the extracted Task05_Prostate, with dataset.json, imagesTr/prostate_00.nii.gz of four dimensions, the
last of which is T2, ADC, and labelsTr/prostate_00.nii.gz with the values 1 (peripheral zone) and 2 (transition zone),
which stay as they are; imagesTs/prostate_03.nii.gz has no labels. The two images of a file become two channels, voxel
by voxel. Nothing is registered: between T2 and ADC of a patient some misalignment remains.

    python -m nnunetv2_semicml.dataset_conversion.msd_prostate Task05_Prostate -d 520 \\
        [--unlabeled Task05_Prostate/imagesTs]
"""

from pathlib import Path

from tqdm import tqdm

from nnunetv2_semicml.data.files import read_json
from nnunetv2_semicml.errors import UserError, reports_user_errors

from .common import argument_parser, find_cases, new_dataset, on_grid_of, read_image, relabel, run

CHANNELS = ["T2", "ADC"]
LABELS = {"background": 0, "PZ": 1, "TZ": 2}


def convert_msd_prostate(folder: Path, dataset_id: int, unlabeled_folder: Path | None = None) -> Path:
    """Convert Task05_Prostate.

    Args:
        folder: the extracted Task05_Prostate.
        dataset_id: free id for the new dataset.
        unlabeled_folder: images without labels, e.g. imagesTs.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: this is another task, or something is missing or not as expected. Then nothing has been written.
    """
    _check_task(folder / "dataset.json")
    pattern = r"(?:(?P<image>imagesTr)|labelsTr)/(?P<case>prostate_\d\d)"
    cases = [
        *find_cases(folder, pattern, ["imagesTr"], "imagesTr/prostate_00.nii.gz", ("imagesTr", "labelsTr")).items()
    ]
    if unlabeled_folder:
        pattern = r"(?P<case>(?P<image>prostate)_\d\d)"
        cases += find_cases(unlabeled_folder, pattern, ["prostate"], "prostate_03.nii.gz", labeled=False).items()
    with new_dataset(
        dataset_id, "Prostate", CHANNELS, LABELS, reference="http://medicaldecathlon.com", licence="CC BY-SA 4.0"
    ) as dataset:
        for case, files in tqdm(cases, "Task05_Prostate"):
            label_file = files.pop("label", None)
            (file,) = files.values()
            image = read_image(file, dimension=4)
            if image.GetSize()[3] != len(CHANNELS):
                raise UserError(file, f"{image.GetSize()[3]} images", "two, T2 and ADC", "Get the original file.")
            images = [image[:, :, :, channel] for channel in range(len(CHANNELS))]
            label = None
            if label_file:
                label = relabel(read_image(label_file), label_file, {value: value for value in LABELS.values()})
                label = on_grid_of(label, label_file, images[0], file)
            dataset.add(case, images, label)
    return dataset.folder


def _check_task(file: Path) -> None:
    expected = ({"0": "T2", "1": "ADC"}, {str(value): name for name, value in LABELS.items()})
    try:
        content = read_json(file)
        found = (content["modality"], content["labels"])
        other = "" if found == expected else str(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        other = f"no usable file ({type(error).__name__}: {error})"
    if other:
        raise UserError(file, other, f"modality and labels {expected}", "Give the folder Task05_Prostate.")


@reports_user_errors
def main() -> None:
    """Command line of `convert_msd_prostate`."""
    parser = argument_parser(
        "Convert Task05_Prostate of the Medical Segmentation Decathlon.", "Task05_Prostate", unlabeled_folder="imagesTs"
    )
    run(convert_msd_prostate, parser)


if __name__ == "__main__":
    main()
