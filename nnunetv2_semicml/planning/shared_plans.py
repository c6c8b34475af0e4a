"""Plans one geometry for all modalities with nnU-Net's fingerprint and planner, and the normalization of each.

nnU-Net sees a temporary nnUNet_raw, whose dataset.json files list the images and labels where they are. May import
nnU-Net, data/, `errors` and its neighbors in planning/.
"""

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pandas as pd
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_semicml.data.files import Json, write_json
from nnunetv2_semicml.data.image_check import CheckedImages
from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.data.modality_group import (
    Modality,
    ModalityGroup,
    preprocessed_folder,
    read_preprocessed_json,
)
from nnunetv2_semicml.data.raw_dataset import RawDataset, confusable_with_id, dataset_number, datasets_with_id
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning.choose_modalities import describe_modalities


def plans_file(dataset_name: str, plans_name: str) -> Path:
    """Where nnU-Net has the plans of a dataset."""
    return preprocessed_folder(dataset_name) / f"{plans_name}.json"


def read_at_once(group: ModalityGroup, complete: Sequence[str], checked: CheckedImages) -> list[Modality]:
    """The modalities that nnU-Net can read as one image in every complete case: all, else the first alone.

    nnU-Net wants spacings that agree to a hundred-thousandth and as many channels in each file. Where it reads only the
    images of one modality, the geometry is planned on these; the others lie on the same grids.
    """
    if apart := [case for case in complete if case in checked.apart]:
        print(
            f"INFO: nnU-Net does not read images of {apart[0]} at once ({checked.apart[apart[0]]}), so the geometry "
            f"is planned on {group.modalities[0].name} alone."
        )
        return group.modalities[:1]
    return group.modalities


@contextmanager
def raw_view(
    raw: RawDataset, group: ModalityGroup, complete: Sequence[str], planned: Sequence[Modality]
) -> Iterator[Path]:
    """Let nnU-Net's fingerprint and planner find the datasets of the group in nnUNet_raw, without writing there.

    Args:
        raw: the multi-modal dataset.
        group: its modalities, of which each dataset has all labeled cases.
        complete: the labeled cases of the multi-modal dataset in the view.
        planned: the modalities of the multi-modal dataset in the view.
    """
    views = {raw.name: (planned, complete)}
    if not group.is_single:
        views |= {m.dataset_name: ([m], sorted(m.labeled)) for m in group.modalities}
    before = os.environ["nnUNet_raw"]
    with tempfile.TemporaryDirectory(prefix="nnUNet_raw_") as folder:
        for name, (modalities, cases) in views.items():
            files = _in_order(modalities, "files")
            listing = {
                case: {"images": [raw.labeled[case]["images"][i] for i in files], "label": raw.labeled[case]["label"]}
                for case in cases
            }
            write_json(
                Path(folder) / name / "dataset.json", {**_describe(raw, modalities, len(listing)), "dataset": listing}
            )
        try:
            os.environ["nnUNet_raw"] = folder
            yield Path(folder)
        finally:
            os.environ["nnUNet_raw"] = before


