"""BraTS 2019, 2020 and 2021: glioma in T1, T1ce, T2 and FLAIR, skull-stripped, 240 × 240 × 155 voxels of 1 mm.

Source: registration at https://www.med.upenn.edu/cbica/brats2019 and brats2020 (2019, 2020), and at
https://www.synapse.org/#!Synapse:syn25829067 (2021).
Terms: those accepted at registration; they ask to cite
Menze et al., IEEE TMI 34(10):1993-2024, 2015; Bakas et al., Scientific Data 4:170117, 2017; Bakas et al.,
arXiv:1811.02629, 2018; for 2021 Baid et al., arXiv:2107.02314, 2021.

Expected, as .nii or .nii.gz, at any depth below FOLDER:
    2019    HGG|LGG/BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_{t1,t1ce,t2,flair,seg}
    2020    BraTS20_Training_001/BraTS20_Training_001_{…}; the label of case 355 is called W39_1998.09.19_Segm
    2021    BraTS2021_00000/BraTS2021_00000_{…}
The four contrasts become channels, or those that --modalities names. In plan_and_preprocess every channel is a modality
by itself, unless its own option --modalities chooses or joins channels: MR=T1,T1ce T2.
The images are copied voxel by voxel. The labels of the files, 1 (necrotic and non-enhancing core), 2 (edema) and 4
(enhancing tumour), become consecutive, as nnU-Net wants them:
    --labels        1   2   4
    whole_tumour    1   1   1   one label: all that is not background
    classes         2   1   3   edema 1, necrotic core 2, enhancing tumour 3
    regions         2   1   3   nested: whole tumour (1, 2, 3), tumour core (2, 3), enhancing tumour (3), which is how
                                the challenge evaluates and nnU-Net trained for it
The grade of the cases of 2019 (HGG or LGG) stands in strata.csv, for withhold_labels --stratify.

    python -m nnunetv2_semicml.dataset_conversion.brats MICCAI_BraTS2020_TrainingData -d 500 --year 2020 \\
        [--modalities T1ce T2] [--labels whole_tumour] [--unlabeled MICCAI_BraTS2020_ValidationData]
"""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnunetv2_semicml.errors import reports_user_errors

from .common import Labels, argument_parser, check_modalities, find_cases, new_dataset, read_case, run

MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
# year -> pattern of the cases, one of them
CASES = {
    2019: (r"BraTS19_\w+", "BraTS19_CBICA_AAB_1"),
    2020: (r"BraTS20_(?:Training|Validation)_\d{3}", "BraTS20_Training_001"),
    2021: (r"BraTS2021_\d{5}", "BraTS2021_00000"),
}
SOURCES = {
    2019: "https://www.med.upenn.edu/cbica/brats2019",
    2020: "https://www.med.upenn.edu/cbica/brats2020",
    2021: "https://www.synapse.org/#!Synapse:syn25829067",
}
# the label that was published under the name it had in the hospital
MISNAMED_LABEL = r"(?<=BraTS20_Training_355/)W39_1998\.09\.19_Segm"

_CONSECUTIVE = {0: 0, 2: 1, 1: 2, 4: 3}
# --labels -> labels of dataset.json, value in the file -> value in the dataset, regions_class_order
LABELS: dict[str, tuple[Labels, dict[int, int], tuple[int, ...] | None]] = {
    "whole_tumour": ({"background": 0, "whole_tumour": 1}, {0: 0, 1: 1, 2: 1, 4: 1}, None),
    "classes": ({"background": 0, "edema": 1, "necrotic_core": 2, "enhancing_tumour": 3}, _CONSECUTIVE, None),
    "regions": (
        {"background": 0, "whole_tumour": (1, 2, 3), "tumour_core": (2, 3), "enhancing_tumour": (3,)},
        _CONSECUTIVE,
        (1, 2, 3),
    ),
}


def convert_brats(
    folder: Path,
    dataset_id: int,
    year: int,
    modalities: Sequence[str] = MODALITIES,
    labels: str = "whole_tumour",
    unlabeled_folder: Path | None = None,
) -> Path:
    """Convert BraTS.

    Args:
        folder: the training data.
        dataset_id: free id for the new dataset.
        year: 2019, 2020 or 2021.
        modalities: two or more of MODALITIES, in channel order.
        labels: a key of LABELS.
        unlabeled_folder: images without labels, e.g. the validation data, in the same layout.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: something is missing, twice or not as expected. Then nothing has been written.
    """
    check_modalities(modalities, MODALITIES)
    names, values, regions_class_order = LABELS[labels]
    images = [modality.lower() for modality in modalities]
    cases = [*_find_cases(folder, year, images).items()]
    if unlabeled_folder:
        cases += _find_cases(unlabeled_folder, year, images, labeled=False).items()
    with new_dataset(
        dataset_id,
        f"BraTS{year}",
        modalities,
        names,
        reference=SOURCES[year],
        licence="the terms accepted at registration",
        regions_class_order=regions_class_order,
    ) as dataset:
        for case, files in tqdm(cases, f"BraTS {year}"):
            grade = files[images[0]].parent.parent.name
            dataset.add(case, *read_case(files, images, values), group=grade if grade in ("HGG", "LGG") else None)
    return dataset.folder


def _find_cases(folder: Path, year: int, images: Sequence[str], labeled: bool = True) -> dict[str, dict[str, Path]]:
    cases, example = CASES[year]
    pattern = rf"(?:.*/)?(?P<case>{cases})/(?:(?P=case)_(?:(?P<image>t1|t1ce|t2|flair)|seg)|{MISNAMED_LABEL})"
    return find_cases(folder, pattern, images, f"{example}/{example}_t1.nii.gz", labeled=labeled)


@reports_user_errors
def main() -> None:
    """Command line of `convert_brats`."""
    parser = argument_parser(
        "Convert BraTS 2019, 2020 or 2021.", "the training data", unlabeled_folder="the validation data"
    )
    parser.add_argument("--year", type=int, choices=CASES, required=True)
    parser.add_argument(
        "--modalities",
        nargs="+",
        choices=MODALITIES,
        default=[*MODALITIES],
        help="channels of the dataset, two or more (default: all four; plan_and_preprocess can still choose or join "
        "them, e.g. with --modalities MR=T1,T1ce T2)",
    )
    parser.add_argument("--labels", choices=LABELS, default="whole_tumour", help="default: whole_tumour")
    run(convert_brats, parser)


if __name__ == "__main__":
    main()
