"""The console scripts: what they take, what they print, and which function does the work.

nnU-Net and PyTorch take seconds to import. So this module imports nothing but the standard library and what imports no
more than that; the work is imported when the arguments are known to be right.
"""

import argparse
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_semicml import ext_trainers
from nnunetv2_semicml.errors import UserError, reports_user_errors, some_of
from nnunetv2_semicml.evaluation import NOTATION, SCORES
from nnunetv2_semicml.planning import CONFIGURATIONS

_DROP = "--drop_modality"


def number_or_name(text: str) -> int | str:
    """What a command line takes for a dataset: its number, or its name in full."""
    return int(text) if text.isdecimal() else text


def _wrap(text: str) -> str:
    """Break lines where argparse does."""
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2)


def _parser(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser that is called like the program, however that was started, and keeps the line breaks of its epilog."""
    return argparse.ArgumentParser(
        prog=program,
        description=_wrap(description),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def trainers_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_trainers."""
    return _parser(
        "nnUNetv2_semicml_trainers",
        "Print the folder in which nnU-Net finds the trainers of this package, for its variable nnUNet_extTrainer.",
        """example:
  export nnUNet_extTrainer="$(nnUNetv2_semicml_trainers)"
""",
    )


def print_trainers_folder() -> None:
    """Run nnUNetv2_semicml_trainers."""
    trainers_parser().parse_args()
    print(Path(ext_trainers.__file__).parent)


def withhold_labels_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_withhold_labels."""
    parser = _parser(
        "nnUNetv2_semicml_withhold_labels",
        "Turn a fully labeled nnU-Net dataset into a semi-supervised one: a new raw dataset with a labeled "
        "share in imagesTr and labelsTr, the other images without labels in imagesUn, and optionally a test set. On "
        "request, some of the training cases lose a modality. withheld_labels.json there says which.",
        """examples:
  nnUNetv2_semicml_withhold_labels -d 400 --output_id 500 --labeled_fraction 0.1 --test_fraction 0.2
  nnUNetv2_semicml_withhold_labels -d 400 --output_id 520 --num_labeled 10 --groups patients.csv \\
      --drop_modality T2=0.5
""",
    )
    add = parser.add_argument
    add(
        "-d", type=number_or_name, required=True, metavar="SOURCE", help="id or whole name of the fully labeled dataset"
    )
    add("--output_id", type=int, required=True, metavar="ID", help="free id for the new dataset")
    add("--output_name", metavar="NAME", help="name of the new dataset without DatasetXXX_ (default: the source's)")
    labeled = parser.add_mutually_exclusive_group(required=True)
    labeled.add_argument(
        "--labeled_fraction", type=float, metavar="F", help="share of the patients outside the test set; 1: all"
    )
    labeled.add_argument("--num_labeled", type=int, metavar="N", help="number of patients (without --groups: cases)")
    labeled.add_argument(
        "--labeled_cases",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="cases that keep their labels: one a line, a JSON list, or withheld_labels.json of an earlier dataset and "
        "ranking.json of what nnUNetv2_semicml_rank would have outlined next",
    )
    test = parser.add_mutually_exclusive_group()
    test.add_argument("--test_fraction", type=float, metavar="F", help="share of all patients to use as test set")
    test.add_argument(
        "--test_cases", type=Path, metavar="FILE", help="cases of the test set: one a line, or a JSON list"
    )
    table = "CSV file with the columns case and group, or JSON file {case: group}"
    add("--groups", type=Path, metavar="FILE", help=f"{table}: the patient of every case")
    add("--stratify", type=Path, metavar="FILE", help=f"{table}: e.g. the hospital, to be drawn from in proportion")
    add(
        _DROP,
        nargs="+",
        default=[],
        metavar="NAME[,NAME…]=FRACTION",
        help="T2=0.3: of the patients with T2 this share, above 0 and below 1, loses its images, of the labeled and of "
        "the unlabeled ones alike; never in the test set, and never all images of a case: such patients are passed "
        "over for others, for the later modality. NAME: a channel in dataset.json, or its number; several channels "
        "go together and must be whole files",
    )
    add("--seed", type=int, default=0, help="another seed, another draw; a smaller draw is part of a larger one")
    return parser


def _parse_drops(texts: Sequence[str]) -> dict[str, float]:
    drops: dict[str, float] = {}
    for text in texts:
        modality, _, fraction = text.rpartition("=")  # the name of a channel may contain =
        try:
            number = float(fraction)
        except ValueError:
            number = None
        if not modality or number is None:
            raise UserError(_DROP, repr(text), "NAME=FRACTION", "Write e.g. T2=0.3.")
        if modality in drops:
            raise UserError(_DROP, f"{modality} twice", "every channel once", "Remove one.")
        drops[modality] = number
    return drops


@reports_user_errors
def run_withhold_labels() -> None:
    """Run nnUNetv2_semicml_withhold_labels."""
    options = vars(withhold_labels_parser().parse_args())
    options[_DROP[2:]] = _parse_drops(options[_DROP[2:]])
    from nnunetv2_semicml.data.files import read_json
    from nnunetv2_semicml.planning.withhold_labels import withhold_labels

    folder = withhold_labels(options.pop("d"), **options)
    record = read_json(folder / "withheld_labels.json")
    print(f"{folder}: " + ", ".join(f"{len(record[share])} {share}" for share in ("labeled", "unlabeled", "test")))
    for modality, cases in record["dropped"].items():
        counts = (f"{len({*cases} & {*record[share]})} {share}" for share in ("labeled", "unlabeled"))
        print(f"Cases that lost {modality}: {', '.join(counts)}")
    like = "" if record["unlabeled"] else " --plans_of ID_OF_THE_SEMI_SUPERVISED_DATASET"
    print(f"Next: nnUNetv2_semicml_plan_and_preprocess -d {options['output_id']}{like}")


def plan_and_preprocess_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_plan_and_preprocess."""
    parser = _parser(
        "nnUNetv2_semicml_plan_and_preprocess",
        "nnUNetv2_plan_and_preprocess for a dataset with unlabeled cases (imagesUn): makes one nnU-Net "
        "dataset of each of its modalities, all with the same geometry. A case may lack modalities: its files are not "
        "there. Nothing is written to nnUNet_raw.",
        _wrap(
            "To predict with a modality's network, put its channels, renumbered from 0000, into one folder: with "
            "--modalities MR=T1,T2 the files CASE_0000 (T1) and CASE_0001 (T2), and nothing else; then "
            "nnUNetv2_predict -d with the id of that modality's dataset."
        )
        + """

examples:
  nnUNetv2_semicml_plan_and_preprocess -d 500 -c 3d_fullres
  nnUNetv2_semicml_plan_and_preprocess -d 500 -c 2d 3d_fullres -pl nnUNetPlannerResEncM \\
      --modalities MR=T1,T1ce T2
""",
    )
    add = parser.add_argument
    add("-d", type=number_or_name, nargs="+", required=True, metavar="ID", help="ids or names of the datasets")
    add("-c", nargs="+", help=f"configurations (default: {' '.join(CONFIGURATIONS)}; with --keep_plans: those done)")
    add("-pl", default="ExperimentPlanner", help="experiment planner (default: %(default)s)")
    add("-fpe", default="DatasetFingerprintExtractor", help="fingerprint extractor (default: %(default)s)")
    add("-gpu_memory_target", type=float, help="in GB (default: the planner's)")
    add("-preprocessor_name", default="DefaultPreprocessor", help="(default: %(default)s)")
    add("-overwrite_target_spacing", nargs=3, type=float, help="in mm, as for nnU-Net")
    add("-overwrite_plans_name", help="name of the plans (default: the planner's)")
    add(
        "--modalities",
        nargs="+",
        metavar="NAME[=CHANNEL,…]",
        help="T2: that channel by itself; MR=T1,T1ce: a modality of several, by names or numbers (default: every "
        "channel, or every file that holds several)",
    )
    add("--one_modality", action="store_true", help="all channels are one modality, in the dataset's own place")
    add("--modality_ids", nargs="+", type=int, metavar="ID", help="ids of their datasets (default: the next free ids)")
    add(
        "--plans_of",
        type=number_or_name,
        metavar="ID",
        help="take the plans of this dataset, e.g. to train on more labels alike",
    )
    add(
        "--keep_plans",
        action="store_true",
        help="keep plans and modalities of an earlier run; preprocess only cases that are new or have changed, add new "
        "labeled cases to the folds, and copy edited folds of the dataset to those of its modalities",
    )
    add("--no_pp", action="store_true", help="plan only, as for nnU-Net")
    add("-np", type=int, nargs="+", help="processes, one number or one for each configuration")
    add("-npfp", type=int, default=8, help="processes for checks and fingerprint (default: %(default)s)")
    add("--clean", action="store_true", help="extract the fingerprints again, though the cases are the same")
    add("--verify_dataset_integrity", action="store_true", help="run nnU-Net's own check as well")
    add("--verbose", action="store_true", help="print more")
    return parser


@reports_user_errors
def run_plan_and_preprocess() -> None:
    """Run nnUNetv2_semicml_plan_and_preprocess."""
    args = plan_and_preprocess_parser().parse_args()
    if len(args.d) > 1 and args.modality_ids:
        raise UserError(
            "option --modality_ids", f"it beside {len(args.d)} datasets", "one dataset", "Plan each by itself."
        )
    from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess

    for dataset in args.d:
        plan_and_preprocess(
            dataset,
            args.c,
            args.pl,
            args.gpu_memory_target,
            args.preprocessor_name,
            args.overwrite_target_spacing,
            args.overwrite_plans_name,
            args.fpe,
            args.modalities,
            args.modality_ids,
            args.one_modality,
            args.plans_of,
            args.keep_plans,
            not args.no_pp,
            args.np,
            args.npfp,
            args.clean,
            args.verify_dataset_integrity,
            args.verbose,
        )


def leaderboard_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_leaderboard."""
    parser = _parser(
        "nnUNetv2_semicml_leaderboard",
        "Train what is missing, predict the test scans (imagesTs) of every modality alone, evaluate them "
        "against labelsTs, and write leaderboard.csv, .md and .html. Repeat the command to go on.",
        f"""methods: {NOTATION}
  nnUNetTrainerSemiCML        trained once on dataset -d, predicts every modality
  each:nnUNetTrainer          trained on the dataset of every modality by itself
  all:nnUNetTrainer           stock nnU-Net on all channels of dataset -d at once; no labeled case may lack one
  each:nnUNetTrainer@600      trained on the modality datasets of dataset 600, e.g. the same patients, all labeled
  "Upper bound=each:nnUNetTrainer@600"     the same with a name for the tables
  PReL=nnUNetTrainerSemiCML+nnUNetTrainerSemiCMLPReL
                              a second stage after the first one that it goes on from, which is trained if need be,
                              and compared if it is listed by itself, too
Methods are independent of each other, but for the first stages that they have in common. If -d is one modality, all of
these train on it. Test cases that lack a modality are left out of its results.

examples:
  nnUNetv2_semicml_leaderboard -d 500 -c 2d -f 0 --methods each:nnUNetTrainer nnUNetTrainerSemiCML
  nnUNetv2_semicml_leaderboard -d 500 -c 3d_fullres --reference "Supervised only" \\
      --methods "Supervised only=each:nnUNetTrainer" PReL=nnUNetTrainerSemiCML+nnUNetTrainerSemiCMLPReL
""",
    )
    add = parser.add_argument
    add(
        "-d",
        type=number_or_name,
        required=True,
        metavar="ID",
        help="id or name of the dataset, planned and preprocessed",
    )
    add("-c", required=True, metavar="CONFIGURATION", help="e.g. 2d, 3d_fullres")
    add("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="folds (default: 0 1 2 3 4), or all")
    add("--methods", nargs="+", required=True, metavar="METHOD", help="see below")
    add("--reference", metavar="NAME", help="the method that the others are compared with (default: the first)")
    add(
        "--external",
        nargs="+",
        default=[],
        metavar="NAME=MODALITY=FOLDER",
        help="predictions of other people's models, files named like the test cases",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="train everything once per seed, below the output folder; only this package's trainers are seeded, those "
        "of nnU-Net differ by chance (default: one run, in nnUNet_results)",
    )
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    add("-o", type=Path, metavar="FOLDER", help="output folder (default: nnUNet_results/leaderboards/…)")
    add("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="(default: %(default)s)")
    add("--train_options", default="", metavar="OPTIONS", help='of nnUNetv2_train: --train_options="-num_gpus 2"')
    add(
        "--predict_options",
        default="",
        metavar="OPTIONS",
        help='of nnUNetv2_predict: --predict_options="--disable_tta -npp 1"',
    )
    add("--executor", default="local", choices=["local", "slurm"], help="(default: %(default)s)")
    add("--jobs", type=int, metavar="N", help="jobs at a time (default: locally one for each GPU, on SLURM all)")
    add(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of submitit, e.g. timeout_min=2880 slurm_partition=gpu gpus_per_node=1 cpus_per_task=12",
    )
    add(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="leaderboard.csv of datasets with other labeled shares, for curves",
    )
    add("--note", default="", metavar="TEXT", help="what readers of the tables should know first")
    return parser


@reports_user_errors
def run_leaderboard() -> None:
    """Run nnUNetv2_semicml_leaderboard."""
    parser = leaderboard_parser()
    args = parser.parse_args()
    from nnunetv2_semicml.evaluation.leaderboard import leaderboard

    page = leaderboard(args, shlex.join([parser.prog, *sys.argv[1:]]))
    print(f"Leaderboard: {page}")


def _add_networks(parser: argparse.ArgumentParser, folds: str) -> None:
    """Options that name trained networks, and how they predict."""
    add = parser.add_argument
    add("-d", type=number_or_name, required=True, metavar="ID", help="id or name of the dataset that was trained on")
    add("-c", required=True, metavar="CONFIGURATION", help="e.g. 2d, 3d_fullres")
    add("-tr", required=True, metavar="TRAINER", help="whose networks predict, e.g. nnUNetTrainerSemiCMLPlus")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    add("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help=folds)
    add("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="(default: %(default)s)")
    add("--disable_tta", action="store_true", help="predict without mirrored copies, as of nnUNetv2_predict")
    add(
        "-np",
        type=int,
        default=3,
        metavar="N",
        help="cases that are preprocessed, and others that are measured, while one is predicted; more need more memory "
        "(default: %(default)s)",
    )


def rank_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_rank."""
    parser = _parser(
        "nnUNetv2_semicml_rank",
        "Predict the unlabeled cases (imagesUn) with the networks of every modality and rank them by how "
        "little these know of them: entropy, and disagreement between folds and between modalities. Writes ranking.csv "
        "and .html, ranking.json with the cases to outline next, and the predictions, to begin with. Repeat the "
        "command to go on.",
        _wrap(
            "To go on with the new labels: move the images of these cases from imagesUn to imagesTr, put their labels "
            "into labelsTr, raise numTraining in dataset.json, and run nnUNetv2_semicml_plan_and_preprocess -d 500 "
            "--keep_plans."
        )
        + """

example:
  nnUNetv2_semicml_rank -d 500 -c 3d_fullres -tr nnUNetTrainerSemiCMLPlus --number 5
""",
    )
    add = parser.add_argument
    _add_networks(parser, "folds (default: 0 1 2 3 4), or all")
    add("-o", type=Path, metavar="FOLDER", help="output folder (default: nnUNet_results/rankings/…)")
    add("--number", type=int, default=5, metavar="N", help="cases to choose (default: %(default)s)")
    add("--score", default="mean", choices=SCORES, help="what counts (default: %(default)s of all measures)")
    add(
        "--pool",
        type=float,
        default=3.0,
        metavar="X",
        help="choose N cases that are not alike from the X · N with the highest scores; 1: by score alone "
        "(default: %(default)s)",
    )
    return parser


@reports_user_errors
def run_rank() -> None:
    """Run nnUNetv2_semicml_rank."""
    parser = rank_parser()
    args = parser.parse_args()
    from nnunetv2_semicml.data.files import read_json
    from nnunetv2_semicml.evaluation.ranking import rank

    page = rank(args, shlex.join([parser.prog, *sys.argv[1:]]))
    chosen = read_json(page.with_suffix(".json"))["label_next"]
    print(f"Ranking: {page}\nTo outline next: {some_of(chosen)}")


def expected_dice_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_expected_dice."""
    parser = _parser(
        "nnUNetv2_semicml_expected_dice",
        "Predict scans with the networks of every modality, and say how good the predictions probably are: "
        "the Dice that their entropy, their volume and the agreement between modalities stand for on the validation "
        "cases of the folds, with an interval. Writes expected_dice.csv and .json, and the predictions. Repeat the "
        "command to go on. Prediction itself needs none of this: nnUNetv2_predict.",
        _wrap(
            "The scans are named as in imagesTs of the dataset; a case may lack modalities. What is expected is the "
            "mean over the classes, and of scans that are like those of the training: no other hospital, no other "
            "disease."
        )
        + """

example:
  nnUNetv2_semicml_expected_dice -d 500 -c 3d_fullres -tr nnUNetTrainerSemiCMLPlus -i tonight -o tonight_checked
""",
    )
    add = parser.add_argument
    _add_networks(parser, "folds (default: 0 1 2 3 4)")
    add("-i", type=Path, required=True, metavar="FOLDER", help="the scans")
    add("-o", type=Path, required=True, metavar="FOLDER", help="output folder")
    add("--confidence", type=float, default=0.9, metavar="C", help="of the interval (default: %(default)s)")
    add("--flag_below", type=float, default=0.7, metavar="DICE", help="flag what is expected below (default: 0.7)")
    return parser


@reports_user_errors
def run_expected_dice() -> None:
    """Run nnUNetv2_semicml_expected_dice."""
    parser = expected_dice_parser()
    args = parser.parse_args()
    import pandas as pd

    from nnunetv2_semicml.evaluation.expected_dice import expected_dice

    file = expected_dice(args, shlex.join([parser.prog, *sys.argv[1:]]))
    table = pd.read_csv(file, dtype={"case": str, "modality": str}, keep_default_na=False)
    flagged = [f"{row['case']} ({row['modality']})" for row in table[table["flagged"]].to_dict("records")]
    print(f"{file}\nFlagged: {some_of(flagged) or 'none'}")


def demo_parser() -> argparse.ArgumentParser:
    """Options of nnUNetv2_semicml_demo."""
    parser = _parser(
        "nnUNetv2_semicml_demo",
        "The whole journey on synthetic patients, in minutes, without GPU and without data.",
        """examples:
  nnUNetv2_semicml_demo
  nnUNetv2_semicml_demo --out /scratch/demo --device cuda
""",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the patients and trainings (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    return parser


@reports_user_errors
def run_demo() -> None:
    """Run nnUNetv2_semicml_demo."""
    args = demo_parser().parse_args()
    from nnunetv2_semicml.data.files import explains_failed_writes
    from nnunetv2_semicml.demo.run import Demo

    with explains_failed_writes(args.out, "Make room, or choose another folder with --out."):
        report = Demo(args.out, args.device, args.seed).run()
    print(f"Report: {report}")


# in the order in which a user needs them
PARSERS = (
    trainers_parser,
    withhold_labels_parser,
    plan_and_preprocess_parser,
    leaderboard_parser,
    rank_parser,
    expected_dice_parser,
    demo_parser,
)
