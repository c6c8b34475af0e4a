"""Compares methods on the test scans of one dataset, each modality alone: `nnUNetv2_semicml_leaderboard`.

Trains what is missing, predicts with nnU-Net's own command line, evaluates every case in 3D, and writes
leaderboard.csv, .md and .html. May import nnU-Net, `errors`, `data`, `planning`; knows trainers by name alone.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import submitit
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semicml.data.modality_group import (
    MODALITIES_FILE,
    ModalityGroup,
    environment_folder,
    preprocessed_folder,
)
from nnunetv2_semicml.data.raw_dataset import (
    RawDataset,
    dataset_number,
    datasets_with_id,
    number_or_name,
    raw_root,
    read_raw_dataset,
)
from nnunetv2_semicml.errors import UserError, reports_user_errors, some_of
from nnunetv2_semicml.evaluation.figures import Volumes
from nnunetv2_semicml.evaluation.jobs import Evaluate, Job, Model, Predict, Train, read_json, run_jobs
from nnunetv2_semicml.evaluation.leaderboard_page import Incomplete, Overlaid, Report, write_markdown, write_page
from nnunetv2_semicml.evaluation.metrics import METRICS

PROGRAMS = Path(sys.executable).parent  # nnU-Net's command lines, installed beside this Python
NOTATION = "[NAME=][each:|all:]TRAINER[@DATASET]"
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
        labeled: number of labeled training cases that have the modality.
        unlabeled: number of unlabeled training cases that have it, used or not.
    """

    dataset: str
    scans: Scans
    labeled: int
    unlabeled: int


@dataclass(frozen=True)
class Method:
    """A trainer, how it is trained and what its networks predict.

    Attributes:
        name: for tables.
        trainer: class name.
        scope: "group": trained once on the multi-modal dataset, writes a network for every modality; "each": trained on
            the dataset of every modality by itself; "all": trained on the multi-modal dataset by stock nnU-Net, all
            channels at once. A dataset that is one modality has "group", however it was asked for.
        trained: the datasets to train -> the datasets that have a network afterwards.
        networks: modality -> what predicts it; modalities without test case are left out.
    """

    name: str
    trainer: str
    scope: str
    trained: dict[str, tuple[str, ...]]
    networks: dict[str, Network]


