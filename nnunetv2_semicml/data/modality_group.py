"""The modality group: which single-modality datasets belong together, and whether they are ready for training.

Planning writes a group to `nnUNet_preprocessed/<dataset>/modalities.json` as its last act, so that the file is the mark
of finished preprocessing. Trainers read it and refuse to start if anything has changed since. Every modality dataset is
also a group of its own, for methods that need no other modality.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import environ
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

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


@dataclass(frozen=True)
class Modality:
    """One modality of a group.

    Attributes:
        name: the channel's name in the group's dataset.json.
        channel: its index there.
        dataset_name: the single-modality nnU-Net dataset, e.g. Dataset501_BraTS_T1ce.
    """

    name: str
    channel: int
    dataset_name: str


@dataclass
class ModalityGroup:
    """The modality datasets of one multi-modal dataset, in channel order, or a modality dataset by itself.

    Attributes:
        dataset_name: the multi-modal dataset, e.g. Dataset500_BraTS, or that of the one modality.
        modalities: its modalities.
        labeled: identifiers of the labeled cases, sorted; nnU-Net's folds split these.
        unlabeled: identifiers of the unlabeled cases, sorted; they serve every fold.
        preprocessed: for each finished data identifier (e.g. nnUNetPlans_3d_fullres) the digest of all settings that
            its voxels depend on.
    """

    dataset_name: str
    modalities: list[Modality]
    labeled: list[str]
    unlabeled: list[str]
    preprocessed: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where the group is stored."""
        return preprocessed_folder(self.dataset_name) / MODALITIES_FILE

    @property
    def is_single(self) -> bool:
        """Whether this is a modality dataset by itself."""
        return self.dataset_name == self.modalities[0].dataset_name

    def alone(self, modality: Modality) -> "ModalityGroup":
        """A modality dataset of this group as a group of its own; nothing of it counts as preprocessed yet."""
        only = Modality(modality.name, 0, modality.dataset_name)
        return ModalityGroup(modality.dataset_name, [only], self.labeled, self.unlabeled)

    @classmethod
    def load(cls, dataset_name: str) -> "ModalityGroup":
        """Read the group of a dataset.

        Raises:
            UserError: if modalities.json is missing or damaged.
        """
        file = preprocessed_folder(dataset_name) / MODALITIES_FILE
        content = read_json(file, "the modality group of a preprocessed dataset")
        try:
            return cls(**{**content, "modalities": [Modality(**m) for m in content["modalities"]]})
        except (KeyError, TypeError) as error:
            raise UserError(file, f"other content ({error})", "a modality group", _PREPROCESS) from error

    def save(self) -> None:
        """Write modalities.json, whole or not at all."""
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=4))
        temporary.replace(self.file)

    def load_plans(self, plans_name: str) -> list[tuple[dict, dict]]:
        """Read (plans, dataset.json) of every modality dataset.

        Raises:
            UserError: if one of the files is missing or damaged.
        """
        return [
            (
                read_json(folder / f"{plans_name}.json", f"the plans of modality {modality.name}"),
                read_json(folder / "dataset.json", f"the dataset.json of modality {modality.name}"),
            )
            for modality in self.modalities
            for folder in [preprocessed_folder(modality.dataset_name)]
        ]

    def digest(self, modality_plans: Sequence[tuple[dict, dict]], configuration: str) -> str:
        """Fingerprint of everything that the preprocessed files of a configuration depend on."""
        settings = []
        for plans, dataset_json in modality_plans:
            manager = PlansManager(plans)
            resolved = manager.get_configuration(configuration).configuration
            settings.append(
                [resolved[key] for key in _PREPROCESSING_SETTINGS]
                + [plans[key] for key in _PREPROCESSING_PLANS]
                + [dataset_json["labels"], dataset_json["channel_names"]]
            )
        content = [settings, self.labeled, self.unlabeled]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def training_digest(self, plans: dict, configuration: str) -> str:
        """Short fingerprint of what makes trained weights fit: preprocessed cases and architecture."""
        resolved = PlansManager(plans).get_configuration(configuration).configuration
        content = [self.preprocessed[resolved["data_identifier"]], resolved["architecture"]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def require_ready(self, plans: dict, configuration: str) -> list[tuple[dict, dict]]:
        """Check that a configuration can be trained.

        Args:
            plans: the plans of the multi-modal dataset.
            configuration: e.g. 3d_fullres.

        Returns:
            (plans, dataset.json) of every modality dataset.

        Raises:
            UserError: if a file is missing or if plans, cases or modalities differ from those that were preprocessed.
        """
        plans_name = plans["plans_name"]
        group_file = preprocessed_folder(self.dataset_name) / f"{plans_name}.json"
        modality_plans = self.load_plans(plans_name)
        shared = _shared_settings(plans, configuration, group_file)
        for modality, (own, _) in zip(self.modalities, modality_plans, strict=True):
            file = preprocessed_folder(modality.dataset_name) / f"{plans_name}.json"
            for key, value in _shared_settings(own, configuration, file).items():
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
        if self.preprocessed[identifier] != self.digest(modality_plans, configuration):
            raise UserError(
                self.file,
                f"plans, labels or cases that have changed since {identifier} was preprocessed",
                "the settings that the preprocessed files were made with",
                _PREPROCESS,
            )
        if not self.unlabeled:
            raise UserError(
                self.file, "no unlabeled case", "some", "Train stock nnU-Net on the modality datasets of this dataset."
            )
        for modality in self.modalities:
            folder = preprocessed_folder(modality.dataset_name)
            _require_cases(folder / identifier, self.labeled)
            _require_cases(folder / unlabeled_identifier(identifier), self.unlabeled)
        return modality_plans


def preprocessed_folder(dataset_name: str) -> Path:
    """Folder of a dataset below nnUNet_preprocessed."""
    return environment_folder("nnUNet_preprocessed") / dataset_name


def environment_folder(variable: str) -> Path:
    """Value of one of nnU-Net's folder variables.

    Raises:
        UserError: if it is not set.
    """
    if not environ.get(variable):
        raise UserError(
            f"environment variable {variable}", "nothing", "a folder", f"Set it as for nnU-Net: export {variable}=…"
        )
    return Path(environ[variable])


def unlabeled_identifier(data_identifier: str) -> str:
    """Folder of the unlabeled cases beside that of the labeled ones, which nnU-Net lists to make its splits."""
    return f"{data_identifier}_unlabeled"


def _shared_settings(plans: dict, configuration: str, file: Path) -> dict:
    manager = PlansManager(plans)
    if configuration not in manager.available_configurations:
        available = ", ".join(manager.available_configurations)
        raise UserError(
            file, f"configurations {available}", configuration, "Train one of these, or add it to the plans."
        )
    resolved = manager.get_configuration(configuration).configuration
    return {key: resolved[key] for key in _SHARED_SETTINGS} | {key: plans[key] for key in _SHARED_PLANS}


def _require_cases(folder: Path, cases: Sequence[str]) -> None:
    present = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    missing = [case for case in cases for end in (".b2nd", "_seg.b2nd", ".pkl") if case + end not in present]
    if missing:
        raise UserError(
            folder, f"no complete preprocessed case {missing[0]}", f"{len(cases)} preprocessed cases", _PREPROCESS
        )


def read_json(file: Path, what: str) -> dict:
    """Read a file of nnUNet_preprocessed.

    Args:
        file: the file.
        what: what it holds, for the error.

    Raises:
        UserError: if it is missing or damaged.
    """
    if not file.is_file():
        raise UserError(file, "no such file", what, _PREPROCESS)
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(file, f"damaged JSON ({error})", what, _PREPROCESS) from error
