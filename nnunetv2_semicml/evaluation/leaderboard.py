"""Compares methods on the test scans of one dataset, each modality alone: `nnUNetv2_semicml_leaderboard`.

Trains what is missing, predicts with nnU-Net's own command line, evaluates every case in 3D, and writes
leaderboard.csv, .md and .html. May import nnU-Net, `errors`, `data`, `planning`; knows trainers by name alone.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import submitit
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semicml.data.checkpoint_file import read_log
from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import Json, explains_failed_writes, written_whole
from nnunetv2_semicml.data.modality_group import (
    MODALITIES_FILE,
    ModalityGroup,
    preprocessed_folder,
)
from nnunetv2_semicml.data.raw_dataset import (
    RawDataset,
    dataset_number,
    datasets_with_id,
    raw_root,
    read_raw_dataset,
)
from nnunetv2_semicml.errors import UserError, some_of
from nnunetv2_semicml.evaluation import NOTATION
from nnunetv2_semicml.evaluation.figures import Volumes
from nnunetv2_semicml.evaluation.jobs import Evaluate, Job, Model, Predict, Train, run_jobs, try_read_json
from nnunetv2_semicml.evaluation.leaderboard_page import (
    Incomplete,
    Overlaid,
    Report,
    Training,
    write_markdown,
    write_page,
)
from nnunetv2_semicml.evaluation.metrics import METRICS

PROGRAMS = Path(sys.executable).parent  # nnU-Net's command lines, installed beside this Python
COLUMNS = ["dataset", "method", "modality", "seed", "case", "class", *METRICS, "n_ref", "n_pred", "diagonal"]
COLUMNS += ["labeled", "unlabeled"]


@dataclass(frozen=True)
class Scans:
    """The test scans that are segmented under one name in the tables.

    Attributes:
        channels: names, in the order in which a network reads them.
        files: of a case that hold these channels, as indices.
        cases: the test cases that have all of these files.
    """

    channels: list[str]
    files: list[int]
    cases: list[str]


@dataclass(frozen=True)
class Network:
    """What a method has for one modality.

    Attributes:
        dataset: the dataset whose network it is.
        scans: what it segments.
        num_labeled: labeled training cases that have the modality.
        num_unlabeled: unlabeled training cases that have it, used or not.
    """

    dataset: str
    scans: Scans
    num_labeled: int
    num_unlabeled: int


@dataclass(frozen=True)
class Method:
    """A trainer, how it is trained and what its networks predict.

    Attributes:
        name: for tables.
        stages: class names of the trainers that run one after the other; the networks are those of the last.
        scope: "group": trained once on the multi-modal dataset, writes a network for every modality; "each": trained on
            the dataset of every modality by itself; "all": trained on the multi-modal dataset by stock nnU-Net, all
            channels at once. A dataset that is one modality has "group", however it was asked for.
        trained: the datasets to train -> the datasets that have a network afterwards.
        networks: modality -> what predicts it; modalities without test case are left out.
    """

    name: str
    stages: tuple[str, ...]
    scope: str
    trained: Mapping[str, tuple[str, ...]]
    networks: Mapping[str, Network]

    @property
    def trainer(self) -> str:
        """The trainer whose networks are compared."""
        return self.stages[-1]


@dataclass(frozen=True)
class Chain:
    """The jobs that lead to the metrics of one method, modality and seed, each after those that it needs.

    Attributes:
        before: trainings and prediction; none for predictions that were made elsewhere.
        evaluate: the last job.
    """

    before: tuple[Job, ...]
    evaluate: Evaluate

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All of them."""
        return *self.before, self.evaluate


@dataclass(frozen=True)
class Entry:
    """One method on one modality.

    Attributes:
        method: its name.
        modality: the modality.
        chains: seed -> jobs.
        num_labeled: as in `Network`; None where it is not known.
        num_unlabeled: the same.
    """

    method: str
    modality: str
    chains: dict[int | None, Chain]
    num_labeled: int | None = None
    num_unlabeled: int | None = None


