"""Weights that a training begins with: where they are named, how they are read, and what of them fits a network.

nnU-Net's own `load_pretrained_weights` is for one network and runs whatever code is in the file. Here a file is read
without running code and laid into every network of a modality, by nnU-Net's rule: all layers but those that make the
segmentation, or none.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunetv2_semicml.data.result_folders import TRAINING_STATE
from nnunetv2_semicml.errors import UserError, some_of
from nnunetv2_semicml.training.checkpoint import read_checkpoint
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer

VARIABLE = "nnUNet_semicml_pretrained_weights"
"""Environment variable: one file, or FLAIR=/a.pth,T1=/b.pth."""
_SEGMENTATION_LAYERS = ".seg_layers."  # as nnU-Net knows them
_EXPECTED = "a checkpoint of nnU-Net, of a modality's model or of nnssl, with network_weights"
_OTHER_FILE = "Name another file, or train without pretrained weights."
_OTHER_PLANS = "Pretrain with these plans (nnUNetv2_move_plans_between_datasets), or train without pretrained weights."


def named_on_command_line() -> str | None:
    """The file of nnUNetv2_train's -pretrained_weights, while nnU-Net is about to load it or a checkpoint.

    nnU-Net tells it to no hook of a trainer. It stands in the frame of the function that asks for the network, whether
    a command line, one of its processes or a script called that; sys.argv would not have it in a script.

    Raises:
        KeyError: nnU-Net calls it otherwise now; better so than to let it run what is in the file.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "maybe_load_checkpoint":
        frame = frame.f_back
    if frame is None:
        return None
    file: str | None = frame.f_locals["pretrained_weights_file"]
    return file


def files_of_modalities(named: str | Mapping[str, str], modalities: Sequence[str], where: str) -> dict[str, str]:
    """Which modality's networks begin with which file; modalities that are not named begin at random.

    Args:
        named: modality -> file, also as in `VARIABLE`, or one file for all.
        modalities: names of the group's.
        where: it was named, for the error.

    Raises:
        UserError: there is no such modality.
    """
    if isinstance(named, str):
        if "=" not in named or Path(named).is_file():
            return dict.fromkeys(modalities, named)
        parts = [part.partition("=") for part in named.split(",")]
        named = {modality.strip(): file.strip() for modality, _, file in parts}
    if unknown := [name for name in named if name not in modalities]:
        raise UserError(
            where,
            f"weights of {some_of(unknown)}",
            f"one file for all modalities, or MODALITY=FILE of {some_of(modalities)}",
            "Correct the name of the modality.",
        )
    return dict(named)


