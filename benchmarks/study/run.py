"""All methods and their ablations on real FLAIR + T1 scans: trains, predicts, evaluates; report.py makes the tables.

    python benchmarks/study/run.py validation --data FOLDER_OF_Dataset700_LGG --work SCRATCH
    python benchmarks/study/run.py test --data FOLDER_OF_Dataset700_LGG --work SCRATCH
    python benchmarks/study/run.py phantom --work SCRATCH

Dataset700_LGG is a raw nnU-Net dataset of 70 patients (TCGA-LGG; FLAIR, T1 post-contrast; label: FLAIR abnormality).
Three tenths of them, stratified by site, are for testing. "validation" leaves these out altogether: of the 49 others,
three tenths are for validation and 5 keep their labels. "test" labels 5 of the 49 (10 %), or 2, 10 or all. Every draw
of labeled and validation patients is also a seed of initial weights and data loading. A smaller labeled set of a draw
is part of its larger ones. "phantom" is the first draw of "test" with 70 synthetic patients.

The 2d configuration is planned at half the in-plane resolution, the networks have a quarter of nnU-Net's features and
the batches 8 cases, so that a CPU bears hundreds of trainings; for the schedule see ../trainers/study_trainers.py.
Training is on all labeled cases (fold "all": the validation Dice during training, by which PReL chooses its teacher, is
therefore that of training cases). nnU-Net's predictor predicts the scans of every modality alone, without test-time
mirroring.

Results are collected beside this script, in validation.csv, test.csv or phantom.csv. What stands there is done, so that
a run goes on where it was interrupted, also on another machine; to do something again, delete its rows and its files
below SCRATCH.
"""

import argparse
import contextlib
import csv
import datetime
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.data.result_folders import fold_folder, model_folder
from nnunetv2_semicml.evaluation.leaderboard import COLUMNS

HERE = Path(__file__).parent
SOURCE = {"test": 700, "validation": 701, "phantom": 702}
MODALITIES = {"test": ("FLAIR", "T1post"), "validation": ("FLAIR", "T1post"), "phantom": ("FLAIR", "T1")}
CLASS = {"test": "tumour", "validation": "tumour", "phantom": "lesion"}
NUM_TEST, NUM_VALIDATION, NUM_TRAINING = 21, 15, 49  # of 70 patients; the last two overlap
SPACING = (5.0, 4.0, 4.0)  # mm; nominal, the original in-plane spacing is 2
DRAWS = (0, 1, 2)
NUM_LABELED = (5, 2, 10, NUM_TRAINING)
SUPERVISED, MULTI_CHANNEL = "StudyNetworkTrainer", "StudyMultiChannelTrainer"
# name for tables: its trainers, each of which starts from the one before
METHODS = {
    "supervised only": [SUPERVISED],
    "supervised, all modalities at once": [MULTI_CHANNEL],
    "Mean Teacher": ["Study_MeanTeacher"],
    "UA-MT": ["Study_UAMT"],
    "CPS": ["Study_CPS"],
    "cross-modal CPS": ["Study_CrossModalCPS"],
    "cross-modal CPS + PReL": ["Study_First_hard", "Study_PReL_hard"],
    "SECL, region": ["Study_SECLRegion"],
    "SECL, anatomical": ["Study_SECLAnatomical"],
    "Semi-CML": ["Study_SemiCML"],
    "Semi-CML, 600 steps": ["Study_First"],
    "Semi-CML + PReL": ["Study_First", "Study_PReL"],
    "Semi-CML + PReL, EMA teacher": ["Study_First_ema", "Study_PReL_ema"],
    "Semi-CML Plus": ["Study_Plus"],
    "Semi-CML Plus + PReL": ["Study_First_plus", "Study_PReL_plus"],
}
ABLATIONS = {
    "Semi-CML": ["Study_First"],
    "neither term": ["Study_First_neither"],
    "MSE alone": ["Study_First_mse"],
    "ASC alone": ["Study_First_asc"],
    "Semi-CML Plus": ["Study_First_plus"],
    "hard pseudo-labels alone": ["Study_First_hard"],
    "ASC weight 0.1": ["Study_First_weight_01"],
    "ASC weight 1": ["Study_First_weight_1"],
    "ASC weight 3.5": ["Study_First_weight_35"],
    "temperature 0.5": ["Study_First_temperature_05"],
    "temperature 0.2": ["Study_First_temperature_02"],
    "4 cases contrasted": ["Study_First_cases_4"],
    "16 cases contrasted": ["Study_First_cases_16"],
    "BMA teacher of Semi-CML": ["Study_First_bma_teacher"],
    "EMA teacher of Semi-CML": ["Study_First_ema_teacher"],
    "Semi-CML, PReL": ["Study_First", "Study_PReL"],
    "neither term, PReL": ["Study_First_neither", "Study_PReL_neither"],
    "MSE alone, PReL": ["Study_First_mse", "Study_PReL_mse"],
    "ASC alone, PReL": ["Study_First_asc", "Study_PReL_asc"],
    "Semi-CML Plus, PReL": ["Study_First_plus", "Study_PReL_plus"],
    "Semi-CML Plus with BMA teacher, PReL": ["Study_First_plus_bma", "Study_PReL_plus_bma"],
    "hard pseudo-labels alone, PReL": ["Study_First_hard", "Study_PReL_hard"],
    "Semi-CML with EMA teacher, PReL": ["Study_First_ema", "Study_PReL_ema"],
    "Semi-CML, PReL from hard labels": ["Study_First", "Study_PReL_hard_labels"],
    "Semi-CML, PReL, better network given back": ["Study_First", "Study_PReL_given_back"],
    "Semi-CML, PReL without ASC": ["Study_First", "Study_PReL_no_asc"],
    "Semi-CML, PReL without labeled cases": ["Study_First", "Study_PReL_unlabeled"],
    "Semi-CML, PReL at 5 times the rate": ["Study_First", "Study_PReL_fast"],
    "SECL, region": ["Study_First_region"],
    "SECL, region, weight 0.1": ["Study_First_region_weight_01"],
    "SECL, region, last stage": ["Study_First_region_last_stage"],
    "SECL, anatomical": ["Study_First_anatomical"],
    "SECL, anatomical, weight 1": ["Study_First_anatomical_weight_1"],
    "SECL, anatomical, temperature 0.1": ["Study_First_anatomical_temperature_01"],
    "SECL, anatomical, last stage": ["Study_First_anatomical_last_stage"],
}


