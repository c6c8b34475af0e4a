"""The conductor beside the proofs of its methods: checkpoints, hooks, schedules, refusals; in this process."""

import copy
import errno
import gc
import json
import os
import pickle
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    Killed,
    KilledMixin,
    assert_identical,
    assert_same_weights,
    draw_batches,
    initialized,
    load_plans,
    make_trainer,
)
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training.conductor import HOOKS_OF_CONDUCTOR, HOOKS_OF_NETWORKS, Conductor
from nnunetv2_semicml.training.schedules import with_schedules

# checkpoints


class nnUNetTrainerSemiCMLKilled(KilledMixin, nnUNetTrainerSemiCML):
    pass


def test_latest_checkpoint_knows_that_its_epoch_is_the_best(groups):
    """nnU-Net notes a new best epoch only after it has saved checkpoint_latest."""
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, save_every=1, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    latest = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=True)
    states = [latest, *latest["modalities"].values()]
    assert [state["_best_ema"] for state in states] == [state["logging"]["ema_fg_dice"][0] for state in states]


def test_deployed_checkpoint_is_a_stock_one(groups):
    trainer = initialized(LABELS, "2d")
    trainer.run_training()
    for t in trainer.trainers:
        checkpoint = torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert checkpoint["provenance"]["trainer"] == "nnUNetTrainerSemiCML"
        assert checkpoint["provenance"]["modality"] == t.name
        assert os.environ["nnUNet_raw"] not in str(checkpoint["init_args"])
        assert "dataset" not in json.loads((Path(t.output_folder_base) / "dataset.json").read_text())


# what is refused


def test_cascade_is_refused(groups):
    plans, dataset_json = load_plans(LABELS)
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(NotImplementedError, match="does not support the cascade"):
        nnUNetTrainerSemiCML(plans, "3d_cascade_fullres", 0, dataset_json, torch.device("cpu"))


def preprocessed(name):
    return Path(os.environ["nnUNet_preprocessed"]) / name


@pytest.fixture
def scratch(labels_group, results, tmp_path, monkeypatch):
    """A copy of nnUNet_preprocessed that may be damaged; links, replaced and never written through."""
    folder = tmp_path / "preprocessed"
    names = [LABELS, *(m.dataset_name for m in labels_group.modalities)]
    for name in names:
        for file in preprocessed(name).rglob("*"):
            if file.is_file():
                copy_of = folder / name / file.relative_to(preprocessed(name))
                copy_of.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, copy_of)
    monkeypatch.setenv("nnUNet_preprocessed", str(folder))
    return folder


def rewrite(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.unlink()
    file.write_text(json.dumps(content))


FLAIR = "Dataset501_Labels_FLAIR"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda d: (d / LABELS / "modalities.json").unlink(),
            r"modalities.json: found no such file.*Run nnUNetv2_semi",
        ),
        (lambda d: (d / FLAIR / "nnUNetPlans.json").unlink(), r"FLAIR/nnUNetPlans.json: found no such file"),
        (lambda d: (d / FLAIR / "dataset.json").unlink(), r"FLAIR/dataset.json: found no such file"),
        (
            lambda d: rewrite(d / FLAIR / "nnUNetPlans.json", lambda p: p["configurations"].pop("2d")),
            r"nnUNetPlans.json: found configurations 3d_fullres; expected 2d",
        ),
        (
            lambda d: rewrite(d / FLAIR / "nnUNetPlans.json", lambda p: p["configurations"]["2d"].update(batch_size=7)),
            r"found batch_size = 7 in configuration 2d; expected \d+, as in .*500_Labels/nnUNetPlans.json",
        ),
        (
            lambda d: rewrite(
                d / FLAIR / "nnUNetPlans.json", lambda p: p["configurations"]["2d"].update(use_mask_for_norm=[False])
            ),
            r"found plans, labels or cases that have changed since nnUNetPlans_2d was preprocessed",
        ),
        (
            lambda d: rewrite(d / LABELS / "modalities.json", lambda m: m["preprocessed"].pop("nnUNetPlans_2d")),
            r"found nnUNetPlans_3d_fullres preprocessed; expected nnUNetPlans_2d",
        ),
        (
            lambda d: next((d / FLAIR / "nnUNetPlans_2d_unlabeled").glob("*.pkl")).unlink(),
            r"nnUNetPlans_2d_unlabeled: found no complete preprocessed case",
        ),
        (
            lambda d: [f.unlink() for f in (d / FLAIR).rglob("*") if f.is_file()],
            r"FLAIR/nnUNetPlans.json: found no such file",
        ),
    ],
)
def test_what_is_missing_or_changed_is_named(scratch, damage, sentence):
    damage(scratch)
    with pytest.raises(RuntimeError, match=sentence):
        make_trainer(LABELS, "2d")
    assert not list(Path(os.environ["nnUNet_results"]).glob("Dataset*"))


