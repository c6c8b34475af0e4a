"""A raw dataset as a user may have it, and planning without processes: each that nnU-Net spawns costs seconds."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as nnunet_trainer_module
import numpy as np
import pytest
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

from nnunetv2_semicml.data import image_check
from nnunetv2_semicml.data.locks import LOCK_FILE
from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning import plan_and_preprocess as planning
from nnunetv2_semicml.planning import preprocess

AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


def write_toy(
    raw: Path,
    number: int = 500,
    name: str = "Toy",
    labeled: int = 6,
    unlabeled: int = 6,
    test: int = 0,
    shape: Sequence[int] = (24, 28, 16),
    channels: Sequence[str] = ("T1", "T2"),
    affine: np.ndarray = AFFINE,
    ending: str = ".nii.gz",
) -> Path:
    """Write a bright ball in noise for every case P00, P01, …, brighter in later channels; returns the folder."""
    random = np.random.default_rng(0)
    folder = raw / f"Dataset{number:03d}_{name}"
    for i, kind in enumerate(["Tr"] * labeled + ["Un"] * unlabeled + ["Ts"] * test):
        center = np.array(shape) // 2 + random.integers(-2, 3, 3) * (np.array(shape) > 8)
        ball = ((np.indices(shape) - center[:, None, None, None]) ** 2).sum(axis=0) < 25
        for channel in range(len(channels)):
            image = random.normal(100, 10, shape) + ball * (60 + 20 * channel)
            save(folder / f"images{kind}" / f"P{i:02d}_{channel:04d}{ending}", image.astype(np.float32), affine)
        if kind != "Un":
            save(folder / f"labels{kind}" / f"P{i:02d}{ending}", ball.astype(np.uint8), affine)
    write_json(
        folder,
        channel_names={str(i): channel for i, channel in enumerate(channels)},
        labels={"background": 0, "ball": 1},
        numTraining=labeled,
        file_ending=ending,
    )
    return folder


def save(file: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """Write a NIfTI file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), file)


def rewrite(folder: Path, pattern: str, change: Callable) -> None:
    """Replace the voxels and the affine of NIfTI files by what `change` makes of them."""
    files = sorted(folder.glob(pattern))
    assert files
    for file in files:
        image = nib.load(file)
        save(file, *change(np.asanyarray(image.dataobj), image.affine.copy()))


def write_json(folder: Path, **changes: object) -> None:
    """Change dataset.json."""
    file = folder / "dataset.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def draw_few_intensities(patch) -> None:
    """For the statistics in fingerprints nnU-Net draws 10⁸ voxels with replacement, however small a dataset is."""
    run = fingerprint_extractor.DatasetFingerprintExtractor.run

    def run_on_few(self, *args, **options):
        self.num_foreground_voxels_for_intensitystats = 10_000
        return run(self, *args, **options)

    patch.setattr(fingerprint_extractor.DatasetFingerprintExtractor, "run", run_on_few)


def use_threads(patch) -> None:
    """Let threads do what spawned processes do otherwise, and draw few intensities."""
    draw_few_intensities(patch)
    for module in (image_check, preprocess):
        patch.setattr(module, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
    stand_in = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    patch.setattr(fingerprint_extractor, "multiprocessing", stand_in)


def copy_processes(patch) -> None:
    """Let the processes of nnU-Net's validations be copies of this one, and not such that import nnU-Net first."""
    forking = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
    for module in (nnunet_trainer_module, evaluate_predictions):
        patch.setattr(module, "multiprocessing", forking)
    patch.setattr(nnunet_trainer_module, "default_num_processes", 1)


def set_folders(patch, root: Path) -> Path:
    """Make nnU-Net's three folders below `root` those of the environment; returns nnUNet_raw."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / variable).mkdir(parents=True, exist_ok=True)
        patch.setenv(variable, str(root / variable))
    patch.setenv("nnUNet_n_proc_DA", "1")
    return root / "nnUNet_raw"


class Planned(Exception):
    """In the place of planning: all checks are passed."""


def stop_before_planning(patch) -> None:
    """Let `plan_and_preprocess` end where it has checked everything and written nothing."""

    def stop(*_):
        raise Planned

    patch.setattr(planning, "raw_view", stop)


def plan(*args, **options):
    """`plan_and_preprocess` with one thread of everything."""
    return planning.plan_and_preprocess(*args, **{"num_processes": [1], "num_processes_fingerprint": 1, **options})


def contents(*folders: Path) -> dict[Path, tuple]:
    """Every file and folder below but locks, with the files' times of modification and bytes."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.name != LOCK_FILE]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else () for path in paths}


_HOLD = """
import os, sys, time
from pathlib import Path
from nnunetv2_semicml.data.locks import hold_lock
hold_lock(Path(sys.argv[1]), "holding", shared=sys.argv[2] == "shared", wait="wait" in sys.argv)
child = os.fork() if "fork" in sys.argv else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


@contextmanager
def lock_elsewhere(folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    """Another process that takes the lock of a folder; it prints the number of its child when it has it.

    Args:
        folder: the folder.
        options: "shared" or "exclusive", and any of "wait", and "fork" for a child that outlives the process.
    """
    command = [sys.executable, "-c", _HOLD, str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def held_elsewhere(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process, as `lock_elsewhere` makes it, that has the lock, and the child that it has forked."""
    with lock_elsewhere(folder, *options) as process:
        yield process, int(process.stdout.readline())


def copy_planned(patch, root: Path, shared: Path) -> Path:
    """Dataset500_Toy, planned and preprocessed for 2d, in folders that a test may change; returns its raw folder.

    Args:
        patch: for the environment and for threads.
        root: the folders' place.
        shared: where the first call leaves what others copy.
    """
    if not shared.is_dir():
        with pytest.MonkeyPatch.context() as own:
            use_threads(own)
            write_toy(set_folders(own, shared))
            plan(500, ["2d"])
    shutil.copytree(shared, root, dirs_exist_ok=True)
    use_threads(patch)
    return set_folders(patch, root) / "Dataset500_Toy"


def preprocessed(dataset_name: str) -> Path:
    """Its folder in nnUNet_preprocessed."""
    return Path(os.environ["nnUNet_preprocessed"]) / dataset_name


def require_ready(dataset_name: str = "Dataset500_Toy", configuration: str = "2d") -> None:
    """As trainers do."""
    plans = json.loads((preprocessed(dataset_name) / "nnUNetPlans.json").read_text())
    ModalityGroup.load(dataset_name).require_ready(plans, configuration)


def refusal(command: Callable, *args, **options) -> str:
    """The sentence of a UserError."""
    with pytest.raises(UserError) as error:
        command(*args, **options)
    return str(error.value)
