"""What a step costs now against what it cost at an earlier commit, trainer by trainer: time and peak memory.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cost/versions.py COMMIT --work SCRATCH

Each side is a process of its own; they take turns, a step at a time, on batches that they have drawn from the same
phantom (see step.py), with activations held and recomputed; every trainer in 2D, Semi-CML and PReL in 3D, too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from memory import peak_memory

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATIONS = {"3d_fullres": "3D", "2d": "2D"}
IN_3D = ("nnUNetTrainerSemiCML", "nnUNetTrainerSemiCMLPReL")  # all would take hours


class Side:
    """A process that makes steps with the package as it stands in some folder."""

    def __init__(self, code: Path, work: Path):
        environment = os.environ | {"PYTHONPATH": str(code)}
        command = [sys.executable, __file__, "-", "--work", str(work), "--side"]
        self.process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def ask(self, *question: str | bool | None) -> float | list[str]:
        """Send a question and wait for its answer."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def answer() -> None:
    """What such a process does."""
    import torch

    from nnunetv2_semicml.ext_trainers import semicml_trainers

    answers, sys.stdout = sys.stdout, sys.stderr
    folder = Path(os.environ["nnUNet_preprocessed"]) / "Dataset500_Cost"
    trainer = batch = None
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "names":
            found = sorted(
                n for n in vars(semicml_trainers) if n.startswith("nnUNetTrainer") and not n.endswith("epochs")
            )
        elif what == "make":
            name, configuration, recompute = rest
            torch.manual_seed(0)
            plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
            dataset_json = json.loads((folder / "dataset.json").read_text())
            trainer_class = getattr(semicml_trainers, name)
            if hasattr(trainer_class, "first_stage"):  # that of the phantom is of Semi-CML
                trainer_class.first_stage = semicml_trainers.nnUNetTrainerSemiCML
            trainer = trainer_class(plans, configuration, 0, dataset_json, torch.device("cpu"))
            trainer.group.modalities = trainer.group.modalities[:2]
            trainer.modality_plans = trainer.modality_plans[:2]
            setattr(trainer, "recompute" if hasattr(trainer, "recompute") else "two_pass", recompute)
            trainer.initialize()
            if hasattr(trainer_class, "first_stage"):
                teach = getattr(trainer, "_set_labeler", None) or trainer._set_teacher
                teach("FLAIR", trainer.trainers[0].network.state_dict())
            trainer.current_epoch = trainer.num_epochs // 2
            batch = next(trainer.get_dataloaders()[0])
            found = 0.0
        elif what == "step":
            start = time.perf_counter()
            trainer.train_step(batch)
            found = time.perf_counter() - start
        else:
            found = min(peak_memory(partial(trainer.train_step, batch)) for _ in range(3))
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    """Measure and write versions.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--work", type=Path, required=True, help="folder for the phantom; reused if it is there")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured in turn")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)  # in a process of one side
    options = parser.parse_args()
    if options.side:
        answer()
        return
    from common import HERE, prepare, ratio, table, write_results  # needs the package as it is now

    work = options.work.resolve()
    prepare(work)
    git = partial(subprocess.run, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    revision = git(["git", "rev-parse", "--short", options.commit]).stdout.strip()
    if not (work / revision).is_dir():
        git(["git", "worktree", "add", "--detach", work / revision, revision])
    sides = {"before": Side(work / revision, work), "now": Side(REPOSITORY, work)}
    names = [side.ask("names") for side in sides.values()]
    rows = []
    for name in [name for name in names[0] if name in names[1]]:
        for configuration, dimensions in CONFIGURATIONS.items():
            if dimensions == "3D" and name not in IN_3D:
                continue
            for recompute in (False, True):
                for side in sides.values():
                    side.ask("make", name, configuration, recompute)
                seconds = {which: [] for which in sides}
                for i in range(options.rounds + 1):
                    # neither always comes first
                    for which, side in list(sides.items())[:: 1 if i % 2 else -1]:
                        taken = side.ask("step")
                        if i:
                            seconds[which].append(taken)
                peaks = {which: side.ask("peak") for which, side in sides.items()}
                how = "recomputed" if recompute else "held"
                memory = f"{peaks['now'] / peaks['before']:.3f}"
                rows.append((name, dimensions, how, ratio(seconds, "now", "before"), memory))
                print(rows[-1], flush=True)
    for side in sides.values():
        side.process.stdin.close()
        side.process.wait()
    header = ("trainer", "", "activations", f"time of a step, now / {revision}", "peak memory")
    write_results(
        HERE / "versions.md", f"A step now and at {revision}", [__doc__.split("\n\n")[2], table(header, rows)]
    )


if __name__ == "__main__":
    main()
