"""Checkpoints that are whole or absent, readable without running code, and tied to what they were trained on."""

import random
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunetv2_semicml.data.checkpoint_file import changed_settings, find_damage, numpy_numbers
from nnunetv2_semicml.data.files import written_whole
from nnunetv2_semicml.errors import UserError

CHECKPOINT_FORMAT = 3
"""Of joint checkpoints. In format 1, which has no such number, every method kept its teachers in a way of its own; in
format 2 the provenance has no settings of the trainer."""


def save_atomically(checkpoint: dict[str, Any], filename: str) -> None:
    """Write a checkpoint, so that a crash or a full disk leaves the previous one.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with written_whole(filename) as unfinished, unfinished.open("wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise UserError(
            filename,
            f"that the checkpoint cannot be written ({error})",
            "enough space and the right to write there",
            "The previous checkpoint is untouched: make room and continue with --c.",
        ) from error


def read_checkpoint(filename: str | Path, device: torch.device, what: str, remedy: str) -> dict[str, Any]:
    """Read a checkpoint of this package or of nnU-Net without running code, and only if it is whole.

    Args:
        filename: the checkpoint.
        device: where its tensors go.
        what: what it is expected to be, for the error.
        remedy: what to do about a damaged one.

    Raises:
        UserError: it cannot be read, its checksums differ, or it holds more than tensors, numbers and text.
    """
    try:
        damage = find_damage(filename)
        with torch.serialization.safe_globals(numpy_numbers()):
            checkpoint: dict[str, Any] = {} if damage else torch.load(filename, map_location=device, weights_only=True)
    except UnpicklingError as error:
        # PyTorch's sentence goes on to say how to read it all the same
        code = re.search(r"GLOBAL (\S+)", str(error))
        damage = f"more than tensors, numbers and text ({code[1] if code else 'in a pickle'}), which could run code"
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        damage = f"a file that cannot be read as a checkpoint ({type(error).__name__} {str(error)[:100]})"
    if damage:
        raise UserError(filename, damage, what, remedy)
    return checkpoint


def load_checkpoint(
    filename: str,
    device: torch.device,
    provenance: dict[str, Any],
    remedy: str = "Put the right one there, continue from another checkpoint of the folder, or train anew without --c.",
) -> dict[str, Any]:
    """Read a joint checkpoint and refuse one of another run or format.

    Args:
        filename: the checkpoint.
        device: where its tensors go.
        provenance: what the checkpoint must have been trained on, as stored under "provenance".
        remedy: what to do about a damaged checkpoint or one of another run.

    Raises:
        UserError: if the file is damaged, of another version of this package, or its provenance is another.
    """
    checkpoint = read_checkpoint(filename, device, f"a checkpoint of {provenance['trainer']}", remedy)
    if "provenance" not in checkpoint:
        raise UserError(filename, "a checkpoint without provenance", f"one of {provenance['trainer']}", remedy)
    if (version := checkpoint.get("format", 1)) != CHECKPOINT_FORMAT:
        raise UserError(
            filename,
            f"a checkpoint of format {version}, which another version of this package wrote",
            f"format {CHECKPOINT_FORMAT}",
            "Continue with that version, or train anew without --c. The models of the modalities predict as before.",
        )
    found = checkpoint["provenance"]
    for key, expected in provenance.items():
        if found.get(key) == expected:
            continue
        of = f"{key} {found.get(key)}", f"{key} {expected}"
        if key.startswith("digest of "):
            of = f"other {key.removeprefix('digest of ')}", "the same, since a run goes on as it began"
        elif key == "settings":
            changed = changed_settings(found[key], expected)
            if not changed:
                continue
            old, new = (", ".join(f"{n} = {settings[n]}" for n in changed) for settings in (found[key], expected))
            of = old, f"{new}, as the trainer has it now"
        raise UserError(filename, f"a checkpoint of {of[0]}", of[1], remedy)
    return checkpoint


def use_builtin_numbers(logger: MetaLogger) -> None:
    """Turn the NumPy numbers of nnU-Net's log into Python's.

    `weights_only` loading refuses the former. They are turned when logged, not when saved: a moving average of float32
    values would otherwise go on in float64 after a resume.
    """

    def builtin(value: Any) -> Any:
        if isinstance(value, list):
            return [builtin(item) for item in value]
        return value.item() if isinstance(value, np.generic) else value

    logger.load_checkpoint({key: builtin(values) for key, values in logger.get_checkpoint().items()})


def get_random_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of Python, NumPy and PyTorch, on the CPU and on a CUDA device."""
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)  # of the form that was asked for
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
