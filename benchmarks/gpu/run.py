"""What only a GPU can show: every method in mixed precision on CUDA, compiled, by NCCL, and what a step costs there.

    python benchmarks/gpu/run.py --work SCRATCH [--only learning|cost|METHOD]

Writes learning.md and cost.md beside this script, part by part, so that a run that is cut short leaves what it has.

- learning: on a tiny phantom, 2D and 3D. Every method trains; its step gives the same gradients with activations
  recomputed and held; its terms are those of the CPU in float32; a training that is interrupted goes on as if it had
  not been; the deployed model predicts through nnU-Net's own command line on the GPU.
- cost: nnU-Net's default network for patches of 128 voxels in batches of 2, on padded images of the same phantom. Peak
  memory and time of a step, relative to one step of stock nnU-Net for every network, measured in turn in one process.
"""

import argparse
import contextlib
import copy
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess
from nnunetv2_semicml.training import conductor

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try the script alone
DATASET = "Dataset500_Small"
SHORT = {"num_epochs": 4, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1, "save_every": 2}
METHODS = [name for name in semicml_trainers.__all__ if not name.rpartition("_")[2].endswith("epochs")]
METHODS.sort(key=lambda name: name.endswith("PReL"))  # second stages come last


def prepare(work: Path) -> None:
    """Write, plan and preprocess the phantom."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work.resolve() / name)
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    os.environ |= {"nnUNet_def_n_proc": "8", "nnUNet_n_proc_DA": "8", "nnUNet_compile": "f"}
    os.environ["nnUNet_extTrainer"] = str(Path(semicml_trainers.__file__).parent)
    raw = Path(os.environ["nnUNet_raw"])
    if not (raw / DATASET).is_dir():
        write_phantom_dataset(raw, 500, "Small", 5, 6, 2, shape=(24, 32, 32), num_classes=2)
        plan_and_preprocess(500, ["2d", "3d_fullres"], num_processes=[2], num_processes_fingerprint=2)
        change_plans()
    os.environ["nnUNet_n_proc_DA"] = "0"


def change_plans() -> None:
    """Small networks and batches, and a configuration "large" that is nnU-Net's default for patches of 128 voxels."""
    for name in (DATASET, *(m.dataset_name for m in ModalityGroup.load(DATASET).modalities)):
        file = Path(os.environ["nnUNet_preprocessed"]) / name / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        large = copy.deepcopy(plans["configurations"]["3d_fullres"])
        large |= {"patch_size": [128] * 3, "batch_size": 2}
        large["architecture"]["arch_kwargs"] |= {
            "n_stages": 6,
            "features_per_stage": [32, 64, 128, 256, 320, 320],
            "kernel_sizes": [[3] * 3] * 6,
            "strides": [[1] * 3, *[[2] * 3] * 5],
            "n_conv_per_stage": [2] * 6,
            "n_conv_per_stage_decoder": [2] * 5,
        }
        for configuration in plans["configurations"].values():
            arch = configuration["architecture"]["arch_kwargs"]
            arch["features_per_stage"] = [8, 16, 32, 32, 32, 32][: arch["n_stages"]]
            configuration["batch_size"] = 4
        plans["configurations"]["large"] = large
        file.write_text(json.dumps(plans))


def make(name: str, configuration: str, device: str = DEVICE, **attributes: object) -> nnUNetTrainer:
    """An initialized trainer with the same weights at every call."""
    trainer_class = getattr(semicml_trainers, name)
    folder = Path(os.environ["nnUNet_preprocessed"]) / DATASET
    plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
    torch.manual_seed(0)
    np.random.seed(0)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    with quiet():
        trainer = trainer_class(plans, configuration, 0, dataset_json, torch.device(device))
        for key, value in attributes.items():
            setattr(trainer, key, value)
        trainer.initialize()
        if hasattr(trainer, "_start_from_first_stage"):
            trainer._start_from_first_stage()
    return trainer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what nnU-Net prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def draw(trainer: nnUNetTrainer) -> dict:
    """A batch of the trainer."""
    np.random.seed(1)
    torch.manual_seed(1)
    with quiet():
        loader, _ = trainer.get_dataloaders()
    return next(loader)


def weights(trainer: nnUNetTrainer) -> list[torch.Tensor]:
    """All weights of all networks, on the CPU."""
    return [p.detach().cpu().clone() for t in trainer.trainers for p in t.unwrapped_network().parameters()]


# learning