def modality_plans(plans: Json, raw: RawDataset, modality: Modality, planner: ExperimentPlanner) -> Json:
    """The group's plans with the modality's own normalization, intensity statistics and mask, and without a cascade."""
    own_planner = copy.copy(planner)
    own_planner.dataset_json = _describe(raw, [modality], len(modality.labeled))
    own_planner.dataset_fingerprint = read_preprocessed_json(
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


def plans_of_other(group: ModalityGroup, plans_of: int | str, plans_name: str) -> dict[str, Json]:
    """The plans of another group, for each dataset of this one.

    Raises:
        UserError: there is no other group of this id or name, or it has other modalities, or no such plans; or another
            process plans it.
    """
    candidates = [plans_of] if isinstance(plans_of, str) else datasets_with_id(plans_of)
    if len(candidates) != 1:
        raise UserError(
            "option --plans_of",
            f"{', '.join(candidates) or 'no dataset'} with the id {plans_of}",
            "one dataset that nnUNetv2_semicml_plan_and_preprocess has planned",
            "Correct the id.",
        )
    with locked(preprocessed_folder(candidates[0]), f"taking its plans for {group.dataset_name}", shared=True):
        return _plans_of(ModalityGroup.load(candidates[0]), group, plans_name)


def _plans_of(other: ModalityGroup, group: ModalityGroup, plans_name: str) -> dict[str, Json]:
    own, others = ({m.name: m.channels for m in g.modalities} for g in (group, other))
    if own != others:
        raise UserError(
            "option --plans_of",
            f"{other.dataset_name} with the modalities {describe_modalities(other.modalities)}",
            f"a dataset with {describe_modalities(group.modalities)}",
            "Choose another dataset, give the same --modalities, or leave the option out.",
        )
    plans = {group.dataset_name: read_preprocessed_json(plans_file(other.dataset_name, plans_name), "its plans")}
    for modality, (of_other, _) in zip(group.modalities, other.load_plans(plans_name), strict=True):
        plans[modality.dataset_name] = of_other
    return {name: {**of_dataset, "dataset_name": name} for name, of_dataset in plans.items()}


def write_descriptions(raw: RawDataset, group: ModalityGroup, source_key: str) -> None:
    """Write dataset.json of every dataset; those of modalities list no files, which would travel with their models."""
    if not group.is_single:
        write_json(preprocessed_folder(raw.name) / "dataset.json", raw.dataset_json)
    for modality in group.modalities:
        described = _describe(raw, [modality], len(modality.labeled))
        source = {} if group.is_single else {source_key: raw.name}
        write_json(preprocessed_folder(modality.dataset_name) / "dataset.json", {**described, **source})


def _in_order(modalities: Sequence[Modality], kind: str) -> list[int]:
    """Files or channels of modalities: of one in its own order, of several in that of the dataset."""
    of_each = [getattr(modality, kind) for modality in modalities]
    return list(of_each[0]) if len(of_each) == 1 else sorted(i for of_one in of_each for i in of_one)


def _describe(raw: RawDataset, modalities: Sequence[Modality], num_training: int) -> Json:
    """dataset.json of some of the channels, renumbered from 0; it lists no files."""
    return {
        **{key: value for key, value in raw.dataset_json.items() if key != "dataset"},
        "channel_names": {str(i): raw.channel_names[c] for i, c in enumerate(_in_order(modalities, "channels"))},
        "numTraining": num_training,
    }


def describe_plans(raw: RawDataset, group: ModalityGroup, plans: Json, configurations: Sequence[str]) -> str:
    """Tables of the modalities, with the files of a scan and the cases, and of configurations, with patch and batch."""
    held = [" + ".join(raw.channel_names[channel] for channel in of_file) for of_file in raw.channels_of_files]
    modalities = [
        {
            "modality": m.name,
            "dataset": m.dataset_name,
            "files of a scan": ", ".join(f"_{number:04d} {held[i]}" for number, i in enumerate(m.files)),
            "labeled": len(m.labeled),
            "unlabeled": len(m.unlabeled),
        }
        for m in group.modalities
    ]
    geometry = [
        {
            "configuration": name,
            "patch": " × ".join(map(str, settings["patch_size"])),
            "spacing in mm": " × ".join(f"{mm:.4g}" for mm in settings["spacing"]),
            "batch": settings["batch_size"],
        }
        for name, settings in ((name, plans["configurations"][name]) for name in configurations)
    ]
    return "\n\n".join(pd.DataFrame(rows).to_string(index=False) for rows in (modalities, geometry) if rows)


def next_command(group: ModalityGroup, plans_name: str, configuration: str) -> str:
    """How to train what has been preprocessed; without unlabeled cases there is but the supervised reference."""
    trainer = "nnUNetTrainerBCPPlus" if len(group.modalities) == 1 else "nnUNetTrainerSemiCMLPlus"
    trainer = trainer if group.unlabeled else "nnUNetTrainerSupervisedEMA"
    number = dataset_number(group.dataset_name)
    dataset = group.dataset_name if confusable_with_id(number) else f"{number}"
    plans = "" if plans_name == "nnUNetPlans" else f" -p {plans_name}"
    return f"nnUNetv2_train {dataset} {configuration} 0 -tr {trainer}{plans}"