class Split(NamedTuple):
    """Who is labeled, unlabeled and held out.

    Attributes:
        purpose: "validation", "test" or "phantom".
        draw: of the labeled and the validation patients, and seed.
        labeled: number of patients.
    """

    purpose: str
    draw: int
    labeled: int

    @property
    def number(self) -> int:
        """Of the multi-modal dataset; those of the modalities follow."""
        first, per_draw = {"validation": (800, 10), "test": (830, 40), "phantom": (950, 0)}[self.purpose]
        return first + per_draw * self.draw + 10 * NUM_LABELED.index(self.labeled)

    @property
    def name(self) -> str:
        """Of the dataset, without number."""
        return f"{self.purpose}{self.draw}_{self.labeled}labeled"

    @property
    def modalities(self) -> tuple[str, ...]:
        """Channel names."""
        return MODALITIES[self.purpose]

    def dataset(self, modality: str | None) -> str:
        """Name of the dataset of a modality, or of all."""
        if modality is None:
            return f"Dataset{self.number}_{self.name}"
        return f"Dataset{self.number + 1 + self.modalities.index(modality)}_{self.name}_{modality}"


class Task(NamedTuple):
    """One method on one split."""

    split: Split
    method: str
    trainers: tuple[str, ...]

    def result(self, work: Path) -> Path:
        """The file of its metrics."""
        return work / "results" / self.split.name / f"{self.trainers[-1]}.json"


def tasks_of(purpose: str) -> list[Task]:
    """What to run."""
    methods = ABLATIONS if purpose == "validation" else METHODS
    draws = DRAWS[:1] if purpose == "phantom" else DRAWS
    tasks = [Task(Split(purpose, d, NUM_LABELED[0]), m, tuple(t)) for m, t in methods.items() for d in draws]
    if purpose != "validation":
        tasks += [Task(Split(purpose, d, NUM_TRAINING), "all labels", (SUPERVISED,)) for d in draws]
    if purpose == "test":
        bounds = ("supervised only", "Semi-CML + PReL")
        tasks += [Task(Split(purpose, d, n), m, tuple(METHODS[m])) for n in (2, 10) for d in draws for m in bounds]
    return tasks