def load_pretrained_weights(trainers: Sequence[ModalityTrainer], files: Mapping[str, str]) -> list[str]:
    """Let networks begin with weights from files: all layers but those that make the segmentation.

    The first convolution may see fewer channels in the file, see `repeat_channels`. No network is changed unless all
    files fit.

    Args:
        trainers: those of the networks.
        files: modality -> file.

    Returns:
        A sentence on every network.

    Raises:
        UserError: a file is damaged, could run code, has no network's weights, or does not fit.
    """
    weights = {file: read_weights(file) for file in dict.fromkeys(files.values())}
    of_networks = {}
    for trainer in trainers:
        if file := files.get(trainer.modality.name):
            of_networks[trainer.name] = fit_weights(trainer.unwrapped_network(), weights[file], file, trainer.name)
    sentences = []
    for trainer in trainers:
        sentence = f"The network of {trainer.name} begins at random: no pretrained weights were named for it."
        if trainer.name in of_networks:
            fitting = of_networks[trainer.name]
            with torch.no_grad():
                for own, value in fitting.values:
                    own.copy_(value)
            sentence = (
                f"The network of {trainer.name} begins with {len(fitting.values)} pretrained tensors of "
                f"{files[trainer.modality.name]}; {fitting.at_random} of its segmentation layers begin at random."
                f"{fitting.repeated}"
            )
        sentences.append(sentence)
    return sentences


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The weights of one network, by nnU-Net's names, without the prefixes of DDP and torch.compile.

    Raises:
        UserError: the file is damaged, could run code, or has no network's weights.
    """
    checkpoint = read_checkpoint(file, torch.device("cpu"), _EXPECTED, _OTHER_FILE)
    keys = {str(key) for key in checkpoint} if isinstance(checkpoint, dict) else set()
    if {"modalities", "provenance"} <= keys:
        found = "the state of a training of several networks, from which --c goes on"
        raise UserError(file, found, _EXPECTED, f"Name the model of a modality: {_models_beside(Path(file))}.")
    weights = checkpoint["network_weights"] if "network_weights" in keys else None
    if not weights or not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        what = "network_weights that are no tensors" if "network_weights" in keys else some_of(sorted(keys))
        raise UserError(file, what or "no keys", _EXPECTED, _OTHER_FILE)
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in weights.items()}


def _models_beside(joint: Path) -> str:
    """The models that were trained together with a joint checkpoint, as far as they are there."""
    folder = joint.absolute().parent
    if folder.name == TRAINING_STATE:
        return str(folder.with_name(joint.name))
    results, dataset, model, fold = folder.parents[2], folder.parents[1].name, folder.parent.name, folder.name
    files = results.glob(f"Dataset*_{dataset.partition('_')[2]}_*/{model}/{fold}/{joint.name}")
    return some_of(map(str, sorted(files))) or f"{joint.name} in the same place below its dataset"


@dataclass(frozen=True)
class Fitting:
    """What of a file a network begins with.

    Attributes:
        values: tensors of the network, each once, and what they become.
        at_random: how many tensors stay as they are.
        repeated: a sentence, if the kernels of the first convolution were repeated.
    """

    values: list[tuple[Tensor, Tensor]]
    at_random: int
    repeated: str


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor], file: str, name: str) -> Fitting:
    """Find the value of every tensor of a network but those of its segmentation layers.

    nnU-Net lists a tensor that modules share under several names, of which the file needs to have one.

    Args:
        network: unwrapped.
        weights: name -> tensor.
        file: where they are from, for the error.
        name: of the network, for the error.

    Raises:
        UserError: a tensor is missing, or has another shape.
    """
    names: dict[Tensor, list[str]] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(key)
    stem = next((id(p) for p in network.parameters() if p.ndim > 2), None)  # the first convolution
    values, repeated = [], ""
    learned = {t: keys for t, keys in names.items() if not any(_SEGMENTATION_LAYERS in key for key in keys)}
    for tensor, keys in learned.items():
        found = [(key, weights[key]) for key in keys if key in weights]
        expected = f"shape {tuple(tensor.shape)}, which the network of {name} has"
        if not found:
            raise UserError(file, f"no {keys[0]}", f"one of {expected}", _OTHER_PLANS)
        key, value = next((f for f in found if f[1].shape == tensor.shape), found[0])
        if id(tensor) == stem and _sees_fewer_channels(value, tensor):
            repeated = (
                f" Its first convolution sees {tensor.shape[1]} channels, that of the file {value.shape[1]}: the "
                "kernels are repeated."
            )
            value = repeat_channels(value, tensor.shape[1])
        if value.shape != tensor.shape:
            raise UserError(file, f"{key} of shape {tuple(value.shape)}", expected, _OTHER_PLANS)
        values.append((tensor, value))
    return Fitting(values, len(names) - len(learned), repeated)


def _sees_fewer_channels(found: Tensor, expected: Tensor) -> bool:
    def without_channels(shape: torch.Size) -> tuple[int, ...]:
        return (*shape[:1], *shape[2:])

    alike = without_channels(found.shape) == without_channels(expected.shape) and found.ndim == expected.ndim
    return alike and 0 < found.shape[1] < expected.shape[1]


def repeat_channels(kernels: Tensor, channels: int) -> Tensor:
    """Kernels for more channels, that answer to equal channels as before.

    Args:
        kernels: (F, c, *size).
        channels: C > c.

    Returns:
        (F, C, *size): every kernel as often as there are channels for it, divided by that number.
    """
    of_channel = torch.arange(channels) % kernels.shape[1]
    times = torch.bincount(of_channel)[of_channel].view(1, -1, *[1] * (kernels.ndim - 2))
    return kernels[:, of_channel] / times
