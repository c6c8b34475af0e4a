"""What the cost benchmarks share: a phantom of many modalities, trainers on it, measures of time and memory."""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import memory
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.training.conductor import Conductor

HERE = Path(__file__).parent
GROUP, MODALITIES, UNLABELED = "Dataset500_Cost", 6, 16
# nnU-Net's own plans, but for these: smaller patches and batches, so that a CPU measures within minutes
CHANGED_PLANS = {"2d": {"batch_size": 8}, "3d_fullres": {"patch_size": [24, 48, 48]}}
# nnU-Net's default networks for such patches
PLANS_ON_GPU = {
    name: {
        "patch_size": [size] * dimensions,
        "batch_size": batch_size,
        "architecture": {
            "n_stages": 6,
            "features_per_stage": [32, 64, 128, 256, *([320, 320] if dimensions == 3 else [512, 512])],
            "kernel_sizes": [[3] * dimensions] * 6,
            "strides": [[1] * dimensions, *[[2] * dimensions] * 5],
            "n_conv_per_stage": [2] * 6,
            "n_conv_per_stage_decoder": [2] * 5,
        },
    }
    for name, dimensions, size, batch_size in (("2d", 2, 256, 12), ("3d_fullres", 3, 128, 2))
}


def arguments(text: str) -> argparse.Namespace:
    """What every script takes: a folder for the phantom and the number of rounds."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the phantom; reused if it is there")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured in turn")
    parser.add_argument("--only", help="one part of a script that has several")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    memory.DEVICE = options.device
    if options.device == "cuda":
        CHANGED_PLANS.update(PLANS_ON_GPU)
    return options


def prepare(work: Path) -> None:
    """Write, plan and preprocess the phantom once: 5 labeled and 16 unlabeled cases, 6 modalities, 3D and 2D."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work.resolve() / name)
    os.environ |= {"nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "2", "nnUNet_compile": "f"}
    if not _prepared(work).is_file():
        _prepare(work)
    os.environ["nnUNet_n_proc_DA"] = "0"


def _prepare(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    raw = write_phantom_dataset(
        work / "nnUNet_raw", 500, "Cost", 5, UNLABELED, 1, shape=(40, 64, 64), modalities=("FLAIR", "T1", "T2")
    )
    described = json.loads((raw / "dataset.json").read_text())
    for channel in range(3, MODALITIES):
        described["channel_names"][str(channel)] = f"twice{channel - 3}"
        for file in raw.glob(f"images*/*_{channel - 3:04d}.nii.gz"):
            another = file.with_name(file.name.replace(f"_{channel - 3:04d}", f"_{channel:04d}"))
            sitk.WriteImage(sitk.ReadImage(str(file)) * 2, str(another))
    (raw / "dataset.json").write_text(json.dumps(described))
    group = plan_and_preprocess(500, ["2d", "3d_fullres"], num_processes=[2, 2], num_processes_fingerprint=2)
    for name in (GROUP, *(m.dataset_name for m in group.modalities)):
        file = Path(os.environ["nnUNet_preprocessed"]) / name / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        for configuration, changes in CHANGED_PLANS.items():
            plans["configurations"][configuration] |= {k: v for k, v in changes.items() if k != "architecture"}
            arch = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
            arch |= changes.get("architecture", {})
        file.write_text(json.dumps(plans))
    os.environ["nnUNet_n_proc_DA"] = "0"
    for configuration in ("2d", "3d_fullres"):
        epoch = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}
        with quiet():
            make_trainer(nnUNetTrainerSemiCML, configuration, **epoch).run_training()  # where PReL starts
    _prepared(work).touch()


def _prepared(work: Path) -> Path:
    """There, if the phantom is, with the plans for this device."""
    return work / f"prepared_for_{memory.DEVICE}"


@contextlib.contextmanager
def quiet() -> object:
    """Without what nnU-Net prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def make_trainer(
    trainer_class: type[nnUNetTrainer], configuration: str, modalities: int = 2, **attributes: object
) -> nnUNetTrainer:
    """An initialized trainer of the first modalities of the group; a stock one gets the very first."""
    dataset = GROUP
    if not issubclass(trainer_class, Conductor):
        dataset = ModalityGroup.load(GROUP).modalities[0].dataset_name
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    torch.manual_seed(0)
    with quiet():
        trainer = trainer_class(
            {**plans, "continue_training": False},
            configuration,
            0,
            json.loads((folder / "dataset.json").read_text()),
            torch.device(memory.DEVICE),
        )
        for name, value in attributes.items():
            setattr(trainer, name, value)
        if dataset == GROUP:
            trainer.group.modalities = trainer.group.modalities[:modalities]
            trainer.modality_plans = trainer.modality_plans[:modalities]
        trainer.initialize()
        if isinstance(trainer, nnUNetTrainerSemiCMLPReL):
            trainer._start_from_first_stage()
    return trainer


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every function, each once per round, after a round that does not count."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            start = clock()
            function()
            synchronize()
            if i:
                seconds[name].append(clock() - start)
    return seconds


def synchronize() -> None:
    """Wait for a GPU, if one computes."""
    if memory.DEVICE == "cuda":
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> str:
    """Median and range over the rounds of the ratio within a round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def operations(function: Callable[[], object], number: int = 12) -> str:
    """A table of the operators that take most of the time of a call, by torch.profiler."""
    on_gpu = memory.DEVICE == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        function()
        synchronize()

    def time_of(event: FunctionEventAvg) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    rows = [(e.key, e.count, f"{time_of(e) / total:.1%}") for e in events[:number]]
    rows.append((f"{len(events) - number} others", "", f"{1 - sum(map(time_of, events[:number])) / total:.1%}"))
    return table(("operator", "calls", "share of the time"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


RATIOS = " Ratios are medians (range) over rounds in which everything is measured in turn."


def write_results(file: Path, title: str, parts: Sequence[str], measured: str = RATIOS) -> None:
    """Write a page of results, headed by how it was made and measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("nnunetv2", "torch", "numpy"))
    script = Path(sys.argv[0]).resolve().relative_to(HERE.parents[1])
    on_gpu = memory.DEVICE == "cuda"
    file = file.with_stem(f"{file.stem}_cuda") if on_gpu else file
    machine = f"{torch.cuda.get_device_name()}, " if on_gpu else ""
    head = (
        f"# {title}\n\n"
        f"`python {script} {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {machine}{platform.machine()} CPU with "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}."
        f"{measured}\n"
    )
    file.write_text("\n".join([head, *parts]))
    print(f"Wrote {file}")
