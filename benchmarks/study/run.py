"""Trains, predicts and evaluates what protocols.py lists; report.py makes the tables.

    python benchmarks/study/run.py lgg validation --data FOLDER_OF_RAW_DATASETS --work SCRATCH
    python benchmarks/study/run.py lgg test       --data FOLDER_OF_RAW_DATASETS --work SCRATCH
    python benchmarks/study/run.py lgg test       --data … --work … --device cuda --processes 8

The folder holds raw nnU-Net datasets by the names that protocols.py gives, e.g. Dataset700_LGG, or others of the same
layout under these names. Test cases are those of imagesTs or, if there are none, three tenths of the cases, stratified
by "institution" in subjects.csv. "validation" leaves them out altogether: it holds out cases of the training set. Every
draw of labeled and validation cases is also a seed of initial weights and data loading. A smaller labeled set of a draw
is part of its larger ones.

Training is on all labeled cases (fold "all": the validation Dice during training, which says what modality is the
better one, is therefore that of training cases). Networks are small, so that a CPU bears hundreds of trainings. Every
modality is predicted alone by nnU-Net's predictor without mirroring, once with the weights of the last step and once
with their exponential moving average. On a GPU training is in float16, as nnU-Net does it; networks are not compiled.

A training takes 8 (bounds) to 29 minutes (UniMatch on floods) of a core, on left atria 21 to 77, see runs.csv: the test
cases of gliomas about 8 core-hours, of their slices 4, of floods 9, of left atria 8 and of the phantom 2.5, some of it
estimated from the first draw; what was tried on validation cases 15.

Results are collected beside this script, in <protocol>_<purpose>.csv, and what the runs cost, and on what device, in
runs.csv. What stands there is done, so that a study goes on where it was interrupted, also on another machine; to do
something anew, delete its rows and its files below SCRATCH. With --again and another SCRATCH what is done is done a
second time, to see how far two runs are apart; the names of these tables begin with "again_".
"""

import argparse
import contextlib
import csv
import datetime
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from protocols import PROTOCOLS, PURPOSES, Protocol, Task, tasks_of

from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.data.result_folders import fold_folder, model_folder
from nnunetv2_semicml.evaluation.leaderboard import COLUMNS

HERE = Path(__file__).parent
WEIGHTS = {"last step": "checkpoint_final.pth", "EMA": "checkpoint_ema.pth"}
KEYS = ["protocol", "purpose", "draw", "labeled", "method", "steps"]
NUM_PHANTOMS, TEST_SHARE = 70, 0.3
CPU, AGAIN = "CPU", "again_"


def set_environment(work: Path, task: Task) -> None:
    """Of nnU-Net, in this process and those that it starts; before nnU-Net is imported."""
    folder = work / f"{task.protocol}_{task.purpose}"
    for name, subfolder in (
        ("nnUNet_raw", "raw"),
        ("nnUNet_preprocessed", "preprocessed"),
        ("nnUNet_results", f"results_draw{task.draw}_{task.steps}steps"),
    ):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder / subfolder)
    os.environ |= {
        "nnUNet_extTrainer": str(HERE.parent / "trainers"),
        "PROTOCOL_STEPS": str(task.steps),
        "nnUNet_semicml_seed": str(task.draw),
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "0",  # augment in the training process
        "nnUNet_compile": "f",  # on a GPU it would take longer than these trainings
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are 30 times slower on a busy machine
        "OMP_NUM_THREADS": "1",  # two small trainings at a time are faster than one after the other
    }


# data


def source_of(protocol: Protocol, data: Path) -> Path:
    """The raw dataset of a protocol, made if it is synthetic."""
    if protocol.source is not None:
        return data / protocol.source
    from nnunetv2_semicml.data.phantom import write_phantom_dataset

    raw = Path(os.environ["nnUNet_raw"]).parent / "source"
    if not raw.is_dir():
        write_phantom_dataset(raw, 499, "Source", num_labeled=NUM_PHANTOMS, num_unlabeled=0, num_test=0)
    return raw / "Dataset499_Source"


