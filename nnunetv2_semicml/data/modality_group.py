"""The modality group: which single-modality datasets belong together, and whether they are ready for training.

Planning writes a group to `nnUNet_preprocessed/<dataset>/modalities.json` as its last act, so that the file is the mark
of finished preprocessing. Trainers read it and refuse to start if anything has changed since. Every modality dataset is
also a group of its own, for methods that need no other modality.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from os import environ
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import Json, json_digest, read_json, require_sound_names, write_json
from nnunetv2_semicml.data.folds import SPLITS_FILE, read_folds, require_cases, require_modalities, restrict, same_folds
from nnunetv2_semicml.data.stored_file import FileState, digest_of
from nnunetv2_semicml.errors import UserError

MODALITIES_FILE = "modalities.json"
_PREPROCESS = "Run nnUNetv2_semicml_plan_and_preprocess for this dataset, plans and configuration."
# what a preprocessed voxel depends on, in a configuration and in the plans
_PREPROCESSING_SETTINGS = (
    "data_identifier",
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_PREPROCESSING_PLANS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
# what the networks of a group have in common
_SHARED_SETTINGS = ("data_identifier", "spacing", "patch_size", "batch_size", "batch_dice", "architecture")
_SHARED_PLANS = ("transpose_forward", "transpose_backward", "image_reader_writer")


class MadeOf(TypedDict):
    """What the preprocessed files of a configuration of a modality dataset were made of.

    Attributes:
        settings: digest of all but the raw files.
        labeled: as in `Modality`.
        unlabeled: as in `Modality`.
    """

    settings: str
    labeled: dict[str, str]
    unlabeled: dict[str, str]


@dataclass(frozen=True)
class Modality:
    """One modality of a group.

    Attributes:
        name: for logs, tables and names of datasets.
        channels: in the group's dataset.json; renumbered from 0 in the modality's own dataset.
        files: of a case that hold these channels, as indices.
        dataset_name: the nnU-Net dataset of these channels, e.g. Dataset501_BraTS_T1ce.
        labeled: the labeled cases that have the modality -> digest of its files and the label; sorted.
        unlabeled: the unlabeled cases that have it -> digest of its files; sorted.
    """

    name: str
    channels: list[int]
    files: list[int]
    dataset_name: str
    labeled: dict[str, str] = field(default_factory=dict)
    unlabeled: dict[str, str] = field(default_factory=dict)


@dataclass
class ModalityGroup:
    """The modality datasets of one multi-modal dataset, in the order of their channels in batches, or one by itself.

    Attributes:
        dataset_name: the multi-modal dataset, e.g. Dataset500_BraTS, or that of the one modality.
        modalities: its modalities.
        part_of: the multi-modal dataset that a modality by itself was planned with.
        files: raw file, relative to nnUNet_raw -> its state when it was checked.
        preprocessed: data identifier (e.g. nnUNetPlans_3d_fullres) -> modality dataset -> what its files were made of.
    """

    dataset_name: str
    modalities: list[Modality]
    part_of: str | None = None
    files: dict[str, FileState] = field(default_factory=dict)
    preprocessed: dict[str, dict[str, MadeOf]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where the group is stored."""
        return preprocessed_folder(self.dataset_name) / MODALITIES_FILE

    @property
    def is_single(self) -> bool:
        """Whether this is a modality dataset by itself."""
        return self.dataset_name == self.modalities[0].dataset_name

    @property
    def labeled(self) -> list[str]:
        """The labeled cases that have some modality, sorted; nnU-Net's folds split these."""
        return sorted({case for modality in self.modalities for case in modality.labeled})

    @property
    def unlabeled(self) -> list[str]:
        """The unlabeled cases that have some modality, sorted; they serve every fold."""
        return sorted({case for modality in self.modalities for case in modality.unlabeled})

    @property
    def labeled_of(self) -> dict[str, dict[str, str]]:
        """Modality -> its labeled cases."""
        return {modality.name: modality.labeled for modality in self.modalities}

    def patterns(self, labeled: bool) -> dict[tuple[str, ...], list[str]]:
        """The modalities that a case has -> the cases with just these; all modalities first."""
        found: dict[tuple[str, ...], list[str]] = {}
        for case in self.labeled if labeled else self.unlabeled:
            names = tuple(m.name for m in self.modalities if case in (m.labeled if labeled else m.unlabeled))
            found.setdefault(names, []).append(case)
        return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))

    def describe(self) -> list[str]:
        """How many cases have which modalities, a line for labeled and for unlabeled cases."""
        lines = []
        for kind in ("labeled", "unlabeled"):
            patterns = self.patterns(kind == "labeled")
            counts = [f"{len(cases)} with {' + '.join(names)}" for names, cases in patterns.items()]
            total = sum(map(len, patterns.values()))
            plural = "s" * (total > 1)
            lines.append(f"{total} {kind} case{plural}: {', '.join(counts)}" if counts else f"no {kind} case")
        return lines

    def alone(self, modality: Modality) -> "ModalityGroup":
        """A modality dataset of this group as a group of its own."""
        only = replace(modality, channels=list(range(len(modality.channels))))
        preprocessed = {
            identifier: {modality.dataset_name: of_modality[modality.dataset_name]}
            for identifier, of_modality in self.preprocessed.items()
            if modality.dataset_name in of_modality
        }
        return ModalityGroup(modality.dataset_name, [only], self.dataset_name, self.files, preprocessed)

    @classmethod
    def load(cls, dataset_name: str) -> "ModalityGroup":
        """Read the group of a dataset.

        Raises:
            UserError: if modalities.json is missing, damaged, or of another version or dataset.
        """
        file = preprocessed_folder(dataset_name) / MODALITIES_FILE
        content = read_preprocessed_json(file, "the modality group of a preprocessed dataset")
        try:
            modalities = [Modality(**m) for m in content["modalities"]]
            files = {name: FileState(*state) for name, state in content["files"].items()}
            group = cls(**{**content, "modalities": modalities, "files": files})
            _require_type(content, cls)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                file, f"the modality group of another version ({error})", "one of this version", _PREPROCESS
            ) from error
        if group.dataset_name != dataset_name or not modalities:
            found = f"{len(modalities)} modalities of {group.dataset_name}"
            raise UserError(file, found, f"some of {dataset_name}", _PREPROCESS)
        for names in ([m.name for m in modalities], [m.dataset_name for m in modalities], group.preprocessed):
            require_sound_names(names, file)
        require_sound_names([*group.labeled, *group.unlabeled], file)
        return group

    def save(self) -> None:
        """Write modalities.json, whole or not at all."""
        write_json(self.file, asdict(self))

    def load_plans(self, plans_name: str) -> list[tuple[Json, Json]]:
        """Read (plans, dataset.json) of every modality dataset.

        Raises:
            UserError: if one of the files is missing or damaged.
        """
        return [
            (
                read_preprocessed_json(folder / f"{plans_name}.json", f"the plans of modality {modality.name}"),
                read_preprocessed_json(folder / "dataset.json", f"the dataset.json of modality {modality.name}"),
            )
            for modality in self.modalities
            for folder in [preprocessed_folder(modality.dataset_name)]
        ]

    def sources(self, plans_name: str, configuration: str) -> dict[str, MadeOf]:
        """Modality dataset -> what the preprocessed files of a configuration have to be made of."""
        return {
            modality.dataset_name: {
                "settings": _settings_digest(modality.dataset_name, plans_name, plans, dataset_json, configuration),
                "labeled": modality.labeled,
                "unlabeled": modality.unlabeled,
            }
            for modality, (plans, dataset_json) in zip(self.modalities, self.load_plans(plans_name), strict=True)
        }

    def provenance(self, plans: Json, configuration: str, fold: int | str) -> dict[str, str]:
        """Short digests of what trained weights belong to: voxels and architecture, cases, and folds."""
        resolved = PlansManager(plans).get_configuration(configuration).configuration
        settings = {name: made["settings"] for name, made in self.preprocessed[resolved["data_identifier"]].items()}
        folds = read_folds(self.file.with_name(SPLITS_FILE))
        members = folds[fold] if isinstance(fold, int) and fold < len(folds) else self.labeled
        parts = {
            "plans": [settings, resolved["architecture"]],
            "cases": [[modality.labeled, modality.unlabeled] for modality in self.modalities],
            "fold": [
                {part: sorted(cases) for part, cases in members.items()} if isinstance(members, dict) else members
            ],
        }
        return {f"digest of {name}": json_digest(content)[:12] for name, content in parts.items()}

    def common_cases(self, modalities: Sequence[str], labeled: bool) -> list[str]:
        """The cases that have all of these modalities, sorted."""
        own = [m.labeled if labeled else m.unlabeled for m in self.modalities if m.name in modalities]
        return sorted(set.intersection(*map(set, own)))

    def require_common_cases(self) -> None:
        """Refuse a group of several modalities, two of which have fewer than two unlabeled cases in common.

        Raises:
            UserError: naming these modalities.
        """
        for pair in combinations([modality.name for modality in self.modalities], 2):
            if len(cases := self.common_cases(pair, labeled=False)) < 2:
                raise UserError(
                    f"imagesUn of {self.dataset_name}",
                    f"{len(cases) or 'no'} unlabeled case with {' and '.join(pair)}",
                    "at least 2, since methods compare the modalities of a case, and cases with each other",
                    "Add such cases, or plan one of these modalities alone (--modalities), or both as one.",
                )

    def require_ready(self, plans: Json, configuration: str) -> list[tuple[Json, Json]]:
        """Check that a configuration can be trained.

        Args:
            plans: the plans of the multi-modal dataset.
            configuration: e.g. 3d_fullres.

        Returns:
            (plans, dataset.json) of every modality dataset.

        Raises:
            UserError: if a file is missing or if plans, cases, folds or raw files differ from those that were
                preprocessed.
        """
        plans_name = plans["plans_name"]
        group_file = preprocessed_folder(self.dataset_name) / f"{plans_name}.json"
        modality_plans = self.load_plans(plans_name)
        shared = settings_of(plans, configuration, group_file, _SHARED_SETTINGS, _SHARED_PLANS)
        for modality, (own, _) in zip(self.modalities, modality_plans, strict=True):
            file = preprocessed_folder(modality.dataset_name) / f"{plans_name}.json"
            for key, value in settings_of(own, configuration, file, _SHARED_SETTINGS, _SHARED_PLANS).items():
                if value != shared[key]:
                    raise UserError(
                        file,
                        f"{key} = {value} in configuration {configuration}",
                        f"{shared[key]}, as in {group_file}, since the networks of a group share one voxel frame",
                        "Make the same change in the plans of all datasets of the group, or plan again.",
                    )
        identifier = shared["data_identifier"]
        if identifier not in self.preprocessed:
            done = ", ".join(self.preprocessed) or "nothing"
            raise UserError(self.file, f"{done} preprocessed", identifier, _PREPROCESS)
        if self.preprocessed[identifier] != self.sources(plans_name, configuration):
            raise UserError(
                self.file,
                f"plans, labels or cases that have changed since {identifier} was preprocessed",
                "the settings that the preprocessed files were made with",
                _PREPROCESS,
            )
        for modality in self.modalities:
            folder = preprocessed_folder(modality.dataset_name)
            _require_cases(folder / identifier, list(modality.labeled))
            _require_cases(folder / unlabeled_identifier(identifier), list(modality.unlabeled))
        self._require_same_folds()
        self._require_unchanged_files()
        return modality_plans

    def _require_same_folds(self) -> None:
        """Refuse folds that were edited in one dataset of the group and not in the others."""
        whole = self.dataset_name if self.part_of is None else self.part_of
        if not (preprocessed_folder(whole) / SPLITS_FILE).is_file():
            whole = self.dataset_name  # the modality's dataset was copied to here without the others
        source = preprocessed_folder(whole) / SPLITS_FILE
        folds = read_folds(source)
        if whole == self.dataset_name:
            require_cases(folds, self.labeled, source)
        for modality in self.modalities:
            file = preprocessed_folder(modality.dataset_name) / SPLITS_FILE
            own = read_folds(file)
            require_cases(own, modality.labeled, file)
            if not same_folds(own, restrict(folds, modality.labeled)):
                raise UserError(
                    file,
                    "other folds",
                    f"those of {source}, without the cases that lack {modality.name}",
                    "Edit the latter, and let them be copied to the datasets of all modalities: "
                    f"nnUNetv2_semicml_plan_and_preprocess -d {whole} --keep_plans",
                )
        require_modalities(folds, self.labeled_of, source)

    def _require_unchanged_files(self) -> None:
        """Refuse images and labels that were changed after preprocessing, where the raw dataset is still there."""
        if not environ.get("nnUNet_raw"):
            return
        root = Path(environ["nnUNet_raw"])
        for name, (size, modified, digest) in self.files.items():
            file = root / name
            try:
                status = file.stat()
            except OSError:
                continue  # preprocessed files are what training needs
            if (status.st_size, status.st_mtime_ns) != (size, modified) and digest_of(file) != digest:
                raise UserError(
                    file,
                    "that it has changed since it was preprocessed",
                    "the images and labels that are trained on",
                    "Run nnUNetv2_semicml_plan_and_preprocess again; with --keep_plans it does only what changed.",
                )