@pytest.fixture(scope="module")
def finished(labels_group, tmp_path_factory):
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(tmp_path_factory.mktemp("results")))
        trainer = make_trainer(LABELS, "2d", num_epochs=1)
        trainer.run_training()
        return Path(trainer.output_folder) / "checkpoint_final.pth"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"dataset": "Dataset007_Other"},
            "found a checkpoint of dataset Dataset007_Other; expected dataset Dataset500",
        ),
        ({"modalities": ["T1", "FLAIR"]}, r"found a checkpoint of modalities \['T1', 'FLAIR'\]; expected modalities"),
        ({"plans": "other"}, "found a checkpoint of plans other; expected plans nnUNetPlans"),
        ({"configuration": "3d_fullres"}, "found a checkpoint of configuration 3d_fullres; expected configuration 2d"),
        ({"fold": 3}, "found a checkpoint of fold 3; expected fold 0"),
        ({"trainer": "Other"}, "found a checkpoint of trainer Other; expected trainer nnUNetTrainerSemiCML"),
    ],
)
def test_foreign_checkpoint_is_refused(finished, results, tmp_path, change, sentence):
    checkpoint = torch.load(finished, weights_only=True)
    checkpoint["provenance"].update(change)
    torch.save(checkpoint, tmp_path / "checkpoint_latest.pth")
    with pytest.raises(RuntimeError, match=sentence):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_damaged_checkpoint_is_refused(finished, results, tmp_path, part):
    content = finished.read_bytes()
    (tmp_path / "checkpoint_latest.pth").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(RuntimeError, match=r"checkpoint_latest.pth: found a damaged file"):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


def test_checkpoint_of_a_stock_trainer_is_refused(finished, results, tmp_path):
    stock = copy.deepcopy(torch.load(finished, weights_only=True))
    del stock["provenance"]
    torch.save(stock, tmp_path / "checkpoint_final.pth")
    with pytest.raises(RuntimeError, match="found a checkpoint without provenance"):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_final.pth"))


def test_checkpoint_of_an_earlier_format_is_refused(finished, results, tmp_path):
    checkpoint = torch.load(finished, weights_only=True)
    del checkpoint["format"]  # there was none
    torch.save(checkpoint, tmp_path / "checkpoint_latest.pth")
    sentence = r"found a checkpoint of format 1, .*; expected format 3. Continue with that version, or train anew"
    with pytest.raises(RuntimeError, match=sentence):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


@pytest.mark.parametrize("of_modality", [False, True])
def test_flipped_bit_is_noticed_on_reading(groups, of_modality):
    """In the joint checkpoint, or in that of a modality, which is read after --val_best."""
    trainer = initialized(LABELS, "2d")
    trainer.run_training()
    joint = Path(trainer.output_folder) / "checkpoint_best.pth"
    file = Path(trainer.trainers[1].output_folder) / joint.name if of_modality else joint
    content = bytearray(file.read_bytes())
    weights_of = trainer.trainers[1].network.encoder.stages[0][0].convs[0].conv.weight
    content[content.index(first_bytes(file, weights_of.shape))] ^= 1
    file.write_bytes(content)

    def validate_best():
        trainer.load_checkpoint(str(joint))
        trainer.perform_actual_validation()

    with pytest.raises(RuntimeError, match=rf"{file}: found a damaged file"):
        validate_best()


