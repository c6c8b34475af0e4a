"""Plans and preprocesses a dataset with unlabeled cases, a multi-modal one as one nnU-Net dataset per modality.

nnU-Net's fingerprint, planner and preprocessor do the work. What is added: one geometry for all modalities, planned on
the labeled cases that have all of them; the unlabeled cases, preprocessed beside the labeled ones; one partition into
folds; and modalities.json, written last. A dataset that is one modality is planned where it is. Nothing is written to
nnUNet_raw.
"""

import argparse
import copy
import filecmp
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_semicml.data.folds import (
    SPLITS_FILE,
    Folds,
    extend_folds,
    make_folds,
    read_folds,
    require_cases,
    require_modalities,
    restrict,
)
from nnunetv2_semicml.data.image_check import CheckedImages, check_images
from nnunetv2_semicml.data.modality_group import (
    Modality,
    ModalityGroup,
    environment_folder,
    preprocessed_folder,
    read_json,
    unlabeled_identifier,
)
from nnunetv2_semicml.data.raw_dataset import (
    RawDataset,
    confusable_with_id,
    dataset_number,
    datasets_with_id,
    raw_root,
    read_raw_dataset,
)
from nnunetv2_semicml.errors import UserError, reports_user_errors, some_of

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")  # nnU-Net's default
_DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's defaults
_SOURCE_KEY = "semicml_source"  # in dataset.json, marks the modality datasets that this module made
_NAME = r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*"


