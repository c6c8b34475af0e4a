"""One run for all networks in nnU-Net's external loggers, of which Weights & Biases is the first.

nnU-Net's `MetaLogger` makes a logger for every environment variable nnUNet_<name>_enabled that is set, each with
`update_config`, `log` and `log_summary`. The conductor's does; those of the networks' trainers forward to them.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

_SWITCH = re.compile(r"nnUNet_\w+_enabled")


class ExternalLogger(Protocol):
    """What `MetaLogger` asks of a logger beside its local one."""

    def update_config(self, config: dict[str, Any]) -> None:
        """Note what a training is made of."""

    def log(self, key: str, value: Any, step: int) -> None:
        """Note a number of an epoch."""

    def log_summary(self, key: str, value: Any) -> None:
        """Note a number of the whole training."""


@contextmanager
def without_external_loggers() -> Iterator[None]:
    """Let nnU-Net make none, whatever the environment says, which is as it was afterwards."""
    switches = {name: value for name, value in os.environ.items() if _SWITCH.fullmatch(name)}
    os.environ.update(dict.fromkeys(switches, "0"))
    try:
        yield
    finally:
        os.environ.update(switches)


class LoggerOfNetwork:
    """Forwards what a network's trainer logs to a logger of the whole training, by keys with the network's name.

    Args:
        logger: of the whole training.
        name: of the network, e.g. FLAIR: train_losses becomes FLAIR/train_losses.
    """

    def __init__(self, logger: ExternalLogger, name: str):
        self.logger = logger
        self.name = name

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Forward what the trainer is made of."""
        self.logger.update_config({f"{self.name}/{key}": value for key, value in config.items()})

    def log(self, key: str, value: Any, step: int) -> None:
        """Forward a number of an epoch; NaN for a network that rests."""
        self.logger.log(f"{self.name}/{key}", value, step)

    def log_summary(self, key: str, value: Any) -> None:
        """Forward a number of the whole training, e.g. final_val/foreground_dice."""
        self.logger.log_summary(f"{self.name}/{key}", value)