def find_scans(raw: RawDataset, group: ModalityGroup) -> dict[str, Scans]:
    """The test scans of every modality and of all channels at once, by the names that they have in the tables.

    Raises:
        UserError: the dataset's files have other channels than when its modalities were planned.
    """
    scans = {}
    for modality in group.modalities:
        if raw.files_of_channels(modality.channels) != modality.files:
            raise UserError(
                group.file,
                f"{modality.name} with the channels {some_of(map(str, modality.channels))}",
                f"whole files of {raw.folder}, whose files hold the channels {raw.channels_of_files}",
                "Plan and preprocess the dataset again.",
            )
        scans[modality.name] = _scans(raw, modality.files)
    scans.setdefault(_name_of_all(raw, group), _scans(raw, range(len(raw.channels_of_files))))
    return scans


def parse_method(text: str, raw: RawDataset, group: ModalityGroup) -> Method:
    """Read one of --methods.

    Args:
        text: NAME=SCOPE:FIRST+TRAINER@DATASET; all but TRAINER can be left out. The name is then the rest of the text,
            the scope the whole group, the dataset that of the test scans. FIRST is the trainer whose networks TRAINER
            goes on from; before it there may be others, in the same way.
        raw: the dataset of the test scans.
        group: its modalities.

    Raises:
        UserError: the text has another form, no test case has what the method needs, it cannot be trained on cases that
            lack channels, or the other dataset is not there, has other modalities, channels or labels, or was made for
            training on some of the test cases.
    """
    match = re.fullmatch(r"(?:([^=]+)=)?((?:(each|all):)?(\w+(?:\+\w+)*)(?:@([\w.+-]+))?)", text)
    if not match:
        example = "Write e.g. each:nnUNetTrainer or nnUNetTrainerSemiCML+nnUNetTrainerSemiCMLPReL."
        raise UserError("--methods", repr(text), NOTATION, example)
    name, spec, scope, trainers, other = match.groups()
    stages = tuple(trainers.split("+"))
    if twice := [trainer for trainer in stages if stages.count(trainer) > 1]:
        raise UserError(
            f"--methods {text}",
            f"{twice[0]} twice",
            "a trainer after + that goes on from the networks of another one before it",
            "Correct the trainers' names.",
        )
    dataset = raw.name if other is None else _find_dataset(other)
    # stock nnU-Net on all channels needs no modality datasets
    grouped = scope != "all" or dataset == raw.name or (preprocessed_folder(dataset) / MODALITIES_FILE).is_file()
    trained_group = (group if dataset == raw.name else ModalityGroup.load(dataset)) if grouped else None
    _require_unseen(text, raw, dataset, trained_group)
    single = trained_group is not None and trained_group.is_single
    if scope == "all" or trained_group is None:
        # of a dataset that is one modality only the complete cases were preprocessed
        if not single:
            _require_all_channels(text, dataset, raw, trained_group)
        networks = {_name_of_all(raw, group): _network_of_all(dataset, raw, trained_group)}
        written: tuple[str, ...] = (dataset,)
    else:
        networks = _networks_of_modalities(trained_group, raw, group)
        written = tuple(modality.dataset_name for modality in trained_group.modalities)
    for network in networks.values():
        _require_same_channels(network, raw)
    tested = {modality: network for modality, network in networks.items() if network.scans.cases}
    if not tested:
        raise UserError(
            raw.folder / "imagesTs",
            f"no test case with {' or '.join(networks)}",
            f"at least one, for --methods {text}",
            "Add such a case, or leave the method out.",
        )
    trained = {dataset: written}
    if scope == "each":
        trained = {network.dataset: (network.dataset,) for network in tested.values()}
    return Method(name or spec, stages, "group" if single else scope or "group", trained, tested)