def cases_of(protocol: Protocol, source: Path, purpose: str, draw: int) -> tuple[list[str], dict[str, str]]:
    """Training cases in the order in which they are labeled, and the held-out ones -> their part of the source."""
    from nnunetv2_semicml.planning.withhold_labels import draw_order

    names = {
        part: sorted(file.name.split(".")[0] for file in (source / f"labels{part}").glob("[!.]*"))
        for part in ("Tr", "Ts")
    }
    stratum_of = dict.fromkeys(names["Tr"], "")
    if (source / "subjects.csv").is_file():
        with (source / "subjects.csv").open() as file:
            stratum_of = {row["case"]: row["institution"] for row in csv.DictReader(file)}
    test = dict.fromkeys(names["Ts"], "Ts")
    if not test:
        test = dict.fromkeys(draw_order(stratum_of, 0)[: round(TEST_SHARE * len(stratum_of))], "Tr")
    training = {case: stratum for case, stratum in stratum_of.items() if case not in test}
    validation = dict.fromkeys(draw_order(training, draw)[: protocol.num_validation], "Tr")
    held_out = test if purpose == "test" else validation
    rest = {case: stratum for case, stratum in training.items() if case not in held_out}
    order = sorted(rest) if protocol.alphabetical else draw_order(rest, draw)
    return [*protocol.first, *(case for case in order if case not in protocol.first)], held_out


def dataset_of(protocol: Protocol, task: Task, modality: str | None = None) -> str:
    """Name of the dataset of a task, or of one of its modalities. All test draws have the same if all is labeled."""
    draw = 0 if task.purpose == "test" and not task.labeled else task.draw
    number = 500 + 50 * draw + 10 * [0, *protocol.labeled].index(task.labeled)
    name = f"draw{draw}_{task.labeled or 'all'}labeled"
    if modality is None or len(protocol.modalities) == 1:
        return f"Dataset{number}_{name}"
    return f"Dataset{number + 1 + list(protocol.modalities).index(modality)}_{name}_{modality}"


def write_raw(protocol: Protocol, task: Task, source: Path, folder: Path) -> None:
    """The raw dataset of a task: labeled, unlabeled and held-out cases, whose labels are elsewhere."""
    described = json.loads((source / "dataset.json").read_text())
    ending = described["file_ending"]
    training, held_out = cases_of(protocol, source, task.purpose, task.draw)
    labeled = training[: task.labeled or len(training)]
    shares = [(case, "Tr", "Tr" if case in labeled else "Un") for case in training]
    for case, origin, share in [*shares, *((case, origin, "Ts") for case, origin in held_out.items())]:
        label = source / f"labels{origin}" / f"{case}{ending}"
        files = {
            file: folder / f"images{share}" / file.name
            for file in (source / f"images{origin}").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}")
        }
        if share != "Un":
            files[label] = folder / f"labels{share}" / label.name
        for file, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if protocol.only_slices:
                write_slices(file, label, target)
            else:
                target.symlink_to(file)
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": len(labeled)}))


def write_slices(file: Path, label: Path, target: Path) -> None:
    """Of an image or a label the slices in which there is foreground, one upon the other."""
    import SimpleITK as sitk

    shown = sitk.GetArrayFromImage(sitk.ReadImage(str(label))).any((1, 2))
    image = sitk.ReadImage(str(file))
    slices = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[shown])
    slices.SetSpacing(image.GetSpacing())
    sitk.WriteImage(slices, str(target))


def prepare(protocol: Protocol, task: Task, data: Path) -> None:
    """Split the cases, plan and preprocess, once; more labels have the plans of the fewest."""
    preprocessed, raw = (Path(os.environ[f"nnUNet_{name}"]) for name in ("preprocessed", "raw"))
    name = dataset_of(protocol, task)
    prepared = preprocessed / f"prepared_{name}"
    with locked(prepared.with_suffix(".lock"), f"preparing {name}", wait=True):
        if prepared.is_file():
            return
        number = int(name[7:10])
        for folder in (raw, preprocessed):
            for left in (left for i in range(10) for left in folder.glob(f"Dataset{number + i}_*")):
                shutil.rmtree(left)  # of an interrupted run
        write_raw(protocol, task, source_of(protocol, data), raw / name)
        cases = sorted(file.name.split(".")[0] for file in (raw / name / "labelsTr").iterdir())
        folds = [{"train": [c for c in cases if c != case], "val": [case]} for case in cases[:5]]
        (raw / name / "splits_final.json").write_text(json.dumps(folds))  # for nnU-Net; fold "all" does not use them
        plan = ["-d", number, "-c", protocol.configuration, "-np", 1, "-npfp", 1]
        if len(protocol.modalities) == 1:
            plan += ["--one_modality"]
        else:
            texts = [f"{m}={channels}" for m, channels in protocol.modalities.items()]
            plan += ["--modalities", *texts, "--modality_ids", *(number + 1 + i for i in range(len(texts)))]
        few = task._replace(labeled=protocol.labeled[0])
        if task.labeled != few.labeled:
            prepare(protocol, few, data)
            plan += ["--plans_of", dataset_of(protocol, few)[7:10]]
        call("nnUNetv2_semicml_plan_and_preprocess", *plan, *([] if "--plans_of" in plan else protocol.plan))
        if task.labeled == few.labeled:
            for modality in (None, *protocol.modalities):
                shrink(protocol, preprocessed / dataset_of(protocol, task, modality) / "nnUNetPlans.json")
        prepared.touch()