def first_bytes(file, shape):
    """Of the weights of this shape that are stored first."""
    checkpoint = torch.load(file, weights_only=True)
    of_networks = checkpoint.get("modalities", {"T1": checkpoint})["T1"]["network_weights"]
    return next(w for w in of_networks.values() if w.shape == shape).numpy().tobytes()


# settings


class nnUNetTrainerSemiCMLOther(nnUNetTrainerSemiCML):
    asc_weight = 0.1
    micro_batch_size = 1
    noise_bounds = (-0.1, 0.1)


def test_settings_are_the_hyper_parameters_that_weights_are_made_of():
    settings = nnUNetTrainerSemiCMLOther.settings()
    expected = {
        "asc_weight": 0.1,
        "noise_bounds": [-0.1, 0.1],
        "num_epochs": 1000,
        "mse_weight": 1.0,
        "asc_cases": None,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["network_trainer"] == "nnUNetTrainer"
    assert not {"micro_batch_size", "recompute", "save_every", "schedules", "group", "trainers"} & settings.keys()
    assert json.loads(json.dumps(settings)) == settings
    assert semicml_trainers.nnUNetTrainerSemiCMLPReL.settings()["first_stage"] == "nnUNetTrainerSemiCML"


def test_training_goes_on_with_the_settings_that_it_began_with(groups, monkeypatch):
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, save_every=1, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    latest = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    monkeypatch.setattr(nnUNetTrainerSemiCMLKilled, "kill_at", -1)
    monkeypatch.setattr(nnUNetTrainerSemiCMLKilled, "asc_weight", 0.1, raising=False)
    monkeypatch.setattr(nnUNetTrainerSemiCMLKilled, "micro_batch_size", 1, raising=False)  # makes no difference
    plans, dataset_json = load_plans(LABELS)

    def continue_it():
        again = {**plans, "continue_training": True}
        nnUNetTrainerSemiCMLKilled(again, "2d", 0, dataset_json, torch.device("cpu")).load_checkpoint(latest)

    sentence = r"found a checkpoint of asc_weight = 0.35, .*; expected asc_weight = 0.1, .*as the trainer has it now"
    with pytest.raises(RuntimeError, match=sentence):
        continue_it()
    make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled).load_checkpoint(latest)  # to validate with it
    monkeypatch.delattr(nnUNetTrainerSemiCMLKilled, "asc_weight")
    monkeypatch.setattr(nnUNetTrainerSemiCMLKilled, "kill_at", KilledMixin.kill_at)
    continue_it()
    # a version of this package that has one more, or one less
    checkpoint = torch.load(latest, weights_only=True)
    settings = checkpoint["provenance"]["settings"]
    for other in ({**settings, "of_another_version": 1}, {k: v for k, v in settings.items() if k != "ema_decay"}):
        checkpoint["provenance"]["settings"] = other
        torch.save(checkpoint, latest)
        continue_it()


def test_seed_is_that_of_every_generator(groups, monkeypatch):
    monkeypatch.setenv("nnUNet_semicml_seed", "11")
    drawn = []
    for _ in range(2):
        make_trainer(LABELS, "2d")
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


# one process at a time


