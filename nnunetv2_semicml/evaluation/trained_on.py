"""What a training was made of, and what a training that begins now would be made of.

Trainers of this package keep it in their checkpoints. For nnU-Net's, which do not, the leaderboard writes a record when
it begins a training; of one that was begun by hand there is only what nnU-Net leaves. May import nnU-Net, `data` and
`jobs`, which imports this where it needs it, since it is slow.
"""

import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semicml.data.checkpoint_file import changed_settings, content_digest, read_provenance
from nnunetv2_semicml.data.files import Json, json_digest, write_json
from nnunetv2_semicml.data.folds import SPLITS_FILE, read_folds
from nnunetv2_semicml.data.modality_group import MODALITIES_FILE, ModalityGroup, preprocessed_folder
from nnunetv2_semicml.evaluation.jobs import stamp, try_read_json

RECORD_FILE = "trained_on.json"  # in the folder of a fold
FINGERPRINT_FILE = "dataset_fingerprint.json"
T = TypeVar("T")

# key -> what it is, in words. Trainings are compared in the keys that are known of both.
_IN_WORDS = {
    "modalities": "modalities",
    "digest of plans": "plans",
    "digest of configuration": "plans or dataset.json",
    "digest of fingerprint": "cases (by nnU-Net's fingerprint)",
    "digest of cases": "cases",
    "digest of labeled cases": "labeled cases",
    "digest of fold": "members of the fold",
    "validation cases": "validation cases",
    "settings": "hyper-parameters",
    "first stage": "first stage",
}
_ONLY_BY_HAND = ("digest of fingerprint", "validation cases")
_OF_PACKAGE = ("digest of cases", "settings", "first stage")


def current(dataset: str, plans_name: str, configuration: str, fold: str) -> Json:
    """What a training of a fold would be made of now, by the keys of `_IN_WORDS`; nothing if it was not planned.

    Raises:
        UserError: the group or the folds of the dataset are damaged.
    """
    folder = preprocessed_folder(dataset)
    names = MODALITIES_FILE, SPLITS_FILE, f"{plans_name}.json", "dataset.json", FINGERPRINT_FILE
    state = tuple(tuple(stamp(folder / name)) for name in names)
    return _current(dataset, plans_name, configuration, fold, state)


def noted(fold_folder: Path, checkpoint: Path, configuration: str) -> Json:
    """What a training by nnU-Net's trainer was made of, as far as that is known.

    Args:
        fold_folder: of the training.
        checkpoint: the one to predict with or to go on from.
        configuration: of the training.
    """
    record = try_read_json(fold_folder / RECORD_FILE) or {}
    # another digest: it was trained again by hand since
    if isinstance(record.get("made of"), dict) and record.get("checkpoint") in (None, digest_once(checkpoint)):
        return dict(record["made of"])
    return _left_by_nnunet(fold_folder, configuration)


def validated_files(summary: Path) -> list[str]:
    """Names of the files in nnU-Net's summary of a validation; none if that is missing or damaged."""
    try:
        return [Path(entry["reference_file"]).name for entry in (try_read_json(summary) or {})["metric_per_case"]]
    except (KeyError, TypeError):
        return []


def begin_record(fold_folder: Path, made_of: Mapping[str, Any]) -> None:
    """Note what a training by nnU-Net's trainer, which begins now, is made of."""
    kept = {key: value for key, value in made_of.items() if key in {*_IN_WORDS} - {*_ONLY_BY_HAND} - {*_OF_PACKAGE}}
    write_json(fold_folder / RECORD_FILE, {"made of": kept, "checkpoint": None})


def finish_record(fold_folder: Path, checkpoint: Path) -> None:
    """Note which checkpoint the training has led to, if it was begun with a record."""
    record = try_read_json(fold_folder / RECORD_FILE)
    if record and record.get("checkpoint") is None and checkpoint.is_file():
        write_json(fold_folder / RECORD_FILE, {**record, "checkpoint": digest_once(checkpoint)})