def trains(name: str, configuration: str) -> str:
    """Whole, and interrupted and resumed: how far apart the weights are in the end, relative to how far they moved."""
    os.environ["nnUNet_semicml_seed"] = "3"
    whole = make(name, configuration, **SHORT)
    start = weights(whole)
    with quiet():
        whole.run_training()
    parts = make(name, configuration, **SHORT)
    stopped = parts.on_epoch_start

    def stop_at_half() -> None:
        if parts.current_epoch == 2:
            raise KeyboardInterrupt
        stopped()

    parts.on_epoch_start = stop_at_half
    with quiet(), contextlib.suppress(KeyboardInterrupt):
        parts.run_training()
    resumed = make(name, configuration, **SHORT)
    with quiet():
        resumed.load_checkpoint(str(Path(parts.output_folder) / "checkpoint_latest.pth"))
        resumed.run_training()
    end, again = weights(whole), weights(resumed)
    assert all(w.isfinite().all() for w in end), "weights are not finite"
    moved = max((a - b).abs().max().item() for a, b in zip(start, end, strict=True))
    apart = max((a - b).abs().max().item() for a, b in zip(again, end, strict=True))
    assert moved > 0, "nothing was learned"
    if whole.grad_scaler is not None:
        scale = whole.grad_scaler.get_scale()
        assert scale >= 2**8, f"the scaler fell to {scale}"
    return "equal to the last bit" if apart == 0 else f"apart by {apart / moved:.1e} of what was learned"


def gradients(trainer: nnUNetTrainer, batch: dict, recompute: bool) -> list[torch.Tensor]:
    """Those of a step, before clipping."""
    trainer.recompute = recompute
    trainer.current_epoch = trainer.num_epochs - 1
    if trainer.grad_scaler is not None:  # which starts so high that the first steps overflow, and are left out
        trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    for t in trainer.trainers:
        t.optimizer.zero_grad(set_to_none=True)
    draws, labeled = trainer.unlabeled_draws(batch), trainer.labeled_patches(batch)
    torch.manual_seed(2)
    trainer._unsupervised_step(trainer.learners(), draws, labeled)
    taught = trainer.labeled_views(labeled, draws)
    for t in trainer.learners():
        trainer._supervised_step(t, taught[t.name])
    scale = 1.0 if trainer.grad_scaler is None else trainer.grad_scaler.get_scale()
    # the lowest head of deep supervision has the weight 0, and a gradient if the network is compiled
    return [
        p.grad / scale
        for t in trainer.learners()
        for p in t.trained_parameters()
        if p.grad is not None and p.grad.any()
    ]


def recomputes(name: str, configuration: str) -> str:
    """Largest difference of a gradient, relative to the largest gradient, of activations recomputed and held."""
    trainer = make(name, configuration, **SHORT)
    batch = draw(trainer)
    held, recomputed = (gradients(trainer, batch, recompute) for recompute in (False, True))
    assert all(g.isfinite().all() for g in held + recomputed), "gradients are not finite"
    largest = max(g.abs().max().item() for g in held)
    apart = max((a - b).abs().max().item() for a, b in zip(held, recomputed, strict=True))
    assert apart <= 2e-3 * largest, f"gradients are apart by {apart / largest:.1e}"
    return "equal to the last bit" if apart == 0 else f"{apart / largest:.0e}"


def same_terms(name: str, configuration: str) -> str:
    """Largest relative difference of a term from the CPU's in float32, with the same weights and batch."""
    options = {**SHORT, "noise_std": 0.0, "recompute": False}
    on = {device: make(name, configuration, device, **options) for device in ("cpu", DEVICE)}
    batch = draw(on["cpu"])
    for a, b in zip(on[DEVICE].trainers, on["cpu"].trainers, strict=True):
        a.unwrapped_network().load_state_dict(b.unwrapped_network().state_dict())
    on[DEVICE].set_method_state(on["cpu"].get_method_state())
    found = {}
    for device, trainer in on.items():
        trainer.current_epoch = trainer.num_epochs - 1
        draws, labeled = trainer.unlabeled_draws(batch), trainer.labeled_patches(batch)
        terms = trainer._unsupervised_loss(trainer.learners(), draws, labeled)
        found[device] = {key: value.item() for key, value in terms.items()}
    if not found["cpu"]:
        return "has none"
    apart = max(abs(found[DEVICE][key] - v) / max(abs(v), 1e-3) for key, v in found["cpu"].items())
    assert apart < 0.05, f"terms {found}"
    return f"{apart:.0e}"


