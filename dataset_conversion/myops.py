"""MyoPS 2020: myocardial infarction in cardiac MR: bSSFP (C0), LGE (DE) and T2, aligned by the organizers.

Source: registration at https://zmiclab.github.io/zxh/0/myops20. Terms: those accepted there; they ask to cite
Zhuang, IEEE TPAMI 41(12):2933-2946, 2019, and Qiu et al., Med. Image Anal. 84:102694, 2023.

Expected:
    FOLDER/train25/myops_training_101_{C0,DE,T2}.nii.gz
    FOLDER/train25_myops_gd/myops_training_101_gd.nii.gz
    test20/myops_test_201_{C0,DE,T2}.nii.gz     (some copies: myops_training_201_…); its labels are not public
The images, which must lie on one grid, are copied voxel by voxel; plan_and_preprocess --modalities chooses two of them.
Labels: left ventricular blood pool 500 -> 1, right ventricular blood pool 600 -> 2, normal myocardium 200 -> 3,
edema 1220 -> 4, scar 2221 -> 5. Slices are 12 to 23 mm apart: the 2d configuration is the natural one.

    python -m nnunetv2_semicml.dataset_conversion.myops "MyoPS 2020 Dataset" -d 510 \\
        [--unlabeled "MyoPS 2020 Dataset/test20"]
"""

from pathlib import Path

from tqdm import tqdm

from nnunetv2_semicml.errors import reports_user_errors

from .common import argument_parser, find_cases, new_dataset, read_case, run

CHANNELS = {"C0": "bSSFP", "DE": "LGE", "T2": "T2"}
LABELS = {
    "background": 0,
    "left_ventricular_blood_pool": 1,
    "right_ventricular_blood_pool": 2,
    "normal_myocardium": 3,
    "edema": 4,
    "scar": 5,
}
VALUES = {0: 0, 500: 1, 600: 2, 200: 3, 1220: 4, 2221: 5}


def convert_myops(folder: Path, dataset_id: int, unlabeled_folder: Path | None = None) -> Path:
    """Convert MyoPS 2020.

    Args:
        folder: the folder with train25 and train25_myops_gd.
        dataset_id: free id for the new dataset.
        unlabeled_folder: images without labels, e.g. test20.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: something is missing, twice or not as expected. Then nothing has been written.
    """
    pattern = r"(?:.*/)?(?P<case>myops_(?:training|test)_\d{3})_(?:(?P<image>C0|DE|T2)|gd)"
    example = "myops_training_101_C0.nii.gz"
    images = list(CHANNELS)
    cases = [*find_cases(folder, pattern, images, example, ("train25", "train25_myops_gd")).items()]
    if unlabeled_folder:
        cases += find_cases(unlabeled_folder, pattern, images, example, labeled=False).items()
    with new_dataset(
        dataset_id,
        "MyoPS2020",
        list(CHANNELS.values()),
        LABELS,
        reference="https://zmiclab.github.io/zxh/0/myops20",
        licence="the terms accepted at registration",
    ) as dataset:
        for case, files in tqdm(cases, "MyoPS 2020"):
            dataset.add(case, *read_case(files, images, VALUES))
    return dataset.folder


@reports_user_errors
def main() -> None:
    """Command line of `convert_myops`."""
    parser = argument_parser(
        "Convert MyoPS 2020.", "the folder with train25 and train25_myops_gd", unlabeled_folder="test20"
    )
    run(convert_myops, parser)


if __name__ == "__main__":
    main()
