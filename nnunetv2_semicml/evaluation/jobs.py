"""The jobs of a leaderboard: train a fold, predict the test scans, evaluate the predictions.

A job knows from the files alone whether it is done, so that a leaderboard can be interrupted anywhere and goes on where
it was. submitit runs jobs in local processes or on SLURM; as these import this module, it imports nothing that is slow.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import submitit
from submitit.core.utils import UncompletedJobError

from nnunetv2_semicml.data import result_folders
from nnunetv2_semicml.data.checkpoint_file import find_damage
from nnunetv2_semicml.data.files import Json, explains_failed_writes, link_file, read_json, written_whole
from nnunetv2_semicml.data.locks import LOCK_FILE, hold_lock, release_lock
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.progress import Progress

INPUTS_FILE = "inputs.json"
_HERE = -1  # the place of the job that runs in this process


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do once.

    Attributes:
        name: what it does, unique within a leaderboard.
        needs: names of the jobs before it, of which only those count that are run with it.
        gpus: value of CUDA_VISIBLE_DEVICES; None: as the executor sets it.
        calls_program: whether it is a command line of nnU-Net.
    """

    name: str
    needs: tuple[str, ...] = ()
    gpus: str | None = None
    calls_program: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """In proportion to which jobs of a class take time."""
        raise NotImplementedError

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
        try:
            with (
                explains_failed_writes(self.target.parent, "Make room, and repeat the command: it goes on from here."),
                self._alone(),
            ):
                if not self.missing():
                    return ""
                self.run()
                return self.missing()
        except UserError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return f"{_last_words(error.output)} ({_end_of(error.returncode)} of {shlex.join(error.cmd)})"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other processes that make the target, e.g. a job of an earlier call that goes on in the cluster."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self._waited_for(self._locks):
            # the program of a process that was killed may live on
            with self._waited_for(self._locks / "program"):
                pass
            try:
                yield
            finally:
                shutil.rmtree(self._locks / "program", ignore_errors=True)

    @contextlib.contextmanager
    def _waited_for(self, folder: Path) -> Iterator[None]:
        try:
            hold_lock(folder, "making it")
        except UserError:
            print(f"Waiting for another process that makes {self.target}", flush=True)
            hold_lock(folder, "making it", wait=True)
        try:
            yield
        finally:
            release_lock(folder)

    @property
    def _locks(self) -> Path:
        """The folder of the lock of the process that makes the target and, in a folder below, that of its program."""
        return self.target.with_name(f".{self.target.name}.job")

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
            lock = self._locks / "program" / LOCK_FILE
            run_program(command, os.environ | environment, Path(folder, "output.txt"), show, lock)


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
        settings: hyper-parameters that the trainer has now, if it is one of this package.
        first: the training whose networks it goes on from, if it is a second stage.
    """

    model: Model
    dataset: str
    fold: str
    validated: tuple[str, ...]
    options: tuple[str, ...]
    settings: Json | None = None
    first: "Train | None" = None

    @property
    def size(self) -> int:
        """Number of networks."""
        return len(self.validated)

    @property
    def target(self) -> Path:
        """The fold's folder."""
        return self.model.fold_folder(self.dataset, self.fold)

    @property
    def _final(self) -> Path:
        return result_folders.state_folder(self.target) / "checkpoint_final.pth"

    @property
    def _models(self) -> list[Path]:
        return [self.model.fold_folder(dataset, self.fold) / "checkpoint_final.pth" for dataset in self.validated]

    def missing(self) -> str:
        """A final checkpoint or a validation, or that these are of another training than would be made now."""
        from nnunetv2_semicml.evaluation.trained_on import validated_files

        if absent := [file for file in (self._final, *self._models) if not file.is_file()]:
            return f"no {absent[0]}"
        try:
            if outdated := self.outdated():
                return outdated
        except UserError as error:
            return str(error)
        for summary in (model.parent / "validation" / "summary.json" for model in self._models):
            if not validated_files(summary):
                return f"{'damaged' if summary.is_file() else 'no'} {summary}"
        return ""

    def outdated(self) -> str:
        """In what the training, finished or not, is another one than would be made now, in words; empty if in nothing.

        Raises:
            UserError: what would be trained on now is damaged.
        """
        from nnunetv2_semicml.evaluation import trained_on

        if not (checkpoint := _to_go_on_from(self.target)):
            return ""
        expected = self._made_of()
        made_of = {checkpoint: self._was_made_of(checkpoint)}
        for model in self._models:
            made_of.setdefault(model, (model.is_file() and trained_on.read_provenance_once(model)) or {})
        for file, of_file in made_of.items():
            if other := trained_on.difference(of_file, expected):
                return f"{file} was {other}"
        if self.first is not None and (outdated := self.first.outdated()):
            return f"of the first stage, {outdated}"
        return ""

    def unknown(self) -> str:
        """What is not known of what the training was made of, in words; empty if all is known or nothing is there."""
        from nnunetv2_semicml.evaluation import trained_on

        checkpoint = _to_go_on_from(self.target)
        if checkpoint is None:
            return ""
        return trained_on.unknown(self._was_made_of(checkpoint), self._made_of())

    def _was_made_of(self, checkpoint: Path) -> Json:
        """What the training was made of, as far as that is known."""
        from nnunetv2_semicml.evaluation import trained_on

        if (provenance := trained_on.read_provenance_once(checkpoint)) is not None:
            return provenance
        if self.settings is not None:  # a damaged one of this package
            return {}
        return trained_on.noted(self.target, checkpoint, self.model.configuration)

    def _made_of(self) -> Json:
        """What the training would be made of now."""
        from nnunetv2_semicml.evaluation.trained_on import current, digest_once

        made_of = current(self.dataset, self.model.plans, self.model.configuration, self.fold)
        first = self.first and digest_once(self.first._final)
        return {**made_of, "settings": self.settings, "first stage": first}

    def run(self) -> None:
        """Train and validate, or what is left of it.

        Raises:
            UserError: the first stage would be trained otherwise now, and nobody has trained it again.
        """
        from nnunetv2_semicml.evaluation.trained_on import begin_record, finish_record, read_provenance_once

        if self.first is not None and (outdated := self.first.outdated()):
            stages = f"{self.first.model.trainer}+{self.model.trainer}"
            raise UserError(
                self.first.target,
                f"a first stage that is out of date: {outdated}",
                "one that was trained as it would be now",
                f"Write {stages}, which trains it again, too.",
            )
        checkpoint = _to_go_on_from(self.target)
        of_package = self.settings is not None or bool(checkpoint and read_provenance_once(checkpoint))
        if checkpoint and (outdated := self.outdated()):
            print(f"Trained again: {outdated}", flush=True)
            how = []
            if not of_package:  # those of the package set an earlier training aside themselves
                aside = self.target.with_name(f"replaced_{self.target.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
                self.target.rename(aside)
                print(f"The earlier training is now in {aside}", flush=True)
        elif checkpoint and checkpoint.name == "checkpoint_final.pth":
            # the end of a training, which --c repeats, writes the models
            how = ["--val"] if all(model.is_file() for model in self._models) else ["--c"]
        else:
            how = ["--c"] if checkpoint else []
        if not how and not of_package:
            begin_record(self.target, self._made_of())
        model = self.model
        arguments = [self.dataset, model.configuration, self.fold, "-tr", model.trainer, "-p", model.plans]
        arguments += ["-device", model.device, *how, *self.options]
        self._call(model.programs / "nnUNetv2_train", *arguments, **model.environment())
        if not of_package:
            finish_record(self.target, self._final)


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
    def size(self) -> int:
        """Number of scans, each for every network of the ensemble."""
        return len(self.scans) * len(self.folds)

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
        file = self.out / INPUTS_FILE
        if (content := try_read_json(file)) != self._inputs():
            damaged = file.is_file() and content is None
            return f"damaged {file}" if damaged else f"no predictions of the current model in {self.out}"
        return absent(self.out, self.scans, self.file_ending)

    def run(self) -> None:
        """Predict into a folder beside the target that then takes its place."""
        from nnunetv2_semicml.data.image_file import require_written
        from nnunetv2_semicml.data.reading import require_whole

        inputs = self._inputs()
        for fold in self.folds:
            self._require_whole_checkpoint(self.model.fold_folder(self.dataset, fold) / "checkpoint_final.pth")
        for scan in (file for files in self.scans.values() for file in files.values()):
            require_whole(scan)
        beside, suffix = f".{self.out.name}.", ".partial"
        for left in self.out.parent.iterdir():
            if left.name.startswith(beside) and left.name.endswith(suffix):  # by a run that was killed
                shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(suffix, beside, self.out.parent))
        scans, predictions = temporary / "scans", temporary / "predictions"
        scans.mkdir(parents=True)
        for files in self.scans.values():
            for name, file in files.items():
                link_file(file, scans / name)
        arguments: list[str | Path] = ["-i", scans, "-o", predictions, *self._arguments(), "-device", self.model.device]
        self._call(self.model.programs / "nnUNetv2_predict", *arguments, **self.model.environment())
        made = [predictions / f"{case}{self.file_ending}" for case in self.scans]
        require_written([file for file in made if file.is_file()], "Make room, and repeat the command.")
        (predictions / INPUTS_FILE).write_text(json.dumps(inputs), encoding="utf-8")
        shutil.rmtree(self.out, ignore_errors=True)
        predictions.rename(self.out)
        shutil.rmtree(temporary)

    def _require_whole_checkpoint(self, file: Path) -> None:
        if damage := find_damage(file):
            raise UserError(
                file, damage, "a whole checkpoint", "Restore it from a backup, or delete it: then it is made again."
            )


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
    calls_program = False

    @property
    def size(self) -> int:
        """Number of cases."""
        return len(self.references)

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
        return "" if content and content.get("inputs") == self._inputs() else f"{self.predictions} is not evaluated"

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
            prediction = self.predictions / f"{case}{self.dataset_json['file_ending']}"
            cases[case] = evaluate_files(Path(reference), prediction, reader, self.dataset_json["labels"])
        with written_whole(self.out) as unfinished:
            unfinished.write_text(json.dumps({"inputs": inputs, "cases": cases}), encoding="utf-8")

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Case -> class -> metrics, once done."""
        return read_json(self.out)["cases"]


def run_jobs(
    jobs: Sequence[Job], executor: submitit.Executor, at_once: int, gpus: Sequence[str] | None
) -> dict[str, str]:
    """Run what is not done, every job after those that it needs.

    Args:
        jobs: in an order in which each stands after those that it needs; those with the longest chain of jobs after
            them begin first, else in this order.
        executor: of submitit.
        at_once: number of jobs that run at a time; those that call no program run beside them in this process, one
            after the other, if the others are processes of this machine.
        gpus: GPUs of this machine to deal out among the jobs that run at a time, if these are its processes. They are
            ended when this function is interrupted; those of a cluster go on.

    Returns:
        The names of the jobs that failed, or were not run since one that they need failed -> what went wrong.
    """
    failures: dict[str, str] = {}
    names = {job.name for job in jobs}
    after = _lengths(jobs)
    waiting = sorted(jobs, key=lambda job: -after[job.name])  # the last chain to end decides when all have ended
    finished: set[str] = set()
    running: dict[int, tuple[Job, submitit.Job | Future[str]]] = {}
    progress = Progress({job.name: (type(job).__name__, job.size) for job in jobs}, at_once)
    try:
        while waiting or running:
            for job in list(waiting):
                needs = names.intersection(job.needs)
                here = gpus is not None and not job.calls_program
                slot = next((i for i in ([_HERE] if here else range(at_once)) if i not in running), None)
                if slot is None or not needs <= finished | failures.keys():
                    continue
                if not (missing := job.missing()):
                    finished.add(job.name)
                    progress.end(job.name)
                elif failed := sorted(needs & failures.keys()):
                    failures[job.name] = f'not run, since "{failed[0]}" failed'
                    progress.end(job.name)
                else:
                    own = job if gpus is None or here else replace(job, gpus=_share(gpus, slot, at_once))
                    handle = _run_here(own) if here else executor.submit(own)
                    running[slot] = job, handle
                    progress.start(job.name)
                    log = _log_of(handle)
                    progress.say(f"{job.name} ({missing}){f': {log}' if log else ''}")
                waiting.remove(job)
            for slot, (job, handle) in list(running.items()):
                if handle.done():
                    del running[slot]
                    problem = _problem(handle)
                    seconds = progress.end(job.name, well=not problem)
                    if problem:
                        log = _log_of(handle)
                        failures[job.name] = f"{problem} (log: {log})" if log else problem
                        progress.say(f"{job.name} failed: {failures[job.name]}")
                    else:
                        finished.add(job.name)
                        progress.say(f"{job.name} done in {seconds:.0f} s; {progress}")
            if running:
                logs = (_log_of(handle) for _, handle in running.values())
                progress.show(next(filter(None, logs), None))
                time.sleep(0.2)
    finally:
        for job, handle in running.values():
            if gpus is not None or isinstance(handle, Future):
                handle.cancel()
            else:
                print(f"{job.name} goes on as job {handle.job_id}")
    return failures


def _lengths(jobs: Sequence[Job]) -> dict[str, int]:
    """For every job the number of jobs in the longest chain of those that need it; each stands after what it needs."""
    lengths: dict[str, int] = {}
    for job in reversed(jobs):
        length = lengths.setdefault(job.name, 0)
        for need in job.needs:
            lengths[need] = max(lengths.get(need, 0), length + 1)
    return lengths


def _run_here(job: Job) -> Future[str]:
    """Run a job beside the others in this process, whose modules need not be imported again, and no longer than it."""
    outcome: Future[str] = Future()

    def run() -> None:
        try:
            outcome.set_result(job())
        except BaseException as error:
            outcome.set_exception(error)

    outcome.set_running_or_notify_cancel()
    Thread(target=run, daemon=True).start()
    return outcome


def _log_of(handle: submitit.Job | Future[str]) -> Path | None:
    return None if isinstance(handle, Future) else Path(handle.paths.stdout)


def run_program(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    show: Callable[[str], None],
    lock: Path | None = None,
) -> str:
    """Run a program to its end, and end it if this is interrupted.

    Args:
        command: the program and its arguments.
        environment: all of its environment variables.
        log: the file for what it prints and writes to its standard error. No pipe: the workers of a program that was
            killed would keep it open, and whoever reads it waiting.
        show: gets this text as it comes, in parts, which may be empty.
        lock: a file that the program locks for as long as it lives, even if this process does not; not on Windows.

    Returns:
        All of this text.

    Raises:
        subprocess.CalledProcessError: its exit status is not 0; `output` is what would be returned.
    """
    with log.open("wb") as output, log.open(errors="replace") as text, _locking(lock) as options:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, **options)
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


@contextlib.contextmanager
def _locking(lock: Path | None) -> Iterator[dict[str, Any]]:
    """Options of Popen with which the program, and none of the processes that it makes, has a lock."""
    if lock is None or sys.platform == "win32":
        yield {}
        return
    import fcntl

    def take_lock() -> None:
        # a file system without locks
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        # between fork and exec, after which the process is the same one
        yield {"pass_fds": [file.fileno()], "preexec_fn": take_lock}


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


def try_read_json(file: Path) -> Json | None:
    """The object in a file that an earlier call may have written; None if it has not, or not to the end."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _to_go_on_from(fold_folder: Path) -> Path | None:
    """The checkpoint that nnU-Net predicts with or goes on from, if there is any."""
    state = result_folders.state_folder(fold_folder)
    files = [state / f"checkpoint_{name}.pth" for name in ("final", "latest", "best")]
    return next((file for file in files if file.is_file()), None)


def _last_words(output: str) -> str:
    """Why a program failed, by its output: its sentence for the user, or else the last line."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    of_user_error = f"{UserError.__module__}.{UserError.__qualname__}: "
    # processes in the background may still complain when the program has said what is wrong
    sentences = [line.removeprefix(of_user_error) for line in lines if line.startswith(of_user_error)]
    return (sentences or lines)[-1].strip()


def _end_of(returncode: int) -> str:
    """How a program has ended, in words."""
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"end by {signal.Signals(-returncode).name}, e.g. for lack of memory,"


def _problem(handle: submitit.Job | Future[str]) -> str:
    error = handle.exception()
    if isinstance(error, UncompletedJobError):
        return "its process was ended before it was done, e.g. for lack of memory or by the limits of the cluster"
    if error:
        return (str(error).strip() or repr(error)).splitlines()[-1]
    return handle.result()


def _share(gpus: Sequence[str], slot: int, at_once: int) -> str:
    """Every job that runs at a time has GPUs of its own, or shares one if there are fewer GPUs than jobs."""
    return ",".join(gpus[slot::at_once] or gpus[slot % len(gpus) :][:1]) if gpus else ""
