"""Finds which cases have which modality, and what their labels can teach.

From what has been read of the raw dataset; nothing is written. May import data/ and `errors`.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

from nnunetv2_semicml.data.folds import Folds
from nnunetv2_semicml.data.image_check import CheckedImages
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup
from nnunetv2_semicml.data.raw_dataset import Cases, RawDataset
from nnunetv2_semicml.errors import UserError, some_of


def with_cases(raw: RawDataset, modality: Modality) -> Modality:
    """The modality with the names of the cases that have all of its files."""

    def having(cases: Cases) -> dict[str, str]:
        return {case: "" for case, files in cases.items() if None not in [files["images"][i] for i in modality.files]}

    return replace(modality, labeled=having(raw.labeled), unlabeled=having(raw.unlabeled))


def with_digests(raw: RawDataset, modality: Modality, checked: CheckedImages) -> Modality:
    """The modality with the digest of the files of each case."""

    def digests(cases: Collection[str], of_folder: Cases) -> dict[str, str]:
        return {
            case: hashlib.sha256(
                "".join(checked.files[file].digest for file in raw.read_files(of_folder[case], modality.files)).encode()
            ).hexdigest()[:16]
            for case in cases
        }

    return replace(
        modality,
        labeled=digests(modality.labeled, raw.labeled),
        unlabeled=digests(modality.unlabeled, raw.unlabeled),
    )


def complete_cases(raw: RawDataset, group: ModalityGroup) -> list[str]:
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


def describe_left_out(raw: RawDataset, group: ModalityGroup) -> list[str]:
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
        if hidden := sorted(f.name for f in (raw.folder / folder).glob(f".*{raw.file_ending}")):
            lines.append(
                f"{folder}: {len(hidden)} hidden files such as {hidden[0]} are passed over; stock nnU-Net takes them "
                "for images of this dataset, so delete them if you train it on all channels at once."
            )
    return lines


def require_foreground(
    raw: RawDataset, group: ModalityGroup, complete: Sequence[str], folds: Folds, checked: CheckedImages
) -> None:
    """Refuse labels that nothing can be learned from, and say what cannot be measured."""
    values = {
        name: {value} if isinstance(value, int) else {*value}
        for name, value in raw.dataset_json["labels"].items()
        if name not in ("background", "ignore")
    }

    def shown(cases: Collection[str]) -> list[str]:
        occurring = set().union(*(checked.label_values[case] for case in cases))
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