def plan_and_preprocess(
    dataset: int | str,
    configurations: Sequence[str] | None = None,
    planner_name: str = "ExperimentPlanner",
    gpu_memory_target: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
    fingerprint_extractor_name: str = "DatasetFingerprintExtractor",
    modalities: Sequence[str] | None = None,
    modality_ids: Sequence[int] | None = None,
    one_modality: bool = False,
    plans_of: int | str | None = None,
    keep_plans: bool = False,
    preprocess: bool = True,
    num_processes: Sequence[int] | None = None,
    num_processes_fingerprint: int = 8,
    clean: bool = False,
    verify_integrity: bool = False,
    verbose: bool = False,
) -> ModalityGroup:
    """Do what `nnUNetv2_plan_and_preprocess` does, for every modality and for the unlabeled cases as well.

    Running it again does the requested configurations again; others stay valid as long as nothing that they depend on
    has changed.

    Args:
        dataset: the dataset's number, or its name in full.
        configurations: those that the planner does not make are skipped, as by nnU-Net. None is nnU-Net's three or,
            with `keep_plans`, those that are preprocessed.
        planner_name: any planner of nnU-Net.
        gpu_memory_target: in GB; None is the planner's default.
        preprocessor_name: any preprocessor of nnU-Net.
        overwrite_target_spacing: three numbers in mm.
        overwrite_plans_name: None is the planner's default.
        fingerprint_extractor_name: any fingerprint extractor of nnU-Net.
        modalities: "T2", the channel of this name or number, or "MR=T1,T2", a modality of several; None is every file
            of a case by itself, which is every channel, unless files hold several.
        modality_ids: ids of the modality datasets; None is the next free ids. A dataset that is one modality needs
            none.
        one_modality: all channels are one modality, planned in the dataset's own place.
        plans_of: another dataset that this function has planned. Its plans are taken as they are, normalization
            included, so that networks can be compared that differ in nothing but their training cases; unlabeled cases
            are then optional. `overwrite_plans_name` tells which of its plans; planner and spacing do not matter.
        keep_plans: keep fingerprint, plans and modalities of an earlier run, preprocess only cases that are new or have
            changed, and add new labeled cases to the folds.
        preprocess: False plans only.
        num_processes: one number, or one for each configuration; None is nnU-Net's default.
        num_processes_fingerprint: for checking the images and extracting the fingerprints.
        clean: extract the fingerprints again even if the cases are the same.
        verify_integrity: run nnU-Net's own integrity check as well.
        verbose: let nnU-Net print more.

    Returns:
        The group, as stored in modalities.json.

    Raises:
        UserError: about whatever is wrong with the input, before anything is written.
    """
    _require_writable(environment_folder("nnUNet_preprocessed"))
    if get_allowed_n_proc_DA() < 1:
        raise UserError(
            "environment variable nnUNet_n_proc_DA",
            "0",
            "at least 1, since nnU-Net's planner takes it as a number of threads",
            "Set it to 0 for training only.",
        )
    planner_class = _find_class(planner_name, "-pl", "an experiment planner", "ExperimentPlanner")
    extractor_class = _find_class(fingerprint_extractor_name, "-fpe", "a fingerprint extractor", "the default")
    default_name = "nnUNetPlans" if plans_of else inspect.signature(planner_class).parameters["plans_name"].default
    plans_name = overwrite_plans_name or default_name
    raw = read_raw_dataset(dataset, require_unlabeled=plans_of is None and not keep_plans)
    previous = _previous_group(raw.name)
    done = previous.preprocessed if previous else {}
    if keep_plans:
        if modalities or modality_ids or one_modality or plans_of is not None or not preprocess:
            raise UserError(
                "option --keep_plans",
                "options about modalities, plans or preprocessing beside it",
                "none: an earlier run has decided these",
                "Leave them out, or leave --keep_plans out to plan anew.",
            )
        if previous is None:
            raise UserError(
                preprocessed_folder(raw.name), "no finished preprocessing", "one", "Leave --keep_plans out to plan."
            )
        chosen = previous.modalities
        plans = read_json(preprocessed_folder(raw.name) / f"{plans_name}.json", "the plans to keep")
        configurations = configurations or [c for c in CONFIGURATIONS if _identifiers(plans, [c]).keys() & done.keys()]
    else:
        chosen = _choose_modalities(raw, modalities, modality_ids, one_modality)
        configurations = configurations or CONFIGURATIONS
    processes = _processes(configurations, num_processes)
    group = ModalityGroup(raw.name, [_with_cases(raw, modality) for modality in chosen])
    given = None if plans_of is None else _given_plans(group, plans_of, plans_name)
    complete = _complete_cases(raw, group)
    print("\n".join([*group.describe(), *_left_out(raw, group)]))
    if group.unlabeled:
        group.require_common_cases()
    folds = _folds(raw, group, keep_plans)
    checked = check_images(raw, num_processes_fingerprint, modalities=[m.files for m in group.modalities])
    _require_foreground(raw, group, complete, folds, checked)
    group.files = {os.path.relpath(file, raw_root()): state for file, state in checked.files.items()}
    group.modalities = [_with_digests(raw, modality, checked) for modality in group.modalities]

    if not keep_plans:
        known = previous is not None and _labeled_files(previous) == _labeled_files(group)
        with _raw_view(raw, group, complete) as folder:
            if verify_integrity:
                verify_dataset_integrity(str(folder / raw.name), num_processes_fingerprint)
            for name in dict.fromkeys([raw.name, *(m.dataset_name for m in group.modalities)]):
                print(f"Extracting the fingerprint of {name}…")
                extractor_class(name, num_processes_fingerprint, verbose).run(overwrite_existing=clean or not known)
            if given is None:
                print(f"Planning {raw.name} on its {len(complete)} labeled cases with all modalities…")
                planner = planner_class(
                    raw.name,
                    preprocessor_name=preprocessor_name,
                    overwrite_target_spacing=overwrite_target_spacing
                    and [float(mm) for mm in overwrite_target_spacing],
                    plans_name=plans_name,
                    **({} if gpu_memory_target is None else {"gpu_memory_target_in_gb": gpu_memory_target}),
                )
                planner.plan_experiment()
        plans = given[raw.name] if given else json.loads(_plans_file(raw.name, plans_name).read_text())
        _write_json(_plans_file(raw.name, plans_name), plans)
        for modality in [] if group.is_single else group.modalities:
            own = given[modality.dataset_name] if given else _modality_plans(plans, raw, modality, planner)
            _write_json(_plans_file(modality.dataset_name, plans_name), own)
    _write_descriptions(raw, group)

    identifiers = _identifiers(plans, configurations)
    for configuration in set(configurations) - set(identifiers.values()):
        print(f"INFO: configuration {configuration} is not in {_plans_file(raw.name, plans_name)}: skipped.")
    # what is going to be replaced counts as missing from here until it is done again
    group.preprocessed = {k: v for k, v in done.items() if k not in identifiers or not preprocess}
    if keep_plans:
        for identifier, configuration in identifiers.items():
            new = group.sources(plans_name, configuration)
            group.preprocessed[identifier] = {
                name: _unchanged(done.get(identifier, {}), name, new[name]) for name in new
            }
    if previous is not None or not preprocess:
        _save(group)
    _write_folds(group, folds)
    for identifier, configuration in identifiers.items() if preprocess else ():
        _preprocess(raw, group, plans_name, configuration, identifier, processes[configuration], verbose)
        group.preprocessed[identifier] = group.sources(plans_name, configuration)
        _save(group)
    return group


