"""Whether the loader keeps the step fed: what a coupled batch costs to load, and how long steps wait for it.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cost/loader.py --work SCRATCH

Two modalities, the phantom with nnU-Net's augmentation (3D: patches of 24 × 48 × 48 in batches of 2; 2D: 64 × 64 in
batches of 8).
"""

import cProfile
import os
import pstats
import statistics
import time
from itertools import chain
from pathlib import Path

import torch
from common import HERE, alternate, arguments, make_trainer, prepare, quiet, ratio, table, write_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.data.streams import Patches, SemiSupervisedDataLoader
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML

CONFIGURATIONS = {"3d_fullres": "3D", "2d": "2D"}
STEPS = 8
BATCHES = 32  # drawn in a row: nnU-Net's augmentation differs from one to the next


def batches(configuration: str, rounds: int) -> tuple[list, str]:
    """CPU time of a coupled batch against stock batches, in one process, and where it goes."""
    coupled, stock = (make_trainer(c, configuration) for c in (nnUNetTrainerSemiCML, nnUNetTrainer))
    with quiet():
        coupled_batches, stock_batches = (t.get_dataloaders()[0] for t in (coupled, stock))
    loader = coupled_batches.data_loader
    functions = {
        "stock": lambda: next(stock_batches),
        "coupled": lambda: next(coupled_batches),
        "coupled, opened anew": lambda: _opening_anew(loader),
        **{
            kind: lambda own=own: [of_draw.generate_train_batch() for of_draw in own]
            for kind, own in loader.loaders.items()
        },
    }
    several = {name: lambda draw=draw: [draw() for _ in range(BATCHES)] for name, draw in functions.items()}
    seconds = alternate(several, rounds, time.process_time)
    row = [ratio(seconds, name, "stock") for name in ("labeled", "unlabeled", "coupled", "coupled, opened anew")]
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(2 * rounds):
        next(coupled_batches)
    profiler.disable()
    stats = pstats.Stats(profiler).stats  # (file, line, function): (calls, _, own time, time with callees, _)
    total = sum(entry[2] for entry in stats.values())
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:8]
    shares = [(f"`{Path(f).name} {name}`", f"{entry[2] / total:.0%}") for (f, _, name), entry in longest]
    return row, table((f"{CONFIGURATIONS[configuration]}: a coupled batch", "share of its time (own)"), shares)


def _opening_anew(loader: SemiSupervisedDataLoader) -> dict[str, list[Patches]]:
    """Draw as if no case had been opened lately, as most of many unlabeled cases are not."""
    for of_draw in chain.from_iterable(loader.loaders.values()):
        of_draw._data._opened.clear()
    return next(loader)


def waiting(configuration: str) -> list[tuple]:
    """Steps of a real training loop: share of the time in which a step waits for its batch."""
    rows = []
    torch.set_num_threads(2)
    for workers in (1, 2):
        os.environ["nnUNet_n_proc_DA"] = str(workers)
        trainer = make_trainer(nnUNetTrainerSemiCML, configuration)
        with quiet():
            loader, validation = trainer.get_dataloaders()
        waits, steps = [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            batch = next(loader)
            ready = time.perf_counter()
            trainer.train_step(batch)
            waits.append(ready - start)
            steps.append(time.perf_counter() - ready)
        for augmenter in (loader, validation):
            augmenter._finish()
        alone = []
        for _ in range(STEPS // 2):
            start = time.perf_counter()
            trainer.train_step(batch)
            alone.append(time.perf_counter() - start)
        share = sum(waits[2:]) / sum(waits[2:] + steps[2:])
        slower = statistics.median(steps[2:]) / statistics.median(alone)
        rows.append((CONFIGURATIONS[configuration], workers, f"{share:.1%}", f"{slower:.2f}"))
        print(rows[-1], flush=True)
    os.environ["nnUNet_n_proc_DA"] = "0"
    return rows


def main() -> None:
    """Measure and write loader.md."""
    options = arguments(__doc__)
    prepare(options.work)
    rows, profiles, waits = [], [], []
    for configuration, dimensions in CONFIGURATIONS.items():
        torch.set_num_threads(1)  # as in nnU-Net's worker processes
        row, shares = batches(configuration, options.rounds)
        rows.append((dimensions, *row))
        print(rows[-1], flush=True)
        profiles.append(shares)
        waits += waiting(configuration)
    parts = [
        __doc__.split("\n\n")[2],
        "\n## A batch, in units of stock nnU-Net's labeled batch of one modality (one process, one thread)\n",
        table(
            ("", "labeled, both modalities", "unlabeled, both", "coupled batch", "the same, cases opened anew"), rows
        ),
        f"\nCPU time of {BATCHES} batches in a row. Files of the cases opened last stay open; here, of all of them.\n",
        *profiles,
        "\n## A training loop on two cores: two threads compute, beside the loading processes\n",
        f"{STEPS} steps, the first two left out. The last column compares steps beside the loader with steps on a "
        "batch that lies there, the loader's processes ended.\n",
        table(("", "loading processes", "share of the time waited", "step beside loader"), waits),
    ]
    write_results(HERE / "loader.md", "Whether the loader keeps the step fed", parts)


if __name__ == "__main__":
    main()