@dataclass(frozen=True)
class Entry:
    """One method on one modality: the evaluations of all seeds, and the jobs that these rest on."""

    method: str
    modality: str
    chains: dict[int | None, list[Job]]
    labeled: int | None = None
    unlabeled: int | None = None


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
        text: NAME=SCOPE:TRAINER@DATASET; all but TRAINER can be left out. The name is then the rest of the text, the
            scope the whole group, the dataset that of the test scans.
        raw: the dataset of the test scans.
        group: its modalities.

    Raises:
        UserError: the text has another form, no test case has what the method needs, it cannot be trained on cases that
            lack channels, or the other dataset is not there, has other modalities, channels or labels, or was made for
            training on some of the test cases.
    """
    match = re.fullmatch(r"(?:([^=]+)=)?((?:(each|all):)?(\w+)(?:@([\w.+-]+))?)", text)
    if not match:
        raise UserError("--methods", repr(text), NOTATION, "Write e.g. nnUNetTrainerSemiCML or each:nnUNetTrainer.")
    name, spec, scope, trainer, other = match.groups()
    dataset = raw.name if other is None else _find_dataset(other)
    trained_group = group
    if dataset != raw.name:
        # stock nnU-Net on all channels needs no modality datasets
        grouped = scope != "all" or (preprocessed_folder(dataset) / MODALITIES_FILE).is_file()
        trained_group = ModalityGroup.load(dataset) if grouped else None
    if trained_group:
        labeled, unlabeled = trained_group.labeled, trained_group.unlabeled
    else:
        references = preprocessed_folder(dataset) / "gt_segmentations"
        labeled, unlabeled = [f.name.removesuffix(raw.file_ending) for f in references.glob(f"*{raw.file_ending}")], []
    if shared := sorted(raw.test.keys() & {*labeled, *unlabeled}):
        raise UserError(
            f"--methods {text}",
            f"test cases of {raw.name} among the training cases of {dataset}: {some_of(shared)}",
            "test cases that no method is trained on",
            "Name another dataset, or make one that leaves these cases out.",
        )
    single = trained_group is not None and trained_group.is_single
    if scope == "all":
        # of a dataset that is one modality only the complete cases were preprocessed
        if not single and (incomplete := _incomplete_cases(dataset, raw, trained_group)):
            raise UserError(
                f"--methods {text}",
                f"{len(incomplete)} labeled cases of {dataset} that lack a channel: {some_of(incomplete)}",
                "all channels of every labeled case, since stock nnU-Net takes the files of a case for its first "
                "channels",
                "Plan a copy of the dataset with nnUNetv2_semicml_plan_and_preprocess --one_modality, which leaves "
                f"these cases out, and write all:{trainer}@ with its id.",
            )
        every_channel = _scans(raw, range(len(raw.channels_of_files)))
        if trained_group:
            every_modality = [modality.name for modality in trained_group.modalities]
            labeled, unlabeled = (trained_group.common_cases(every_modality, labeled=kind) for kind in (True, False))
        networks = {_name_of_all(raw, group): Network(dataset, every_channel, len(labeled), len(unlabeled))}
    else:
        others = {modality.name: modality for modality in trained_group.modalities}
        if lacking := [modality.name for modality in group.modalities if modality.name not in others]:
            raise UserError(
                trained_group.file, f"the modalities {some_of(others)}", some_of(lacking), "Name another dataset."
            )
        networks = {
            modality.name: Network(
                others[modality.name].dataset_name,
                _scans(raw, modality.files),
                len(others[modality.name].labeled),
                len(others[modality.name].unlabeled),
            )
            for modality in group.modalities
        }
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
    if scope == "each":
        trained = {network.dataset: (network.dataset,) for network in tested.values()}
    else:
        written = [dataset] if scope == "all" else [modality.dataset_name for modality in trained_group.modalities]
        trained = {dataset: tuple(written)}
    return Method(name or spec, trainer, "group" if single else scope or "group", trained, tested)


def plan_method(
    method: Method,
    raw: RawDataset,
    references: Mapping[str, str],
    out: Path,
    args: argparse.Namespace,
    first_stages: dict[tuple, list[str]],
) -> list[Entry]:
    """Jobs of one method.

    Args:
        method: what to compare.
        raw: the dataset of the test scans.
        references: test case -> reference segmentation.
        out: folder of the leaderboard.
        args: the command line.
        first_stages: (dataset, fold, seed) -> names of the jobs that train earlier methods there, which a method that
            goes on from their networks needs; this adds to it.

    Returns:
        One entry per modality.
    """
    folds = tuple(args.f)
    entries = {
        modality: Entry(method.name, modality, {}, network.labeled, network.unlabeled)
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
        train: dict[str, list[Train]] = {}
        for dataset, written in method.trained.items():
            for fold in folds:
                earlier = first_stages.setdefault((dataset, fold, seed), [])
                job = Train(
                    name=f"train {method.trainer} on {dataset}, fold {fold}{of_seed}",
                    needs=tuple(earlier) if method.scope == "group" else (),
                    model=model,
                    dataset=dataset,
                    fold=fold,
                    validated=written,
                    options=tuple(shlex.split(args.train_options)),
                )
                if method.scope == "group":
                    earlier.append(job.name)
                train.setdefault(dataset, []).append(job)
        for modality, network in method.networks.items():
            dataset, cases = network.dataset, network.scans.cases
            before = train[dataset if method.scope == "each" else next(iter(method.trained))]
            place = Path(
                f"{method.scope}_{method.trainer}",
                "unseeded" if seed is None else f"seed_{seed}",
                f"folds_{'_'.join(folds)}",
                dataset,
            )
            predict = Predict(
                name=f"predict {modality} with {method.trainer} of {dataset}{of_seed}",
                needs=tuple(job.name for job in before),
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
            entries[modality].chains[seed] = [*before, predict, evaluate]
    return list(entries.values())


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
    file_name = re.sub(r"\W", "_", f"{name}_{modality}")
    evaluate = Evaluate(
        name=f"evaluate {modality} of {name}",
        predictions=Path(folder).absolute(),
        references={case: references[case] for case in scans[modality].cases},
        dataset_json=raw.dataset_json,
        out=out / "metrics" / "external" / f"{file_name}.json",
    )
    return Entry(name, modality, {None: [evaluate]})


def collect(entries: Sequence[Entry], failures: dict[str, str], dataset: str) -> tuple[pd.DataFrame, list[Incomplete]]:
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
        lacking = {}
        for chain in entry.chains.values():
            lacking |= {job.name: failures.get(job.name) or missing for job in chain if (missing := job.missing())}
        if lacking:
            incomplete.append(Incomplete(entry.method, entry.modality, lacking))
            continue
        about = {"dataset": dataset, "method": entry.method, "modality": entry.modality}
        for seed, chain in entry.chains.items():
            for case, classes in chain[-1].results().items():
                for name, metrics in classes.items():
                    row = {**about, "seed": seed, "case": case, "class": name, **metrics}
                    rows.append(row | {"labeled": entry.labeled, "unlabeled": entry.unlabeled})
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype(dict.fromkeys(("seed", "labeled", "unlabeled"), "Int64")), incomplete


def read_table(file: Path, scans: Mapping[str, Scans]) -> pd.DataFrame:
    """Read the leaderboard.csv of another dataset, for curves over the labeled share.

    Raises:
        UserError: it is no such table, or has other modalities than these, or other test cases of one of them.
    """
    try:
        names = dict.fromkeys(("dataset", "method", "modality", "case", "class"), str)
        table = pd.read_csv(file, dtype=names | dict.fromkeys(("seed", "labeled", "unlabeled"), "Int64"))
    except (OSError, ValueError) as error:
        raise UserError(file, f"an unreadable file ({error})", "a leaderboard.csv", "Correct --compare.") from error
    if list(table.columns) != COLUMNS:
        raise UserError(
            file,
            f"the columns {', '.join(table.columns)}",
            ", ".join(COLUMNS),
            "Name a leaderboard.csv of this version.",
        )
    for modality, cases in table.groupby("modality")["case"]:
        if modality not in scans:
            raise UserError(
                file, f"the modality {modality}", f"only {some_of(scans)}", "Name a table of the same modalities."
            )
        if different := {*cases} ^ {*scans[modality].cases}:
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


def _require_same_channels(network: Network, raw: RawDataset) -> None:
    """Refuse a network that was made for other channels, labels or files than those of the test scans."""
    expected = {
        "channel_names": {str(i): channel for i, channel in enumerate(network.scans.channels)},
        **{key: raw.dataset_json[key] for key in ("labels", "file_ending")},
    }
    file = preprocessed_folder(network.dataset) / "dataset.json"
    described = read_json(file)
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
    writers: dict[tuple[str, str], tuple[str, str]] = {}
    for method in methods:
        for dataset, written in method.trained.items():
            for network in written:
                trained, first = writers.setdefault((method.trainer, network), (dataset, method.name))
                if trained != dataset:
                    raise UserError(
                        "--methods",
                        f"{first} and {method.name}, which both write the networks of {method.trainer} on {network}",
                        "one of them",
                        "Leave one out, or give it a subclass of the trainer, under another name.",
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
        plans = read_json(file) or {"configurations": {}}
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
    return run_jobs(jobs, executor, args.jobs or 1, gpus=[gpu for gpu in visible.split(",") if gpu])


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
    first_stages: dict[tuple, list[str]] = {}
    entries = [e for method in methods for e in plan_method(method, raw, references, out, args, first_stages)]
    entries += [plan_external(text, scans, raw, references, out) for text in args.external]
    rows = [(entry.method, entry.modality) for entry in entries]
    if twice := [f"{method} on {modality}" for method, modality in rows if rows.count((method, modality)) > 1]:
        raise UserError("--methods, --external", f"{twice[0]} twice", "different names", f"Write {NOTATION}.")
    reference_method = args.reference or entries[0].method
    if reference_method not in {method for method, _ in rows}:
        names = ", ".join(dict.fromkeys(method for method, _ in rows))
        raise UserError("--reference", reference_method, f"one of {names}", "Correct it, or leave it out.")

    others = [read_table(file, scans) for file in args.compare]

    # methods may share jobs, e.g. when they differ in the name alone; the first comes before all that need it
    jobs: dict[str, Job] = {}
    for job in (job for entry in entries for chain in entry.chains.values() for job in chain):
        jobs.setdefault(job.name, job)
    for job in jobs.values():
        if isinstance(job, Train) and job.missing():
            _require_preprocessed(job)
    logs = out / "logs" / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    failures = _run(list(jobs.values()), args, logs)

    cases, incomplete = collect(entries, failures, raw.name)
    report = Report(
        title=f"Leaderboard of {raw.name}",
        command=command,
        facts=_facts(raw, group, scans, args),
        reference_method=reference_method,
        cases=cases,
        incomplete=incomplete,
        others=others,
        files=_files(entries, incomplete, raw, scans, references),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, write in (
        ("csv", lambda file: cases.to_csv(file, index=False, float_format="%.6g")),
        ("md", lambda file: write_markdown(file, report)),
        ("html", lambda file: write_page(file, report)),
    ):
        temporary = out / f".leaderboard.{name}"
        write(temporary)
        temporary.replace(out / f"leaderboard.{name}")
    if incomplete:
        job, problem = next(iter(incomplete[0].missing.items()))
        raise UserError(
            out / "leaderboard.html",
            f'{len(incomplete)} incomplete results, the first of which lacks "{job}": {problem}',
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
        "Seeds": ", ".join(map(str, args.seeds)) if args.seeds else "none set, one run",
        "Machine of this command": ", ".join(
            [platform.system(), platform.machine(), f"{os.cpu_count()} CPU cores", *gpus]
        ),
        "Software": ", ".join(f"{name} {version(name)}" for name in packages),
        "Date": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    }


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
            predictions.setdefault(entry.modality, {})[entry.method] = chain[-1].predictions
    return [
        Overlaid(modality, volumes_of(scans[modality], of_methods), _describe_shown(raw, scans[modality]))
        for modality, of_methods in predictions.items()
    ]


def _describe_shown(raw: RawDataset, scans: Scans) -> str:
    """What of a scan the overlays show, if that is not all."""
    channels = scans.channels[: len(raw.channels_of_files[scans.files[0]])]
    if len(scans.channels) == 1:
        return ""
    return channels[0] if len(channels) == 1 else f"the mean of {', '.join(channels)}"


@reports_user_errors
def main() -> None:
    """Command line of `leaderboard`."""
    parser = argparse.ArgumentParser(
        description="Train what is missing, predict the test scans (imagesTs) of every modality alone, evaluate them "
        "against labelsTs, and write leaderboard.csv, .md and .html. Repeat the command to go on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""methods: {NOTATION}
  nnUNetTrainerSemiCML        trained once on dataset -d, predicts every modality
  each:nnUNetTrainer          trained on the dataset of every modality by itself
  all:nnUNetTrainer           stock nnU-Net on all channels of dataset -d at once; no labeled case may lack one
  each:nnUNetTrainer@600      trained on the modality datasets of dataset 600, e.g. the same patients, all labeled
  "Upper bound=each:nnUNetTrainer@600"     the same with a name for the tables
A method that goes on from another's networks stands after it. If -d is one modality, all of these train on it.
Test cases that lack a modality are left out of its results.""",
    )
    add = parser.add_argument
    add(
        "-d",
        type=number_or_name,
        required=True,
        metavar="ID",
        help="id or name of the dataset, planned and preprocessed",
    )
    add("-c", required=True, metavar="CONFIGURATION", help="e.g. 2d, 3d_fullres")
    add("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="folds (default: 0 1 2 3 4), or all")
    add("--methods", nargs="+", required=True, metavar="METHOD", help="see below")
    add("--reference", metavar="NAME", help="the method that the others are compared with (default: the first)")
    add(
        "--external",
        nargs="+",
        default=[],
        metavar="NAME=MODALITY=FOLDER",
        help="predictions of other people's models, files named like the test cases",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="train everything once per seed, below the output folder; only this package's trainers are seeded, those "
        "of nnU-Net differ by chance (default: one run, in nnUNet_results)",
    )
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    add("-o", type=Path, metavar="FOLDER", help="output folder (default: nnUNet_results/leaderboards/…)")
    add("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="(default: %(default)s)")
    add("--train_options", default="", metavar="OPTIONS", help='of nnUNetv2_train: --train_options="-num_gpus 2"')
    add(
        "--predict_options",
        default="",
        metavar="OPTIONS",
        help='of nnUNetv2_predict: --predict_options="--disable_tta -npp 1"',
    )
    add("--executor", default="local", choices=["local", "slurm"], help="(default: %(default)s)")
    add("--jobs", type=int, metavar="N", help="jobs at a time (default: one locally, all on SLURM); GPUs are dealt out")
    add(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of submitit, e.g. timeout_min=2880 slurm_partition=gpu gpus_per_node=1 cpus_per_task=12",
    )
    add(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="leaderboard.csv of datasets with other labeled shares, for curves",
    )
    page = leaderboard(parser.parse_args(), shlex.join(["nnUNetv2_semicml_leaderboard", *sys.argv[1:]]))
    print(f"Leaderboard: {page}")


if __name__ == "__main__":
    main()