def plan_method(
    method: Method, raw: RawDataset, references: Mapping[str, str], out: Path, args: argparse.Namespace
) -> list[Entry]:
    """Jobs of one method, of which only a second stage waits for a training: that of its first one.

    Args:
        method: what to compare.
        raw: the dataset of the test scans.
        references: test case -> reference segmentation.
        out: folder of the leaderboard.
        args: the command line.

    Returns:
        One entry per modality. Methods that have a training in common have equal jobs for it.
    """
    folds = tuple(args.f)
    entries = {
        modality: Entry(method.name, modality, {}, network.num_labeled, network.num_unlabeled)
        for modality, network in method.networks.items()
    }
    for seed in args.seeds or [None]:
        # nnU-Net's result folders have no seed in their names, so every seed has result folders of its own
        results = environment_folder("nnUNet_results") if seed is None else out / f"seed_{seed}" / "nnUNet_results"
        model = Model(
            programs=PROGRAMS,
            results=results.absolute(),
            trainer=method.trainer,
            plans=args.p,
            configuration=args.c,
            device=args.device,
            seed=seed,
        )
        of_seed = "" if seed is None else f", seed {seed}"
        stages = {
            dataset: [_plan_stages(method, model, dataset, fold, args) for fold in folds] for dataset in method.trained
        }
        for modality, network in method.networks.items():
            dataset, cases = network.dataset, network.scans.cases
            before = stages[dataset if method.scope == "each" else next(iter(method.trained))]
            place = Path(
                f"{method.scope}_{method.trainer}",
                "unseeded" if seed is None else f"seed_{seed}",
                f"folds_{'_'.join(folds)}",
                dataset,
            )
            predict = Predict(
                name=f"predict {modality} with {method.trainer} of {dataset}{of_seed}",
                needs=tuple(of_fold[-1].name for of_fold in before),
                model=model,
                dataset=dataset,
                folds=folds,
                scans={case: _input_files(raw, case, network.scans.files) for case in cases},
                file_ending=raw.file_ending,
                out=out / "predictions" / place,
                options=tuple(shlex.split(args.predict_options)),
            )
            evaluate = Evaluate(
                name=f"evaluate {modality} with {method.trainer} of {dataset}{of_seed}",
                needs=(predict.name,),
                predictions=predict.out,
                references={case: references[case] for case in cases},
                dataset_json=raw.dataset_json,
                out=out / "metrics" / place.with_name(f"{dataset}.json"),
            )
            train = [job for of_fold in before for job in of_fold]
            entries[modality].chains[seed] = Chain((*train, predict), evaluate)
    return list(entries.values())


def _plan_stages(method: Method, model: Model, dataset: str, fold: str, args: argparse.Namespace) -> list[Train]:
    """The trainings of a method on one dataset and fold, each of which needs the one before it, if it is not done."""
    jobs: list[Train] = []
    first: Train | None = None
    for trainer in method.stages:
        settings, first_stage = find_settings(trainer)
        if first_stage and (first is None or first.model.trainer != first_stage):
            first = _plan_training(method, replace(model, trainer=first_stage), dataset, fold, args)
        job = _plan_training(method, replace(model, trainer=trainer), dataset, fold, args)
        job = replace(job, settings=settings, first=first, needs=(first.name,) if first else ())
        # what a finished training went on from is needed no more
        jobs = [*(jobs if job.missing() else []), job]
        first = job
    return jobs


def _plan_training(method: Method, model: Model, dataset: str, fold: str, args: argparse.Namespace) -> Train:
    of_seed = "" if model.seed is None else f", seed {model.seed}"
    return Train(
        name=f"train {model.trainer} on {dataset}, fold {fold}{of_seed}",
        model=model,
        dataset=dataset,
        fold=fold,
        validated=method.trained[dataset],
        options=tuple(shlex.split(args.train_options)),
        settings=find_settings(model.trainer)[0],
    )


