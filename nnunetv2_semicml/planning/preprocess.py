"""Lets nnU-Net's preprocessor make the files of a configuration: those that are new or have changed, of all modalities.

Labeled cases go where nnU-Net has them, unlabeled ones into a folder beside. May import nnU-Net, data/ and `errors`.
"""

import filecmp
import multiprocessing
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_semicml.data.files import copy_file, explains_failed_writes
from nnunetv2_semicml.data.modality_group import (
    MadeOf,
    Modality,
    ModalityGroup,
    is_preprocessed,
    preprocessed_folder,
    unlabeled_identifier,
)
from nnunetv2_semicml.data.raw_dataset import RawDataset
from nnunetv2_semicml.errors import UserError

_ENDS = (".b2nd", "_seg.b2nd", ".pkl")  # of the files of a preprocessed case


def still_valid(
    group: ModalityGroup, identifier: str, done: Mapping[str, MadeOf], plans_name: str, configuration: str
) -> dict[str, MadeOf]:
    """Find what of an earlier preprocessing can stay.

    Args:
        group: with the digests of the raw files as they are now.
        identifier: data identifier of the configuration.
        done: what there is of it, in the form of a value of `ModalityGroup.preprocessed`.
        plans_name: of the plans.
        configuration: of the plans.

    Returns:
        In the same form: the cases whose raw files and settings are the same, and whose files are there.
    """
    valid: dict[str, MadeOf] = {}
    for name, new in group.sources(plans_name, configuration).items():
        old = done.get(name)
        valid[name] = {"settings": new["settings"], "labeled": {}, "unlabeled": {}}
        if old is None or old["settings"] != new["settings"]:
            continue
        for kind, folder in _folders(name, identifier).items():
            valid[name][kind] = {
                case: digest
                for case, digest in new[kind].items()
                if old[kind].get(case) == digest and is_preprocessed(folder, case)
            }
    return valid


def preprocess_configuration(
    raw: RawDataset,
    group: ModalityGroup,
    plans_name: str,
    configuration: str,
    identifier: str,
    num_processes: int,
    verbose: bool,
) -> None:
    """Make what `group.preprocessed` does not have yet of a configuration, and remove what does not belong to it.

    Raises:
        UserError: a process was killed, or something cannot be written.
    """
    jobs: dict[Path, Future[None]] = {}  # file of a case, without its end -> who makes it
    num_kept = 0
    nothing: MadeOf = {"settings": "", "labeled": {}, "unlabeled": {}}
    executor = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"))
    try:
        for modality in group.modalities:
            folder = preprocessed_folder(modality.dataset_name)
            plans = PlansManager(str(folder / f"{plans_name}.json"))
            manager = plans.get_configuration(configuration)
            preprocessor = manager.preprocessor_class(verbose=verbose)
            valid = group.preprocessed.get(identifier, {}).get(modality.dataset_name, nothing)
            for kind, output in _folders(modality.dataset_name, identifier).items():
                output.mkdir(exist_ok=True)
                _remove_cases_but(output, valid[kind])
                num_kept += len(valid[kind])
                cases = raw.labeled if kind == "labeled" else raw.unlabeled
                for case in getattr(modality, kind).keys() - valid[kind].keys():
                    jobs[output / case] = executor.submit(
                        preprocessor.run_case_save,
                        str(output / case),
                        [cases[case]["images"][i] for i in modality.files],
                        cases[case].get("label"),
                        plans,
                        manager,
                        str(folder / "dataset.json"),
                    )
            _copy_labels(raw, modality, folder / "gt_segmentations")
        if num_kept:
            print(f"{configuration}: {num_kept} preprocessed images stay, {len(jobs)} are new or have changed.")
        for file, job in tqdm(jobs.items(), desc=f"Preprocessing {configuration}"):
            with explains_failed_writes(f"{file}.b2nd", "Make room, and repeat the command."):
                job.result()
    except BrokenProcessPool as error:
        raise UserError(
            preprocessed_folder(raw.name),
            "that a process was killed, probably for lack of memory",
            "enough memory for one case in each process",
            "Use fewer processes (-np).",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)  # after an error, nobody waits for the others


def _folders(dataset_name: str, identifier: str) -> dict[Literal["labeled", "unlabeled"], Path]:
    """Kind of cases -> folder of their preprocessed files."""
    folder = preprocessed_folder(dataset_name)
    return {"labeled": folder / identifier, "unlabeled": folder / unlabeled_identifier(identifier)}


def _remove_cases_but(folder: Path, kept: Collection[str]) -> None:
    """Remove the preprocessed files of other cases, whose number may have shrunk, and links, not what they lead to."""
    names = {f"{case}{end}" for case in kept for end in _ENDS}
    for file in folder.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name not in names:
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
            copy_file(label, folder / name)
