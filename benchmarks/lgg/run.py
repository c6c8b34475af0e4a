"""Supervised-only nnU-Net → Semi-CML → PReL on real FLAIR + T1 scans, 10 % labeled, through the command lines.

    python benchmarks/lgg/run.py --data FOLDER_OF_Dataset700_LGG --work SCRATCH --seed 0       # and 1, 2
    python benchmarks/lgg/run.py --data FOLDER_OF_Dataset700_LGG --work SCRATCH --choose PReL  # what defaults rest on
    python benchmarks/lgg/run.py --data FOLDER_OF_Dataset700_LGG --work SCRATCH --choose SECL  # the same
    python benchmarks/lgg/run.py --data FOLDER_OF_Dataset700_LGG --work SCRATCH --choose SECL_again --seed 1

Dataset700_LGG is a raw nnU-Net dataset of 70 patients (TCGA-LGG; FLAIR, T1 post-contrast; label: FLAIR abnormality).
Three tenths of the patients, stratified by site and the same for every seed, are for testing; of the others, a tenth
keeps its labels. The 2d configuration is planned at half the in-plane resolution, the networks have half of nnU-Net's
features and the batches 8 cases, so that a CPU bears it. Training is on all labeled cases (fold "all": the validation
Dice during training, by which PReL chooses its teacher, is therefore that of training cases); the test scans of every
modality are predicted alone, without test-time mirroring. Dice is per patient, in 3D. The seed fixes the labeled
patients, the initial weights and the data loading.

--choose leaves the test patients out altogether: three tenths of the others are for validation, and as many as before
are labeled. Variants of PReL start from one run of Semi-CML.

A run goes on where it was interrupted. Two can go on at a time: seeds, or with --only different methods of one seed,
after one of them has prepared the data (--only with no name).
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, wilcoxon

from nnunetv2_semicml.planning.withhold_labels import draw_order

HERE = Path(__file__).parent
NAME = "LGG"
SOURCE, GROUP, MODALITIES = 700, 710, {"FLAIR": 711, "T1post": 712}
METHODS = {
    "supervised only": "nnUNetTrainer_short",
    "Semi-CML": "nnUNetTrainerSemiCML_short",
    "PReL": "nnUNetTrainerSemiCMLPReL_short",
}
VARIANTS = {
    "PReL": {
        "Semi-CML": "nnUNetTrainerSemiCML_short",
        "PReL": "nnUNetTrainerSemiCMLPReL_short",  # labeled weight 1, learning rate 0.001
        "PReL, labeled weight 0": "nnUNetTrainerSemiCMLPReL_short_unlabeled",
        "PReL, learning rate 0.005": "nnUNetTrainerSemiCMLPReL_short_fast",
    },
    "SECL": {  # 300 steps
        "no contrast": "nnUNetTrainerSECL_none",
        # weight 0.1, temperature 0.1, stage 2 of the encoder, 4 regions along each axis
        "anatomical": "nnUNetTrainerSECLAnatomical_short",
        "anatomical, weight 1": "nnUNetTrainerSECLAnatomical_heavy",
        "anatomical, temperature 0.5": "nnUNetTrainerSECLAnatomical_warm",
        "anatomical, last stage": "nnUNetTrainerSECLAnatomical_deep",
        "region": "nnUNetTrainerSECLRegion_short",
        "region, weight 1": "nnUNetTrainerSECLRegion_heavy",
        "region, last stage": "nnUNetTrainerSECLRegion_deep",
    },
    "SECL_again": {  # what was chosen there, in 600 steps; to be run with another seed, for another draw
        "no contrast": "nnUNetTrainerSECL_none_long",
        "anatomical, temperature 0.5": "nnUNetTrainerSECLAnatomical_long",
        "region, weight 1": "nnUNetTrainerSECLRegion_heavy_long",
    },
}
NUM_LABELED = 5  # a tenth of the 49 patients that are not for testing
SPACING = (5.0, 4.0, 4.0)  # mm; nominal, the original in-plane spacing is 2


class Run:
    """One split of the patients, below one folder."""

    def __init__(self, data: Path, work: Path, seed: int, choose: bool):
        self.data, self.seed, self.choose = data.resolve(), seed, choose
        self.work = work.resolve() / (f"choose_{seed}" if choose else f"seed_{seed}")
        self.log = self.work / "log.txt"
        self.environment = {
            **{name: str(self.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_def_n_proc": "1",
            "nnUNet_semicml_seed": str(seed),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are 30 times slower on a busy machine
        }

    def call(self, program: str, *arguments: object, **environment: str) -> str:
        """Run a command line of this environment; its output goes to a log. Returns its last line."""
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        print(datetime.datetime.now().strftime("%H:%M:%S"), "$", program, *arguments, flush=True)
        with self.log.open("a") as file:
            own = os.environ | self.environment | environment
            subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=own)
        return self.log.read_text().splitlines()[-1]

    def prepare(self) -> None:
        """Split the patients, plan and preprocess, once."""
        finished = self.work / "prepared"
        self.work.mkdir(parents=True, exist_ok=True)
        folders = [self.call("nnUNetv2_semicml_trainers"), str(HERE / "trainers")]
        self.environment["nnUNet_extTrainer"] = os.pathsep.join(folders)
        if finished.is_file():
            return
        raw = self.work / "nnUNet_raw"
        shutil.rmtree(raw, ignore_errors=True)
        shutil.rmtree(self.work / "nnUNet_preprocessed", ignore_errors=True)
        with (self.data / "subjects.csv").open() as file:
            site_of = {row["case"]: row["institution"] for row in csv.DictReader(file)}
        test = draw_order(site_of, 0)[: round(0.3 * len(site_of))]
        source = raw / f"Dataset{SOURCE}_{NAME}"
        for folder in ("imagesTr", "labelsTr"):
            (source / folder).mkdir(parents=True)
            for file in (self.data / folder).iterdir():
                patient = file.name.split(".")[0].removesuffix("_0000").removesuffix("_0001")
                if not (self.choose and patient in test):
                    (source / folder / file.name).symlink_to(file)
        described = json.loads((self.data / "dataset.json").read_text())
        described["numTraining"] = len(list((source / "labelsTr").iterdir()))
        (source / "dataset.json").write_text(json.dumps(described))
        sites, tests = self.work / "sites.csv", self.work / "test.json"
        tests.write_text(json.dumps(test))
        with sites.open("w") as file:
            present = {p: site for p, site in site_of.items() if not (self.choose and p in test)}
            csv.writer(file).writerows([("case", "group"), *present.items()])
        held_out = ["--test_fraction", 0.3] if self.choose else ["--test_cases", tests]
        split = ["--num_labeled", NUM_LABELED, *held_out, "--stratify", sites, "--seed", self.seed]
        self.call("nnUNetv2_semicml_withhold_labels", "-d", SOURCE, "--output_id", GROUP, *split)
        plan = ["-c", "2d", "-overwrite_target_spacing", *SPACING, "-np", 1, "-npfp", 1]
        self.call("nnUNetv2_semicml_plan_and_preprocess", "-d", GROUP, *plan)
        for plans in (self.work / "nnUNet_preprocessed").glob("*/nnUNetPlans.json"):
            shrink(plans)
        for channel, modality in enumerate(MODALITIES):
            scans = self.work / "scans" / modality
            scans.mkdir(parents=True)
            for file in (raw / f"Dataset{GROUP}_{NAME}" / "imagesTs").glob(f"*_{channel:04d}.nii.gz"):
                shutil.copy(file, scans / file.name.replace(f"_{channel:04d}", "_0000"))
        finished.touch()

    def evaluate(self, method: str, trainer: str) -> dict:
        """Train, predict and evaluate what is not yet there: {(patient, modality, method): Dice}."""
        datasets = MODALITIES.values() if method == "supervised only" else [GROUP]
        for dataset in datasets:
            name = {GROUP: NAME, **{d: f"{NAME}_{m}" for m, d in MODALITIES.items()}}[dataset]
            model = self.work / "nnUNet_results" / f"Dataset{dataset}_{name}" / f"{trainer}__nnUNetPlans__2d"
            if not (model / "fold_all" / "checkpoint_final.pth").is_file():
                train = [dataset, "2d", "all", "-tr", trainer, "-device", "cpu"]
                self.call("nnUNetv2_train", *train, nnUNet_n_proc_DA="0")
        dice = {}
        for modality, dataset in MODALITIES.items():
            out = self.work / "predictions" / trainer / modality
            if not (out / "summary.json").is_file():
                scans = ["-i", self.work / "scans" / modality, "-o", out]
                model = ["-d", dataset, "-c", "2d", "-f", "all", "-tr", trainer]
                cheap = ["-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"]
                self.call("nnUNetv2_predict", *scans, *model, *cheap)
                truth = self.work / "nnUNet_raw" / f"Dataset{GROUP}_{NAME}" / "labelsTs"
                files = ["-djfile", out / "dataset.json", "-pfile", out / "plans.json"]
                self.call("nnUNetv2_evaluate_folder", truth, out, *files, "-np", 1)
            for case in json.loads((out / "summary.json").read_text())["metric_per_case"]:
                patient = Path(case["reference_file"]).name.removesuffix(".nii.gz")
                dice[patient, modality, method] = case["metrics"]["1"]["Dice"]
        return dice

    def numbers(self) -> str:
        """How many patients are what."""
        split = json.loads((self.work / "nnUNet_raw" / f"Dataset{GROUP}_{NAME}" / "withheld_labels.json").read_text())
        held_out = "validation" if self.choose else "test"
        return f"{len(split['labeled'])} labeled, {len(split['unlabeled'])} unlabeled, {len(split['test'])} {held_out}"


def shrink(file: Path) -> None:
    """Make the networks and batches of a plans file smaller, as users of nnU-Net edit plans."""
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["2d"]
    architecture = configuration["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [n // 2 for n in architecture["features_per_stage"]]
    configuration["batch_size"] = 8
    file.write_text(json.dumps(plans, indent=4))


def write_csv(file: Path, dice: dict) -> None:
    """Write the Dice of every patient."""
    with file.open("w") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["patient", "modality", "method", "dice"])
        rows.writerows([*key, f"{value:.4f}"] for key, value in dice.items())


def read_csv(file: Path) -> dict:
    """Read what `write_csv` wrote."""
    with file.open() as rows:
        return {(r["patient"], r["modality"], r["method"]): float(r["dice"]) for r in csv.DictReader(rows)}


def write_tables(file: Path, title: str, command: str, numbers: str, runs: dict[str, dict]) -> None:
    """Write Markdown: mean Dice of every run, and paired differences between the methods.

    Args:
        file: where.
        title: the heading.
        command: what was typed.
        numbers: of patients.
        runs: {name of the run: {(patient, modality, method): Dice}} over the same patients and methods.
    """
    methods = list(dict.fromkeys(method for dice in runs.values() for *_, method in dice))
    packages = ", ".join(f"{name} {version(name)}" for name in ("nnunetv2-semicml", "nnunetv2", "torch"))
    machine = f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {packages}"
    lines = [f"# {title}", "", f"`{command}`, {machine}", "", f"{numbers} patients. Mean Dice over these:", ""]
    columns = [*runs, "mean ± SD"] if len(runs) > 1 else [*runs]
    lines += [f"| modality | method | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    of_patient = {}
    for modality in MODALITIES:
        patients = sorted({patient for patient, of, _ in next(iter(runs.values())) if of == modality})
        for method in methods:
            values = np.array([[dice[p, modality, method] for p in patients] for dice in runs.values()])
            means = values.mean(1)
            of_patient[modality, method] = values.mean(0)
            cells = [modality, method, *(f"{mean:.3f}" for mean in means)]
            if len(runs) > 1:
                cells.append(f"{means.mean():.3f} ± {means.std(ddof=1):.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    over = f", Dice averaged over the {len(runs)} runs first" if len(runs) > 1 else ""
    lines += ["", f"Differences, patient by patient{over}:", ""]
    lines += [
        "| modality | difference | mean | 95 % interval | better / worse | Wilcoxon p |",
        "|---|---|---|---|---|---|",
    ]
    for modality in MODALITIES:
        for i, second in enumerate(methods):
            for first in methods[:1] if len(methods) > 4 else methods[:i]:
                if first == second:
                    continue
                difference = of_patient[modality, second] - of_patient[modality, first]
                interval, p = "none", "none"
                if difference.any():  # not so where PReL gave every network back
                    low, high = bootstrap((difference,), np.mean, rng=0).confidence_interval
                    interval, p = f"{low:+.3f} … {high:+.3f}", f"{wilcoxon(difference).pvalue:.3f}"
                counts = f"{(difference > 0).sum()} / {(difference < 0).sum()}"
                lines.append(
                    f"| {modality} | {second} − {first} | {difference.mean():+.3f} | {interval} | {counts} | {p} |"
                )
    lines += ["", "Intervals: bootstrap over patients (BCa). p: two-sided, not corrected for testing repeatedly."]
    file.write_text("\n".join(lines) + "\n")
    print(file.read_text())


def main() -> None:
    """Run one split and write the tables beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder Dataset700_LGG")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--seed", type=int, default=0, help="of labeled patients, initial weights and data loading")
    parser.add_argument("--choose", choices=VARIANTS, help="compare variants without the test patients")
    parser.add_argument("--only", nargs="*", help="prepare, and run these of the methods, without tables")
    args = parser.parse_args()
    run = Run(args.data, args.work, args.seed, bool(args.choose))
    run.prepare()
    dice = {}
    for method, trainer in (VARIANTS[args.choose] if args.choose else METHODS).items():
        if args.only is None or method in args.only:
            dice |= run.evaluate(method, trainer)
    if args.only is not None:
        return
    command = "python benchmarks/lgg/run.py --data Dataset700_LGG --work SCRATCH"
    title = "Supervised-only nnU-Net, Semi-CML and PReL on LGG FLAIR + T1"
    table, dices = "results", "dice"
    if args.choose:
        command += f" --choose {args.choose}"
        title = f"Variants of {args.choose} on validation patients"
        table, dices = f"choose_{args.choose.lower()}", f"dice_choose_{args.choose.lower()}"
    write_csv(HERE / f"{dices}_seed_{args.seed}.csv", dice)
    files = sorted(HERE.glob(f"{dices}_seed_*.csv"))
    runs = {file.stem.removeprefix(f"{dices}_").replace("_", " "): read_csv(file) for file in files}
    write_tables(HERE / f"{table}.md", title, f"{command} --seed N", run.numbers(), runs)


if __name__ == "__main__":
    main()
