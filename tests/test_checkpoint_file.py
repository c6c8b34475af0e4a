"""Damage of checkpoints is found, down to a single bit, and the same content is known again under another name."""

import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_semicml.data.checkpoint_file import content_digest, find_damage, read_log, read_provenance

CONTENT = {"weights": torch.arange(6.0), "epoch": [1, 2.5, "x"], "provenance": {"fold": "0"}}


def save(file: Path, content: object = CONTENT) -> Path:
    with file.open("wb") as stream:  # the folder in the archive is then called "archive", whatever the file is
        torch.save(content, stream)
    return file


def same(loaded: dict) -> bool:
    return (
        loaded.keys() == CONTENT.keys()
        and torch.equal(loaded["weights"], CONTENT["weights"])
        and all(loaded[key] == CONTENT[key] for key in ("epoch", "provenance"))
    )


def test_every_flipped_bit_is_found_refused_or_harmless(tmp_path: Path):
    """Every third one, which hits every byte and every place in a byte; all of them take a minute."""
    whole = save(tmp_path / "whole.pth").read_bytes()
    file, counts = tmp_path / "flipped.pth", {"found": 0, "refused": 0, "harmless": 0}
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        if damage := find_damage(file):
            assert damage.startswith("a damaged file (")
            counts["found"] += 1
            continue
        try:
            loaded = torch.load(file, weights_only=True)
        except Exception:
            counts["refused"] += 1
        else:
            assert same(loaded), f"bit {bit} of {len(whole)} bytes"
            counts["harmless"] += 1
    assert counts["found"] > sum(counts.values()) / 2  # the others are in padding and headers


@pytest.mark.parametrize("kept", [0, 1, 500, -1])
def test_a_part_is_damaged(tmp_path: Path, kept: int):
    file = save(tmp_path / "a.pth")
    assert find_damage(file) == ""
    file.write_bytes(file.read_bytes()[:kept])
    assert "damaged file (BadZipFile: File is not a zip file)" in find_damage(file)


def test_a_damaged_checkpoint_has_a_digest_or_is_none(tmp_path: Path):
    whole = save(tmp_path / "whole.pth").read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):  # the directory of the archive, by which it is read
        (tmp_path / "a.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(zipfile.BadZipFile):
            assert len(content_digest(tmp_path / "a.pth")) == 12


def test_what_is_not_there_is_an_error_of_the_system(tmp_path: Path):
    for function in (find_damage, content_digest, read_provenance):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "a.pth")


def test_digest_is_that_of_the_content(tmp_path: Path):
    first = content_digest(save(tmp_path / "a.pth"))
    torch.save(CONTENT, tmp_path / "b.pth")  # here the folder in the archive is called "b"
    assert content_digest(tmp_path / "b.pth") == first
    other = {**CONTENT, "weights": torch.tensor([0.0, 1, 2, 3, 4, struct.unpack("<f", b"\1\0\xa0\x40")[0]])}
    assert content_digest(save(tmp_path / "c.pth", other)) != first


@pytest.mark.parametrize(
    ("content", "provenance"),
    [
        (CONTENT, {"fold": "0"}),
        ({"network_weights": {}, "logging": np.float64(1)}, None),  # as stock nnU-Net's
        ({"network_weights": {}}, None),
        ([1, 2], None),
    ],
)
def test_provenance_is_what_was_trained_on(tmp_path: Path, content: object, provenance: dict | None):
    assert read_provenance(save(tmp_path / "a.pth", content)) == provenance


def test_a_damaged_checkpoint_has_no_provenance_and_no_log(tmp_path: Path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    assert read_provenance(tmp_path / "a.pth") is None
    assert read_log(tmp_path / "a.pth") == {}


def test_log_is_read_with_the_numpy_numbers_of_stock_nnunet(tmp_path: Path):
    log = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "train_losses": [-0.5, np.int64(1)]}
    file = save(tmp_path / "a.pth", {"network_weights": {}, "logging": log})
    assert read_log(file) == {"mean_fg_dice": [0.5, 0.25], "train_losses": [-0.5, 1]}