def waits(name: str, configuration: str) -> str:
    """How often the host waits for the GPU in a step, and in a step of stock nnU-Net for each network."""
    trainer = make(name, configuration, **SHORT)
    batch = draw(trainer)
    stock = {t.name: dict(zip(("data", "target"), p, strict=True)) for t, p in zip(
        trainer.trainers, trainer.labeled_patches(batch).values(), strict=True)}  # fmt: skip

    def stock_steps() -> None:
        for t in trainer.trainers:
            nnUNetTrainer.train_step(t, stock[t.name])

    counts = []
    for step in (lambda: trainer.train_step(batch), stock_steps):
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in caught))
    return f"{counts[0]} ({counts[1]})"


def predicts(name: str, configuration: str) -> str:
    """Predict a test scan of one modality with nnU-Net's own command line, which knows nothing of this package."""
    group = ModalityGroup.load(DATASET)
    modality = group.modalities[1]
    raw, out = Path(os.environ["nnUNet_raw"]) / DATASET, Path(os.environ["nnUNet_results"]) / "predictions" / name
    scans = out / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    for scan in (raw / "imagesTs").glob("*_0001.nii.gz"):
        (scans / scan.name.replace("_0001", "_0000")).write_bytes(scan.read_bytes())
    code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as p; p()"
    words = ["-i", scans, "-o", out, "-d", modality.dataset_name, "-c", configuration, "-f", "0", "-tr", name]
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"}
    call = [sys.executable, "-c", code, *map(str, words), "-device", DEVICE, "-npp", "1", "-nps", "1"]
    subprocess.run(call, env=environment, check=True, capture_output=True)
    made = len(list(out.glob("*.nii.gz")))
    assert made == len(list(scans.iterdir())), f"{made} predictions"
    return f"{made} scans"


def compiles(name: str, configuration: str) -> str:
    """A compiled step (inductor) against an eager one: largest difference of a gradient, relative to the largest."""
    eager = make(name, configuration, **SHORT)
    batch = draw(eager)
    os.environ["nnUNet_compile"] = "t"
    try:
        compiled = make(name, configuration, **SHORT)
    finally:
        os.environ["nnUNet_compile"] = "f"
    assert all(isinstance(t.network, torch._dynamo.OptimizedModule) for t in compiled.trainers)
    a, b = gradients(eager, batch, True), gradients(compiled, batch, True)
    largest = max(g.abs().max().item() for g in a)
    apart = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    assert apart < 0.05 * largest, f"gradients are apart by {apart / largest:.1e}"
    compiled.train_step(batch)
    return f"{apart / largest:.0e}"


