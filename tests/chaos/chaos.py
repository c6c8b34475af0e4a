"""Kills processes at random moments, fills disks and starts everything twice; says what is left of the promises.

    make chaos                                         # or, with other numbers of trials and a limit:
    OMP_WAIT_POLICY=PASSIVE python tests/chaos/chaos.py --work SCRATCH [--trials 6] [--minutes 30] [--seed 0]

On a tiny 2D phantom, by the command lines that users type. A trial is right if every command that has to end well does,
every other one ends with the sentence of a UserError as its last line, and what is there at the end is what an
uninterrupted run leaves: the same files, no others, and the same weights to the last bit. Small file systems are tmpfs,
which only root can mount; without it those trials are left out, and the table says so.

Trials are kept in SCRATCH, and the command goes on where it was interrupted, unless the code is another one. To work on
the code meanwhile, run it in another clone: what is tested is the code beside the script.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import torch

from nnunetv2_semicml.data.locks import hold_lock

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
REPORT = REPOSITORY / "benchmarks" / "reliability.md"
BIN = Path(sys.executable).parent
GROUP, FLAIR, T1 = "Dataset500_Chaos", "Dataset501_Chaos_FLAIR", "Dataset502_Chaos_T1"
# trainer -> dataset that it trains, and datasets of the models
TRAINERS = {
    "SemiCML": (500, [FLAIR, T1]),
    "SemiCMLPReL": (500, [FLAIR, T1]),
    "MeanTeacher": (502, [T1]),
    "CPS": (502, [T1]),
    "SECLRegion": (502, [T1]),
    "SupervisedEMA": (502, [T1]),
    "FilterMatch": (502, [T1]),
    "UniMatch": (502, [T1]),
    "SemiCMLPlus": (500, [FLAIR, T1]),
}
REFUSAL = "nnunetv2_semicml.errors.UserError: "  # nnU-Net's own commands end with a traceback, ours with "Error: "
LOCKED = "found another process at work there"
FULL = "cannot be written"


class Wrong(Exception):
    """What a trial found."""


def check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


class Command(subprocess.Popen):
    """A command line in a process group of its own, which can be killed as a whole."""

    started: ClassVar[list["Command"]] = []

    def __init__(self, command: list[object], environment: dict[str, str]):
        self.started.append(self)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        streams = {"stdout": subprocess.DEVNULL, "stderr": self.output}
        super().__init__([sys.executable, *map(str, command)], env=environment, start_new_session=True, **streams)

    def end(self) -> str:
        """Wait, for ten minutes at most; returns what it has printed about errors."""
        try:
            self.wait(600)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Wrong("a command that does not end") from None
        self.output.seek(0)
        return self.output.read().decode(errors="replace").strip()

    def kill_all(self) -> None:
        """Kill it and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class Place:
    """A folder with the results of some trainings, and the commands that write there."""

    def __init__(self, work: Path, results: Path, preprocessed: Path | None = None, seed: int = 7):
        self.results = results
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "nnUNet_raw": str(work / "nnUNet_raw"),
            "nnUNet_preprocessed": str(preprocessed or work / "nnUNet_preprocessed"),
            "nnUNet_results": str(results),
            "nnUNet_extTrainer": str(HERE / "trainers"),
            "nnUNet_semicml_seed": str(seed),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        results.mkdir(parents=True, exist_ok=True)

    def start(self, command: list[object], **changes: str) -> Command:
        """Start one of the command lines."""
        return Command(command, self.environment | changes)

    def train(self, trainer: str, *options: str) -> Command:
        """Start a training of fold 0."""
        program = HERE / "two_processes.py" if trainer.endswith("2") else BIN / "nnUNetv2_train"
        name = f"nnUNetTrainer{trainer.removesuffix('2')}_chaos" + "2" * trainer.endswith("2")
        device = [] if trainer.endswith("2") else ["-device", "cpu"]
        dataset = TRAINERS[trainer.removesuffix("2")][0]
        return self.start([program, dataset, "2d", 0, "-tr", name, *device, *options])

    def plan(self, *options: object) -> Command:
        """Start planning again."""
        program = BIN / "nnUNetv2_semicml_plan_and_preprocess"
        return self.start([program, "-d", 500, "-np", 1, "-npfp", 1, *options], nnUNet_n_proc_DA="1")

    def leaderboard(self, out: Path) -> Command:
        """Start a leaderboard of the first stage that is trained already."""
        methods = "Semi-CML=nnUNetTrainerSemiCML_chaos"
        options = ["-device", "cpu", "-f", 0, "--predict_options=--disable_tta -npp 1 -nps 1"]
        program = BIN / "nnUNetv2_semicml_leaderboard"
        return self.start([program, "-d", 500, "-c", "2d", "--methods", methods, "-o", out, *options])

    def fold(self, dataset: str, trainer: str) -> Path:
        """Folder of fold 0."""
        name = f"nnUNetTrainer{trainer.removesuffix('2')}_chaos" + "2" * trainer.endswith("2")
        return self.results / dataset / f"{name}__nnUNetPlans__2d" / "fold_0"

    def folds(self, trainer: str) -> list[Path]:
        """The folders that a training writes: first that of the joint checkpoints."""
        dataset, models = TRAINERS[trainer.removesuffix("2")]
        first = self.fold(GROUP, trainer) if dataset == 500 else self.fold(T1, trainer) / "training_state"
        return [first, *(self.fold(model, trainer) for model in models)]


