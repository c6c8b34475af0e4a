"""One run for all networks: what nnU-Net's external loggers are given, and what Weights & Biases writes of it."""

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from conftest import LABELS, Killed, KilledMixin, initialized, load_plans, make_trainer
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from wandb.proto.wandb_internal_pb2 import Record

from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.training import conductor
from nnunetv2_semicml.training.loggers import without_external_loggers

FLAIR = "Dataset501_Labels_FLAIR"
DICE = {"FLAIR": 0.5, "T1": 0.25}


class nnUNetTrainerMeanTeacherKilled(KilledMixin, nnUNetTrainerMeanTeacher):
    save_every = 1

    def draws(self):
        return [("FLAIR",)]

    def learners(self):
        return self.trainers[:1]  # that of T1 rests: its loss is NaN


def train_in_two_parts():
    """Killed after an epoch, continued and validated, as by nnUNetv2_train."""
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerMeanTeacherKilled, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    wandb.finish()
    del trainer
    plans, dataset_json = load_plans(LABELS)
    plans["continue_training"] = True
    trainer = nnUNetTrainerMeanTeacherKilled(plans, "2d", 0, dataset_json, torch.device("cpu"))
    for name, value in {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}.items():
        setattr(trainer, name, value)
    maybe_load_checkpoint(trainer, True, False)
    trainer.run_training()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
        trainer.perform_actual_validation()
    wandb.finish()
    return trainer


def numbers(trainer):
    """Epoch -> key -> number, of the local logs of all trainers, by the rules of nnU-Net's MetaLogger."""
    found = [{}, {}]
    for prefix, t in {"": trainer, **{f"{t.name}/": t for t in trainer.trainers}}.items():
        for key, values in t.logger.get_checkpoint().items():
            for epoch, value in enumerate(values):
                several = value if isinstance(value, list) else None
                named = {key: value} if several is None else {f"{key}/class_{i}": v for i, v in enumerate(several, 1)}
                found[epoch] |= {f"{prefix}{name}": v for name, v in named.items()}
    return found


def validate(self, save_probabilities=False):
    """What nnU-Net logs in the end, without its processes, which take seconds."""
    self.logger.log_summary("final_val/foreground_dice", DICE[self.name])


