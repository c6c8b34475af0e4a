"""Plans and preprocesses a dataset with unlabeled cases, a multi-modal one as one single-modality dataset per modality.

nnU-Net's fingerprint, planner and preprocessor do the work. What is added: one geometry for all modalities, planned on
the multi-modal dataset; the unlabeled cases, preprocessed beside the labeled ones; and modalities.json, written last.
A dataset with one channel is a modality dataset already, and planned where it is.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_semicml.data.modality_group import (
    Modality,
    ModalityGroup,
    environment_folder,
    preprocessed_folder,
    read_json,
    unlabeled_identifier,
)
from nnunetv2_semicml.data.raw_dataset import RawDataset, check_images, read_raw_dataset
from nnunetv2_semicml.errors import UserError, reports_user_errors

NUM_FOLDS = 5  # nnU-Net's default split
_DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's defaults
_SOURCE_KEY = "semicml_source"  # marks the raw modality datasets that this module made


def plan_and_preprocess(
    dataset_id: int,
    configurations: Sequence[str] = ("2d", "3d_fullres", "3d_lowres"),
    planner_name: str = "ExperimentPlanner",
    gpu_memory_target: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
    modality_names: Sequence[str] | None = None,
    modality_ids: Sequence[int] | None = None,
    plans_of: int | None = None,
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
        dataset_id: the multi-modal dataset, or one of a single modality.
        configurations: those that the planner does not make are skipped, as by nnU-Net.
        planner_name: any planner of nnU-Net.
        gpu_memory_target: in GB; None is the planner's default.
        preprocessor_name: any preprocessor of nnU-Net.
        overwrite_target_spacing: three numbers in mm.
        overwrite_plans_name: None is the planner's default.
        modality_names: names in dataset.json's channel_names; None is all channels.
        modality_ids: ids of the modality datasets; None is the next free ids. A dataset with one channel needs none.
        plans_of: another dataset that this function has planned. Its plans are taken as they are, normalization
            included, so that networks can be compared that differ in nothing but their training cases; unlabeled cases
            are then optional. `overwrite_plans_name` tells which of its plans; planner and spacing do not matter.
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
    environment_folder("nnUNet_preprocessed")
    if get_allowed_n_proc_DA() < 1:
        raise UserError(
            "environment variable nnUNet_n_proc_DA",
            "0",
            "at least 1, since nnU-Net's planner takes it as a number of threads",
            "Set it to 0 for training only.",
        )
    processes = _processes(configurations, num_processes)
    planner_class = _find_planner(planner_name)
    raw = read_raw_dataset(dataset_id, require_unlabeled=plans_of is None)
    modalities = _choose_modalities(raw, modality_names, modality_ids)
    given = None if plans_of is None else _given_plans(raw, modalities, plans_of, overwrite_plans_name or "nnUNetPlans")
    splits = _read_splits(raw)
    check_images(raw, num_processes_fingerprint)
    if verify_integrity:
        verify_dataset_integrity(str(raw.folder), num_processes_fingerprint)

    group = ModalityGroup(raw.name, modalities, sorted(raw.labeled), sorted(raw.unlabeled))
    previous = _previous_group(raw.name)
    if previous is None or (previous.labeled, previous.modalities) != (group.labeled, group.modalities):
        clean = True  # nnU-Net would keep the fingerprint of other cases

    def fingerprint(of_dataset: str) -> None:
        extract_fingerprint_dataset(
            convert_dataset_name_to_id(of_dataset),
            DatasetFingerprintExtractor,
            num_processes_fingerprint,
            False,
            clean,
            verbose,
        )

    print(f"Planning {raw.name} on its {len(group.labeled)} labeled cases…")
    fingerprint(raw.name)
    if given is None:
        _, plans_name = plan_experiment_dataset(
            dataset_id,
            planner_class,
            gpu_memory_target,
            preprocessor_name,
            overwrite_target_spacing,
            overwrite_plans_name,
        )
        plans_file = preprocessed_folder(raw.name) / f"{plans_name}.json"
        plans = json.loads(plans_file.read_text())
    else:
        plans = given[raw.name]
        plans_name = plans["plans_name"]
        plans_file = preprocessed_folder(raw.name) / f"{plans_name}.json"
        _write_json(plans_file, plans)
        _write_json(preprocessed_folder(raw.name) / "dataset.json", raw.dataset_json)
    available = [c for c in configurations if c in plans["configurations"]]
    for configuration in set(configurations) - set(available):
        print(f"INFO: configuration {configuration} is not in {plans_file}: skipped.")
    identifiers = {c: PlansManager(plans).get_configuration(c).data_identifier for c in available}
    groups = [group] if group.is_single else [group, *map(group.alone, modalities)]
    for each in groups:
        if (previous := _previous_group(each.dataset_name)) is not None:
            # from here until it is done again, what is going to be replaced counts as missing
            kept = {k: v for k, v in previous.preprocessed.items() if k not in identifiers.values()}
            each.preprocessed.update(kept)
            each.save()

    _write_json(preprocessed_folder(raw.name) / "splits_final.json", splits)
    for modality in [] if group.is_single else modalities:
        _write_raw_modality(raw, modality)
        fingerprint(modality.dataset_name)
        own = _modality_plans(plans, modality, planner_class) if given is None else given[modality.dataset_name]
        _write_json(preprocessed_folder(modality.dataset_name) / f"{plans_name}.json", own)
        _write_json(preprocessed_folder(modality.dataset_name) / "splits_final.json", splits)

    for configuration in available:
        for modality in modalities:
            print(f"Preprocessing {modality.name}, {configuration}, labeled cases…")
            _preprocess_labeled(raw, modality, plans_name, configuration, processes[configuration], verbose)
        _preprocess_unlabeled(raw, modalities, plans_name, configuration, processes[configuration], verbose)
        for each in groups:
            each.preprocessed[identifiers[configuration]] = each.digest(each.load_plans(plans_name), configuration)
            each.save()
    return group


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


def _find_planner(name: str) -> type[ExperimentPlanner]:
    folder = Path(nnunetv2.__path__[0]) / "experiment_planning"
    planner = recursive_find_python_class(str(folder), name, current_module="nnunetv2.experiment_planning")
    if planner is None:
        raise UserError("option -pl", name, "an experiment planner of nnU-Net", "Try ExperimentPlanner.")
    return planner


def _previous_group(dataset_name: str) -> ModalityGroup | None:
    try:
        return ModalityGroup.load(dataset_name)
    except UserError:  # there is none, or it is damaged and will be replaced
        return None


def _given_plans(raw: RawDataset, modalities: list[Modality], plans_of: int, plans_name: str) -> dict[str, dict]:
    """The plans of another group, for each dataset of this one."""
    candidates = list(find_candidate_datasets(plans_of))
    if len(candidates) != 1:
        raise UserError(
            "option --plans_of",
            f"{', '.join(candidates) or 'no dataset'} with the id {plans_of}",
            "one dataset that nnUNetv2_semicml_plan_and_preprocess has planned",
            "Correct the id.",
        )
    other = ModalityGroup.load(candidates[0])
    names, other_names = ([m.name for m in group] for group in (modalities, other.modalities))
    if names != other_names:
        raise UserError(
            "option --plans_of",
            f"{other.dataset_name} with the modalities {', '.join(other_names)}",
            f"a dataset with {', '.join(names)}",
            "Choose another dataset, or leave the option out.",
        )
    plans = {raw.name: read_json(preprocessed_folder(other.dataset_name) / f"{plans_name}.json", "its plans")}
    for modality, (own, _) in zip(modalities, other.load_plans(plans_name), strict=True):
        plans[modality.dataset_name] = own
    return {name: {**of_dataset, "dataset_name": name} for name, of_dataset in plans.items()}


def _choose_modalities(raw: RawDataset, names: Sequence[str] | None, ids: Sequence[int] | None) -> list[Modality]:
    file = raw.folder / "dataset.json"
    names = list(names or raw.channel_names)
    for name in names:
        if name not in raw.channel_names:
            raise UserError(
                "option --modalities", name, f"one of {', '.join(raw.channel_names)} ({file})", "Correct the name."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*", name):
            raise UserError(
                file,
                f"the channel name {name!r}",
                "a name that can be part of a folder name: letters, digits, single _ and . + -",
                "Rename the channel in channel_names.",
            )
    if len({name.casefold() for name in names}) < len(names):
        raise UserError(
            file, f"the modalities {', '.join(names)}", "different names", "Rename the channels in channel_names."
        )
    if len(raw.channel_names) == 1:
        if ids is not None:
            raise UserError(
                "option --modality_ids", f"{list(ids)}", f"none, since {raw.name} has one channel", "Leave it out."
            )
        return [Modality(names[0], 0, raw.name)]
    if ids is None:
        ids = _free_ids(raw, names)
    if len(ids) != len(names) or len(set(ids)) < len(ids):
        raise UserError(
            "option --modality_ids",
            f"{list(ids)}",
            f"{len(names)} different ids, for {', '.join(names)}",
            "Give one id for each modality, or leave the option out.",
        )
    modalities = [
        Modality(name, raw.channel_names.index(name), _modality_dataset_name(raw, name, dataset_id))
        for name, dataset_id in zip(names, ids, strict=True)
    ]
    for modality, dataset_id in zip(modalities, ids, strict=True):
        if taken := _taken_by(raw, dataset_id, modality.name):
            raise UserError(
                f"dataset id {dataset_id}",
                f"that {taken} has it",
                f"a free id for {modality.dataset_name}",
                "Choose other ids with --modality_ids.",
            )
    return modalities


def _free_ids(raw: RawDataset, names: Sequence[str]) -> list[int]:
    """The ids that these modalities already have, else the next free ones."""
    previous = _previous_group(raw.name)
    if previous is not None and [m.name for m in previous.modalities] == names:
        return [convert_dataset_name_to_id(m.dataset_name) for m in previous.modalities]
    ids: list[int] = []
    for candidate in range(convert_dataset_name_to_id(raw.name) + 1, 1000):
        if len(ids) < len(names) and not _taken_by(raw, candidate, names[len(ids)]):
            ids.append(candidate)
    return ids


def _modality_dataset_name(raw: RawDataset, modality: str, dataset_id: int) -> str:
    return f"Dataset{dataset_id:03d}_{raw.name.split('_', 1)[1]}_{modality}"


def _taken_by(raw: RawDataset, dataset_id: int, modality: str) -> str | None:
    """The dataset that keeps a modality from having an id, if any; not what an earlier run made for it."""
    own = _modality_dataset_name(raw, modality, dataset_id)
    others = [str(name) for name in find_candidate_datasets(dataset_id)]
    return next((name for name in others if name != own or not _made_here(raw, name)), None)


def _made_here(raw: RawDataset, dataset_name: str) -> bool:
    file = raw.folder.parent / dataset_name / "dataset.json"
    try:
        return json.loads(file.read_text()).get(_SOURCE_KEY) == raw.name
    except (OSError, ValueError):
        return False


def _read_splits(raw: RawDataset) -> list[dict]:
    """The user's or an earlier split, if it fits the labeled cases; else nnU-Net's five folds."""
    cases = sorted(raw.labeled)
    for file in (raw.folder / "splits_final.json", preprocessed_folder(raw.name) / "splits_final.json"):
        if not file.is_file():
            continue
        splits = json.loads(file.read_text())
        found = {case for fold in splits for case in (*fold["train"], *fold["val"])}
        if found != set(cases):
            example = sorted(found ^ set(cases))[0]
            raise UserError(
                file,
                f"folds that {'lack' if example in cases else 'name'} {example}",
                f"the {len(cases)} labeled cases",
                "Correct the file, or delete it to have new folds made.",
            )
        return splits
    if len(cases) < NUM_FOLDS:
        raise UserError(
            raw.folder / "labelsTr",
            f"{len(cases)} labeled cases",
            f"at least {NUM_FOLDS}, for nnU-Net's {NUM_FOLDS}-fold cross-validation",
            f"Label more cases, or put folds of your own into {raw.folder / 'splits_final.json'}.",
        )
    # nnU-Net's own call; its identifiers are NumPy strings
    splits = generate_crossval_split(cases, seed=12345, n_splits=NUM_FOLDS)
    return [{part: [str(case) for case in members] for part, members in fold.items()} for fold in splits]


def _write_raw_modality(raw: RawDataset, modality: Modality) -> None:
    """Write the raw dataset.json of a modality, which lists the multi-modal dataset's files and copies no image."""
    folder = raw.folder.parent / modality.dataset_name
    folder.mkdir(exist_ok=True)
    dataset_json = {
        **raw.dataset_json,
        "channel_names": {"0": modality.name},
        "numTraining": len(raw.labeled),
        _SOURCE_KEY: raw.name,
        "dataset": {
            case: {
                "images": [os.path.relpath(files["images"][modality.channel], folder)],
                "label": os.path.relpath(files["label"], folder),
            }
            for case, files in raw.labeled.items()
        },
    }
    _write_json(folder / "dataset.json", dataset_json)


