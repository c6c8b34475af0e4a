"""Training where cases lack modalities, and a modality has several channels: who learns from which cases.

The proofs of every trainer on such data are in the trainers' own tests (INCOMPLETE among their settings).
"""

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHANNELS,
    LABELS,
    LACKING_CHANNELS,
    LACKING_PATTERNS,
    PATTERNS,
    draw_batches,
    initialized,
    load_plans,
    make_trainer,
    unlabeled_outputs,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT

# dataset -> modality -> channels; number of labeled and unlabeled cases; what they lack
SETUPS = {
    CHANNELS: ({"MR": [0, 2], "T1": [1]}, (7, 5), LACKING_CHANNELS),
    PATTERNS: ({"FLAIR": [0], "T1": [1], "T2": [2]}, (7, 6), LACKING_PATTERNS),
}


def cases_with(dataset, kind, *modalities):
    """The cases that have all of these modalities, by the table from which files were deleted."""
    channels_of, numbers, lacking = SETUPS[dataset]
    prefix, number = {"labeled": ("tr", numbers[0]), "unlabeled": ("un", numbers[1])}[kind]
    needed = {channel for modality in modalities for channel in channels_of[modality]}
    name = dataset.split("_")[1].lower()
    cases = [f"{prefix}_{i:03d}" for i in range(number)]
    return {f"{name}_{case}" for case in cases if not needed & {*lacking.get(case, ())}}


def loaders(trainer):
    """Training loaders of labeled and unlabeled, and those of validation: [modalities], [cases] of each."""
    train, validation = trainer.get_dataloaders()
    found = {**train.data_loader.loaders, "validation": validation.data_loader.loaders["labeled"]}
    return {kind: [(list(own.channels), set(own.indices)) for own in of_kind] for kind, of_kind in found.items()}


@pytest.mark.parametrize("dataset", [CHANNELS, PATTERNS])
def test_every_network_trains_on_all_labeled_cases_that_have_its_modality(groups, dataset):
    trainer = initialized(dataset, "2d")
    found = loaders(trainer)["labeled"]
    folds = json.loads((Path(os.environ["nnUNet_preprocessed"]) / dataset / "splits_final.json").read_text())
    assert [names for names, _ in found] == [[modality] for modality in SETUPS[dataset][0]]
    for (modality,), cases in found:
        assert cases == cases_with(dataset, "labeled", modality) & {*folds[0]["train"]}
        plans, dataset_json = load_plans(next(m.dataset_name for m in groups[dataset].modalities if m.name == modality))
        stock = nnUNetTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        assert set(stock.do_split()[0]) == cases  # nnU-Net's own training on the modality dataset
    (batch,) = draw_batches(trainer, 1)
    for patches in batch["labeled"]:
        assert {len(image) for image in patches["images"].values()} == {trainer.configuration_manager.batch_size}


@pytest.mark.parametrize("dataset", [CHANNELS, PATTERNS])
def test_modalities_are_coupled_on_the_unlabeled_cases_that_have_both(groups, dataset):
    modalities = list(SETUPS[dataset][0])
    found = loaders(initialized(dataset, "2d"))["unlabeled"]
    assert [tuple(names) for names, _ in found] == list(combinations(modalities, 2))
    for names, cases in found:
        assert cases == cases_with(dataset, "unlabeled", *names)
        assert len(cases) >= 2


@pytest.mark.parametrize("dataset", [CHANNELS, PATTERNS])
def test_methods_for_one_modality_use_all_of_its_unlabeled_cases(groups, dataset):
    found = loaders(initialized(dataset, "2d", nnUNetTrainerMeanTeacher))["unlabeled"]
    assert [names for names, _ in found] == [[modality] for modality in SETUPS[dataset][0]]
    for (modality,), cases in found:
        assert cases == cases_with(dataset, "unlabeled", modality)


def test_a_pair_is_drawn_at_once_where_no_case_lacks_one(groups):
    found = loaders(initialized(LABELS, "2d"))["unlabeled"]
    assert found == [(["FLAIR", "T1"], set(groups[LABELS].unlabeled))]


def test_networks_are_validated_on_the_same_patches(groups):
    """Of the validation cases that have all modalities; the others, and those of training, show no patch."""
    folds = json.loads((Path(os.environ["nnUNet_preprocessed"]) / PATTERNS / "splits_final.json").read_text())
    assert len(folds) == 5
    for fold, cases_of_fold in enumerate(folds):
        ((names, cases),) = loaders(initialized(PATTERNS, "2d", fold=fold))["validation"]
        assert names == ["FLAIR", "T1", "T2"]
        assert cases == cases_with(PATTERNS, "labeled", *names) & {*cases_of_fold["val"]}


