"""A stock nnU-Net trainer as one member of a group: it keeps its network and records, and is given its batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule

from nnunetv2_semicml.data.image_file import require_written
from nnunetv2_semicml.data.modality_group import Modality
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.training.checkpoint import read_checkpoint, save_atomically, use_builtin_numbers


class ModalityTrainer(nnUNetTrainer):
    """What a group changes in a stock trainer: no batches of its own, and checkpoints made for deployment.

    Everything else (network, loss, optimizer, schedule, log, progress.png, validation, model folder) is inherited from
    the stock trainer that this class is combined with by `make_modality_trainer_class`.
    """

    name: str  # of the network: that of the modality, with a number if it is not the modality's first
    modality: Modality
    deployed: bool  # whether the network gets a model folder
    predicts_as: str  # the nnU-Net trainer that stands in the checkpoints
    channels: Sequence[str]
    provenance: Mapping[str, Any]  # stands in the checkpoints; the conductor knows it when training begins
    print_to_console = False  # the conductor reports the epochs of all networks together
    averaged_network: nn.Module | None = None  # is validated and deployed instead of the one that is trained

    def get_dataloaders(self) -> tuple[None, None]:
        """Draw nothing: the conductor does. Only the mirroring axes, which inference needs, are determined here."""
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return None, None

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Write to this modality's log file and, warnings always and all during validation, to the console."""
        if args[:1] == ("train_loss",) and np.isnan(args[1]):
            args = ("train_loss: none, since the network learned from no labeled patches in this epoch",)
        warning = any("WARNING" in str(arg) for arg in args)
        also_print_to_console = also_print_to_console and (self.print_to_console or warning)
        super().print_to_log_file(
            f"[{self.name}]", *args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp
        )

    def on_validation_epoch_start(self) -> None:
        """Validate what will be deployed."""
        super().on_validation_epoch_start()
        self._exchange_weights()

    def on_validation_epoch_end(self, val_outputs: Sequence[dict[str, Any]]) -> None:
        """Log as nnU-Net does, in numbers that a checkpoint can hold."""
        self._exchange_weights()
        super().on_validation_epoch_end(val_outputs)
        use_builtin_numbers(self.logger)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, on the console, too.

        Raises:
            UserError: a prediction was not written to its end; there is no summary then.
        """
        self.print_to_console = True
        self._exchange_weights()
        super().perform_actual_validation(save_probabilities)
        self._exchange_weights()
        self.print_to_console = False
        if self.local_rank == 0:
            folder = Path(self.output_folder) / "validation"
            try:
                predictions = sorted(folder.glob(f"*{self.dataset_json['file_ending']}"))
                require_written(predictions, "Make room, and validate with --val.")
            except UserError:
                (folder / "summary.json").unlink(missing_ok=True)
                raise

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Swap the weights of the trained and the averaged network, so that nnU-Net's code sees the latter."""
        if self.averaged_network is None:
            return
        own, averaged = (
            [*network.parameters(), *network.buffers()] for network in (self.unwrapped_network(), self.averaged_network)
        )
        for a, b in zip(own, averaged, strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    def local_network(self) -> nn.Module:
        """The network without the wrapper of distributed training: the conductor averages the gradients."""
        network: nn.Module = self.network.module if self.is_ddp else self.network
        return network

    def unwrapped_network(self) -> nn.Module:
        """That without torch.compile's wrapper, whose weight names are those of nnU-Net's checkpoints."""
        network = self.local_network()
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def deployed_network(self) -> nn.Module:
        """The network whose weights are validated and deployed."""
        return self.unwrapped_network() if self.averaged_network is None else self.averaged_network

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates: the network's weights, and what a method has added to them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def get_state(self) -> dict[str, Any]:
        """What continues this modality's training, as part of the joint checkpoint."""
        return {
            "network_weights": self.unwrapped_network().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }

    def set_state(self, state: dict[str, Any], current_epoch: int) -> None:
        """Restore what `get_state` returned."""
        self.unwrapped_network().load_state_dict(state["network_weights"])
        self.optimizer.load_state_dict(state["optimizer_state"])
        self.logger.load_checkpoint(state["logging"])
        self._best_ema = state["_best_ema"]
        self.inference_allowed_mirroring_axes = state["inference_allowed_mirroring_axes"]
        self.current_epoch = current_epoch

    def save_checkpoint(self, filename: str) -> None:
        """Write what a stock nnU-Net predicts with: the weights, under the name of a trainer that it knows.

        Optimizer and scaler state stand in the joint checkpoint alone; training continues from there.
        """
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        if self.local_rank != 0 or not self.deployed:
            return
        checkpoint = {
            "network_weights": self.deployed_network().state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.predicts_as,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "provenance": dict(self.provenance),
        }
        save_atomically(checkpoint, filename)

    def load_network_weights(self, filename: str) -> None:
        """Load the weights, and nothing else, of a checkpoint that `save_checkpoint` wrote."""
        remedy = "Validate without --val_best, or train anew."
        checkpoint = read_checkpoint(filename, self.device, f"the best model of {self.name}", remedy)
        self.deployed_network().load_state_dict(checkpoint["network_weights"])


def make_modality_trainer_class(
    stock_trainer: type[nnUNetTrainer],
    class_name: str,
    name: str,
    modality: Modality,
    deployed: bool,
    channels: Sequence[str],
) -> type[ModalityTrainer]:
    """Make the trainer of a network as a member of a group.

    Args:
        stock_trainer: the nnU-Net trainer of the network.
        class_name: that of the conductor; nnU-Net derives the result folder from it.
        name: of the network, for logs and as a key; the modality's first network has its name.
        modality: what the network sees.
        deployed: whether checkpoints of the network are written for nnU-Net to predict with.
        channels: names of the modality's channels.
    """
    members = {
        "name": name,
        "modality": modality,
        "deployed": deployed,
        "predicts_as": _predicts_as(stock_trainer).__name__,
        "channels": channels,
    }
    return type(class_name, (ModalityTrainer, stock_trainer), members)


def _predicts_as(trainer: type[nnUNetTrainer]) -> type[nnUNetTrainer]:
    """The trainer of nnU-Net that builds the same networks, so that any nnU-Net can predict; or else this one."""
    build = trainer.build_network_architecture
    of_nnunet = (c for c in trainer.__mro__ if c.__module__.startswith("nnunetv2."))
    same = [c for c in of_nnunet if getattr(c, "build_network_architecture", None) is build]
    return same[0] if same else trainer
