"""The jobs of a leaderboard: train a fold, predict the test scans, evaluate the predictions.

A job knows from the files alone whether it is done, so that a leaderboard can be interrupted anywhere and goes on where
it was. submitit runs jobs in local processes or on SLURM; as these import this module, it imports nothing that is slow.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import submitit
from filelock import FileLock, Timeout

from nnunetv2_semicml.data import result_folders
from nnunetv2_semicml.data.files import Json, link_file, read_json
from nnunetv2_semicml.errors import UserError

INPUTS_FILE = "inputs.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do once.

    Attributes:
        name: what it does, unique within a leaderboard.
        needs: names of the jobs before it.
        gpus: value of CUDA_VISIBLE_DEVICES; None: as the executor sets it.
    """

    name: str
    needs: tuple[str, ...] = ()
    gpus: str | None = None

    @property
    def target(self) -> Path:
        """The file or folder that the job makes."""
        raise NotImplementedError

    def missing(self) -> str:
        """What is not there, or out of date, in words; empty if the job is done."""
        raise NotImplementedError

    def run(self) -> None:
        """Make the target."""
        raise NotImplementedError

    def __call__(self) -> str:
        """Run if something is missing, and return what went wrong, if anything, in words."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.target.with_name(f".{self.target.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            # e.g. a job of an earlier call that goes on in the cluster; when it ends, nothing is left to do here
            print(f"Waiting for another process that makes {self.target}", flush=True)
            lock.acquire()
        with lock:
            if not self.missing():
                return ""
            try:
                self.run()
            except UserError as error:
                return str(error)
            except subprocess.CalledProcessError as error:
                return f"{_last_words(error.output)} (exit status {error.returncode} of {shlex.join(error.cmd)})"
            return self.missing()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let submitit submit the job again when SLURM's time limit or another user interrupts it."""
        return submitit.helpers.DelayedSubmission(self)

    def _call(self, program: Path, *arguments: str | Path, **environment: str) -> None:
        command = [str(program), *map(str, arguments)]
        if self.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus
        print("$", shlex.join(command), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            show = partial(print, end="", flush=True)
            run_program(command, os.environ | environment, Path(folder, "output.txt"), show)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Networks that nnU-Net trains together: one trainer, configuration and seed.

    Attributes:
        programs: folder of nnU-Net's command lines.
        results: value of nnUNet_results.
        trainer: class name.
        plans: plans identifier.
        configuration: e.g. 3d_fullres.
        device: nnU-Net's -device.
        seed: value of nnUNet_semicml_seed, which seeds this package's trainers; None: as the environment has it.
    """

    programs: Path
    results: Path
    trainer: str
    plans: str
    configuration: str
    device: str
    seed: int | None

    def fold_folder(self, dataset: str, fold: str) -> Path:
        """Where nnU-Net keeps a fold of one dataset."""
        model = result_folders.model_folder(self.results, dataset, self.trainer, self.plans, self.configuration)
        return result_folders.fold_folder(model, fold)

    def environment(self) -> dict[str, str]:
        """Environment variables of the command lines."""
        seed = {} if self.seed is None else {"nnUNet_semicml_seed": str(self.seed)}
        return {"nnUNet_results": str(self.results), **seed}


@dataclass(frozen=True, kw_only=True)
class Train(Job):
    """nnUNetv2_train of one fold, from the beginning or from where it was interrupted.

    Attributes:
        model: what to train.
        dataset: the dataset to train.
        fold: 0, 1, … or all.
        validated: the datasets that have a validated network afterwards.
        options: more options of nnUNetv2_train.
    """

    model: Model
    dataset: str
    fold: str
    validated: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def target(self) -> Path:
        """The fold's folder."""
        return self.model.fold_folder(self.dataset, self.fold)

    def missing(self) -> str:
        """A final checkpoint or a validation."""
        files = [self.target / "checkpoint_final.pth"]
        for dataset in self.validated:
            folder = self.model.fold_folder(dataset, self.fold)
            files += [folder / "checkpoint_final.pth", folder / "validation" / "summary.json"]
        return next((f"no {file}" for file in files if not file.is_file()), "")

    def run(self) -> None:
        """Train and validate, or what is left of it."""
        checkpoints = result_folders.state_folder(self.target)
        if (checkpoints / "checkpoint_final.pth").is_file():
            how = ["--val"]
        else:
            how = ["--c"] if any(checkpoints.glob("checkpoint_*.pth")) else []
        model = self.model
        arguments = [self.dataset, model.configuration, self.fold, "-tr", model.trainer, "-p", model.plans]
        arguments += ["-device", model.device, *how, *self.options]
        self._call(model.programs / "nnUNetv2_train", *arguments, **model.environment())


@dataclass(frozen=True, kw_only=True)
class Predict(Job):
    """nnUNetv2_predict of the test scans with all folds.

    Attributes:
        model: what to predict with.
        dataset: the dataset whose network predicts.
        folds: 0, 1, … or all.
        scans: case -> what nnU-Net reads of it: the name that it expects, e.g. CASE_0000.tif and CASE.json -> file.
        file_ending: of the predictions.
        out: the folder of the predictions.
        options: more options of nnUNetv2_predict.
    """

    model: Model
    dataset: str
    folds: tuple[str, ...]
    scans: Mapping[str, Mapping[str, str]]
    file_ending: str
    out: Path
    options: tuple[str, ...]

    @property
    def target(self) -> Path:
        """The folder of the predictions."""
        return self.out

    def _arguments(self) -> list[str]:
        model = self.model
        named = ["-d", self.dataset, "-c", model.configuration, "-tr", model.trainer, "-p", model.plans]
        return [*named, "-f", *self.folds, *self.options]

    def _inputs(self) -> Json:
        checkpoints = [self.model.fold_folder(self.dataset, fold) / "checkpoint_final.pth" for fold in self.folds]
        scans = [Path(file) for files in self.scans.values() for file in files.values()]
        return {"arguments": self._arguments(), "files": [stamp(file) for file in [*checkpoints, *scans]]}

    def missing(self) -> str:
        """Predictions of the current checkpoints and scans."""
        if try_read_json(self.out / INPUTS_FILE) != self._inputs():
            return f"no predictions of the current model in {self.out}"
        return absent(self.out, self.scans, self.file_ending)

    def run(self) -> None:
        """Predict into a folder beside the target that then takes its place."""
        inputs = self._inputs()
        temporary = self.out.with_name(f".{self.out.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted run
        scans, predictions = temporary / "scans", temporary / "predictions"
        scans.mkdir(parents=True)
        for files in self.scans.values():
            for name, file in files.items():
                link_file(file, scans / name)
        arguments: list[str | Path] = ["-i", scans, "-o", predictions, *self._arguments(), "-device", self.model.device]
        self._call(self.model.programs / "nnUNetv2_predict", *arguments, **self.model.environment())
        (predictions / INPUTS_FILE).write_text(json.dumps(inputs))
        shutil.rmtree(self.out, ignore_errors=True)
        predictions.rename(self.out)
        shutil.rmtree(temporary)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Job):
    """Metrics of a folder of predictions.

    Attributes:
        predictions: the folder.
        references: case -> reference segmentation.
        dataset_json: of the reference dataset.
        out: the JSON file.
    """

    predictions: Path
    references: Mapping[str, str]
    dataset_json: Json
    out: Path

    @property
    def target(self) -> Path:
        """The JSON file."""
        return self.out

    def _inputs(self) -> Json:
        ending = self.dataset_json["file_ending"]
        # nnU-Net reads the spacing of a TIFF from CASE.json beside it
        files: list[str | Path] = [
            file
            for case, reference in self.references.items()
            for file in (reference, Path(reference).with_name(f"{case}.json"), self.predictions / f"{case}{ending}")
        ]
        definition = version("nnunetv2-semicml"), self.dataset_json["labels"]
        # as JSON gives it back
        return json.loads(json.dumps({"definition": definition, "files": [stamp(file) for file in files]}))

    def missing(self) -> str:
        """A prediction, or its metrics."""
        if lacking := absent(self.predictions, self.references, self.dataset_json["file_ending"]):
            return lacking
        content = try_read_json(self.out)
        return "" if content and content["inputs"] == self._inputs() else f"{self.predictions} is not evaluated"

    def run(self) -> None:
        """Evaluate all cases."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        from nnunetv2_semicml.evaluation.metrics import evaluate_files

        if absent(self.predictions, self.references, self.dataset_json["file_ending"]):
            return
        inputs = self._inputs()
        example = next(iter(self.references.values()))
        reader = determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)()
        cases = {}
        for case, reference in self.references.items():
            print("Evaluating", case, flush=True)
            prediction = self.predictions / f"{case}{self.dataset_json['file_ending']}"
            cases[case] = evaluate_files(Path(reference), prediction, reader, self.dataset_json["labels"])
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"inputs": inputs, "cases": cases}))
        temporary.replace(self.out)

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Case -> class -> metrics, once done."""
        return read_json(self.out)["cases"]


def run_jobs(
    jobs: Sequence[Job], executor: submitit.Executor, at_once: int, gpus: Sequence[str] | None
) -> dict[str, str]:
    """Run what is not done, every job after those that it needs.

    Args:
        jobs: in an order in which each stands after those that it needs.
        executor: of submitit.
        at_once: number of jobs that run at a time.
        gpus: GPUs of this machine to deal out among the jobs that run at a time, if these are its processes. They are
            ended when this function is interrupted; those of a cluster go on.

    Returns:
        The names of the jobs that failed, or were not run since one that they need failed -> what went wrong.
    """
    failures: dict[str, str] = {}
    waiting = list(jobs)
    finished: set[str] = set()
    running: dict[int, tuple[Job, submitit.Job]] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if failed := next((need for need in job.needs if need in failures), None):
                    failures[job.name] = f'not run, since "{failed}" failed'
                elif len(running) == at_once or not finished.issuperset(job.needs):
                    continue
                elif not job.missing():
                    finished.add(job.name)
                else:
                    slot = next(i for i in range(at_once) if i not in running)
                    handle = executor.submit(job if gpus is None else replace(job, gpus=_share(gpus, slot, at_once)))
                    running[slot] = job, handle
                    print(f"{time.strftime('%H:%M:%S')} {job.name}: {handle.paths.stdout}", flush=True)
                waiting.remove(job)
            for slot, (job, handle) in list(running.items()):
                if handle.done():
                    del running[slot]
                    if problem := _problem(handle):
                        failures[job.name] = f"{problem} (log: {handle.paths.stdout})"
                        print(f"{time.strftime('%H:%M:%S')} {job.name} failed: {failures[job.name]}", flush=True)
                    else:
                        finished.add(job.name)
            if running:
                time.sleep(0.2)
    finally:
        for job, handle in running.values():
            if gpus is None:
                print(f"{job.name} goes on as job {handle.job_id}")
            else:
                handle.cancel()
    return failures


def run_program(command: Sequence[str], environment: Mapping[str, str], log: Path, show: Callable[[str], None]) -> str:
    """Run a program to its end, and end it if this is interrupted.

    Args:
        command: the program and its arguments.
        environment: all of its environment variables.
        log: the file for what it prints and writes to its standard error. No pipe: the workers of a program that was
            killed would keep it open, and whoever reads it waiting.
        show: gets this text as it comes, in parts, which may be empty.

    Returns:
        All of this text.

    Raises:
        subprocess.CalledProcessError: its exit status is not 0; `output` is what would be returned.
    """
    with log.open("wb") as output, log.open(errors="replace") as text:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                show(text.read())
        except BaseException:
            process.kill()
            process.wait()
            raise
        text.seek(0)
        whole = text.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, whole)
    return whole