def test_fold_without_complete_validation_case_validates_each_by_itself_and_says_so(groups, capsys):
    trainer = initialized(CHANNELS, "2d")
    own = {"MR": ["channels_tr_000"], "T1": ["channels_tr_001"]}
    complete = sorted(cases_with(CHANNELS, "labeled", "MR", "T1"))
    for t in trainer.trainers:
        t.do_split = lambda name=t.name: (complete, own[name])
    found = loaders(trainer)["validation"]
    assert found == [(["MR"], {"channels_tr_000"}), (["T1"], {"channels_tr_001"})]
    assert "WARNING: no validation case has all modalities" in capsys.readouterr().out
    outputs = trainer.validation_step(next(trainer.get_dataloaders()[1]))
    assert [np.isfinite(o["loss"]) for o in outputs] == [True, True]


def test_random_split_that_would_differ_between_modalities_is_refused(groups):
    with pytest.raises(
        RuntimeError, match=r"splits_final.json: found 5 folds; expected fold 7, since nnU-Net's random"
    ):
        make_trainer(CHANNELS, "2d", fold=7)
    assert make_trainer(LABELS, "2d", fold=7)


def test_terms_are_means_over_the_pairs(groups):
    """By the formulas, pair by pair: mean squared error of Semi-CML, and that of every network with its teacher."""
    semicml = initialized(PATTERNS, "2d")
    (batch,) = draw_batches(semicml, 1)
    total = 0
    for patches, pair in zip(batch["unlabeled"], combinations(("FLAIR", "T1", "T2"), 2), strict=True):
        networks = {t.name: t.network for t in semicml.trainers}
        with torch.no_grad():
            a, b = (networks[name](patches["images"][name])[0].softmax(1)[:, 1:] for name in pair)
        total += ((a - b) ** 2).mean() / 3
    assert float(semicml.train_step(batch)["unsupervised"]["mse"]) == pytest.approx(float(total), rel=1e-4)

    alone = initialized(PATTERNS, "2d", nnUNetTrainerUAMT)
    (batch,) = draw_batches(alone, 1)
    terms = []
    for draw in alone.unlabeled_draws(batch):
        images = draw.images
        targets = {name: (torch.zeros(len(i), 3, *i.shape[2:]), i[:, :1] > 0) for name, i in images.items()}
        terms.append(alone.unsupervised_terms(unlabeled_outputs(alone, [images]), targets)["mse"])
    squares = []
    for t, patches in zip(alone.trainers, batch["unlabeled"], strict=True):
        image = patches["images"][t.name]
        with torch.no_grad():
            square = t.network(image)[0].softmax(1) ** 2
        squares.append(square[(image > 0).expand_as(square)].mean())
    found = float(torch.stack(terms).mean().detach())
    assert found == pytest.approx(float(sum(squares)), rel=1e-4)  # a sum over the networks


def test_networks_have_the_channels_of_their_modality(groups):
    trainer = initialized(CHANNELS, "3d_fullres")
    assert [t.num_input_channels for t in trainer.trainers] == [2, 1]
    (batch,) = draw_batches(trainer, 1)
    images = {name: image for patches in batch["labeled"] for name, image in patches["images"].items()}
    assert {name: image.shape[1] for name, image in images.items()} == {"MR": 2, "T1": 1}


def test_a_draw_has_at_least_two_cases(groups):
    """Which a contrast needs; as many as the plans say otherwise, unless the trainer says how many."""
    trainer = initialized(LABELS, "2d", nnUNetTrainerMeanTeacher)
    for planned, own, cases in ((1, None, 2), (3, None, 3), (3, 1, 1), (1, 5, 5)):
        trainer.configuration_manager.configuration["batch_size"] = planned
        trainer.unlabeled_batch_size = own
        assert trainer.cases_per_draw == cases


def test_how_many_cases_have_what_stands_in_the_log(groups):
    log = Path(initialized(PATTERNS, "2d").log_file).read_text()
    assert "7 labeled cases: 5 with FLAIR + T1 + T2, 1 with FLAIR + T1, 1 with T2" in log
    assert (
        "6 unlabeled cases: 1 with FLAIR + T1 + T2, 2 with FLAIR + T1, 1 with FLAIR + T2, 1 with T1 + T2, 1 with T1"
        in log
    )