def set_environment(work: Path) -> None:
    """Of nnU-Net, in this process and those that it starts."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)
    import nnunetv2_semicml.ext_trainers

    folders = [*nnunetv2_semicml.ext_trainers.__path__, str(HERE.parent / "trainers")]
    os.environ["nnUNet_extTrainer"] = os.pathsep.join(folders)
    os.environ["nnUNet_def_n_proc"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads are 30 times slower on a busy machine
    os.environ["OMP_NUM_THREADS"] = "1"  # two small trainings at a time are faster than one after the other


def write_source(data: Path, work: Path, purpose: str) -> list[object]:
    """Make the fully labeled dataset, once; returns options of nnUNetv2_semicml_withhold_labels."""
    from nnunetv2_semicml.data.phantom import write_phantom_dataset
    from nnunetv2_semicml.planning.withhold_labels import draw_order

    raw, tests, sites = work / "nnUNet_raw", work / f"{purpose}_tests.json", work / f"{purpose}_sites.csv"
    source = raw / f"Dataset{SOURCE[purpose]}_{purpose}"
    options = ["--test_fraction", 0.3] if purpose == "validation" else ["--test_cases", tests]
    options += [] if purpose == "phantom" else ["--stratify", sites]
    with locked(work / f".{purpose}.locked", f"making {purpose}", wait=True):
        if tests.is_file():
            return options
        shutil.rmtree(source, ignore_errors=True)  # of an interrupted run
        if purpose == "phantom":
            write_phantom_dataset(raw, SOURCE[purpose], purpose, num_labeled=70, num_unlabeled=0, num_test=0)
            site_of = {file.name.removesuffix(".nii.gz"): "" for file in (source / "labelsTr").iterdir()}
        else:
            with (data / "subjects.csv").open() as file:
                site_of = {row["case"]: row["institution"] for row in csv.DictReader(file)}
        test = draw_order(site_of, 0)[:NUM_TEST]
        if purpose != "phantom":
            present = {p: site for p, site in site_of.items() if purpose == "test" or p not in test}
            for folder in ("imagesTr", "labelsTr"):
                (source / folder).mkdir(parents=True)
                for file in (data / folder).iterdir():
                    if file.name.split(".")[0].removesuffix("_0000").removesuffix("_0001") in present:
                        (source / folder / file.name).symlink_to(file)
            described = json.loads((data / "dataset.json").read_text())
            (source / "dataset.json").write_text(json.dumps(described | {"numTraining": len(present)}))
            with sites.open("w") as file:
                csv.writer(file).writerows([("case", "group"), *present.items()])
        tests.write_text(json.dumps(test))
    return options


def prepare(data: Path, work: Path, split: Split) -> None:
    """Split the patients, plan and preprocess, once."""
    prepared = work / f"{split.name}.prepared"
    with locked(prepared.with_suffix(".locked"), f"preparing {split.name}", wait=True):
        if not prepared.is_file():
            plan_split(data, work, split)
            prepared.touch()


def plan_split(data: Path, work: Path, split: Split) -> None:
    """Make the datasets of a split."""
    held_out = write_source(data, work, split.purpose)
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        for number in range(split.number, split.number + 3):
            for left in (work / folder).glob(f"Dataset{number}_*"):  # of an interrupted run
                shutil.rmtree(left)
    labeled = ["--num_labeled", split.labeled] if split.labeled < NUM_TRAINING else ["--labeled_fraction", 1]
    options = ["-d", SOURCE[split.purpose], "--output_id", split.number, "--output_name", split.name, *labeled]
    call("nnUNetv2_semicml_withhold_labels", *options, *held_out, "--seed", split.draw)
    raw = work / "nnUNet_raw" / split.dataset(None)
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (raw / "labelsTr").iterdir())
    if len(cases) < 5:  # nnU-Net asks for folds, which fold "all" does not use
        folds = [{"train": [c for c in cases if c != case], "val": [case]} for case in cases]
        (raw / "splits_final.json").write_text(json.dumps(folds))
    plan = ["-d", split.number, "-c", "2d", "--modality_ids", split.number + 1, split.number + 2, "-np", 1, "-npfp", 1]
    if split.labeled == NUM_TRAINING:
        few = split._replace(labeled=NUM_LABELED[0])
        prepare(data, work, few)
        call("nnUNetv2_semicml_plan_and_preprocess", *plan, "--plans_of", few.number)
        return
    spacing = [] if split.purpose == "phantom" else ["-overwrite_target_spacing", *SPACING]
    call("nnUNetv2_semicml_plan_and_preprocess", *plan, *spacing)
    for modality in (None, *split.modalities):
        shrink(work / "nnUNet_preprocessed" / split.dataset(modality) / "nnUNetPlans.json")


def call(program: str, *arguments: object) -> None:
    """Run a command line of this environment."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_n_proc_DA"}
    options = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def shrink(file: Path) -> None:
    """Make the networks and batches of a plans file smaller, as users of nnU-Net edit plans."""
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["2d"]
    architecture = configuration["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [n // 4 for n in architecture["features_per_stage"]]
    configuration["batch_size"] = 8
    file.write_text(json.dumps(plans, indent=4))


def run(data: Path, work: Path, task: Task) -> str:
    """Prepare, train, predict and evaluate what is not yet there; the result is a file. Returns what happened."""
    try:
        return run_task(data, work, task)
    except Exception:  # hours of other trainings go on
        return f"FAILED {task}\n{traceback.format_exc()}"


def run_task(data: Path, work: Path, task: Task) -> str:
    """Of `run`, the part that may fail."""
    import torch

    torch.set_num_threads(1)
    prepare(data, work, task.split)
    result = task.result(work)
    result.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with locked(result.with_suffix(".locked"), f"making {result.name}", wait=True):
        if not result.is_file():
            with (result.with_suffix(".log")).open("a") as log, contextlib.redirect_stdout(log):
                for trainer in task.trainers:
                    train(work, task.split, trainer)
                modalities = (None,) if MULTI_CHANNEL in task.trainers else task.split.modalities
                results = [predict_and_evaluate(work, task.split, task.trainers[-1], m) for m in modalities]
            cases = {m or " + ".join(task.split.modalities): r for m, r in zip(modalities, results, strict=True)}
            temporary = result.with_suffix(".tmp")
            temporary.write_text(json.dumps(cases))
            temporary.replace(result)
    cases = json.loads(result.read_text())
    dice = [sum(m["dice"] or 0 for m in of.values()) / len(of) for of in cases.values()]
    numbers = ", ".join(f"{modality} {d:.3f}" for modality, d in zip(cases, dice, strict=True))
    return f"{task.split.name}: {task.method}: {numbers} ({time.monotonic() - begin:.0f} s)"


def train(work: Path, split: Split, trainer: str) -> None:
    """Train on all labeled cases, unless that is done, or another process is about it."""
    import torch
    from nnunetv2.run.run_training import run_training

    os.environ["nnUNet_semicml_seed"] = str(split.draw)
    os.environ["nnUNet_n_proc_DA"] = "0"  # augment in the training process
    for modality in split.modalities if trainer == SUPERVISED else (None,):
        dataset = split.dataset(modality)
        folder = fold_folder(model_folder(work / "nnUNet_results", dataset, trainer, "nnUNetPlans", "2d"), "all")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent, f"training {trainer}", wait=True):
            if not (folder / "checkpoint_final.pth").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                if trainer == MULTI_CHANNEL:  # the group's own preprocessing is of every modality alone
                    call("nnUNetv2_preprocess", "-d", split.number, "-c", "2d", "-np", 1)
                torch.manual_seed(split.draw)  # nnU-Net's own trainer has no seed
                np.random.seed(split.draw)
                run_training(dataset, "2d", "all", trainer, device=torch.device("cpu"))