# what is chosen before anything is read or written


def _require_writable(folder: Path) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(existing, "a folder that may not be written to", "one that may", "Change nnUNet_preprocessed.")


def _processes(configurations: Sequence[str], num_processes: Sequence[int] | None) -> dict[str, int]:
    if num_processes is None:
        return {c: _DEFAULT_PROCESSES.get(c, 4) for c in configurations}
    if len(num_processes) == 1:
        num_processes = list(num_processes) * len(configurations)
    if len(num_processes) != len(configurations) or min(num_processes) < 1:
        raise UserError(
            "option -np",
            f"{len(num_processes)} numbers for {len(configurations)} configurations: {list(num_processes)}",
            "one positive number, or one for each configuration",
            "Correct it.",
        )
    return dict(zip(configurations, num_processes, strict=True))


def _find_class(name: str, option: str, kind: str, example: str) -> type:
    folder = Path(nnunetv2.__path__[0]) / "experiment_planning"
    found = recursive_find_python_class(str(folder), name, current_module="nnunetv2.experiment_planning")
    if found is None:
        raise UserError(f"option {option}", name, f"{kind} of nnU-Net", f"Try {example}.")
    return found


def _identifiers(plans: dict, configurations: Sequence[str]) -> dict[str, str]:
    """Data identifier -> configuration, of those that the plans have."""
    manager = PlansManager(plans)
    available = [c for c in configurations if c in plans["configurations"]]
    return {manager.get_configuration(c).data_identifier: c for c in available}


def _plans_file(dataset_name: str, plans_name: str) -> Path:
    return preprocessed_folder(dataset_name) / f"{plans_name}.json"


def _previous_group(dataset_name: str) -> ModalityGroup | None:
    try:
        return ModalityGroup.load(dataset_name)
    except UserError:  # there is none, or it is damaged and will be replaced
        return None


def _given_plans(group: ModalityGroup, plans_of: int | str, plans_name: str) -> dict[str, dict]:
    """The plans of another group, for each dataset of this one."""
    candidates = [plans_of] if isinstance(plans_of, str) else datasets_with_id(plans_of)
    if len(candidates) != 1:
        raise UserError(
            "option --plans_of",
            f"{', '.join(candidates) or 'no dataset'} with the id {plans_of}",
            "one dataset that nnUNetv2_semicml_plan_and_preprocess has planned",
            "Correct the id.",
        )
    other = ModalityGroup.load(candidates[0])
    own, others = ({m.name: m.channels for m in g.modalities} for g in (group, other))
    if own != others:
        raise UserError(
            "option --plans_of",
            f"{other.dataset_name} with the modalities {_describe_modalities(other.modalities)}",
            f"a dataset with {_describe_modalities(group.modalities)}",
            "Choose another dataset, give the same --modalities, or leave the option out.",
        )
    plans = {group.dataset_name: read_json(_plans_file(other.dataset_name, plans_name), "its plans")}
    for modality, (of_other, _) in zip(group.modalities, other.load_plans(plans_name), strict=True):
        plans[modality.dataset_name] = of_other
    return {name: {**of_dataset, "dataset_name": name} for name, of_dataset in plans.items()}


def _describe_modalities(modalities: Sequence[Modality]) -> str:
    return ", ".join(f"{m.name} (channels {', '.join(map(str, m.channels))})" for m in modalities)


# modalities


