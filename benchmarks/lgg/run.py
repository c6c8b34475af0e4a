"""Supervised-only nnU-Net against Semi-CML on real FLAIR + T1 scans, 10 % labeled, through the command lines.

    python benchmarks/lgg/run.py --data FOLDER_OF_Dataset700_LGG --work SCRATCH --seed 0

Dataset700_LGG is a raw nnU-Net dataset of 70 patients (TCGA-LGG; FLAIR, T1 post-contrast; label: FLAIR abnormality).
Three tenths of the patients, stratified by site, are for testing; a tenth of the others keeps its labels. The 2d
configuration is planned at half the in-plane resolution and the networks have half of nnU-Net's features, so that a CPU
bears it. Every network is trained for the same number of steps on all labeled cases (fold "all") and predicts the test
scans of its modality alone. Dice is per patient, in 3D. The seed fixes the split and the initial weights of Semi-CML;
stock nnU-Net has no seed, and the data loading of neither is seeded, so numbers vary from run to run.
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
from scipy.stats import wilcoxon

HERE = Path(__file__).parent
DATASET = "LGG"
SOURCE, GROUP, MODALITIES = 700, 710, {"FLAIR": 711, "T1post": 712}
METHODS = {"supervised only": "nnUNetTrainer_1000steps", "Semi-CML": "nnUNetTrainerSemiCML_1000steps"}
SPACING = (5.0, 4.0, 4.0)  # mm; nominal, the original in-plane spacing is 2


def call(program: str, *arguments: object, log: Path) -> str:
    """Run a command line of this environment; its output goes to a log. Returns its last line."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    print("$", program, *arguments, flush=True)
    with log.open("a") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)
    return log.read_text().splitlines()[-1]


def main() -> None:
    """Run everything and write the tables beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder Dataset700_LGG")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of Semi-CML's initial weights")
    args = parser.parse_args()
    work = args.work.resolve() / f"seed_{args.seed}"
    (work / "nnUNet_raw").mkdir(parents=True)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[folder] = str(work / folder)
    os.environ.update(nnUNet_n_proc_DA="1", nnUNet_def_n_proc="2", nnUNet_semicml_seed=str(args.seed))
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads are 30 times slower on a busy machine
    (work / "nnUNet_raw" / f"Dataset{SOURCE}_{DATASET}").symlink_to(args.data.resolve())
    log = work / "log.txt"
    sites = work / "sites.csv"
    with (args.data / "subjects.csv").open() as file, sites.open("w") as out:
        csv.writer(out).writerows([("case", "group"), *((s["case"], s["institution"]) for s in csv.DictReader(file))])

    trainers = call("nnUNetv2_semicml_trainers", log=log)
    os.environ["nnUNet_extTrainer"] = os.pathsep.join([trainers, str(HERE / "trainers")])
    split = ["--labeled_fraction", 0.1, "--test_fraction", 0.3, "--stratify", sites, "--seed", args.seed]
    call("nnUNetv2_semicml_withhold_labels", "-d", SOURCE, "--output_id", GROUP, *split, log=log)
    plan = ["-c", "2d", "-overwrite_target_spacing", *SPACING, "-np", 2, "-npfp", 2]
    call("nnUNetv2_semicml_plan_and_preprocess", "-d", GROUP, *plan, log=log)

    for plans in (work / "nnUNet_preprocessed").glob("*/nnUNetPlans.json"):
        halve_features(plans)

    raw = work / "nnUNet_raw" / f"Dataset{GROUP}_{DATASET}"
    dice = {}
    for method, trainer in METHODS.items():
        for dataset in MODALITIES.values() if method == "supervised only" else [GROUP]:
            call("nnUNetv2_train", dataset, "2d", "all", "-tr", trainer, "-device", "cpu", log=log)
        for channel, (modality, dataset) in enumerate(MODALITIES.items()):
            scans = work / "scans" / modality
            if not scans.is_dir():
                scans.mkdir(parents=True)
                for file in (raw / "imagesTs").glob(f"*_{channel:04d}.nii.gz"):
                    shutil.copy(file, scans / file.name.replace(f"_{channel:04d}", "_0000"))
            out = work / "predictions" / trainer / modality
            model = ["-d", dataset, "-c", "2d", "-f", "all", "-tr", trainer]
            call("nnUNetv2_predict", "-i", scans, "-o", out, *model, "-device", "cpu", "-npp", 1, "-nps", 1, log=log)
            files = ["-djfile", out / "dataset.json", "-pfile", out / "plans.json"]
            call("nnUNetv2_evaluate_folder", raw / "labelsTs", out, *files, "-np", 1, log=log)
            for case in json.loads((out / "summary.json").read_text())["metric_per_case"]:
                patient = Path(case["reference_file"]).name.removesuffix(".nii.gz")
                dice[patient, modality, method] = case["metrics"]["1"]["Dice"]
    write_tables(dice, args.seed, json.loads((raw / "withheld_labels.json").read_text()))


def halve_features(file: Path) -> None:
    """Make the networks of a plans file narrower, as users of nnU-Net edit plans."""
    plans = json.loads(file.read_text())
    architecture = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [n // 2 for n in architecture["features_per_stage"]]
    file.write_text(json.dumps(plans, indent=4))


def write_tables(dice: dict, seed: int, split: dict) -> None:
    """Write the per-patient Dice as CSV and its summary as Markdown."""
    with (HERE / f"dice_seed_{seed}.csv").open("w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["patient", "modality", "method", "dice"])
        rows.writerows([*key, f"{value:.4f}"] for key, value in sorted(dice.items()))

    cases = {part: len(split[part]) for part in ("labeled", "unlabeled", "test")}
    lines = [
        f"# Supervised-only nnU-Net against Semi-CML on LGG FLAIR + T1, seed {seed}",
        "",
        f"`python benchmarks/lgg/run.py --data Dataset700_LGG --work SCRATCH --seed {seed}`, {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        + ", ".join(f"{package} {version(package)}" for package in ("nnunetv2-semicml", "nnunetv2", "torch")),
        "",
        f"{cases['labeled']} labeled, {cases['unlabeled']} unlabeled, {cases['test']} test patients; 1000 steps.",
        "",
        "| Modality | supervised only, mean ± SD | Semi-CML, mean ± SD | difference | better / worse | Wilcoxon p |",
        "|---|---|---|---|---|---|",
    ]
    for modality in MODALITIES:
        patients = sorted({patient for patient, of, _ in dice if of == modality})
        first, second = (np.array([dice[p, modality, method] for p in patients]) for method in METHODS)
        difference = second - first
        counts = f"{(difference > 0).sum()} / {(difference < 0).sum()}"
        summaries = " | ".join(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in (first, second))
        p = wilcoxon(difference).pvalue
        lines.append(f"| {modality} | {summaries} | {difference.mean():+.3f} | {counts} | {p:.3f} |")
    (HERE / f"results_seed_{seed}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