def predict_and_evaluate(work: Path, split: Split, trainer: str, modality: str | None) -> dict[str, dict[str, float]]:
    """Metrics of every held-out patient, predicted from a modality, or from all at once (None)."""
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_semicml.evaluation.metrics import evaluate_files

    model = model_folder(work / "nnUNet_results", split.dataset(modality), trainer, "nnUNetPlans", "2d")
    out = work / "predictions" / split.name / trainer / (modality or "all")
    out.mkdir(parents=True, exist_ok=True)
    options = {"use_mirroring": False, "perform_everything_on_device": False, "allow_tqdm": False}
    predictor = nnUNetPredictor(device=torch.device("cpu"), **options)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    raw = work / "nnUNet_raw" / split.dataset(None)
    channels = [i for i, name in enumerate(split.modalities) if modality in (None, name)]
    cases = sorted(label.name.removesuffix(".nii.gz") for label in (raw / "labelsTs").iterdir())
    scans = [[str(raw / "imagesTs" / f"{case}_{i:04d}.nii.gz") for i in channels] for case in cases]
    predictor.predict_from_files_sequential(scans, [str(out / case) for case in cases])
    metrics = {}
    for case in cases:
        files = raw / "labelsTs" / f"{case}.nii.gz", out / f"{case}.nii.gz"
        (metrics[case],) = evaluate_files(*files, SimpleITKIO(), {"background": 0, CLASS[split.purpose]: 1}).values()
    return metrics