def _choose_modalities(
    raw: RawDataset, texts: Sequence[str] | None, ids: Sequence[int] | None, one_modality: bool
) -> list[Modality]:
    """The modalities, with names of their datasets and without cases."""
    if one_modality and texts:
        raise UserError("options --modalities, --one_modality", "both", "one of them", "Leave one out.")
    every_channel = list(range(len(raw.channel_names)))
    if one_modality or (texts is None and len(raw.channels_of_files) == 1):
        if ids is not None:
            raise UserError(
                "option --modality_ids", f"{list(ids)}", f"none, since {raw.name} is one modality", "Leave it out."
            )
        (name,) = _default_names([raw.channel_names]) if len(raw.channels_of_files) == 1 else ["all"]
        return [Modality(name, every_channel, list(range(len(raw.channels_of_files))), raw.name)]
    if texts is None:
        channels = [list(held) for held in raw.channels_of_files]
        chosen = dict(
            zip(_default_names([[raw.channel_names[c] for c in held] for held in channels]), channels, strict=True)
        )
    else:
        chosen = _parse_modalities(raw, texts)
    names = list(chosen)
    if ids is None:
        ids = _free_ids(raw, names)
    if len(ids) != len(names) or len(set(ids)) < len(ids):
        raise UserError(
            "option --modality_ids",
            f"{list(ids)}",
            f"{len(names)} different ids, for {', '.join(names)}",
            "Give one id for each modality, or leave the option out.",
        )
    for name, dataset_id in zip(names, ids, strict=True):
        if taken := _taken_by(raw, dataset_id, name):
            raise UserError(
                f"dataset id {dataset_id}",
                f"that {taken} has it",
                f"a free id for {_modality_dataset_name(raw, name, dataset_id)}",
                "Choose other ids with --modality_ids.",
            )
    return [
        Modality(name, channels, raw.files_of_channels(channels), _modality_dataset_name(raw, name, dataset_id))
        for (name, channels), dataset_id in zip(chosen.items(), ids, strict=True)
    ]