def unknown(made_of: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What cannot be compared, in words on trainings like this one; empty if all can."""
    if not made_of:
        return "their checkpoint cannot be read"
    if "digest of fingerprint" in made_of:
        return (
            "they were not begun by a leaderboard, nor by a trainer that notes its cases: that these are the present "
            "ones is known from nnU-Net's plans, fingerprint and validation alone"
        )
    if "digest of cases" in made_of and "settings" not in made_of:
        return "their checkpoint does not say the hyper-parameters, which were not noted at its time"
    if "settings" in made_of and expected.get("settings") is None:
        return "their hyper-parameters cannot be compared, since nnU-Net does not find their trainer here"
    return ""


def difference(made_of: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In what a training is another one than expected, in words; empty if in nothing that is known."""
    words = []
    for key, in_words in _IN_WORDS.items():
        old, new = made_of.get(key), expected.get(key)
        if old is None or new is None or old == new:
            continue
        if key == "settings":
            changed = changed_settings(old, new)
            if not changed:
                continue
            in_words += f" ({', '.join(f'{name} {old[name]}, now {new[name]}' for name in changed)})"
        words.append(in_words)
    return f"trained with other {', '.join(words)} than the present ones" if words else ""


def _of_state(function: Callable[[str], T]) -> Callable[[str | Path], T]:
    """Remember what a function says of a file for as long as the file stays as it is."""

    @lru_cache(maxsize=4096)
    def of_state(file: str, *_: int) -> T:
        return function(file)

    return lambda file: of_state(*stamp(file))


def _digest_of_checkpoint(file: str) -> str | None:
    try:
        return content_digest(file)
    except (OSError, zipfile.BadZipFile):
        return None


read_provenance_once = _of_state(read_provenance)
digest_once = _of_state(_digest_of_checkpoint)


@lru_cache(maxsize=4096)
def _current(dataset: str, plans_name: str, configuration: str, fold: str, _: tuple[Any, ...]) -> Json:
    folder = preprocessed_folder(dataset)
    plans = try_read_json(folder / f"{plans_name}.json")
    if not plans or configuration not in plans.get("configurations", {}):
        return {}
    made_of: Json = {
        "digest of configuration": _digest_of_configuration(folder, plans, configuration),
        "digest of fingerprint": _digest(try_read_json(folder / FINGERPRINT_FILE)),
    }
    if (folder / SPLITS_FILE).is_file():
        folds = read_folds(folder / SPLITS_FILE)
        if fold.isdecimal() and int(fold) < len(folds):
            members = {part: sorted(cases) for part, cases in folds[int(fold)].items()}
            made_of |= {"digest of fold": _digest(members), "validation cases": members["val"]}
    if (folder / MODALITIES_FILE).is_file():
        group = ModalityGroup.load(dataset)
        made_of["modalities"] = [modality.name for modality in group.modalities]
        made_of["digest of labeled cases"] = _digest([modality.labeled for modality in group.modalities])
        if PlansManager(plans).get_configuration(configuration).data_identifier in group.preprocessed:
            made_of |= group.provenance(plans, configuration, int(fold) if fold.isdecimal() else fold)
    return made_of


def _left_by_nnunet(fold_folder: Path, configuration: str) -> Json:
    model = fold_folder.parent
    made_of: Json = {
        "digest of configuration": _digest_of_configuration(model, try_read_json(model / "plans.json"), configuration),
        "digest of fingerprint": _digest(try_read_json(model / FINGERPRINT_FILE)),
    }
    files = validated_files(fold_folder / "validation" / "summary.json")
    if files and (described := try_read_json(model / "dataset.json")):
        made_of["validation cases"] = sorted(file.removesuffix(described.get("file_ending", "")) for file in files)
    return made_of


def _digest_of_configuration(folder: Path, plans: Json | None, configuration: str) -> str | None:
    """Of what a training takes from plans and dataset.json, whatever other configurations there are."""
    described = try_read_json(folder / "dataset.json")
    if not plans or not described or configuration not in plans.get("configurations", {}):
        return None
    resolved = PlansManager(plans).get_configuration(configuration).configuration
    shared = {key: value for key, value in plans.items() if key not in ("configurations", "continue_training")}
    keys = "channel_names", "labels", "regions_class_order", "numTraining", "file_ending"
    return _digest([resolved, shared, {key: described.get(key) for key in keys}])


def _digest(content: Any) -> str | None:
    return None if content is None else json_digest(content)[:12]