def preprocessed_folder(dataset_name: str) -> Path:
    """Folder of a dataset below nnUNet_preprocessed."""
    return environment_folder("nnUNet_preprocessed") / dataset_name


def unlabeled_identifier(data_identifier: str) -> str:
    """Folder of the unlabeled cases beside that of the labeled ones, which nnU-Net lists to make its splits."""
    return f"{data_identifier}_unlabeled"


def _require_type(value: Any, kind: Any) -> None:
    """Raise a TypeError unless the content of a JSON file is of a type made of dictionaries, lists and tuples."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    hints = {} if parts else get_type_hints(kind)
    if origin is list and type(value) is list:
        members = [(item, parts[0]) for item in value]
    elif origin is dict and type(value) is dict:
        members = [(item, parts[1]) for item in value.values()]
    elif type(value) is list and hints and len(value) == len(hints):
        members = [*zip(value, hints.values(), strict=True)]
    elif type(value) is dict and value.keys() == hints.keys():
        members = [(item, hints[name]) for name, item in value.items()]
    elif origin not in (list, dict) and type(value) in (parts or (kind,)):
        members = []
    else:
        raise TypeError(f"{str(value)[:50]} in the place of {getattr(kind, '__name__', kind)}")
    for item, own in members:
        _require_type(item, own)


def _settings_digest(dataset_name: str, plans_name: str, plans: Json, dataset_json: Json, configuration: str) -> str:
    """Fingerprint of everything but the raw files that the preprocessed files of a configuration depend on."""
    file = preprocessed_folder(dataset_name) / f"{plans_name}.json"
    settings = settings_of(plans, configuration, file, _PREPROCESSING_SETTINGS, _PREPROCESSING_PLANS)
    if lacking := [key for key in ("labels", "channel_names") if key not in dataset_json]:
        raise UserError(file.with_name("dataset.json"), f"no {lacking[0]}", "some", _PREPROCESS)
    return json_digest([*settings.values(), dataset_json["labels"], dataset_json["channel_names"]])


def settings_of(plans: Json, configuration: str, file: Path, own: Sequence[str], common: Sequence[str] = ()) -> Json:
    """What the plans in a file say about a configuration, under its own keys and under those that are common to all.

    Raises:
        UserError: there is no such configuration, or nnU-Net does not understand the plans.
    """
    try:
        manager = PlansManager(plans)
        available = manager.available_configurations
        if configuration in available:
            resolved = manager.get_configuration(configuration).configuration
            return {key: resolved[key] for key in own} | {key: plans[key] for key in common}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            file, f"damaged plans ({type(error).__name__}: {error})", "plans as nnU-Net writes them", _PREPROCESS
        ) from error
    raise UserError(
        file, f"configurations {', '.join(available)}", configuration, "Train one of these, or add it to the plans."
    )


def _require_cases(folder: Path, cases: Sequence[str]) -> None:
    if missing := [case for case in cases if not is_preprocessed(folder, case)]:
        raise UserError(
            folder, f"no complete preprocessed case {missing[0]}", f"{len(cases)} preprocessed cases", _PREPROCESS
        )


def is_preprocessed(folder: Path, case: str) -> bool:
    """Whether the preprocessed files of a case are all there and can be opened, as they can not if they are cut off."""
    try:
        nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    except Exception:  # blosc2 and pickle raise many kinds
        return False
    return True


def read_preprocessed_json(file: Path, what: str) -> Json:
    """Read a file of nnUNet_preprocessed that holds an object.

    Args:
        file: the file.
        what: what it holds, for the error.

    Raises:
        UserError: if it is missing or damaged.
    """
    if not file.is_file():
        raise UserError(file, "no such file", what, _PREPROCESS)
    try:
        content: Json = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(file, f"damaged JSON ({error})", what, _PREPROCESS) from error
    if not isinstance(content, dict):
        raise UserError(file, f"a JSON {type(content).__name__}", what, _PREPROCESS)
    return content
