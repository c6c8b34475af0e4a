"""The proofs of DESIGN 8 for Semi-CML, in this process."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    SETTINGS,
    Killed,
    KilledMixin,
    assert_identical,
    assert_labels_of_unlabeled_cases_change_nothing,
    assert_same_weights,
    assert_step_equals_reference,
    draw_batches,
    final_checkpoint,
    initialized,
    labeled_of,
    load_plans,
    make_trainer,
    nnUNetTrainerWithDropout,
    unsupervised_terms,
    weights,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import (
    nnUNetTrainerSemiCML,
    nnUNetTrainerSemiCML_5epochs,
    nnUNetTrainerSemiCML_50epochs,
    nnUNetTrainerSemiCML_250epochs,
)


class nnUNetTrainerSemiCMLWithDropout(nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerWithDropout


# proof 1


@pytest.mark.parametrize("term", ["asc", "mse"])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_unsupervised_gradient_reaches_every_weight_of_every_network(groups, dataset, configuration, term):
    trainer = initialized(dataset, configuration)
    (batch,) = draw_batches(trainer, 1)
    unsupervised_terms(trainer, batch)[term].backward()
    for t in trainer.trainers:
        # the lower deep-supervision heads do not see unlabeled cases
        untouched = [n for n, p in t.network.named_parameters() if p.grad is None or not p.grad.any()]
        heads = len(t.network.decoder.seg_layers) - 1
        assert all(".seg_layers." in name for name in untouched)
        assert len(untouched) == 2 * heads


# proof 3


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_without_unsupervised_weight_every_step_is_that_of_the_stock_trainer(groups, dataset, configuration, two_pass):
    trainer = initialized(dataset, configuration, asc_weight=0.0, mse_weight=0.0, two_pass=two_pass)
    stock = []
    for modality, own in zip(groups[dataset].modalities, trainer.trainers, strict=True):
        plans, dataset_json = load_plans(modality.dataset_name)
        reference = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        reference.initialize()
        reference.network.load_state_dict(own.network.state_dict())
        stock.append(reference)
    for batch in draw_batches(trainer, 3):
        separate = labeled_of(batch)
        losses = trainer.train_step(batch)["supervised"]
        assert list(separate) == list(losses) == [modality.name for modality in groups[dataset].modalities]
        for reference, (data, target), loss in zip(stock, separate.values(), losses.values(), strict=True):
            assert reference.train_step({"data": data, "target": target})["loss"] == loss
    assert_same_weights(weights(trainer), [t.network.state_dict() for t in stock])


def test_unsupervised_weight_changes_the_step(groups):
    """The counterpart: the equality above is not that of a dead term."""
    with_terms, without = (
        initialized(LABELS, "2d", asc_weight=w, mse_weight=w, rampup_fraction=0.0) for w in (1.0, 0.0)
    )
    (batch,) = draw_batches(with_terms, 1)
    for trainer in (with_terms, without):
        trainer.train_step(batch)
    for a, b in zip(weights(with_terms), weights(without), strict=True):
        assert not all(torch.equal(a[k], b[k]) for k in a)


def test_weights_are_ramped(groups):
    trainer = initialized(LABELS, "2d", num_epochs=10)
    ramp = []
    for trainer.current_epoch in range(10):
        values = trainer.unsupervised_weights()
        ramp.append(values["asc"])
        assert values["mse"] / values["asc"] == pytest.approx(1.0 / 0.35)
    assert ramp[0] == pytest.approx(0.35 * np.exp(-5))
    assert ramp == sorted(ramp)
    assert ramp[4:] == [0.35] * 6


# proof 4


class nnUNetTrainerSemiCMLKilled(KilledMixin, nnUNetTrainerSemiCML):
    pass


def test_resumed_training_equals_uninterrupted_training(groups, tmp_path, monkeypatch):
    schedule = {"num_epochs": 4, "save_every": 2}
    monkeypatch.setenv("nnUNet_semicml_seed", "3")

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, **schedule, kill_at=-1)
    whole.run_training()

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "parts"))
    killed = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, **schedule)
    with pytest.raises(Killed):
        killed.run_training()
    monkeypatch.setenv("nnUNet_semicml_seed", "4")  # must not matter any more
    resumed = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, **schedule, kill_at=-1)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 2
    resumed.run_training()

    assert_same_weights(weights(whole), weights(resumed))
    final = [final_checkpoint(trainer) for trainer in (whole, resumed)]
    assert len(final[0]["logging"]["unsupervised/asc"]) == 4
    assert_identical(*final)


def test_latest_checkpoint_knows_that_its_epoch_is_the_best(groups):
    """nnU-Net notes a new best epoch only after it has saved checkpoint_latest."""
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, save_every=1, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    latest = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=True)
    states = [latest, *latest["modalities"].values()]
    assert [state["_best_ema"] for state in states] == [state["logging"]["ema_fg_dice"][0] for state in states]


# proof 5


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_whole_training_runs_and_learns(groups, dataset, configuration, two_pass):
    trainer = initialized(dataset, configuration, two_pass=two_pass)
    before = weights(trainer)
    trainer.run_training()
    log = trainer.logger.get_checkpoint()
    for term in ("asc", "mse"):
        assert len(log[f"unsupervised/{term}"]) == len(log[f"weight/{term}"]) == 2
        assert np.isfinite(log[f"unsupervised/{term}"]).all()
        assert np.min(log[f"unsupervised/{term}"]) > 0
    for old, new in zip(before, weights(trainer), strict=True):
        assert not all(torch.equal(old[k], new[k]) for k in old)
    for t in trainer.trainers:
        assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= {f.name for f in Path(t.output_folder).iterdir()}
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {
            f.name for f in Path(t.output_folder_base).iterdir()
        }
    assert {"checkpoint_final.pth", "unsupervised_terms.png"} <= {f.name for f in Path(trainer.output_folder).iterdir()}


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


@pytest.mark.parametrize(
    ("trainer_class", "epochs"),
    [
        (nnUNetTrainerSemiCML_5epochs, 5),
        (nnUNetTrainerSemiCML_50epochs, 50),
        (nnUNetTrainerSemiCML_250epochs, 250),
    ],
)
def test_schedules_reach_the_modality_trainers(groups, trainer_class, epochs):
    plans, dataset_json = load_plans(LABELS)
    trainer = trainer_class(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    assert [t.num_epochs for t in trainer.trainers] == [epochs] * 2
    assert [t.lr_scheduler.max_steps for t in trainer.trainers] == [epochs] * 2


# proof 6


def test_labels_of_unlabeled_cases_change_nothing(groups, copy_of_labels):
    assert_labels_of_unlabeled_cases_change_nothing(lambda: initialized(LABELS, "2d", rampup_fraction=0.0))


# proof 8


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerSemiCML, nnUNetTrainerSemiCMLWithDropout])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_step_gives_the_gradients_of_the_formula(groups, dataset, configuration, trainer_class):
    trainer = initialized(dataset, configuration, trainer_class, rampup_fraction=0.0)
    (batch,) = draw_batches(trainer, 1)
    dropout = [m for t in trainer.trainers for m in t.network.modules() if isinstance(m, nn.Dropout2d | nn.Dropout3d)]
    assert bool(dropout) == (trainer_class is nnUNetTrainerSemiCMLWithDropout)
    assert_step_equals_reference(trainer, batch)


# what is refused


def test_cascade_is_refused(groups):
    plans, dataset_json = load_plans(LABELS)
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(NotImplementedError, match="does not support the cascade"):
        nnUNetTrainerSemiCML(plans, "3d_cascade_fullres", 0, dataset_json, torch.device("cpu"))


def test_wandb_is_refused(groups, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    with pytest.raises(NotImplementedError, match="unset nnUNet_wandb_enabled"):
        make_trainer(LABELS, "2d")


def test_pretrained_weights_are_refused(groups):
    with pytest.raises(NotImplementedError, match="leave out -pretrained_weights"):
        make_trainer(LABELS, "2d").network.state_dict()


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
    with pytest.raises(RuntimeError, match=r"checkpoint_latest.pth: found a file that cannot be read as a checkpoint"):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


def test_checkpoint_of_a_stock_trainer_is_refused(finished, results, tmp_path):
    stock = copy.deepcopy(torch.load(finished, weights_only=True))
    del stock["provenance"]
    torch.save(stock, tmp_path / "checkpoint_final.pth")
    with pytest.raises(RuntimeError, match="cannot be read as a checkpoint"):
        make_trainer(LABELS, "2d").load_checkpoint(str(tmp_path / "checkpoint_final.pth"))