def _default_names(channel_names: Sequence[Sequence[str]]) -> list[str]:
    """Names for modalities with channels of these names: fit for folders, and with a number if they were alike."""
    fit = [
        "+".join(re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.+-") or "channel" for name in names)
        for names in channel_names
    ]
    folded = [name.casefold() for name in fit]
    return [name if folded.count(name.casefold()) == 1 else f"{name}_{i}" for i, name in enumerate(fit)]


def _parse_modalities(raw: RawDataset, texts: Sequence[str]) -> dict[str, list[int]]:
    """Name -> channels, of options "T2" or "MR=T1,T1ce"."""
    option, file = "option --modalities", raw.folder / "dataset.json"

    def channel(name: str) -> int:
        found = [i for i, known in enumerate(raw.channel_names) if known == name]
        if not found and name.isdecimal() and int(name) < len(raw.channel_names):
            found = [int(name)]
        if len(found) != 1:
            raise UserError(
                option,
                f"{name}, the name of channels {', '.join(map(str, found))}" if found else name,
                f"one of {some_of(raw.channel_names)} ({file}), or its number",
                "Give the number, e.g. NAME=0." if found else "Correct the name.",
            )
        return found[0]

    chosen: dict[str, list[int]] = {}
    for text in texts:
        name, separator, listed = text.partition("=")
        if text in raw.channel_names or not separator:
            channels = [channel(text)]
            (name,) = _default_names([[raw.channel_names[channels[0]]]])
        else:
            channels = [channel(part) for part in listed.split(",")]
        if not re.fullmatch(_NAME, name):
            raise UserError(
                option,
                f"the name {name!r}",
                "a name that can be part of a folder name: letters, digits, single _ and . + -",
                "Choose another one.",
            )
        if name.casefold() in {known.casefold() for known in chosen}:
            raise UserError(option, f"two modalities called {name}", "different names", "Write NAME=CHANNEL.")
        if twice := {c for known in chosen.values() for c in known} & {*channels} or len({*channels}) < len(channels):
            which = some_of(raw.channel_names[c] for c in twice) if isinstance(twice, set) else listed
            raise UserError(option, f"{which} twice", "every channel in one modality", "Remove it from one.")
        if raw.files_of_channels(channels) is None:
            layout = "; ".join(some_of(raw.channel_names[c] for c in held) for held in raw.channels_of_files)
            raise UserError(
                option,
                f"{name} with the channels {some_of(raw.channel_names[c] for c in channels)}",
                f"all channels of a file, in their order, since the files of a case hold {layout}",
                "Take whole files.",
            )
        chosen[name] = channels
    return chosen


def _free_ids(raw: RawDataset, names: Sequence[str]) -> list[int]:
    """The ids that these modalities already have, else the next ones that are free and that nnU-Net can tell apart."""
    previous = _previous_group(raw.name)
    if previous is not None and [m.name for m in previous.modalities] == list(names) and not previous.is_single:
        return [dataset_number(m.dataset_name) for m in previous.modalities]
    ids: list[int] = []
    for candidate in count(dataset_number(raw.name) + 1):
        if len(ids) == len(names):
            return ids
        if not _taken_by(raw, candidate, names[len(ids)]) and not confusable_with_id(candidate):
            ids.append(candidate)


def _modality_dataset_name(raw: RawDataset, modality: str, dataset_id: int) -> str:
    return f"Dataset{dataset_id:03d}_{raw.name.split('_', 1)[1]}_{modality}"


def _taken_by(raw: RawDataset, dataset_id: int, modality: str) -> str | None:
    """The dataset that keeps a modality from having an id, if any; not what an earlier run made for it."""
    own = _modality_dataset_name(raw, modality, dataset_id)
    return next((n for n in datasets_with_id(dataset_id) if n != own or not _made_here(raw, n)), None)


def _made_here(raw: RawDataset, dataset_name: str) -> bool:
    try:
        described = json.loads((preprocessed_folder(dataset_name) / "dataset.json").read_text())
    except (OSError, ValueError):
        return False
    return described.get(_SOURCE_KEY) == raw.name


# cases


def _with_cases(raw: RawDataset, modality: Modality) -> Modality:
    """The modality with the names of the cases that have all of its files."""

    def having(cases: dict[str, dict]) -> dict[str, str]:
        return {case: "" for case, files in cases.items() if None not in [files["images"][i] for i in modality.files]}

    return replace(modality, labeled=having(raw.labeled), unlabeled=having(raw.unlabeled))


def _with_digests(raw: RawDataset, modality: Modality, checked: CheckedImages) -> Modality:
    """The modality with the digest of the files of each case."""

    def digests(cases: Collection[str], of_folder: dict[str, dict]) -> dict[str, str]:
        return {
            case: hashlib.sha256(
                "".join(checked.files[file][2] for file in raw.read_files(of_folder[case], modality.files)).encode()
            ).hexdigest()[:16]
            for case in cases
        }

    return replace(
        modality,
        labeled=digests(modality.labeled, raw.labeled),
        unlabeled=digests(modality.unlabeled, raw.unlabeled),
    )


def _labeled_files(group: ModalityGroup) -> list:
    """What a fingerprint depends on."""
    return [(m.dataset_name, m.channels, m.labeled) for m in group.modalities]


def _complete_cases(raw: RawDataset, group: ModalityGroup) -> list[str]:
    """The labeled cases that have all modalities, on which the geometry is planned."""
    complete = group.common_cases([m.name for m in group.modalities], labeled=True)
    if not complete:
        raise UserError(
            raw.folder / "imagesTr",
            f"no labeled case with {' and '.join(m.name for m in group.modalities)}",
            "at least one that has all modalities, to plan the geometry",
            "Add such a case, or plan without one of these modalities.",
        )
    return complete


def _left_out(raw: RawDataset, group: ModalityGroup) -> list[str]:
    """Which cases have no modality, and which have a part of one."""
    lines = []
    for folder, cases, known in (
        ("imagesTr", raw.labeled, group.labeled),
        ("imagesUn", raw.unlabeled, group.unlabeled),
    ):
        if without := sorted(cases.keys() - known):
            lines.append(
                f"{folder}: {len(without)} cases have none of these modalities and are left out: {some_of(without)}"
            )
        for modality in group.modalities:
            parts = [[files["images"][i] is None for i in modality.files] for files in cases.values()]
            if number := sum(any(part) and not all(part) for part in parts):
                lines.append(f"{folder}: {number} cases have some files of {modality.name} and count as without it.")
        if hidden := [f.name for f in (raw.folder / folder).glob(f".*{raw.file_ending}")]:
            lines.append(
                f"{folder}: {len(hidden)} hidden files such as {hidden[0]} are passed over; stock nnU-Net takes them "
                "for images of this dataset, so delete them if you train it on all channels at once."
            )
    return lines


def _folds(raw: RawDataset, group: ModalityGroup, keep: bool) -> Folds:
    """The user's or an earlier split; else nnU-Net's five folds."""
    files = [raw.folder / SPLITS_FILE, preprocessed_folder(raw.name) / SPLITS_FILE]
    for file in reversed(files) if keep else files:
        if not file.is_file():
            continue
        folds = read_folds(file)
        if keep:
            folds = extend_folds(restrict(folds, group.labeled), group.labeled_of)
        require_cases(folds, group.labeled, file)
        require_modalities(folds, group.labeled_of, file)
        return folds
    folds = make_folds(group.labeled_of, raw.folder / "labelsTr")
    require_modalities(folds, group.labeled_of, raw.folder / "labelsTr")
    return folds


def _require_foreground(
    raw: RawDataset, group: ModalityGroup, complete: Sequence[str], folds: Folds, checked: CheckedImages
) -> None:
    """Refuse labels that nothing can be learned from, and say what cannot be measured."""
    values = {
        name: {value} if isinstance(value, int) else {*value}
        for name, value in raw.dataset_json["labels"].items()
        if name not in ("background", "ignore")
    }

    def shown(cases: Collection[str]) -> list[str]:
        occurring = set().union(*(checked.labels[case] for case in cases))
        return [name for name, own in values.items() if own & occurring]

    of_whom = {"all modalities": complete, **group.labeled_of}
    for name, cases in of_whom.items():
        if not shown(cases):
            raise UserError(
                raw.folder / "labelsTr",
                f"no foreground in any of the {len(cases)} labels of cases with {name}",
                f"some voxels of {some_of(values)}",
                "Add a case that shows it, or correct the labels.",
            )
    if absent := [name for name in values if name not in shown(group.labeled)]:
        print(f"INFO: no labeled case shows {some_of(absent)}: no network can learn it.")
    for number, fold in enumerate(folds):
        if not shown([case for case in fold["val"] if case in complete]):
            print(
                f"WARNING: no validation case of fold {number} with all modalities shows foreground: its validation "
                "Dice says nothing, and methods that choose by it refuse this fold."
            )


# planning


@contextmanager
def _raw_view(raw: RawDataset, group: ModalityGroup, complete: Sequence[str]) -> Iterator[Path]:
    """Let nnU-Net's fingerprint and planner find the datasets of the group in nnUNet_raw, without writing there.

    The variable names a temporary folder of dataset.json files, which list images and labels where they are. The
    multi-modal dataset has its complete cases alone and, if these lack other channels, those of the modalities only.
    """
    every_file = list(range(len(raw.channels_of_files)))
    if any(None in raw.labeled[case]["images"] for case in complete):
        every_file = [i for modality in group.modalities for i in modality.files]
    views = {raw.name: (every_file, complete)}
    if not group.is_single:
        views |= {m.dataset_name: (m.files, m.labeled) for m in group.modalities}
    before = os.environ["nnUNet_raw"]
    with tempfile.TemporaryDirectory(prefix="nnUNet_raw_") as folder:
        for name, (files, cases) in views.items():
            channels = [c for i in files for c in raw.channels_of_files[i]]
            listing = {
                case: {
                    "images": [raw.labeled[case]["images"][i] for i in files],
                    "label": raw.labeled[case]["label"],
                }
                for case in cases
            }
            described = _describe(raw, channels, len(listing))
            _write_json(Path(folder) / name / "dataset.json", {**described, "dataset": listing})
        try:
            os.environ["nnUNet_raw"] = folder
            yield Path(folder)
        finally:
            os.environ["nnUNet_raw"] = before


def _describe(raw: RawDataset, channels: Sequence[int], num_training: int) -> dict:
    """dataset.json of some of the channels, renumbered from 0; it lists no files."""
    return {
        **{key: value for key, value in raw.dataset_json.items() if key != "dataset"},
        "channel_names": {str(i): raw.channel_names[c] for i, c in enumerate(channels)},
        "numTraining": num_training,
    }


def _modality_plans(plans: dict, raw: RawDataset, modality: Modality, planner: ExperimentPlanner) -> dict:
    """The group's plans with the modality's own normalization, intensity statistics and mask, and without a cascade."""
    own_planner = copy.copy(planner)
    own_planner.dataset_json = _describe(raw, modality.channels, len(modality.labeled))
    own_planner.dataset_fingerprint = read_json(
        preprocessed_folder(modality.dataset_name) / "dataset_fingerprint.json", f"the fingerprint of {modality.name}"
    )
    schemes, use_mask = own_planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    own = deepcopy(plans)
    own["dataset_name"] = modality.dataset_name
    own["foreground_intensity_properties_per_channel"] = own_planner.dataset_fingerprint[
        "foreground_intensity_properties_per_channel"
    ]
    own["configurations"] = {k: v for k, v in own["configurations"].items() if "previous_stage" not in v}
    for configuration in own["configurations"].values():
        configuration.pop("next_stage", None)
        if "normalization_schemes" in configuration:
            configuration.update(normalization_schemes=schemes, use_mask_for_norm=use_mask)
    return own


def _write_descriptions(raw: RawDataset, group: ModalityGroup) -> None:
    """Write dataset.json of every dataset; those of modalities list no files, which would travel with their models."""
    if not group.is_single:
        _write_json(preprocessed_folder(raw.name) / "dataset.json", raw.dataset_json)
    for modality in group.modalities:
        described = _describe(raw, modality.channels, len(modality.labeled))
        source = {} if group.is_single else {_SOURCE_KEY: raw.name}
        _write_json(preprocessed_folder(modality.dataset_name) / "dataset.json", {**described, **source})


def _write_folds(group: ModalityGroup, folds: Folds) -> None:
    _write_json(preprocessed_folder(group.dataset_name) / SPLITS_FILE, folds)
    for modality in [] if group.is_single else group.modalities:
        _write_json(preprocessed_folder(modality.dataset_name) / SPLITS_FILE, restrict(folds, modality.labeled))


# preprocessing


def _unchanged(done: dict[str, dict], dataset_name: str, new: dict) -> dict:
    """What of an earlier preprocessing of a modality stays valid, in the form of `ModalityGroup.preprocessed`."""
    old = done.get(dataset_name)
    if old is None or old["settings"] != new["settings"]:
        return {"settings": new["settings"], "labeled": {}, "unlabeled": {}}
    return new | {
        kind: {case: digest for case, digest in new[kind].items() if old[kind].get(case) == digest}
        for kind in ("labeled", "unlabeled")
    }


def _preprocess(
    raw: RawDataset,
    group: ModalityGroup,
    plans_name: str,
    configuration: str,
    identifier: str,
    num_processes: int,
    verbose: bool,
) -> None:
    """Let nnU-Net's preprocessor make what `group.preprocessed` does not have yet, and remove what is not wanted."""
    jobs, kept = [], 0
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as executor:
        for modality in group.modalities:
            folder = preprocessed_folder(modality.dataset_name)
            plans = PlansManager(str(_plans_file(modality.dataset_name, plans_name)))
            manager = plans.get_configuration(configuration)
            preprocessor = manager.preprocessor_class(verbose=verbose)
            valid = group.preprocessed.get(identifier, {}).get(modality.dataset_name, {"labeled": {}, "unlabeled": {}})
            for kind, cases in (("labeled", raw.labeled), ("unlabeled", raw.unlabeled)):
                output = folder / (identifier if kind == "labeled" else unlabeled_identifier(identifier))
                _remove_cases_but(output, valid[kind])
                output.mkdir(exist_ok=True)
                kept += len(valid[kind])
                for case in getattr(modality, kind).keys() - valid[kind].keys():
                    files = cases[case]
                    images, label = [files["images"][i] for i in modality.files], files.get("label")
                    dataset_json = str(folder / "dataset.json")
                    arguments = (str(output / case), images, label, plans, manager, dataset_json)
                    jobs.append(executor.submit(preprocessor.run_case_save, *arguments))
            _copy_labels(raw, modality, folder / "gt_segmentations")
        if kept:
            print(f"{configuration}: {kept} preprocessed images stay, {len(jobs)} are new or have changed.")
        try:
            for job in tqdm(jobs, desc=f"Preprocessing {configuration}"):
                job.result()
        except BrokenProcessPool as error:
            raise UserError(
                preprocessed_folder(raw.name),
                "that a process was killed, probably for lack of memory",
                "enough memory for one case in each process",
                "Use fewer processes (-np).",
            ) from error


def _remove_cases_but(folder: Path, kept: Collection[str]) -> None:
    """Remove the preprocessed files of other cases, whose number may have shrunk."""
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        return
    names = {f"{case}{end}" for case in kept for end in (".b2nd", "_seg.b2nd", ".pkl")}
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def _copy_labels(raw: RawDataset, modality: Modality, folder: Path) -> None:
    """Keep in gt_segmentations, by which nnU-Net validates, the labels as they are now."""
    folder.mkdir(exist_ok=True)
    wanted = {f"{case}{raw.file_ending}": raw.labeled[case]["label"] for case in modality.labeled}
    for file in folder.iterdir():
        if file.name not in wanted:
            file.unlink()
    for name, label in wanted.items():
        if not (folder / name).is_file() or not filecmp.cmp(label, folder / name, shallow=False):
            shutil.copyfile(label, folder / name)


def _save(group: ModalityGroup) -> None:
    """Write modalities.json of the group and of every modality dataset by itself."""
    for each in [group] if group.is_single else [*map(group.alone, group.modalities), group]:
        each.save()


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=4))