def _modality_plans(plans: dict, modality: Modality, planner_class: type[ExperimentPlanner]) -> dict:
    """The group's plans with the modality's own normalization, intensity statistics and mask, and without a cascade."""
    planner = planner_class(convert_dataset_name_to_id(modality.dataset_name))
    schemes, use_mask = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    own = deepcopy(plans)
    own["dataset_name"] = modality.dataset_name
    own["foreground_intensity_properties_per_channel"] = planner.dataset_fingerprint[
        "foreground_intensity_properties_per_channel"
    ]
    own["configurations"] = {k: v for k, v in own["configurations"].items() if "previous_stage" not in v}
    for configuration in own["configurations"].values():
        configuration.pop("next_stage", None)
        if "normalization_schemes" in configuration:
            configuration.update(normalization_schemes=schemes, use_mask_for_norm=use_mask)
    return own


def _preprocess_labeled(
    raw: RawDataset, modality: Modality, plans_name: str, configuration: str, num_processes: int, verbose: bool
) -> None:
    file = preprocessed_folder(modality.dataset_name) / "dataset.json"
    listing = json.loads((raw.folder.parent / modality.dataset_name / "dataset.json").read_text())
    _write_json(file, listing)
    preprocess_dataset(
        convert_dataset_name_to_id(modality.dataset_name), plans_name, [configuration], [num_processes], verbose
    )
    # nnU-Net's preprocessor needs the list of files here; models that are trained from this folder must not carry it
    _write_json(file, {key: value for key, value in listing.items() if key != "dataset"})