def collect(work: Path, purpose: str) -> pd.DataFrame:
    """All results that there are, those of this machine and those of the committed table, in task order."""
    table = HERE / f"{purpose}.csv"
    known = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=COLUMNS)
    parts = []
    for task in tasks_of(purpose):
        file = task.result(work)
        if not file.is_file():
            parts.append(known[is_of(known, task)])
            continue
        num_training = NUM_TRAINING - (NUM_VALIDATION if purpose == "validation" else 0)
        about = {
            "dataset": "phantom" if purpose == "phantom" else "LGG",
            "method": task.method,
            "seed": task.split.draw,
            "class": CLASS[purpose],
            "labeled": task.split.labeled,
            "unlabeled": num_training - task.split.labeled,
        }
        rows = [
            {**about, "modality": modality, "case": case, **metrics}
            for modality, cases in json.loads(file.read_text()).items()
            for case, metrics in cases.items()
        ]
        parts.append(pd.DataFrame(rows, columns=COLUMNS))
    return pd.concat([part for part in parts if len(part)] or [known])


def is_of(table: pd.DataFrame, task: Task) -> pd.Series:
    """Which rows are results of a task."""
    split = task.split
    return (table["method"] == task.method) & (table["seed"] == split.draw) & (table["labeled"] == split.labeled)


def write(work: Path, purpose: str) -> None:
    """Write the table, and how it was made."""
    table = collect(work, purpose)
    file = HERE / f"{purpose}.csv"
    table.to_csv(file, index=False, float_format="%.4g")
    packages = ("nnunetv2-semicml", "nnunetv2", "torch")
    done = sum(is_of(table, task).any() for task in tasks_of(purpose))
    data = "" if purpose == "phantom" else " --data Dataset700_LGG"
    facts = {
        "command": f"python benchmarks/study/run.py {purpose}{data} --work SCRATCH",
        "runs": f"{done} of {len(tasks_of(purpose))}",
        "draws, which are the seeds": ", ".join(map(str, sorted(set(table["seed"])))),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "software": ", ".join(f"{name} {version(name)}" for name in packages),
        "date": str(datetime.date.today()),
    }
    file.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(file)


def main() -> None:
    """Run what is missing, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), help="the folder Dataset700_LGG")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--draws", type=int, nargs="+", default=DRAWS, help="(default: all)")
    parser.add_argument("--only", nargs="+", help="methods (default: all)")
    parser.add_argument("purpose", choices=SOURCE)
    args = parser.parse_args()
    work, data = args.work.resolve(), args.data.resolve()
    set_environment(work)
    tasks = [task for task in tasks_of(args.purpose) if task.split.draw in args.draws]
    tasks = [task for task in tasks if args.only is None or task.method in args.only]
    known = collect(work, args.purpose)
    tasks = [task for task in tasks if not is_of(known, task).any()]
    with multiprocessing.get_context("spawn").Pool(args.processes, warnings.simplefilter, ("ignore",)) as pool:
        for line in pool.imap_unordered(partial(run, data, work), tasks):
            print(time.strftime("%H:%M:%S"), line, flush=True)
            write(work, args.purpose)


if __name__ == "__main__":
    main()