@lru_cache
def find_settings(trainer: str) -> tuple[Json | None, str | None]:
    """Hyper-parameters of a trainer of this package and the name of its first stage; None for others.

    nnU-Net looks for it as `nnUNetv2_train` does. A trainer that is not found here cannot be compared with what was
    trained before, and says itself what it lacks when it is to train.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(trainer)
    except Exception:  # the folders of nnUNet_extTrainer hold whatever users wrote
        return None, None
    if not hasattr(found, "settings"):
        return None, None
    return found.settings(), getattr(getattr(found, "first_stage", None), "__name__", None)


def plan_external(
    text: str, scans: Mapping[str, Scans], raw: RawDataset, references: Mapping[str, str], out: Path
) -> Entry:
    """Jobs of one of --external, NAME=MODALITY=FOLDER: predictions that were made elsewhere.

    Raises:
        UserError: the text has another form, or there is no such modality, test case of it, or folder.
    """
    name, _, rest = text.partition("=")
    modality, _, folder = rest.partition("=")
    tested = [name for name, of_modality in scans.items() if of_modality.cases]
    if modality not in tested:
        raise UserError(
            "--external",
            repr(text),
            f"NAME=MODALITY=FOLDER with one of the modalities that test cases have: {', '.join(tested)}",
            'Write e.g. "TransUNet=FLAIR=predictions/flair".',
        )
    if not Path(folder).is_dir():
        raise UserError(folder, "no such folder", f"predictions of {name}", "Correct --external.")
    # the digest tells names apart that file systems, or the replaced characters, do not
    digest = hashlib.sha256(repr((name, modality)).encode()).hexdigest()[:12]
    file_name = f"{re.sub(r'[^a-zA-Z0-9]', '_', f'{name}_{modality}')[:80]}_{digest}"
    evaluate = Evaluate(
        name=f"evaluate {modality} of {name}",
        predictions=Path(folder).absolute(),
        references={case: references[case] for case in scans[modality].cases},
        dataset_json=raw.dataset_json,
        out=out / "metrics" / "external" / f"{file_name}.json",
    )
    return Entry(name, modality, {None: Chain((), evaluate)})


def collect(
    entries: Sequence[Entry], failures: Mapping[str, str], dataset: str
) -> tuple[pd.DataFrame, list[Incomplete]]:
    """Read the metrics of what is complete, and say what the rest lacks.

    Args:
        entries: what was planned.
        failures: what `run_jobs` returned.
        dataset: name for the column.

    Returns:
        One row per case, class, modality, method and seed, of entries without gaps; and the entries with gaps.
    """
    rows, incomplete = [], []
    for entry in entries:
        jobs = [job for chain in entry.chains.values() for job in chain.jobs]
        lacking = {job.name: failures.get(job.name) or missing for job in jobs if (missing := job.missing())}
        if lacking:
            incomplete.append(Incomplete(entry.method, entry.modality, lacking))
            continue
        about = {"dataset": dataset, "method": entry.method, "modality": entry.modality}
        for seed, chain in entry.chains.items():
            for case, classes in chain.evaluate.results().items():
                for name, metrics in classes.items():
                    row = {**about, "seed": seed, "case": case, "class": name, **metrics}
                    rows.append(row | {"labeled": entry.num_labeled, "unlabeled": entry.num_unlabeled})
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype(dict.fromkeys(("seed", "labeled", "unlabeled"), "Int64")), incomplete


def read_table(file: Path, scans: Mapping[str, Scans]) -> pd.DataFrame:
    """Read the leaderboard.csv of another dataset, for curves over the labeled share.

    Raises:
        UserError: it is no such table, or has other modalities than these, or other test cases of one of them.
    """
    try:
        names = dict.fromkeys(("dataset", "method", "modality", "case", "class"), str)
        numbers = dict.fromkeys(("seed", "labeled", "unlabeled"), "Int64")
        # nothing but an empty number is missing: cases and modalities may be called NA or null
        missing = {column: [""] for column in COLUMNS if column not in names}
        table = pd.read_csv(file, dtype=names | numbers, keep_default_na=False, na_values=missing)
    except (OSError, ValueError) as error:
        raise UserError(file, f"an unreadable file ({error})", "a leaderboard.csv", "Correct --compare.") from error
    if list(table.columns) != COLUMNS:
        raise UserError(
            file,
            f"the columns {', '.join(table.columns)}",
            ", ".join(COLUMNS),
            "Name a leaderboard.csv of this version.",
        )
    for modality in table["modality"].unique():
        if modality not in scans:
            raise UserError(
                file, f"the modality {modality}", f"only {some_of(scans)}", "Name a table of the same modalities."
            )
        if different := {*table.loc[table["modality"] == modality, "case"]} ^ {*scans[modality].cases}:
            raise UserError(
                file,
                f"other test cases of {modality} than this leaderboard: {some_of(sorted(different))}",
                "the same test cases, so that only the training differs",
                "Split both datasets with the same test set.",
            )
    return table


def _scans(raw: RawDataset, files: Sequence[int]) -> Scans:
    channels = [raw.channel_names[channel] for i in files for channel in raw.channels_of_files[i]]
    cases = [case for case, of_case in raw.test.items() if None not in [of_case["images"][i] for i in files]]
    return Scans(channels, list(files), cases)


def _name_of_all(raw: RawDataset, group: ModalityGroup) -> str:
    """All channels at once, in the tables: the modality that has them all, if there is one."""
    whole = [modality.name for modality in group.modalities if len(modality.channels) == len(raw.channel_names)]
    return whole[0] if whole else " + ".join(raw.channel_names)


def _input_files(raw: RawDataset, case: str, files: Sequence[int]) -> dict[str, str]:
    """What nnU-Net reads of a test case: the name that it expects -> the file."""
    read = raw.read_files(raw.test[case], files)
    images = {f"{case}_{i:04d}{raw.file_ending}": file for i, file in enumerate(read[: len(files)])}
    return images | {Path(file).name: file for file in read[len(files) :]}


def _find_dataset(name_or_id: str) -> str:
    if not name_or_id.isdecimal():
        found = [name_or_id] if preprocessed_folder(name_or_id).is_dir() else []
    else:
        found = datasets_with_id(int(name_or_id))
    if len(found) != 1:
        raise UserError(
            "--methods",
            f"{some_of(found) or 'no dataset'} for @{name_or_id}",
            "one preprocessed dataset with this id or name",
            "Correct the id, or name the dataset in full.",
        )
    return found[0]


def _incomplete_cases(dataset: str, raw: RawDataset, group: ModalityGroup | None) -> list[str]:
    """The labeled cases of a dataset that lack a file, or, where only preprocessed cases are there, a modality."""
    if dataset == raw.name or (raw_root() / dataset).is_dir():
        source = raw if dataset == raw.name else read_raw_dataset(dataset, require_unlabeled=False)
        return [case for case, files in source.labeled.items() if None in files["images"]]
    if group is None:
        return []
    complete = group.common_cases([modality.name for modality in group.modalities], labeled=True)
    return sorted({*group.labeled} - {*complete})


def _require_unseen(text: str, raw: RawDataset, dataset: str, group: ModalityGroup | None) -> None:
    """Refuse a dataset that was made for training on test cases."""
    trained = {*group.labeled, *group.unlabeled} if group else {*_preprocessed_cases(dataset, raw)}
    if shared := sorted(raw.test.keys() & trained):
        raise UserError(
            f"--methods {text}",
            f"test cases of {raw.name} among the training cases of {dataset}: {some_of(shared)}",
            "test cases that no method is trained on",
            "Name another dataset, or make one that leaves these cases out.",
        )


def _preprocessed_cases(dataset: str, raw: RawDataset) -> list[str]:
    """The labeled cases of a dataset that stock nnU-Net has preprocessed."""
    references = preprocessed_folder(dataset) / "gt_segmentations"
    return [file.name.removesuffix(raw.file_ending) for file in references.glob(f"*{raw.file_ending}")]


def _require_all_channels(text: str, dataset: str, raw: RawDataset, group: ModalityGroup | None) -> None:
    if incomplete := _incomplete_cases(dataset, raw, group):
        raise UserError(
            f"--methods {text}",
            f"{len(incomplete)} labeled cases of {dataset} that lack a channel: {some_of(incomplete)}",
            "all channels of every labeled case, since stock nnU-Net takes the files of a case for its first channels",
            "Plan a copy of the dataset with nnUNetv2_semicml_plan_and_preprocess --one_modality, which leaves these "
            "cases out, and write @ and its id behind the trainer.",
        )


def _network_of_all(dataset: str, raw: RawDataset, group: ModalityGroup | None) -> Network:
    """The network of all channels at once."""
    scans = _scans(raw, range(len(raw.channels_of_files)))
    if group is None:
        return Network(dataset, scans, len(_preprocessed_cases(dataset, raw)), 0)
    modalities = [modality.name for modality in group.modalities]
    return Network(dataset, scans, *(len(group.common_cases(modalities, labeled=kind)) for kind in (True, False)))


def _networks_of_modalities(trained: ModalityGroup, raw: RawDataset, group: ModalityGroup) -> dict[str, Network]:
    """The networks of a group for the modalities of the test scans.

    Raises:
        UserError: it lacks a modality.
    """
    found = {modality.name: modality for modality in trained.modalities}
    if lacking := [modality.name for modality in group.modalities if modality.name not in found]:
        raise UserError(trained.file, f"the modalities {some_of(found)}", some_of(lacking), "Name another dataset.")
    return {
        modality.name: Network(
            found[modality.name].dataset_name,
            _scans(raw, modality.files),
            len(found[modality.name].labeled),
            len(found[modality.name].unlabeled),
        )
        for modality in group.modalities
    }


def _require_same_channels(network: Network, raw: RawDataset) -> None:
    """Refuse a network that was made for other channels, labels or files than those of the test scans."""
    expected = {
        "channel_names": {str(i): channel for i, channel in enumerate(network.scans.channels)},
        **{key: raw.dataset_json[key] for key in ("labels", "file_ending")},
    }
    file = preprocessed_folder(network.dataset) / "dataset.json"
    described = try_read_json(file)
    found = described and {key: described.get(key) for key in expected}
    if found != expected:
        raise UserError(
            file,
            "no such file" if found is None else str(found),
            f"{expected}, as in {raw.folder / 'dataset.json'}",
            "Plan and preprocess this dataset, or name another one.",
        )


def _require_own_networks(methods: Sequence[Method]) -> None:
    """Refuse two trainings that write into the same folder of nnUNet_results, where one would pass for the other."""
    writers: dict[tuple[str, str], tuple[tuple[str, tuple[str, ...]], str]] = {}
    for method in methods:
        for i, trainer in enumerate(method.stages):
            for dataset, written in method.trained.items():
                training = dataset, method.stages[:i]
                for network in written:
                    other, first = writers.setdefault((trainer, network), (training, method.name))
                    if other != training:
                        raise UserError(
                            "--methods",
                            f"{first} and {method.name}, which both write the networks of {trainer} on {network}",
                            "one way to train these",
                            "Leave one out, name the same first stage in both, or give one a subclass of the trainer.",
                        )


def _require_shown(names: Sequence[str]) -> None:
    """Refuse names of methods, modalities or classes that no table can show."""
    if hidden := [name for name in names if not name.isprintable() or not name.strip()]:
        raise UserError(
            "the names of methods, modalities and classes",
            some_of(map(repr, hidden)),
            "characters that can be printed, in one line",
            "Correct --methods, --external or the dataset.json.",
        )


def _references(raw: RawDataset) -> dict[str, str]:
    references = {case: raw.folder / "labelsTs" / f"{case}{raw.file_ending}" for case in raw.test}
    if not references:
        raise UserError(
            raw.folder / "imagesTs", "no test scan", "scans that no training sees", "Add them, and labelsTs."
        )
    if lacking := [file for file in references.values() if not file.is_file()]:
        raise UserError(
            lacking[0], "no such file", "a reference segmentation of every test scan", "Add it, or remove the scan."
        )
    return {case: str(file) for case, file in references.items()}


def _require_preprocessed(job: Train) -> None:
    for dataset in job.validated:
        file = preprocessed_folder(dataset) / f"{job.model.plans}.json"
        plans = try_read_json(file) or {"configurations": {}}
        configuration = job.model.configuration
        if configuration not in plans["configurations"]:
            raise UserError(
                file,
                f"configurations {', '.join(plans['configurations']) or 'none'}",
                configuration,
                f"Plan and preprocess {dataset}.",
            )
        identifier = PlansManager(plans).get_configuration(configuration).data_identifier
        if not (file.parent / identifier).is_dir():
            raise UserError(
                file.parent / identifier,
                "no such folder",
                f"preprocessed cases, to {job.name}",
                "Run nnUNetv2_semicml_plan_and_preprocess; for all channels at once: "
                f"nnUNetv2_preprocess -d {dataset_number(dataset)} -plans_name {job.model.plans} -c {configuration}",
            )


def _parse_slurm(parameters: Sequence[str]) -> dict[str, str | int]:
    pairs = [parameter.partition("=")[::2] for parameter in parameters]
    if wrong := [key for key, value in pairs if not value]:
        raise UserError("--slurm", repr(wrong[0]), "KEY=VALUE", "Write e.g. slurm_partition=gpu.")
    if "timeout_min" not in dict(pairs):
        # submitit's default of five minutes would end every training
        raise UserError("--slurm", "no timeout_min", "the time limit of a job in minutes", "Add e.g. timeout_min=2880.")
    return {key: int(value) if value.isdecimal() else value for key, value in pairs}


def _run(jobs: Sequence[Job], args: argparse.Namespace, logs: Path) -> dict[str, str]:
    """Run the jobs where the command line says."""
    on_slurm = args.executor == "slurm"
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs", str(args.jobs), "at least 1", "Correct it.")
    if args.slurm and not on_slurm:
        raise UserError("--slurm", "parameters", "none with --executor local", "Add --executor slurm.")
    # locally no time limit, where submitit's default is two minutes
    parameters = _parse_slurm(args.slurm) if on_slurm else {"timeout_min": 60 * 24 * 365}
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=args.executor)
        executor.update_parameters(name="leaderboard", stderr_to_stdout=True, **parameters)
    except (NameError, RuntimeError, AssertionError) as error:  # what submitit raises
        raise UserError(
            "--executor, --slurm", str(error), "SLURM's programs and parameters of submitit", "Correct the options."
        ) from error
    if on_slurm:
        return run_jobs(jobs, executor, args.jobs or len(jobs), gpus=None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = [gpu for gpu in visible.split(",") if gpu]
    of_device = len(gpus) if args.device == "cuda" else 1
    return run_jobs(jobs, executor, args.jobs or max(1, of_device), gpus)


def leaderboard(args: argparse.Namespace, command: str) -> Path:
    """Make a leaderboard.

    Args:
        args: the command line.
        command: the same as text, for the report.

    Returns:
        The HTML page.

    Raises:
        UserError: an option does not fit, or something could not be run; the tables then say what is missing.
    """
    raw = read_raw_dataset(args.d, require_unlabeled=False)
    group = ModalityGroup.load(raw.name)
    references = _references(raw)
    default = environment_folder("nnUNet_results") / "leaderboards" / f"{raw.name}__{args.p}__{args.c}"
    out = (args.o or default).absolute()

    scans = find_scans(raw, group)
    methods = [parse_method(text, raw, group) for text in args.methods]
    _require_own_networks(methods)
    entries = [entry for method in methods for entry in plan_method(method, raw, references, out, args)]
    entries += [plan_external(text, scans, raw, references, out) for text in args.external]
    rows = [(entry.method, entry.modality) for entry in entries]
    if twice := [f"{method} on {modality}" for method, modality in rows if rows.count((method, modality)) > 1]:
        raise UserError("--methods, --external", f"{twice[0]} twice", "different names", f"Write {NOTATION}.")
    _require_shown([*(name for row in rows for name in row), *raw.dataset_json["labels"]])
    reference_method = args.reference or entries[0].method
    if reference_method not in {method for method, _ in rows}:
        names = ", ".join(dict.fromkeys(method for method, _ in rows))
        raise UserError("--reference", reference_method, f"one of {names}", "Correct it, or leave it out.")

    others = [read_table(file, scans) for file in args.compare]

    # methods may share jobs, e.g. a first stage; each comes before all that need it
    jobs: dict[str, Job] = {}
    for job in (job for entry in entries for chain in entry.chains.values() for job in chain.jobs):
        jobs.setdefault(job.name, job)
    trainings = [job for job in jobs.values() if isinstance(job, Train)]
    again = {}
    for job in trainings:
        if job.missing():
            _require_preprocessed(job)
            again[job.name] = job.outdated()
    remedy = "Make room, and repeat the command: it goes on from here."
    with explains_failed_writes(out, remedy):
        logs = out / "logs" / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        failures = _run(list(jobs.values()), args, logs)

    cases, incomplete = collect(entries, failures, raw.name)
    unknown: dict[str, list[str]] = {}
    for job in trainings:
        if not job.missing() and (why := job.unknown()):
            unknown.setdefault(why, []).append(job.name)
    notes = {
        "Trained again": [f"{name}, since {why}" for name, why in again.items() if why],
        "Not known": [f"{some_of(names)}: {why}" for why, names in unknown.items()],
    }
    report = Report(
        title=f"Leaderboard of {raw.name}",
        command=command,
        facts=_facts(raw, group, scans, args)
        | {name: "; ".join(of_name) for name, of_name in notes.items() if of_name},
        reference_method=reference_method,
        cases=cases,
        incomplete=incomplete,
        others=others,
        files=_files(entries, incomplete, raw, scans, references),
        trainings=_trainings(entries, incomplete),
        note=args.note,
    )
    with explains_failed_writes(out, remedy):
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / "leaderboard.csv") as file:
            cases.to_csv(file, index=False, float_format="%.6g")
        with written_whole(out / "leaderboard.md") as file:
            write_markdown(file, report)
        with written_whole(out / "leaderboard.html") as file:
            write_page(file, report)
    if incomplete:
        lacking, problem = next(iter(incomplete[0].missing.items()))
        raise UserError(
            out / "leaderboard.html",
            f'{len(incomplete)} incomplete results, the first of which lacks "{lacking}": {problem}',
            "all jobs done",
            "Put this right and repeat the command: it goes on from here.",
        )
    return out / "leaderboard.html"


def _facts(
    raw: RawDataset, group: ModalityGroup, scans: Mapping[str, Scans], args: argparse.Namespace
) -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("nnunetv2-semicml", "nnunetv2", "torch", "monai", "scipy")
    return {
        "Test cases": _describe_test(raw, {m.name: scans[m.name].cases for m in group.modalities}),
        "Training cases": "; ".join(group.describe()),
        "Configuration": f"{args.c}, {args.p}",
        "Folds": ", ".join(args.f) + (", predicted as an ensemble" if len(args.f) > 1 else ""),
        "Seeds": ", ".join(map(str, args.seeds)) if args.seeds else _seed_of_environment(),
        "Machine of this command": ", ".join(
            [platform.system(), platform.machine(), f"{os.cpu_count()} CPU cores", *gpus]
        ),
        "Software": ", ".join(f"{name} {version(name)}" for name in packages),
        "Date": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    }


def _seed_of_environment() -> str:
    seed = os.environ.get("nnUNet_semicml_seed")
    return f"{seed}, of this package's trainers (nnUNet_semicml_seed)" if seed else "none set, one run"


def _describe_test(raw: RawDataset, cases_of: Mapping[str, Collection[str]]) -> str:
    """How many test cases have which modality."""
    text = f"{len(raw.test)}, each modality alone"
    if all(len(cases) == len(raw.test) for cases in cases_of.values()):
        return text
    counts = [f"{len(cases)} with {modality}" for modality, cases in cases_of.items()]
    if without := raw.test.keys() - {case for cases in cases_of.values() for case in cases}:
        counts.append(f"{len(without)} with none of these, which no method segments")
    text += f": {', '.join(counts)}. Results of a modality are those of the cases that have it"
    if untested := [modality for modality, cases in cases_of.items() if not cases]:
        text += f"; there are none of {' and '.join(untested)}"
    return text


def _files(
    entries: Sequence[Entry],
    incomplete: Sequence[Incomplete],
    raw: RawDataset,
    scans: Mapping[str, Scans],
    references: Mapping[str, str],
) -> list[Overlaid]:
    """What to look at: scans, references and the predictions of the first seed."""
    gaps = {(entry.method, entry.modality) for entry in incomplete}
    reader = raw.find_reader()

    def volumes_of(scanned: Scans, of_methods: Mapping[str, Path]) -> Volumes:
        images = {case: raw.read_files(raw.test[case], scanned.files)[0] for case in scanned.cases}
        return Volumes(images, references, of_methods, raw.file_ending, reader())

    predictions: dict[str, dict[str, Path]] = {}
    for entry in entries:
        if (entry.method, entry.modality) not in gaps:
            chain = next(iter(entry.chains.values()))
            predictions.setdefault(entry.modality, {})[entry.method] = chain.evaluate.predictions
    return [
        Overlaid(modality, volumes_of(scans[modality], of_methods), _describe_shown(raw, scans[modality]))
        for modality, of_methods in predictions.items()
    ]


def _trainings(entries: Sequence[Entry], incomplete: Sequence[Incomplete]) -> list[Training]:
    """How the networks were trained whose predictions are in the table; of several seeds, with the first one."""
    gaps = {(entry.method, entry.modality) for entry in incomplete}
    found = []
    for entry in entries:
        before = next(iter(entry.chains.values())).before
        if not before or (entry.method, entry.modality) in gaps:
            continue
        *jobs, predict = before
        assert isinstance(predict, Predict)
        trained = [job for job in jobs if isinstance(job, Train) and job.name in predict.needs]
        epochs_before, first = 0, trained[0].first
        while first is not None:
            epochs_before += len(_log_of(first, predict.dataset).get("train_losses", []))
            first = first.first
        logs = [_log_of(training, predict.dataset) for training in trained]
        terms = trained[0].target / "unsupervised_terms.png"
        found.append(Training(entry.method, entry.modality, logs, epochs_before, terms if terms.is_file() else None))
    return found


def _log_of(training: Train, dataset: str) -> dict[str, list[float]]:
    """nnU-Net's log of the network of a dataset; nothing if the network is gone, as first stages may be."""
    file = training.model.fold_folder(dataset, training.fold) / "checkpoint_final.pth"
    return read_log(file) if file.is_file() else {}


def _describe_shown(raw: RawDataset, scans: Scans) -> str:
    """What of a scan the overlays show, if that is not all."""
    channels = scans.channels[: len(raw.channels_of_files[scans.files[0]])]
    if len(scans.channels) == 1:
        return ""
    return channels[0] if len(channels) == 1 else f"the mean of {', '.join(channels)}"