def by_nccl(name: str, configuration: str) -> str:
    """A training in a group of one process, whose gradients NCCL averages."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        trainer = make(name, configuration, **SHORT)
        assert trainer.is_ddp
        with quiet():
            trainer.run_training()
        assert all(w.isfinite().all() for w in weights(trainer))
    finally:
        dist.destroy_process_group()
    return "trained"


CHECKS = {
    "resumed": trains,
    "recomputed and held": recomputes,
    "terms on the CPU": same_terms,
    "waits (stock)": waits,
    "predicts": predicts,
}
ON_SEMICML = {"compiled": compiles, "NCCL": by_nccl}


def learning(at_once: int = 8) -> None:
    """Every check of every method, several methods at a time; first stages before the second ones."""
    rows: list[dict[str, str]] = []
    for second in (False, True):
        names = [name for name in METHODS if name.endswith("PReL") == second]
        with ThreadPoolExecutor(at_once) as pool:
            for of_method in pool.map(learning_of_other_process, names):
                rows += of_method
                write("learning.md", [*CHECKS, *ON_SEMICML], rows)


def learning_of_other_process(name: str) -> list[dict[str, str]]:
    """Rows of a method, in a process of its own."""
    call = [sys.executable, __file__, "--work", parsed.work, "--only", name]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    print(done.stderr[-3000:] if "FAILED" in done.stdout or done.returncode else "", done.stdout, flush=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def learning_of(name: str) -> None:
    """Print a row for each configuration; what fails is written down, and the rest goes on."""
    for configuration in ("2d", "3d_fullres"):
        checks = CHECKS | (ON_SEMICML if name == "nnUNetTrainerSemiCML" else {})
        row = {"method": name.removeprefix("nnUNetTrainer"), "configuration": configuration}
        row |= {title: outcome(check, name, configuration) for title, check in checks.items()}
        print(json.dumps(row), flush=True)


def outcome(check: Callable[[str, str], str], name: str, configuration: str) -> str:
    """What a check found, or how it failed."""
    try:
        return check(name, configuration)
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, subprocess.CalledProcessError):
            print(error.stdout.decode()[-2000:], error.stderr.decode()[-2000:])
        return f"FAILED: {type(error).__name__} {str(error).splitlines()[0][:80] if str(error) else ''}"


# cost


def cost(rounds: int = 7) -> None:
    """Peak memory and median time of steps, in turn."""
    rows = []
    for name in ("nnUNetTrainerSupervisedEMA", "nnUNetTrainerMeanTeacher", "nnUNetTrainerSemiCML"):
        for compiled in (False, True) if name == "nnUNetTrainerSemiCML" else (False,):
            os.environ["nnUNet_compile"] = "t" if compiled else "f"
            rows.append({"method": name.removeprefix("nnUNetTrainer"), **cost_of(name, compiled, rounds)})
            torch.cuda.empty_cache()
            print(rows[-1], flush=True)
            write("cost.md", list(rows[0])[1:], rows)
    os.environ["nnUNet_compile"] = "f"


def cost_of(name: str, compiled: bool, rounds: int) -> dict[str, object]:
    """One row."""
    trainer = make(name, "large", num_epochs=2, num_iterations_per_epoch=1)
    trainer.current_epoch = 1
    batch = draw(trainer)
    stock = [{"data": p.image, "target": p.target} for p in trainer.labeled_patches(batch).values()]

    def stock_steps() -> None:
        for t, own in zip(trainer.trainers, stock, strict=True):
            nnUNetTrainer.train_step(t, own)

    def coupled(recompute: bool) -> None:
        trainer.recompute = recompute
        trainer.train_step(batch)

    steps = {"stock": stock_steps, "recomputed": lambda: coupled(True), "held": lambda: coupled(False)}
    patch = " × ".join(map(str, trainer.configuration_manager.patch_size))
    about = {"networks": len(trainer.trainers), "patch": patch, "batch": trainer.configuration_manager.batch_size}
    return {**about, "compiled": compiled, **outcome_of_cost(steps, rounds)}


def outcome_of_cost(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, str]:
    """Peak memory beyond what is held anyway, and time, relative to the stock steps."""
    peaks, seconds = {}, {key: [] for key in steps}
    for _ in range(3):  # compiles, and chooses algorithms
        for step in steps.values():
            step()
    for key, step in steps.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peaks[key] = torch.cuda.max_memory_allocated()
    for _ in range(rounds):
        for key, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds[key].append(time.perf_counter() - start)
    of_stock = statistics.median(seconds["stock"])

    def times(key: str) -> str:
        ratios = [a / b for a, b in zip(seconds[key], seconds["stock"], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"

    return {
        "memory of stock, GiB": f"{peaks['stock'] / 2**30:.2f}",
        "recomputed, memory": f"{peaks['recomputed'] / peaks['stock']:.2f}",
        "held, memory": f"{peaks['held'] / peaks['stock']:.2f}",
        "stock, s": f"{of_stock:.3f}",
        "recomputed": times("recomputed"),
        "held": times("held"),
    }


def write(name: str, columns: list[str], rows: list[dict[str, object]]) -> None:
    """Write a table with what it was made on."""
    columns = list(dict.fromkeys(["method", "configuration", *columns])) if "configuration" in rows[0] else [
        "method", *columns]  # fmt: skip
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    lines = [
        f"# {name.removesuffix('.md').capitalize()} on a GPU",
        "",
        f"`{' '.join(['python', *sys.argv])}`, {datetime.date.today():%d %B %Y}, {machine}, {os.cpu_count()} cores, "
        f"PyTorch {torch.__version__}, seed 0. The script's docstrings say what the columns mean.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows),
        "",
    ]
    (HERE / name).write_text("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the phantom; reused if it is there")
    parser.add_argument("--only", choices=["learning", "cost", *METHODS])
    parsed = parser.parse_args()
    prepare(parsed.work)
    # pictures take longer than such epochs
    MetaLogger.plot_progress_png = lambda self, folder: None
    conductor.plot_terms = lambda *_: None
    if parsed.only in METHODS:
        learning_of(parsed.only)
    else:
        for part in (cost, learning):
            if parsed.only in (None, part.__name__):
                part()