def assert_config(config, trainer):
    """What a stock trainer sends, of every network what it sends once it is initialized, and no case and no path."""
    assert config["settings"] == trainer.settings()
    assert config["plans"]["dataset_name"] == LABELS
    assert (config["configuration"], config["fold"]) == ("2d", 0)
    assert config["dataset"]["labels"] == trainer.dataset_json["labels"]
    for t in trainer.trainers:
        assert config[f"{t.name}/hparas"]["num_iterations_per_epoch"] == 2
        assert config[f"{t.name}/hparas"]["batch_size"] == t.configuration_manager.batch_size
    sent = json.dumps(config)
    for t in trainer.trainers:
        assert not any(case in sent for cases in t.do_split() for case in cases)
    assert not any(case in sent for case in trainer.group.unlabeled)
    assert not any(os.environ[name] in sent for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"))


# Weights & Biases


@pytest.fixture
def offline(monkeypatch):
    """Nothing leaves this machine, and standard output stays pytest's."""
    own = {"nnUNet_wandb_enabled": "1", "nnUNet_wandb_mode": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    yield
    wandb.finish()


def read_records(file):
    """The records of a .wandb file, which is a log of LevelDB behind seven bytes: blocks of chunks of records."""
    content, position, record, records = file.read_bytes(), 7, b"", []
    while position < len(content):
        if 32768 - position % 32768 < 7:  # no room for the head of a chunk
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            records.append(Record.FromString(record))
            record = b""
    return records


def items(records):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in records}


def test_weights_and_biases_has_one_run(groups, results, offline):
    trainer = train_in_two_parts()
    files = sorted(results.rglob("*.wandb"))
    assert len(files) == 2  # one for each process
    assert {file.name for file in files} == {files[0].name}  # of the same run
    assert {file.parents[2] for file in files} == {Path(trainer.output_folder)}
    rows, config, summary = {}, {}, {}
    for record in (record for file in files for record in read_records(file)):
        if record.HasField("history"):
            rows.setdefault(record.history.step.num, {}).update(items(record.history.item))
        config |= items(record.run.config.update) | items(record.config.update)
        summary |= items(record.summary.update)
    expected = numbers(trainer)
    assert sorted(rows) == [0, 1]
    for epoch, row in rows.items():
        row = {key: value for key, value in row.items() if not key.startswith("_")}
        assert row.keys() == expected[epoch].keys()
        # text that JSON does not have
        found = {key: float(value) if isinstance(value, str) else value for key, value in row.items()}
        assert found == pytest.approx(expected[epoch], nan_ok=True)
        assert np.isnan(found["T1/train_losses"])
        assert {"FLAIR/train_losses", "unsupervised/mse", "weight/mse", "T1/dice_per_class_or_region/class_2"} <= {*row}
    assert_config(config, trainer)
    assert {name: summary[f"{name}/final_val/foreground_dice"] for name in DICE} == DICE


# any further logger


class Fake:
    """Stands for a logger of a later nnU-Net."""

    made: list["Fake"] = []

    def __init__(self, folder, resume):
        self.folder, self.resume, self.config, self.rows, self.summary = folder, resume, {}, [{}, {}], {}
        self.made.append(self)

    def update_config(self, config):
        assert not config.keys() & self.config.keys()
        self.config |= config

    def log(self, key, value, step):
        assert key not in self.rows[step]
        self.rows[step][key] = value

    def log_summary(self, key, value):
        self.summary[key] = value


@pytest.fixture
def fake(monkeypatch):
    original = MetaLogger.__init__

    def init(self, output_folder, resume, verbose=False):
        original(self, output_folder, resume, verbose)
        if self._is_logger_enabled("nnUNet_fake_enabled"):
            self.loggers.append(Fake(output_folder, resume))

    monkeypatch.setattr(MetaLogger, "__init__", init)
    monkeypatch.setenv("nnUNet_fake_enabled", "1")
    monkeypatch.setattr(Fake, "made", [])
    return Fake.made


def test_any_logger_of_nnunet_is_one_for_all_networks(groups, fake):
    trainer = train_in_two_parts()
    first, second = fake
    assert [logger.resume for logger in fake] == [False, True]
    assert {logger.folder for logger in fake} == {trainer.output_folder}
    expected = numbers(trainer)
    assert first.rows[0] == pytest.approx(expected[0], nan_ok=True)
    assert second.rows[1] == pytest.approx(expected[1], nan_ok=True)
    assert (first.rows[1], second.rows[0]) == ({}, {})
    for logger in fake:
        assert_config(logger.config, trainer)
    assert second.summary == {f"{name}/final_val/foreground_dice": dice for name, dice in DICE.items()}
    assert os.environ["nnUNet_fake_enabled"] == "1"


def test_every_network_sends_what_a_stock_trainer_sends(groups, fake):
    for dataset, trainer_class in ((FLAIR, nnUNetTrainer), (LABELS, nnUNetTrainerMeanTeacher)):
        plans, dataset_json = load_plans(dataset)
        listing = {"case": {"images": ["/data/case.nii.gz"], "label": "/data/label.nii.gz"}}
        described = {**dataset_json, "dataset": listing}
        trainer_class(plans, "2d", 0, described, torch.device("cpu")).initialize()
    of_stock, of_group = (logger.config for logger in fake)
    assert of_group["FLAIR/hparas"] == of_stock["hparas"]
    assert of_group.keys() == {*of_stock, "settings", "FLAIR/hparas", "T1/hparas"} - {"hparas"}
    assert of_stock["dataset"]["dataset"] == listing
    assert "/data" not in json.dumps(of_group)


def test_run_of_one_modality_is_in_its_model_folder(groups, fake):
    """Where it is when the training is continued, whatever folder the joint state has."""
    trainer = initialized(FLAIR, "2d", nnUNetTrainerMeanTeacher)
    assert fake[0].folder == trainer.trainers[0].output_folder
    assert {"FLAIR/hparas", "settings"} <= fake[0].config.keys()


def test_only_the_first_process_logs(groups, fake, monkeypatch):
    calls = {"is_available": True, "is_initialized": True, "get_rank": 1, "get_world_size": 2, "barrier": None}
    of_second = SimpleNamespace(**{name: lambda value=value: value for name, value in calls.items()})
    monkeypatch.setattr(conductor, "dist", of_second)
    trainer = make_trainer(LABELS, "2d")
    assert (trainer.logger.loggers, fake) == ([], [])
    of_second.get_rank = lambda: 0
    assert make_trainer(LABELS, "2d", nnUNetTrainerMeanTeacher).logger.loggers == fake
    assert len(fake) == 1


def test_switches_are_as_they_were(monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("nnUNet_wandb_mode", "offline")
    monkeypatch.setenv("nnUNet_later_enabled", "true")
    before = dict(os.environ)
    with suppress(Killed), without_external_loggers():
        assert [os.environ[f"nnUNet_{name}_enabled"] for name in ("wandb", "later")] == ["0", "0"]
        assert os.environ["nnUNet_wandb_mode"] == "offline"
        raise Killed
    assert dict(os.environ) == before