@contextmanager
def other_process(folder):
    """A process that holds the lock of a folder until it is killed."""
    code = (
        "import time; from pathlib import Path; from nnunetv2_semicml.data.locks import hold_lock\n"
        f"hold_lock(Path({str(folder)!r}), 'planning'); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def folders_of(trainer):
    return [Path(folder) for folder in (trainer.output_folder, *(t.output_folder for t in trainer.trainers))]


@pytest.mark.parametrize("which", [0, 1, 2, "plans", "plans of T1"])
def test_what_another_process_uses_is_refused(copy_of_labels, which):
    """The folders that are written to, those of modalities included, and the preprocessed cases."""
    trainer = initialized(LABELS, "2d")
    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    of_plans = {"plans": preprocessed / LABELS, "plans of T1": preprocessed / "Dataset502_Labels_T1"}
    folder = of_plans[which] if which in of_plans else folders_of(trainer)[which]
    del trainer
    gc.collect()
    with other_process(folder):
        before = sorted(Path(os.environ["nnUNet_results"]).rglob("*"))
        with pytest.raises(RuntimeError, match=rf"{folder}: found another process at work there \(planning, process"):
            make_trainer(LABELS, "2d")
        assert [path for path in sorted(Path(os.environ["nnUNet_results"]).rglob("*")) if path.suffix == ".pth"] == []
        assert [f for f in before if f.is_file() and f.suffix == ".txt"] == sorted(
            Path(os.environ["nnUNet_results"]).rglob("*.txt")
        )
    make_trainer(LABELS, "2d")  # the other one is gone


# a new training over an earlier one


class Dying:
    """Dies between the final checkpoints of FLAIR and T1, or before any checkpoint."""

    def on_train_end(self):
        self.trainers[0].on_train_end()
        raise Killed


@pytest.mark.parametrize("dies", ["before its first checkpoint", "between the final checkpoints"])
def test_models_are_of_one_training_whenever_another_is_killed(groups, dies):
    old = initialized(LABELS, "2d")
    old.run_training()
    old.perform_actual_validation()
    folders = folders_of(old)
    models = [torch.load(f / "checkpoint_final.pth", weights_only=True) for f in folders]
    plans, dataset_json = load_plans(LABELS)
    del old
    gc.collect()
    members = {"kill_at": 0} if dies.startswith("before") else {}
    bases = (KilledMixin if members else Dying, nnUNetTrainerSemiCML)
    killed = make_trainer(LABELS, "2d", type("nnUNetTrainerSemiCML", bases, members))
    torch.manual_seed(5)
    with pytest.raises(Killed):
        killed.run_training()
    assert not (folders[2] / "checkpoint_final.pth").exists()  # nobody predicts with one of each
    assert not list(folders[2].glob("validation/*"))
    del killed
    gc.collect()
    again = nnUNetTrainerSemiCML({**plans, "continue_training": True}, "2d", 0, dataset_json, torch.device("cpu"))
    found = sorted(file.name for file in folders[0].glob("checkpoint_*.pth"))
    if members:
        assert found == ["checkpoint_best.pth", "checkpoint_final.pth"]
        for folder, model in zip(folders, models, strict=True):
            assert_identical(torch.load(folder / "checkpoint_final.pth", weights_only=True), model)
        assert (folders[2] / "validation" / "summary.json").is_file()
        return
    assert found == ["checkpoint_best.pth"]
    for name, value in {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}.items():
        setattr(again, name, value)
    again.load_checkpoint(str(folders[0] / "checkpoint_best.pth"))
    again.run_training()
    new = [torch.load(f / "checkpoint_final.pth", weights_only=True) for f in folders]
    for name, model, earlier in zip(("FLAIR", "T1"), new[1:], models[1:], strict=True):
        assert_same_weights([model["network_weights"]], [new[0]["modalities"][name]["network_weights"]])
        assert not torch.equal(*(next(iter(m["network_weights"].values())) for m in (model, earlier)))
    assert not list(Path(os.environ["nnUNet_results"]).rglob("earlier_training"))


def test_full_disk_ends_in_a_sentence(groups, monkeypatch):
    def fail(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/progress.png")

    monkeypatch.setattr(MetaLogger, "plot_progress_png", fail)
    sentence = r"progress.png: found that it cannot be written \(No space left on device\).* continue with --c"
    with pytest.raises(UserError, match=sentence):
        make_trainer(LABELS, "2d").run_training()


@pytest.mark.parametrize("left", [0, 200])
def test_validation_that_was_not_written_to_its_end_has_no_summary(groups, monkeypatch, left):
    """On a full disk ITK writes a part of a prediction, and says nothing."""
    trainer = initialized(LABELS, "2d")
    original = nnUNetTrainer.perform_actual_validation

    def validate(self, *options):
        original(self, *options)
        file = sorted(Path(self.output_folder, "validation").glob("*.nii.gz"))[0]
        file.write_bytes(file.read_bytes()[:left])

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    with pytest.raises(UserError, match=r"nii.gz: found a part of a file; expected all of it.* validate with --val"):
        trainer.perform_actual_validation()
    assert not (Path(trainer.trainers[0].output_folder) / "validation" / "summary.json").exists()


# hooks of nnU-Net


def test_every_hook_of_nnunet_has_its_place():
    """Whatever a user overrides is asked for by name: the conductor has it, or it is refused there."""
    hooks = {name for name, member in vars(nnUNetTrainer).items() if callable(getattr(nnUNetTrainer, name))}
    hooks -= {name for name in hooks if name.startswith("__")}
    inherited = {"run_training", "print_to_log_file"}  # honoured as they are
    assert hooks - inherited - vars(Conductor).keys() == HOOKS_OF_NETWORKS
    assert hooks >= HOOKS_OF_CONDUCTOR
    assert not HOOKS_OF_NETWORKS & vars(Conductor).keys()


@pytest.mark.parametrize("hook", sorted(HOOKS_OF_NETWORKS))
def test_hook_of_a_network_on_a_conductor_is_refused(groups, results, hook):
    own = type("nnUNetTrainerOwn", (nnUNetTrainerSemiCML,), {hook: lambda self: None})
    sentence = rf"nnUNetTrainerOwn overrides {hook}, .* in a subclass of nnUNetTrainer, .* network_trainer of nnUNetTr"
    with pytest.raises(NotImplementedError, match=sentence):
        make_trainer(LABELS, "2d", own)
    assert not list(results.iterdir())


@pytest.mark.parametrize("hook", sorted(HOOKS_OF_CONDUCTOR))
def test_hook_of_the_conductor_on_a_network_trainer_is_refused(groups, results, hook):
    network_trainer = type("nnUNetTrainerOfMine", (nnUNetTrainer,), {hook: lambda self: None})
    own = type("nnUNetTrainerOwn", (nnUNetTrainerSemiCML,), {"network_trainer": network_trainer})
    with pytest.raises(NotImplementedError, match=rf"nnUNetTrainerOfMine, the network_trainer of .* overrides {hook}"):
        make_trainer(LABELS, "2d", own)


class nnUNetTrainerOtherHooks(nnUNetTrainer):
    """Hooks of a network, all of which are honoured."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), 3e-4)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    def _build_loss(self):
        loss = super()._build_loss()
        return lambda output, target: 3 * loss(output, target)

    def get_training_transforms(self, *args, **kwargs):
        return nnUNetTrainer.get_validation_transforms(kwargs.get("deep_supervision_scales", args[2]))

    def do_split(self):
        training, validation = super().do_split()
        return training[:1], validation

    def _set_batch_size_and_oversample(self):
        self.batch_size = 3


class nnUNetTrainerSemiCMLOtherHooks(nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerOtherHooks


def test_hooks_of_the_network_trainer_are_honoured(groups):
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLOtherHooks)
    reference = initialized(LABELS, "2d")
    (batch,) = draw_batches(trainer, 1)
    assert {len(p["cases"]) for p in batch["labeled"]} == {3}
    assert {case for p in batch["labeled"] for case in p["cases"]} == set(trainer.trainers[0].do_split()[0])
    assert all(isinstance(t.optimizer, torch.optim.AdamW) for t in trainer.trainers)
    losses = [t.train_step(batch)["supervised"]["FLAIR"] for t in (trainer, reference)]
    assert losses[0] == pytest.approx(3 * losses[1], rel=1e-5)
    trainer.run_training()
    # it builds nnU-Net's networks, so nnU-Net predicts with them
    checkpoint = torch.load(Path(trainer.trainers[0].output_folder) / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"


def test_hyper_parameters_of_nnunet_are_class_attributes(groups):
    members = {"num_epochs": 7, "initial_lr": 0.5, "weight_decay": 0.1, "save_every": 3, "asc_weight": 0.2}
    members |= {"oversample_foreground_percent": 1.0, "enable_deep_supervision": False}
    plans, dataset_json = load_plans(LABELS)
    trainer = type("nnUNetTrainerOwn", (nnUNetTrainerSemiCML,), members)(
        plans, "2d", 0, dataset_json, torch.device("cpu")
    )
    trainer.initialize()
    for name, value in members.items():
        assert all(getattr(t, name) == value for t in (trainer, *(trainer.trainers if name != "asc_weight" else ())))
    assert trainer.trainers[0].optimizer.param_groups[0]["lr"] == 0.5
    stock = nnUNetTrainer(*load_plans(LABELS)[:1], "2d", 0, dataset_json, torch.device("cpu"))
    assert trainer.num_iterations_per_epoch == stock.num_iterations_per_epoch


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"mse": torch.ones((), requires_grad=True), "x": torch.ones((), requires_grad=True)}, "computes x, but term_"),
        ({"mse": torch.ones(())}, "computes mse without a gradient: no network would learn from it"),
    ],
)
def test_term_that_would_be_lost_is_refused(groups, monkeypatch, terms, sentence):
    trainer = initialized(LABELS, "2d")
    monkeypatch.setattr(trainer, "unsupervised_terms", lambda outputs, targets: terms)
    (batch,) = draw_batches(trainer, 1)
    with pytest.raises(ValueError, match=sentence):
        trainer.train_step(batch)


@pytest.mark.parametrize("name", ["asc_wieght", "epochs", "two_pass"])
def test_hyper_parameter_that_nobody_reads_is_refused(groups, results, name):
    members = {name: 1, "num_epochs": 3, "mse_weight": 0.5, "network_trainer": nnUNetTrainerOtherHooks}
    own = type("nnUNetTrainerOwn", (nnUNetTrainerSemiCML,), members)
    with pytest.raises(AttributeError, match=f"nnUNetTrainerOwn sets {name}, which no trainer that it is made of has"):
        make_trainer(LABELS, "2d", own)
    assert not list(results.iterdir())
    members = {name: 1, "learners": lambda self: self.trainers[: getattr(self, name)]}
    make_trainer(LABELS, "2d", type("nnUNetTrainerOwn", (nnUNetTrainerSemiCML,), members))  # has code that reads it


# schedules


def test_first_stage_without_schedules_of_its_own_is_refused():
    """Else the second stage in 50 epochs would go on from another trainer's."""
    first = type("nnUNetTrainerFirst", (nnUNetTrainerSemiCML,), {"asc_weight": 0.1})
    second = type("nnUNetTrainerSecond", (semicml_trainers.nnUNetTrainerSemiCMLPReL,), {"first_stage": first})
    with pytest.raises(TypeError, match="Decorate nnUNetTrainerFirst, the first stage of nnUNetTrainerSecond"):
        with_schedules(second)


@pytest.mark.parametrize("name", sorted(semicml_trainers.__all__))
def test_offered_trainer_can_be_found_and_pickled(name):
    trainer_class = getattr(semicml_trainers, name)
    assert trainer_class.__name__ == name
    assert pickle.loads(pickle.dumps(trainer_class)) is trainer_class
    base, _, epochs = name.partition("_")
    default = 600 if base.endswith("PReL") else 1000
    assert trainer_class.num_epochs == (int(epochs.removesuffix("epochs")) if epochs else default)
    assert issubclass(trainer_class, getattr(semicml_trainers, base))
    if hasattr(trainer_class, "first_stage"):
        assert trainer_class.first_stage.__name__ == name.replace("PReL", "")
    assert {f"{base}_{n}epochs" for n in (5, 50, 250)} | {base} <= set(semicml_trainers.__all__)


def test_schedules_reach_the_modality_trainers(groups):
    plans, dataset_json = load_plans(LABELS)
    trainer = semicml_trainers.nnUNetTrainerSemiCML_50epochs(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    assert [t.num_epochs for t in trainer.trainers] == [50] * 2
    assert [t.lr_scheduler.max_steps for t in trainer.trainers] == [50] * 2


def test_the_log_is_moved_by_the_process_that_writes_it(groups, tmp_path):
    """Where one modality is trained; other processes that move it, too, would end with FileNotFoundError, or not."""
    trainer = make_trainer("Dataset501_Labels_FLAIR", "2d", nnUNetTrainerMeanTeacher)
    for rank, moved in ((1, False), (0, True)):
        begun = tmp_path / "training_log_begun.txt"
        begun.write_text("begun")
        trainer.local_rank, trainer.log_file = rank, str(begun)
        trainer._move_log_file()
        assert Path(trainer.log_file).parent == Path(trainer.output_folder)
        assert begun.exists() != moved
        assert Path(trainer.log_file).exists() == moved
