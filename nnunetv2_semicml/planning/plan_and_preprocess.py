"""Plans and preprocesses a dataset with unlabeled cases, a multi-modal one as one nnU-Net dataset per modality.

nnU-Net's fingerprint, planner and preprocessor do the work. What is added: one geometry for all modalities, planned on
the labeled cases that have all of them; the unlabeled cases, preprocessed beside the labeled ones; one partition into
folds; and modalities.json, written last. A dataset that is one modality is planned where it is. Nothing is written to
nnUNet_raw.
"""

import inspect
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import Json, explains_failed_writes, read_json, require_sound_names, write_json
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
from nnunetv2_semicml.data.image_check import check_images
from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.data.modality_group import (
    MODALITIES_FILE,
    Modality,
    ModalityGroup,
    preprocessed_folder,
    read_preprocessed_json,
    settings_of,
)
from nnunetv2_semicml.data.raw_dataset import (
    RawDataset,
    confusable_with_id,
    dataset_number,
    raw_root,
    read_raw_dataset,
)
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning import CONFIGURATIONS
from nnunetv2_semicml.planning.cases import (
    complete_cases,
    describe_left_out,
    require_foreground,
    with_cases,
    with_digests,
)
from nnunetv2_semicml.planning.choose_modalities import (
    SOURCE_KEY,
    choose_modalities,
    describe_modalities,
    previous_group,
)
from nnunetv2_semicml.planning.preprocess import preprocess_configuration, still_valid
from nnunetv2_semicml.planning.shared_plans import (
    describe_plans,
    modality_plans,
    next_command,
    plans_file,
    plans_of_other,
    raw_view,
    read_at_once,
    write_descriptions,
)

_DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's defaults


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
        UserError: about whatever is wrong with the input, before anything is written; or another process plans or
            trains one of the datasets; or something cannot be written.
    """
    root = environment_folder("nnUNet_preprocessed")
    _require_writable(root)
    if get_allowed_n_proc_DA() < 1:
        raise UserError(
            "environment variable nnUNet_n_proc_DA",
            "0",
            "at least 1, since nnU-Net's planner takes it as a number of threads",
            "Set it to 0 for training only.",
        )
    planner_class = _find_class(planner_name, "-pl", "an experiment planner", "ExperimentPlanner")
    extractor_class = _find_class(fingerprint_extractor_name, "-fpe", "a fingerprint extractor", "the default")
    of_planner = inspect.signature(planner_class).parameters["plans_name"].default
    plans_name = overwrite_plans_name or ("nnUNetPlans" if plans_of is not None else of_planner)
    require_sound_names([plans_name], "option -overwrite_plans_name")
    raw = read_raw_dataset(dataset, require_unlabeled=plans_of is None and not keep_plans)
    task = f"planning {raw.name}"
    with explains_failed_writes(root, "Make room, and repeat the command."), ExitStack() as locks:
        locks.enter_context(locked(preprocessed_folder(raw.name), task))
        previous = previous_group(raw.name)
        done = previous.preprocessed if previous else {}
        if keep_plans:
            if modalities or modality_ids or one_modality or plans_of is not None or not preprocess:
                raise UserError(
                    "option --keep_plans",
                    "options about modalities, plans or preprocessing beside it",
                    "none: an earlier run has decided these",
                    "Leave them out, or leave --keep_plans out to plan anew.",
                )
            chosen, plans = _planned_before(raw, plans_name)
            trainable = [name for name, c in plans["configurations"].items() if "previous_stage" not in c]
            planned = _identifiers(plans, trainable, plans_file(raw.name, plans_name))
            configurations = configurations or [c for identifier, c in planned.items() if identifier in done]
        else:
            chosen = choose_modalities(raw, modalities, modality_ids, one_modality)
            configurations = configurations or CONFIGURATIONS
        processes = _processes(configurations, num_processes)
        for modality in [*chosen, *(previous.modalities if previous else [])]:
            locks.enter_context(locked(preprocessed_folder(modality.dataset_name), task))
        if not keep_plans and choose_modalities(raw, modalities, modality_ids, one_modality) != chosen:
            raise UserError(
                f"the datasets {', '.join(m.dataset_name for m in chosen)}",
                "that another planning has just taken their ids",
                "free ids",
                "Repeat the command.",
            )
        group = ModalityGroup(raw.name, [with_cases(raw, modality) for modality in chosen])
        given = None if plans_of is None else plans_of_other(group, plans_of, plans_name)
        complete = complete_cases(raw, group)
        print("\n".join([*group.describe(), *describe_left_out(raw, group)]))
        if confusable := confusable_with_id(dataset_number(raw.name)):
            print(
                f"INFO: nnU-Net goes by the beginnings of names and takes one of {raw.name} and {confusable[0]} for "
                "the other: give its commands names instead of ids."
            )
        if group.unlabeled:
            group.require_common_cases()
        folds = _folds(raw, group, keep_plans)
        checked = check_images(raw, num_processes_fingerprint, modalities=[m.files for m in group.modalities])
        require_foreground(raw, group, complete, folds, checked)
        group.files = {os.path.relpath(file, raw_root()): state for file, state in checked.files.items()}
        group.modalities = [with_digests(raw, modality, checked) for modality in group.modalities]

        if not keep_plans:
            with raw_view(raw, group, complete, read_at_once(group, complete, checked)) as folder:
                if verify_integrity:
                    verify_dataset_integrity(str(folder / raw.name), num_processes_fingerprint)
                for name in dict.fromkeys([raw.name, *(m.dataset_name for m in group.modalities)]):
                    print(f"Extracting the fingerprint of {name}…")
                    known = previous is not None and _has_fingerprint(name, group, previous)
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
            plans = given[raw.name] if given else read_json(plans_file(raw.name, plans_name))
            write_json(plans_file(raw.name, plans_name), plans)
            for modality in [] if group.is_single else group.modalities:
                own = given[modality.dataset_name] if given else modality_plans(plans, raw, modality, planner)
                write_json(plans_file(modality.dataset_name, plans_name), own)
        write_descriptions(raw, group, SOURCE_KEY)

        identifiers = _identifiers(plans, configurations, plans_file(raw.name, plans_name))
        for configuration in set(configurations) - set(identifiers.values()):
            print(f"INFO: configuration {configuration} is not in {plans_file(raw.name, plans_name)}: skipped.")
        # what is going to be replaced counts as missing from here until it is done again
        group.preprocessed = {k: v for k, v in done.items() if k not in identifiers or not preprocess}
        if keep_plans:
            for identifier, configuration in identifiers.items():
                group.preprocessed[identifier] = still_valid(
                    group, identifier, done.get(identifier, {}), plans_name, configuration
                )
        if previous is not None or not preprocess:
            _save(group)
        _write_folds(group, folds)
        for identifier, configuration in identifiers.items() if preprocess else ():
            preprocess_configuration(
                raw, group, plans_name, configuration, identifier, processes[configuration], verbose
            )
            group.preprocessed[identifier] = group.sources(plans_name, configuration)
            _save(group)
        print(f"\n{raw.name} is {'ready' if preprocess else 'planned'}: {'; '.join(group.describe())}")
        trainable = [c for c in identifiers.values() if "previous_stage" not in plans["configurations"][c]]
        print(f"\n{describe_plans(raw, group, plans, trainable)}\n")
        if preprocess and trainable:
            print(f"Next, e.g.: {next_command(group, plans_name, trainable[0])}")
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


def _identifiers(plans: Json, configurations: Sequence[str], file: Path) -> dict[str, str]:
    """Data identifier, by which folders are called -> configuration, of those that the plans in a file have."""
    available = [c for c in configurations if c in plans["configurations"]]
    identifiers = {settings_of(plans, c, file, ["data_identifier"])["data_identifier"]: c for c in available}
    require_sound_names(identifiers, file)
    return identifiers


def _planned_before(raw: RawDataset, plans_name: str) -> tuple[list[Modality], Json]:
    """Modalities and plans of an earlier run."""
    folder = preprocessed_folder(raw.name)
    if not (folder / MODALITIES_FILE).is_file():
        raise UserError(folder, "no finished preprocessing", "one", "Leave --keep_plans out to plan.")
    previous = ModalityGroup.load(raw.name)
    for modality in previous.modalities:
        if raw.files_of_channels(modality.channels) != modality.files:
            raise UserError(
                raw.folder / "dataset.json",
                f"the channels {', '.join(raw.channel_names)}",
                f"those that were planned: {describe_modalities(previous.modalities)}",
                "Correct channel_names, or leave --keep_plans out to plan anew.",
            )
    if not plans_file(raw.name, plans_name).is_file():
        others = sorted(file.stem for file in folder.glob("*Plans*.json"))
        raise UserError(
            plans_file(raw.name, plans_name),
            "no such file",
            f"the plans to keep; there are {', '.join(others) or 'none'}",
            "Name them with -overwrite_plans_name, or their planner with -pl.",
        )
    plans = read_preprocessed_json(plans_file(raw.name, plans_name), "the plans to keep")
    if not isinstance(plans.get("configurations"), dict):
        raise UserError(
            plans_file(raw.name, plans_name), "no configurations", "the plans to keep", "Leave --keep_plans out."
        )
    return previous.modalities, plans


def _has_fingerprint(dataset_name: str, group: ModalityGroup, previous: ModalityGroup) -> bool:
    """Whether a dataset's fingerprint is of these cases: not damaged, nor made by a later run that was interrupted."""
    file = preprocessed_folder(dataset_name) / "dataset_fingerprint.json"
    try:
        read_json(file)
    except (OSError, ValueError):
        return False
    finished = file.stat().st_mtime_ns <= previous.file.stat().st_mtime_ns
    return finished and _labeled_files(previous) == _labeled_files(group)


def _labeled_files(group: ModalityGroup) -> list[tuple[str, list[int], dict[str, str]]]:
    """What a fingerprint depends on."""
    return [(m.dataset_name, m.channels, m.labeled) for m in group.modalities]


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


def _write_folds(group: ModalityGroup, folds: Folds) -> None:
    write_json(preprocessed_folder(group.dataset_name) / SPLITS_FILE, folds)
    for modality in [] if group.is_single else group.modalities:
        write_json(preprocessed_folder(modality.dataset_name) / SPLITS_FILE, restrict(folds, modality.labeled))


def _save(group: ModalityGroup) -> None:
    """Write modalities.json of the group and of every modality dataset by itself."""
    for each in [group] if group.is_single else [*map(group.alone, group.modalities), group]:
        each.save()
