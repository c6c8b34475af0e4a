"""Chooses the modalities of a raw dataset: which channels belong together, and what their datasets are called.

From options and names alone; no image is opened and nothing is written. May import nnU-Net, data/ and `errors`.
"""

import re
from collections.abc import Sequence
from itertools import count

from nnunetv2_semicml.data.files import read_json
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup, preprocessed_folder
from nnunetv2_semicml.data.raw_dataset import RawDataset, confusable_with_id, dataset_number, datasets_with_id
from nnunetv2_semicml.errors import UserError, some_of

SOURCE_KEY = "semicml_source"  # in dataset.json, names the dataset that planning made a modality's dataset of
_NAME = r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*"


def choose_modalities(
    raw: RawDataset, texts: Sequence[str] | None, ids: Sequence[int] | None, one_modality: bool
) -> list[Modality]:
    """The modalities, with names of their datasets and without cases.

    Args:
        raw: the dataset.
        texts: "T2", the channel of this name or number, or "MR=T1,T2", a modality of several; None is every file of a
            case by itself.
        ids: of the modality datasets; None is the ids that they already have, or the next free ones.
        one_modality: all channels are one modality, in the dataset's own place.

    Raises:
        UserError: the options contradict each other or the dataset, or an id is not free.
    """
    if one_modality and texts:
        raise UserError("options --modalities, --one_modality", "both", "one of them", "Leave one out.")
    num_files = len(raw.channels_of_files)
    if one_modality or (texts is None and num_files == 1):
        if ids is not None:
            raise UserError(
                "option --modality_ids", f"{list(ids)}", f"none, since {raw.name} is one modality", "Leave it out."
            )
        (name,) = _default_names([raw.channel_names]) if num_files == 1 else ["all"]
        whole = Modality(name, list(range(len(raw.channel_names))), list(range(num_files)), raw.name)
        _require_alike_files(raw, whole, "option --one_modality")
        return [whole]
    if texts is None:
        held = [list(channels) for channels in raw.channels_of_files]
        names = _default_names([[raw.channel_names[c] for c in channels] for channels in held])
        chosen = dict(zip(names, held, strict=True))
    else:
        chosen = _parse(raw, texts)
    if ids is None:
        ids = _free_ids(raw, list(chosen))
    else:
        _require_free(raw, ids, list(chosen))
    modalities = [
        Modality(name, channels, raw.files_of_channels(channels), _dataset_name(raw, name, dataset_id))
        for (name, channels), dataset_id in zip(chosen.items(), ids, strict=True)
    ]
    for modality in modalities:
        _require_alike_files(raw, modality, "option --modalities")
    return modalities


def describe_modalities(modalities: Sequence[Modality]) -> str:
    """For a sentence: their names and channels."""
    return ", ".join(f"{m.name} (channels {', '.join(map(str, m.channels))})" for m in modalities)


def previous_group(dataset_name: str) -> ModalityGroup | None:
    """What an earlier run has planned; None if there is nothing, or nothing that can be read."""
    try:
        return ModalityGroup.load(dataset_name)
    except UserError:
        return None