def call(program: str, *arguments: object) -> None:
    """Run a command line of this environment."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_n_proc_DA"}
    options: dict[str, Any] = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def shrink(protocol: Protocol, file: Path) -> None:
    """Make the networks, patches and batches of a plans file smaller, as users of nnU-Net edit plans."""
    plans = json.loads(file.read_text())
    configuration = plans["configurations"][protocol.configuration]
    configuration["batch_size"] = protocol.batch_size
    configuration["patch_size"] = list(protocol.patch_size or configuration["patch_size"])
    kwargs = configuration["architecture"]["arch_kwargs"]
    stages = kwargs["n_stages"] = protocol.stages or kwargs["n_stages"]
    for name in ("kernel_sizes", "strides"):
        kwargs[name] = kwargs[name][:stages]
    kwargs["features_per_stage"] = [protocol.features * 2**i for i in range(stages)]
    kwargs["n_conv_per_stage"] = [1] * stages
    kwargs["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    file.write_text(json.dumps(plans, indent=4))


# runs


def result_file(work: Path, task: Task) -> Path:
    """Where the metrics of a task are."""
    share = f"draw{task.draw}_{task.labeled or 'all'}labeled"
    return work / f"{task.protocol}_{task.purpose}" / share / f"{task.trainers[-1]}_{task.steps}.json"


def model_of(protocol: Protocol, task: Task, modality: str | None, trainer: str = "") -> Path:
    """Where a modality's networks are or will be, None: the joint state; of the last trainer unless one is named."""
    trainer = trainer or f"Protocol_{task.trainers[-1]}"
    dataset, results = dataset_of(protocol, task, modality), Path(os.environ["nnUNet_results"])
    return model_folder(results, dataset, trainer, "nnUNetPlans", protocol.configuration)


def run(data: Path, work: Path, task: Task, device: str = "cpu") -> str:
    """Prepare, train, predict and evaluate what is not yet there; the result is a file. Returns what happened."""
    begin = time.monotonic()
    try:
        set_environment(work, task)
        file = result_file(work, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".locked"), f"making {file.name}", wait=True):
            if not file.is_file():
                with file.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
                    result = run_task(data, task, device)
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps(result))
                temporary.replace(file)
    except Exception:  # hours of other trainings go on
        return f"FAILED {task}\n{traceback.format_exc()}"
    table = pd.DataFrame(json.loads(file.read_text())["rows"])
    dice = table.fillna({"dice": 0.0}).groupby(["modality", "weights"], sort=False)["dice"].mean()
    numbers = ", ".join(f"{' '.join(key)} {value:.3f}" for key, value in dice.items())
    return f"{task.purpose} {task.draw}: {task.method}: {numbers} ({time.monotonic() - begin:.0f} s)"