def end(process: Command, sentence: str = "") -> None:
    """Wait for a command that has to end well or, if there is a sentence, with an error that says so."""
    errors = process.end()
    if not sentence:
        check(process.returncode == 0, f"{process.args[1:]} ended with {process.returncode}: {errors[-1500:]}")
        return
    last = errors.splitlines()[-1] if errors else ""
    check(process.returncode != 0, f"a command that ends well instead of: {sentence}")
    check(
        last.startswith((REFUSAL, "Error: ")) and sentence in last, f"no sentence with {sentence!r}: {errors[-1500:]}"
    )
    check(last.startswith(REFUSAL) or "Traceback" not in errors, f"a traceback: {errors[-1500:]}")


# what there is


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint but random states, whatever its structure."""

    def flat(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if key != "random_states":
                    yield from flat(item, f"{name}/{key}")

    return dict(flat(torch.load(file, map_location="cpu", weights_only=False), ""))


def same_tensors(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_of(fold: Path) -> list[str]:
    """Names of all files but logs and locks."""
    names = (file.relative_to(fold).as_posix() for file in fold.rglob("*") if file.is_file())
    return sorted(
        name for name in names if not Path(name).name.startswith("training_log") and Path(name).name != ".lock"
    )


def metrics(fold: Path) -> object:
    return json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]


def require_same(place: Place, reference: Place, trainer: str) -> None:
    """Refuse anything but what an uninterrupted training leaves."""
    for number, (own, other) in enumerate(zip(place.folds(trainer), reference.folds(trainer), strict=True)):
        found, expected = files_of(own), files_of(other)
        check(found == expected, f"{own}: {sorted({*found} ^ {*expected})} too many or too few")
        for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
            check(same_tensors(own / name, other / name), f"{own / name}: other weights")
        check(number == 0 or metrics(own) == metrics(other), f"{own}: other validation results")


# trials


def wait_for_start(process: Command, place: Place, trainer: str) -> None:
    """Until a training has the lock of its folder: before, all that processes do is import libraries."""
    lock, begun = place.folds(trainer)[-1] / ".lock", time.time()
    while process.poll() is None and not (lock.is_file() and lock.stat().st_mtime > begun):
        time.sleep(0.01)


class Chaos:
    """The trials, each with random numbers of its own."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed = work, seed
        self.durations: dict[str, float] = {}
        self.kills = 0

    # what is made once

    def prepare(self) -> None:
        """Write and plan the phantom."""
        if (self.work / "prepared").is_file():
            return
        from nnunetv2_semicml.data.phantom import write_phantom_dataset

        raw = self.work / "nnUNet_raw"
        shutil.rmtree(raw, ignore_errors=True)
        write_phantom_dataset(raw, 500, "Chaos", num_labeled=5, num_unlabeled=4, num_test=2, shape=(16, 24, 24))
        end(Place(self.work, self.work / "preparation").plan("-c", "2d"))
        for name in (GROUP, FLAIR, T1):
            file = self.work / "nnUNet_preprocessed" / name / "nnUNetPlans.json"
            plans = json.loads(file.read_text())
            configuration = plans["configurations"]["2d"]
            arguments = configuration["architecture"]["arch_kwargs"]
            stages = arguments["n_stages"]
            arguments |= {"features_per_stage": [4] * stages, "n_conv_per_stage": [1] * stages}
            arguments["n_conv_per_stage_decoder"] = [1] * (stages - 1)
            configuration["batch_size"] = 4
            file.write_text(json.dumps(plans))
        (self.work / "prepared").touch()

    def reference(self, trainer: str) -> Place:
        """An uninterrupted training, and those that it needs; made once."""
        place = Place(self.work, self.work / f"reference_{trainer}")
        if not place.results.with_suffix(".done").is_file():
            shutil.rmtree(place.results, ignore_errors=True)
            place.results.mkdir()
            self.give_first_stage(place, trainer)
            process = place.train(trainer)
            wait_for_start(process, place, trainer)
            begun = time.monotonic()
            end(process)
            place.results.with_suffix(".done").write_text(str(time.monotonic() - begun))
        self.durations[trainer] = float(place.results.with_suffix(".done").read_text())
        return place

    def give_first_stage(self, place: Place, trainer: str) -> None:
        if trainer == "SemiCMLPReL":
            shutil.copytree(self.reference("SemiCML").results, place.results, dirs_exist_ok=True)

    @contextmanager
    def place(self, trainer: str) -> Iterator[tuple[Place, Place]]:
        """A new place for a trial, and the reference."""
        reference = self.reference(trainer)
        place = Place(self.work, self.work / "trial")
        shutil.rmtree(place.results, ignore_errors=True)
        place.results.mkdir()
        self.give_first_stage(place, trainer)
        yield place, reference

    def finish(self, place: Place, trainer: str, rng: random.Random, kills: int) -> None:
        """Go on with a training until it is done, and kill it now and then."""
        while True:
            finished = (place.folds(trainer)[0] / "checkpoint_final.pth").is_file()
            process = place.train(trainer, "--val" if finished and rng.random() < 0.5 else "--c")
            if not kills:
                end(process)
                return
            kills -= 1
            if self.kill_at_random(process, place, trainer, rng):
                return

    def kill_at_random(self, process: Command, place: Place, trainer: str, rng: random.Random) -> bool:
        """Kill a training at a moment after its start; say whether it had ended well before."""
        moment = rng.uniform(0, self.durations[trainer])
        wait_for_start(process, place, trainer)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is not None:
            end(process)
            return True
        self.kills += 1
        process.kill_all()
        return False

    # kinds of trials

    def uninterrupted(self, trainer: str, rng: random.Random) -> None:
        """The control: without any kill, all is the same."""
        with self.place(trainer) as (place, reference):
            end(place.train(trainer))
            require_same(place, reference, trainer)

    def killed(self, trainer: str, rng: random.Random) -> None:
        """One to three kills."""
        with self.place(trainer) as (place, reference):
            if not self.kill_at_random(place.train(trainer), place, trainer, rng):
                self.finish(place, trainer, rng, rng.randrange(3))
            require_same(place, reference, trainer)

    def killed_in_validation(self, trainer: str, rng: random.Random) -> None:
        """The kill comes after the last epoch."""
        with self.place(trainer) as (place, reference):
            process, (first, *_) = place.train(trainer), place.folds(trainer)
            while process.poll() is None and not (first / "checkpoint_final.pth").is_file():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, self.durations[trainer] / 2))
            self.kills += process.poll() is None
            process.kill_all()
            self.finish(place, trainer, rng, rng.randrange(2))
            require_same(place, reference, trainer)

    def replaced(self, trainer: str, rng: random.Random) -> None:
        """A new training over a finished one is killed: all models are of one of them, now and after --c."""
        with self.place(trainer) as (place, new):
            old = Place(self.work, self.work / f"old_{trainer}", seed=8)
            if not old.results.with_suffix(".done").is_file():
                self.give_first_stage(old, trainer)
                end(old.train(trainer))
                old.results.with_suffix(".done").touch()
            shutil.copytree(old.results, place.results, dirs_exist_ok=True)
            finished = self.kill_at_random(place.train(trainer), place, trainer, rng)
            whose = self.whose(place, old, trainer)
            check(len(whose) < 2, f"models of both trainings after the kill: {whose}")
            if not finished:
                self.finish(place, trainer, rng, rng.randrange(2))
            whose = self.whose(place, old, trainer)
            check(len(whose) == 1, f"models of both trainings at the end: {whose}")
            require_same(place, old if "the old one" in whose else new, trainer)

    def whose(self, place: Place, old: Place, trainer: str) -> set[str]:
        """Of which training the checkpoints are that a command would find."""
        pairs = [
            (own / name, other / name)
            for own, other in zip(place.folds(trainer), old.folds(trainer), strict=True)
            for name in ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
            if (own / name).is_file()
        ]
        return {"the old one" if b.is_file() and same_tensors(a, b) else "the new one" for a, b in pairs}

    def full_disk_in_training(self, trainer: str, rng: random.Random) -> None:
        """The disk is full at some moment; with more room the training goes on."""
        with self.place(trainer) as (place, reference), small_disk(place.results, 2**30) as resize:
            self.give_first_stage(place, trainer)
            needed = sum(file.stat().st_size for file in reference.results.rglob("*") if file.is_file())
            used = sum(file.stat().st_size for file in place.results.rglob("*") if file.is_file())
            resize(int(used + (needed - used) * rng.uniform(0.02, 0.95)))
            end(place.train(trainer), FULL)
            resize(2**30)
            self.finish(place, trainer, rng, 0)
            require_same(place, reference, trainer)

    def full_disk_in_planning(self, _: str, rng: random.Random) -> None:
        """Cases are preprocessed again, on a disk without room for all."""
        self.planned_again(rng, fill=True)

    def killed_in_planning(self, _: str, rng: random.Random) -> None:
        """Cases are preprocessed again; the command is killed, and repeated."""
        self.planned_again(rng, fill=False)

    def planned_again(self, rng: random.Random, fill: bool) -> None:
        disk = self.work / "disk"
        disk.mkdir(exist_ok=True)
        with small_disk(disk, 2**30, wanted=fill) as resize:
            preprocessed, reference = disk / "preprocessed", self.work / "nnUNet_preprocessed"
            shutil.rmtree(preprocessed, ignore_errors=True)
            shutil.copytree(reference, preprocessed)
            gone = [file for file in preprocessed.glob("*/*/*.b2nd") if rng.random() < 0.8]
            size = sum(file.stat().st_size for file in gone)
            for file in gone:
                file.unlink()
            place = Place(self.work, self.work / "trial", preprocessed)
            if fill:
                used = sum(-(-file.stat().st_size // 4096) * 4096 for file in preprocessed.rglob("*") if file.is_file())
                resize(used + int(size * rng.uniform(0, 0.7)))
                end(place.plan("--keep_plans"), FULL)
                resize(2**30)
            else:
                process = place.plan("--keep_plans")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(3, 20))
                self.kills += process.poll() is None
                process.kill_all()
            end(place.plan("--keep_plans"))
            for file in reference.rglob("*"):
                other = preprocessed / file.relative_to(reference)
                if file.is_file() and file.name != ".lock":
                    check(other.is_file(), f"{other} is missing")
                    check(other.read_bytes() == file.read_bytes(), f"{other} is another one")
            left = [file.name for file in preprocessed.rglob(".*") if file.name != ".lock"]
            check(not left, f"{left} left over")

    def full_disk_in_leaderboard(self, trainer: str, rng: random.Random) -> None:
        """Predictions on a disk without room for all."""
        expected = self.expected_leaderboard(trainer)
        disk = self.work / "disk"
        disk.mkdir(exist_ok=True)
        with self.place(trainer) as (place, reference), small_disk(disk, 2**30) as resize:
            shutil.copytree(reference.results, place.results, dirs_exist_ok=True)
            resize(rng.randrange(4096, 40_000, 4096))
            process = place.leaderboard(disk / "out")
            errors = process.end()
            check(process.returncode != 0, "a leaderboard that ends well on a full disk")
            check("Traceback" not in errors, f"a traceback: {errors[-1500:]}")
            resize(2**30)
            end(place.leaderboard(disk / "out"))
            check((disk / "out" / "leaderboard.csv").read_text() == expected, "another leaderboard")

    def expected_leaderboard(self, trainer: str) -> str:
        reference = self.reference(trainer)
        out = self.work / "leaderboard"
        if not (out / "leaderboard.csv").is_file():
            end(reference.leaderboard(out))
        return (out / "leaderboard.csv").read_text()

    def two_trainings(self, trainer: str, rng: random.Random) -> None:
        """Of one fold: the second is refused, the first is not disturbed."""
        with self.place(trainer) as (place, reference):
            first = place.train(trainer)
            wait_for_start(first, place, trainer)
            time.sleep(rng.uniform(0, self.durations[trainer] / 4))
            second = place.train(trainer, *rng.choice(([], ["--c"])))
            for process in (first, second):
                process.end()
            if second.returncode == 0:  # it came first
                first, second = second, first
            end(second, LOCKED)
            end(first)
            require_same(place, reference, trainer)

    def planning_in_training(self, trainer: str, rng: random.Random) -> None:
        """It is refused, and the training is not disturbed."""
        with self.place(trainer) as (place, reference):
            process = place.train(trainer)
            wait_for_start(process, place, trainer)
            planning = place.plan("--keep_plans")
            planning.end()
            check(process.poll() is None, "no training during which to plan")
            end(planning, LOCKED)
            end(process)
            require_same(place, reference, trainer)

    def two_plannings(self, _: str, rng: random.Random) -> None:
        """The second is refused."""
        place = Place(self.work, self.work / "trial", self.work / "disk" / "two")
        shutil.rmtree(self.work / "disk" / "two", ignore_errors=True)
        shutil.copytree(self.work / "nnUNet_preprocessed", self.work / "disk" / "two")
        for file in (self.work / "disk" / "two").glob("*/*/*.b2nd"):
            file.unlink()
        both = [place.plan("--keep_plans") for _ in range(2)]
        errors = [process.end() for process in both]
        codes = [process.returncode for process in both]
        check(sorted(codes) == [0, 1], f"exit codes {codes}: {errors}"[:2000])
        end(both[codes.index(1)], LOCKED)
        end(both[codes.index(0)])
        for file in (self.work / "nnUNet_preprocessed").glob("*/*/*.b2nd"):
            other = self.work / "disk" / "two" / file.relative_to(self.work / "nnUNet_preprocessed")
            check(other.is_file() and other.read_bytes() == file.read_bytes(), f"{other} is missing or another one")

    def two_leaderboards(self, trainer: str, rng: random.Random) -> None:
        """In one folder: each waits for what the other one is making, and both end well."""
        expected = self.expected_leaderboard(trainer)
        with self.place(trainer) as (place, reference):
            shutil.copytree(reference.results, place.results, dirs_exist_ok=True)
            out = place.results / "out"
            for process in [place.leaderboard(out) for _ in range(2)]:
                end(process)
            check((out / "leaderboard.csv").read_text() == expected, "another leaderboard")


@contextmanager
def small_disk(folder: Path, size: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Mount a file system of some bytes, whose size can be changed."""
    if not wanted:
        yield lambda size: None
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# kind -> what it is done with, share of the trials
KINDS: dict[str, tuple[str, float]] = {
    "killed SemiCML": ("SemiCML", 1),
    "replaced SemiCML": ("SemiCML", 1),
    "full_disk_in_training SemiCML": ("SemiCML", 0.5),
    "full_disk_in_planning": ("", 0.5),
    "two_plannings": ("", 0.3),
    "planning_in_training SemiCML": ("SemiCML", 0.3),
    "two_trainings SemiCML": ("SemiCML", 0.5),
    "killed MeanTeacher": ("MeanTeacher", 1),
    "replaced MeanTeacher": ("MeanTeacher", 1),
    "full_disk_in_leaderboard SemiCML": ("SemiCML", 0.5),
    "two_leaderboards SemiCML": ("SemiCML", 0.3),
    "killed SemiCMLPReL": ("SemiCMLPReL", 1),
    "killed_in_validation SemiCML": ("SemiCML", 0.5),
    "killed_in_planning": ("", 0.5),
    "killed SemiCML2": ("SemiCML2", 1),
    **{f"killed {trainer}": (trainer, 1) for trainer in [*TRAINERS][3:]},
    "killed_in_validation MeanTeacher": ("MeanTeacher", 0.5),
    "full_disk_in_training MeanTeacher": ("MeanTeacher", 0.5),
    "two_trainings MeanTeacher": ("MeanTeacher", 0.3),
    **{f"uninterrupted {trainer}": (trainer, 0) for trainer in [*TRAINERS, "SemiCML2"]},
}


def can_mount(work: Path) -> bool:
    with suppress(OSError, subprocess.CalledProcessError):
        work.mkdir(parents=True, exist_ok=True)
        (work / "disk").mkdir(exist_ok=True)
        with small_disk(work / "disk", 2**20):
            return True
    return False


def code() -> str:
    """The last commit that has changed the package, and whether it has been edited since."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", "nnunetv2_semicml"]
        return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + " and edits" * bool(git("diff", "HEAD", "--name-only"))


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Do what is not done yet, one trial of every kind after the other."""
    chaos, file = Chaos(args.work, args.seed), args.work / "trials.jsonl"
    hold_lock(args.work, "running chaos.py")
    mountable, same = can_mount(args.work), args.work / "code"
    if same.is_file() and same.read_text() != code():
        sys.exit(f"{args.work} is of {same.read_text()}, and this is {code()}: give another folder.")
    same.write_text(code())
    chaos.prepare()
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    begun = time.monotonic()
    for number in range(args.trials):
        for kind, (trainer, share) in KINDS.items():
            if (
                (number > 0 and number >= args.trials * share)
                or any((d["kind"], d["number"], d["seed"]) == (kind, number, args.seed) for d in done)
                or ("full_disk" in kind and not mountable)
                or args.only not in kind
            ):
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                return done
            before, chaos.kills, found = time.monotonic(), 0, ""
            try:
                getattr(chaos, kind.split()[0])(trainer, random.Random(f"{args.seed} {kind} {number}"))
            except Wrong as wrong:
                found = str(wrong)
            finally:
                for process in Command.started:
                    if process.poll() is None:
                        process.kill_all()
                Command.started.clear()
            trial = {"kind": kind, "number": number, "seed": args.seed, "kills": chaos.kills, "found": found}
            done.append(trial)
            with file.open("a") as stream:
                stream.write(json.dumps(trial) + "\n")
            print(f"{kind} {number}: {found or 'right'} ({time.monotonic() - before:.0f} s)", flush=True)
    return done


def report(args: argparse.Namespace, done: list[dict[str, object]]) -> str:
    rows = []
    for kind in KINDS:
        trials = [trial for trial in done if trial["kind"] == kind and trial["seed"] == args.seed]
        wrong = [trial for trial in trials if trial["found"]]
        rows.append(f"{kind} | {len(trials) or 'not run'} | {sum(t['kills'] for t in trials)} | {len(wrong)}")
    summaries = {
        name: getattr(Chaos, name).__doc__.splitlines()[0] for name in dict.fromkeys(k.split()[0] for k in KINDS)
    }
    failures = [f"- {t['kind']} {t['number']}: {str(t['found'])[:300]}" for t in done if t["found"]]
    return "\n".join(
        [
            "# Kills, full disks, and everything twice",
            "",
            f"`python tests/chaos/chaos.py --work SCRATCH --trials {args.trials} --seed {args.seed}` (`make chaos`), "
            f"{datetime.date.today()}, {platform.machine()} CPU with {os.cpu_count()} cores, "
            f"torch {torch.__version__}, the package as of {code()}.",
            "",
            *(__doc__ or "").split("\n\n")[2].splitlines(),
            "",
            *(f"- {name}: {text}" for name, text in summaries.items()),
            "",
            "SemiCML2 is Semi-CML in two processes (gloo). Kills are those that met a living process.",
            "",
            "kind | trials | kills | wrong",
            "--- | --- | --- | ---",
            *rows,
            "",
            *(["What was wrong:", "", *failures] if failures else ["Nothing was wrong."]),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--trials", type=int, default=6, help="of the kinds that have most (default: 6)")
    parser.add_argument("--minutes", type=float, default=30, help="no trial is begun after these (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names contain this; no report is written")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that nothing stays mounted
    found = run(arguments)
    if not arguments.only:
        REPORT.write_text(report(arguments, found), encoding="utf-8")
        print(f"See {REPORT}.")
    sys.exit(any(trial["found"] for trial in found))