def test_a_modality_of_several_channels_is_trained_by_itself(groups):
    """With all of its cases, those that lack the other modality among them."""
    modality = groups[CHANNELS].modalities[0]
    trainer = initialized(modality.dataset_name, "2d", nnUNetTrainerMeanTeacher, num_epochs=1)
    found = loaders(trainer)
    assert found["unlabeled"] == [(["MR"], cases_with(CHANNELS, "unlabeled", "MR"))]
    trainer.run_training()
    checkpoint = torch.load(Path(trainer.trainers[0].output_folder) / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["provenance"]["channels"] == ["FLAIR", "T2"]


# PReL


def test_prel_learns_from_the_cases_that_show_the_better_modality(groups):
    nnUNetTrainer_first = initialized(PATTERNS, "2d", num_epochs=1)
    nnUNetTrainer_first.run_training()
    trainer = initialized(PATTERNS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer._start_from_first_stage()
    trainer._set_labeler("T2", trainer.trainers[2].network.state_dict())
    found = loaders(trainer)["unlabeled"]
    assert found == [
        (["FLAIR", "T2"], cases_with(PATTERNS, "unlabeled", "FLAIR", "T2")),
        (["T1", "T2"], cases_with(PATTERNS, "unlabeled", "T1", "T2")),
    ]


def test_prel_refuses_to_choose_by_validation_without_foreground(groups, monkeypatch):
    first = initialized(LABELS, "2d", num_epochs=1)
    first.run_training()
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPReL)
    trainer._start_from_first_stage()  # some of the validation cases show foreground
    dataset_class = trainer.trainers[0].dataset_class
    load_case = dataset_class.load_case

    def without_foreground(self, identifier):
        *arrays, properties = load_case(self, identifier)
        return *arrays, {**properties, "class_locations": {1: [], 2: []}}

    monkeypatch.setattr(dataset_class, "load_case", without_foreground)
    with pytest.raises(
        RuntimeError, match=r"fold 0 of Dataset500_Labels: found no foreground in labels_tr_\d+; expected"
    ):
        trainer._start_from_first_stage()


# cases that come later


def test_other_cases_refuse_to_continue_and_not_to_validate(groups):
    first = initialized(LABELS, "2d", num_epochs=1)
    first.run_training()
    file = Path(first.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    for key, validates in (("cases", True), ("fold", False), ("plans", False)):
        changed = {**checkpoint, "provenance": {**checkpoint["provenance"], f"digest of {key}": "0123"}}
        torch.save(changed, file)
        trainer = make_trainer(LABELS, "2d", num_epochs=1)
        for trainer.continue_training in (True, False):
            if validates and not trainer.continue_training:
                trainer.load_checkpoint(str(file))
            else:
                sentence = f"found a checkpoint of other {key}; expected the same, since a run goes on as it began"
                with pytest.raises(RuntimeError, match=sentence):
                    trainer.load_checkpoint(str(file))


def test_too_few_cases_for_a_method_are_refused(groups, monkeypatch):
    load = ModalityGroup.load.__func__

    def with_one_unlabeled(cls, name):
        group = load(cls, name)
        for modality in group.modalities:
            while len(modality.unlabeled) > 1:
                modality.unlabeled.popitem()
        return group

    monkeypatch.setattr(ModalityGroup, "load", classmethod(with_one_unlabeled))
    monkeypatch.setattr(
        ModalityGroup, "require_ready", lambda self, plans, configuration: self.load_plans("nnUNetPlans")
    )
    flair = groups[LABELS].modalities[0].dataset_name
    for dataset, method in ((flair, nnUNetTrainerSECLRegion), (LABELS, nnUNetTrainerSemiCML)):
        with pytest.raises(
            RuntimeError, match=r"found 1 unlabeled cases with .*; expected at least 2, which nnUNetTrainer"
        ):
            make_trainer(dataset, "2d", method)
    assert make_trainer(flair, "2d", nnUNetTrainerMeanTeacher)


# what a user sees


def test_warnings_of_every_modality_reach_the_console(groups, capsys):
    trainer = initialized(LABELS, "2d")
    capsys.readouterr()
    trainer.trainers[1].print_to_log_file("WARNING: look here")
    trainer.trainers[1].print_to_log_file("only in the log")
    shown = capsys.readouterr().out
    assert "[T1] WARNING: look here" in shown
    assert "only in the log" not in shown
    assert "only in the log" in Path(trainer.trainers[1].log_file).read_text()


def test_network_that_rests_has_no_loss_that_is_nan(groups, capsys):
    first = initialized(LABELS, "2d", num_epochs=1)
    first.run_training()
    capsys.readouterr()
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=2, join_fraction=0.5)
    trainer.run_training()
    shown = capsys.readouterr().out
    logs = [Path(t.log_file).read_text() for t in trainer.trainers]
    better = [t.name for t in trainer.trainers].index(trainer.better_modality)
    assert "train_loss: none, since the network learned from no labeled patches in this epoch" in logs[better]
    assert "rests" not in logs[1 - better]
    assert not any("loss nan" in text for text in (shown, *logs))