def run_task(data: Path, task: Task, device_type: str) -> dict[str, Any]:
    """Of `run`, the part that takes long: metrics of every held-out case, and what they cost."""
    import torch
    from nnunetv2.run.run_training import run_training

    torch.set_num_threads(1)
    device = torch.device(device_type)
    protocol = PROTOCOLS[task.protocol]
    prepare(protocol, task, data)
    begin = time.process_time()
    dataset = dataset_of(protocol, task)
    for trainer in (f"Protocol_{name}" for name in task.trainers):
        model = model_of(protocol, task, list(protocol.modalities)[-1], trainer)
        model.mkdir(parents=True, exist_ok=True)
        with locked(model, f"training {trainer}", wait=True):
            if not (fold_folder(model, "all") / WEIGHTS["EMA"]).is_file():  # the last file that a training writes
                run_training(dataset, protocol.configuration, "all", trainer, device=device)
    rows = [
        {"modality": modality, "weights": weights, "case": case, **metrics}
        for modality in protocol.modalities
        for weights in WEIGHTS
        for case, metrics in predict_and_evaluate(protocol, task, modality, weights, device).items()
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
    return {"rows": rows, "cpu_seconds": round(time.process_time() - begin), "device": name}


def predict_and_evaluate(
    protocol: Protocol, task: Task, modality: str, weights: str, device: Any
) -> dict[str, dict[str, float]]:
    """Metrics of every held-out case, predicted from a modality on a device of PyTorch."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_semicml.evaluation.metrics import evaluate_files

    raw, work = (
        Path(os.environ["nnUNet_raw"]) / dataset_of(protocol, task),
        Path(os.environ["nnUNet_results"]).parents[1],
    )
    out = result_file(work, task).with_suffix("") / modality / weights
    out.mkdir(parents=True, exist_ok=True)
    options = {"use_mirroring": False, "perform_everything_on_device": False, "allow_tqdm": False}
    predictor = nnUNetPredictor(device=device, **options)
    predictor.initialize_from_trained_model_folder(str(model_of(protocol, task, modality)), ("all",), WEIGHTS[weights])
    described = json.loads((raw / "dataset.json").read_text())
    ending, names = described["file_ending"], list(described["channel_names"].values())
    channels = [names.index(name) for name in protocol.modalities[modality].split(",")]
    cases = sorted(label.name.removesuffix(ending) for label in (raw / "labelsTs").iterdir())
    scans = [[str(raw / "imagesTs" / f"{case}_{i:04d}{ending}") for i in channels] for case in cases]
    predictor.predict_from_files_sequential(scans, [str(out / case) for case in cases])
    reader = determine_reader_writer_from_dataset_json(described, scans[0][0], verbose=False)()
    return {
        case: evaluate_files(
            raw / "labelsTs" / f"{case}{ending}", out / f"{case}{ending}", reader, described["labels"]
        )[protocol.foreground]
        for case in cases
    }


# tables


def read_runs(prefix: str = "") -> pd.DataFrame:
    """What was run, on what device, and what it cost; with the prefix AGAIN, a second time."""
    file = HERE / f"{prefix}runs.csv"
    columns = [*KEYS, "cpu_seconds", "date", "commit", "device"]
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=columns)


def rows_with(table: pd.DataFrame, values: Mapping[str, Any]) -> pd.DataFrame:
    """Of a table those rows that have these values."""
    return table[(table[list(values)] == list(values.values())).all(axis=1)]


def is_done(task: Task, prefix: str = "") -> bool:
    """Whether the committed tables have it; with the prefix AGAIN, those of second runs."""
    return not rows_with(read_runs(prefix), {key: getattr(task, key) for key in KEYS}).empty


def add_to_tables(work: Path, task: Task, prefix: str = "") -> None:
    """Add the result of a task, if it has one that is not there."""
    file = result_file(work, task)
    if not file.is_file() or is_done(task, prefix):
        return
    result = json.loads(file.read_text())
    protocol = PROTOCOLS[task.protocol]
    about = {"dataset": protocol.source or "phantom", "method": task.method, "seed": task.draw}
    about |= {"labeled": task.labeled, "class": protocol.foreground, "steps": task.steps}
    columns = ["weights", "steps", *(c for c in COLUMNS if c != "unlabeled")]
    rows = pd.DataFrame([{**about, **row} for row in result["rows"]])[columns]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    run = {key: getattr(task, key) for key in KEYS} | {"cpu_seconds": result["cpu_seconds"]}
    run |= {"date": datetime.date.today(), "commit": commit.strip(), "device": result["device"]}
    for name, table in ((f"{task.protocol}_{task.purpose}", rows), ("runs", pd.DataFrame([run]))):
        file = HERE / f"{prefix}{name}.csv"
        table.to_csv(file, mode="a", header=not file.is_file(), index=False, float_format="%.4g")


def main() -> None:
    """Run what is missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("purpose", choices=PURPOSES)
    parser.add_argument("--data", type=Path, default=Path(), help="the folder of the raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--draws", type=int, nargs="+", help="(default: all)")
    parser.add_argument("--only", nargs="+", help="methods (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="what is done is done a second time, see above")
    args = parser.parse_args()
    work, data = args.work.resolve(), args.data.resolve()
    tasks = [task for task in tasks_of(args.protocol, args.purpose) if args.draws is None or task.draw in args.draws]
    tasks = [task for task in tasks if args.only is None or task.method in args.only]
    prefix = AGAIN if args.again else ""
    tasks = [task for task in tasks if not is_done(task, prefix)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(run, data, work, device=args.device), tasks):
            print(time.strftime("%H:%M:%S"), line, flush=True)
            for task in tasks:
                add_to_tables(work, task, prefix)


if __name__ == "__main__":
    main()