def _default_names(channel_names: Sequence[Sequence[str]]) -> list[str]:
    """Names for modalities with channels of these names: fit for folders, and with a number if they were alike."""
    fit = [
        "+".join(re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.+-") or "channel" for name in names)
        for names in channel_names
    ]

    def alike(names: Sequence[str]) -> list[bool]:
        folded = [name.casefold() for name in names]  # there are file systems that take T1 for t1
        return [folded.count(name) > 1 for name in folded]

    numbered = [f"{name}_{i}" if twice else name for i, (name, twice) in enumerate(zip(fit, alike(fit), strict=True))]
    # a number may make a name that another channel has
    return [f"{name}_{i}" for i, name in enumerate(fit)] if any(alike(numbered)) else numbered


def _parse(raw: RawDataset, texts: Sequence[str]) -> dict[str, list[int]]:
    """Name -> channels, of options "T2" or "MR=T1,T1ce"."""
    option = "option --modalities"
    chosen: dict[str, list[int]] = {}
    for text in texts:
        name, separator, listed = text.partition("=")
        if text in raw.channel_names or not separator:
            channels = [raw.find_channel(text, option)]
            (name,) = _default_names([[raw.channel_names[channels[0]]]])
        else:
            channels = [raw.find_channel(part, option) for part in listed.split(",")]
        if not re.fullmatch(_NAME, name):
            raise UserError(
                option,
                f"the name {name!r}",
                "a name that can be part of a folder name: letters, digits, single _ and . + -",
                "Choose another one.",
            )
        if name.casefold() in {known.casefold() for known in chosen}:
            raise UserError(option, f"two modalities called {name}", "different names", "Write NAME=CHANNEL.")
        earlier = [c for known in chosen.values() for c in known]
        if twice := [c for i, c in enumerate(channels) if c in earlier + channels[:i]]:
            which = some_of(raw.channel_names[c] for c in twice)
            raise UserError(option, f"{which} twice", "every channel at most once", "Leave it out in one place.")
        if not raw.files_of_channels(channels):
            layout = "; ".join(some_of(raw.channel_names[c] for c in held) for held in raw.channels_of_files)
            raise UserError(
                option,
                f"{name} with the channels {some_of(raw.channel_names[c] for c in channels)}",
                f"all channels of a file, in their order, since the files of a case hold {layout}",
                "Take whole files.",
            )
        chosen[name] = channels
    return chosen


def _require_alike_files(raw: RawDataset, modality: Modality, option: str) -> None:
    """Refuse files of one modality that nnU-Net's readers do not put into one image, such as color and depth."""
    numbers = [len(raw.channels_of_files[i]) for i in modality.files]
    if len(set(numbers)) > 1:
        raise UserError(
            option,
            f"{modality.name} with files of {some_of(map(str, numbers))} channels",
            "files with as many channels each, since nnU-Net reads no others as one image",
            "Make them different modalities, or store every channel in its own file.",
        )


def _free_ids(raw: RawDataset, names: Sequence[str]) -> list[int]:
    """The ids that these modalities already have, else the next ones that are free and that nnU-Net can tell apart."""
    previous = previous_group(raw.name)
    if previous is not None and [m.name for m in previous.modalities] == list(names) and not previous.is_single:
        return [dataset_number(m.dataset_name) for m in previous.modalities]
    later = count(dataset_number(raw.name) + 1)
    return [next(i for i in later if not _taken_by(raw, i, name) and not confusable_with_id(i)) for name in names]


def _require_free(raw: RawDataset, ids: Sequence[int], names: Sequence[str]) -> None:
    """Refuse ids that the user gave, if they are not what the modalities can have."""
    if len(ids) != len(names) or len(set(ids)) < len(ids) or min(ids) < 1:
        raise UserError(
            "option --modality_ids",
            f"{list(ids)}",
            f"{len(names)} different ids, for {', '.join(names)}",
            "Give one id for each modality, or leave the option out.",
        )
    remedy = "Choose other ids with --modality_ids."
    for name, dataset_id in zip(names, ids, strict=True):
        own = _dataset_name(raw, name, dataset_id)
        if taken := _taken_by(raw, dataset_id, name):
            raise UserError(f"dataset id {dataset_id}", f"that {taken} has it", f"a free id for {own}", remedy)
        if confusable := confusable_with_id(dataset_id):
            raise UserError(
                f"dataset id {dataset_id}",
                f"that nnU-Net, which looks at the beginnings of names, confuses it with that of {confusable[0]}",
                f"an id for {own} that neither begins another one nor begins with it",
                remedy,
            )


def _dataset_name(raw: RawDataset, modality: str, dataset_id: int) -> str:
    return f"Dataset{dataset_id:03d}_{raw.name.split('_', 1)[1]}_{modality}"


def _taken_by(raw: RawDataset, dataset_id: int, modality: str) -> str | None:
    """The dataset that keeps a modality from having an id, if any; not what an earlier run made for it."""
    own = _dataset_name(raw, modality, dataset_id)
    return next((n for n in datasets_with_id(dataset_id) if n != own or not _made_here(raw, n)), None)


def _made_here(raw: RawDataset, dataset_name: str) -> bool:
    """Whether planning has made, or begun, a dataset of this one's; one that it did not describe was begun."""
    folder = preprocessed_folder(dataset_name)
    try:
        described = read_json(folder / "dataset.json")
    except FileNotFoundError:
        return folder.is_dir() and not (raw.folder.parent / dataset_name).exists()
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get(SOURCE_KEY) == raw.name