def stamp(file: str | Path) -> list[str | int]:
    """What changes when a file changes: [path, size, time], or nothing but the path if there is none."""
    path = Path(file).absolute()
    if not path.is_file():
        return [str(path)]
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def absent(folder: Path, cases: Collection[str], file_ending: str) -> str:
    """Which cases a folder lacks, in words; empty if none."""
    lacking = [case for case in cases if not (folder / f"{case}{file_ending}").is_file()]
    if not lacking:
        return ""
    some = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
    return f"no prediction of {len(lacking)} of {len(cases)} cases in {folder}: {some}"


def try_read_json(file: Path) -> Any | None:
    """Content of a file that an earlier call may have written; None if it has not, or not to the end."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _last_words(output: str) -> str:
    """Why a program failed, by its output: its sentence for the user, or else the last line."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    of_user_error = f"{UserError.__module__}.{UserError.__qualname__}: "
    # processes in the background may still complain when the program has said what is wrong
    sentences = [line.removeprefix(of_user_error) for line in lines if line.startswith(of_user_error)]
    return (sentences or lines)[-1].strip()


def _problem(handle: submitit.Job) -> str:
    if error := handle.exception():
        return (str(error).strip() or repr(error)).splitlines()[-1]
    return handle.result()


def _share(gpus: Sequence[str], slot: int, at_once: int) -> str:
    """Every job that runs at a time has GPUs of its own, or shares one if there are fewer GPUs than jobs."""
    return ",".join(gpus[slot::at_once] or gpus[slot % len(gpus) :][:1]) if gpus else ""