def _dataset(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


@reports_user_errors
def main() -> None:
    """Run nnUNetv2_semicml_plan_and_preprocess."""
    parser = argparse.ArgumentParser(
        description="nnUNetv2_plan_and_preprocess for a dataset with unlabeled cases (imagesUn): makes one nnU-Net "
        "dataset of each of its modalities, all with the same geometry. A case may lack modalities: its files are not "
        "there. Nothing is written to nnUNet_raw.",
        epilog="To predict with a modality's network, put its channels, renumbered from 0000, into one folder: with "
        "--modalities MR=T1,T2 the files CASE_0000 (T1) and CASE_0001 (T2), and nothing else; then nnUNetv2_predict -d "
        "with the id of that modality's dataset.",
    )
    add = parser.add_argument
    add("-d", type=_dataset, nargs="+", required=True, metavar="ID", help="ids or names of the datasets")
    add("-c", nargs="+", help=f"configurations (default: {' '.join(CONFIGURATIONS)}; with --keep_plans: those done)")
    add("-pl", default="ExperimentPlanner", help="experiment planner (default: %(default)s)")
    add("-fpe", default="DatasetFingerprintExtractor", help="fingerprint extractor (default: %(default)s)")
    add("-gpu_memory_target", type=float, help="in GB (default: the planner's)")
    add("-preprocessor_name", default="DefaultPreprocessor", help="(default: %(default)s)")
    add("-overwrite_target_spacing", nargs=3, type=float, help="in mm, as for nnU-Net")
    add("-overwrite_plans_name", help="name of the plans (default: the planner's)")
    add(
        "--modalities",
        nargs="+",
        metavar="NAME[=CHANNEL,…]",
        help="T2: that channel by itself; MR=T1,T1ce: a modality of several, by names or numbers (default: every "
        "channel, or every file that holds several)",
    )
    add("--one_modality", action="store_true", help="all channels are one modality, in the dataset's own place")
    add("--modality_ids", nargs="+", type=int, metavar="ID", help="ids of their datasets (default: the next free ids)")
    add(
        "--plans_of",
        type=_dataset,
        metavar="ID",
        help="take the plans of this dataset, e.g. to train on more labels alike",
    )
    add(
        "--keep_plans",
        action="store_true",
        help="keep plans and modalities of an earlier run; preprocess only cases that are new or have changed, add new "
        "labeled cases to the folds, and copy edited folds of the dataset to those of its modalities",
    )
    add("--no_pp", action="store_true", help="plan only, as for nnU-Net")
    add("-np", type=int, nargs="+", help="processes, one number or one for each configuration")
    add("-npfp", type=int, default=8, help="processes for checks and fingerprint (default: %(default)s)")
    add("--clean", action="store_true", help="extract the fingerprints again, though the cases are the same")
    add("--verify_dataset_integrity", action="store_true", help="run nnU-Net's own check as well")
    add("--verbose", action="store_true", help="print more")
    args = parser.parse_args()
    if len(args.d) > 1 and args.modality_ids:
        raise UserError(
            "option --modality_ids", f"it beside {len(args.d)} datasets", "one dataset", "Plan each by itself."
        )
    for dataset in args.d:
        group = plan_and_preprocess(
            dataset,
            args.c,
            args.pl,
            args.gpu_memory_target,
            args.preprocessor_name,
            args.overwrite_target_spacing,
            args.overwrite_plans_name,
            args.fpe,
            args.modalities,
            args.modality_ids,
            args.one_modality,
            args.plans_of,
            args.keep_plans,
            not args.no_pp,
            args.np,
            args.npfp,
            args.clean,
            args.verify_dataset_integrity,
            args.verbose,
        )
        print(f"\n{group.dataset_name} is {'planned' if args.no_pp else 'ready'}: {'; '.join(group.describe())}")
        for modality in group.modalities:
            channels = json.loads((preprocessed_folder(modality.dataset_name) / "dataset.json").read_text())[
                "channel_names"
            ]
            listed = ", ".join(f"_{int(i):04d} {name}" for i, name in channels.items())
            print(f"  {modality.name}: {modality.dataset_name} ({listed})")


if __name__ == "__main__":
    main()