def _preprocess_unlabeled(
    raw: RawDataset,
    modalities: Sequence[Modality],
    plans_name: str,
    configuration: str,
    num_processes: int,
    verbose: bool,
) -> None:
    jobs = []
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as executor:
        for modality in modalities:
            folder = preprocessed_folder(modality.dataset_name)
            plans = PlansManager(str(folder / f"{plans_name}.json"))
            manager = plans.get_configuration(configuration)
            preprocessor = manager.preprocessor_class(verbose=verbose)
            output = folder / unlabeled_identifier(manager.data_identifier)
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            for case, files in raw.unlabeled.items():
                image, no_label = [files["images"][modality.channel]], None
                dataset_json = str(folder / "dataset.json")
                arguments = (str(output / case), image, no_label, plans, manager, dataset_json)
                jobs.append(executor.submit(preprocessor.run_case_save, *arguments))
        for job in tqdm(jobs, desc=f"Preprocessing unlabeled cases, {configuration}"):
            job.result()


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=4))


@reports_user_errors
def main() -> None:
    """Run nnUNetv2_semicml_plan_and_preprocess."""
    parser = argparse.ArgumentParser(
        description="nnUNetv2_plan_and_preprocess for a dataset with unlabeled cases (imagesUn): makes one "
        "single-modality nnU-Net dataset of each of its modalities, all with the same geometry."
    )
    parser.add_argument("-d", type=int, required=True, help="id of the dataset")
    parser.add_argument(
        "-c", nargs="+", default=["2d", "3d_fullres", "3d_lowres"], help="configurations (default: %(default)s)"
    )
    parser.add_argument("-pl", default="ExperimentPlanner", help="experiment planner (default: %(default)s)")
    parser.add_argument("-gpu_memory_target", type=float, help="in GB (default: the planner's)")
    parser.add_argument("-preprocessor_name", default="DefaultPreprocessor", help="(default: %(default)s)")
    parser.add_argument("-overwrite_target_spacing", nargs=3, type=float, help="in mm, as for nnU-Net")
    parser.add_argument("-overwrite_plans_name", help="name of the plans (default: the planner's)")
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="channel names (default: all channels)")
    parser.add_argument(
        "--modality_ids", nargs="+", type=int, metavar="ID", help="ids of their datasets (default: the next free ids)"
    )
    parser.add_argument(
        "--plans_of", type=int, metavar="ID", help="take the plans of this dataset, e.g. to train on more labels alike"
    )
    parser.add_argument("-np", type=int, nargs="+", help="processes, one number or one for each configuration")
    parser.add_argument("-npfp", type=int, default=8, help="processes for the fingerprint (default: %(default)s)")
    parser.add_argument("--clean", action="store_true", help="extract the fingerprints again")
    parser.add_argument("--verify_dataset_integrity", action="store_true", help="run nnU-Net's own check as well")
    parser.add_argument("--verbose", action="store_true", help="print more")
    args = parser.parse_args()
    group = plan_and_preprocess(
        args.d,
        args.c,
        args.pl,
        args.gpu_memory_target,
        args.preprocessor_name,
        args.overwrite_target_spacing,
        args.overwrite_plans_name,
        args.modalities,
        args.modality_ids,
        args.plans_of,
        args.np,
        args.npfp,
        args.clean,
        args.verify_dataset_integrity,
        args.verbose,
    )
    print(
        f"\n{group.dataset_name} is ready: {len(group.labeled)} labeled and {len(group.unlabeled)} unlabeled cases of"
    )
    for modality in group.modalities:
        print(f"  {modality.name}: {modality.dataset_name}")


if __name__ == "__main__":
    main()
