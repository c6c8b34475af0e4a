"""The proofs of docs/design.md for every method of one stage, from one table, in this process; their terms: test_terms.

A new method is a row of METHODS. The second stage, PReL: test_prel.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHANNELS,
    INCOMPLETE,
    LABELS,
    REGIONS,
    Killed,
    KilledMixin,
    assert_close_gradients,
    assert_identical,
    assert_labels_of_unlabeled_cases_change_nothing,
    assert_same_weights,
    assert_step_equals_reference,
    draw_batches,
    final_checkpoint,
    gradients,
    initialized,
    labeled_of,
    load_plans,
    make_trainer,
    nnUNetTrainerCompiled,
    nnUNetTrainerWithDropout,
    reference_gradients,
    step_gradients,
    unsupervised_terms,
    weights,
    with_something_seen,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.trainers.nnUNetTrainerBCP import nnUNetTrainerBCP
from nnunetv2_semicml.trainers.nnUNetTrainerBCPPlus import nnUNetTrainerBCPPlus
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerFilterMatch import nnUNetTrainerFilterMatch
from nnunetv2_semicml.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"


def output_seen(trainer, t):
    """What the gradient of a term on logits reaches: all but the coarse heads of deep supervision."""
    last = len(t.network.decoder.seg_layers) - 1
    return {
        name for name, _ in t.network.named_parameters() if ".seg_layers." not in name or f".seg_layers.{last}." in name
    }


def encoder_seen(trainer, t):
    """What that of a term on features reaches."""
    stages = range(trainer.students[t.name].stage + 1)
    return {n for n, _ in t.network.named_parameters() if any(n.startswith(f"encoder.stages.{s}.") for s in stages)}


@dataclass(frozen=True)
class Row:
    """A method in the tests.

    Attributes:
        method: its trainer.
        reached: which weights of a network each of its terms reaches.
        attributes: with which every part of it is switched on.
        stock: with which, beside weights of 0 for all terms, it learns from nothing but nnU-Net's labeled batch.
    """

    method: type
    reached: Callable = output_seen
    attributes: dict = field(default_factory=dict)
    stock: dict = field(default_factory=dict)


UNMIXED = {"supervised_weight_after_warmup": None, "box_side": 0.0}
METHODS = [
    Row(nnUNetTrainerMeanTeacher),
    Row(nnUNetTrainerUAMT),
    Row(nnUNetTrainerCPS),
    Row(nnUNetTrainerCrossModalCPS),
    Row(nnUNetTrainerSemiCML),
    Row(nnUNetTrainerSemiCMLPlus, stock=UNMIXED),
    Row(nnUNetTrainerSECLRegion, encoder_seen),
    Row(nnUNetTrainerSECLAnatomical, encoder_seen),
    Row(nnUNetTrainerBCP, stock=UNMIXED),
    Row(nnUNetTrainerBCPPlus, stock=UNMIXED),
    Row(nnUNetTrainerCrossModalBCP, stock=UNMIXED),
    Row(nnUNetTrainerFixMatch),
    Row(nnUNetTrainerUniMatch),
    Row(nnUNetTrainerFilterMatch, stock={"warmup_fraction": 1.0}),
]
ALONE = [(LABELS, "2d"), (LABELS, "3d_fullres"), (REGIONS, "3d_fullres"), *INCOMPLETE]
SETTINGS = [
    pytest.param(row, dataset, configuration, id=f"{row.method.__name__}-{dataset}-{configuration}")
    for row in METHODS
    for dataset, configuration in (
        ALONE
        if row.method.min_modalities > 1
        else [(FLAIR, "2d"), (FLAIR, "3d_fullres"), (REGIONS_T1, "3d_fullres"), (CHANNELS, "2d")]
    )
]
FIRST = [p for p in SETTINGS if p.values[2] == "2d" and p.values[1] in (LABELS, FLAIR)]  # one of each method
ONE_MODALITY = [row.method for row in METHODS if row.method.min_modalities == 1]
pytestmark = pytest.mark.usefixtures("groups")
each_setting = pytest.mark.parametrize(("row", "dataset", "configuration"), SETTINGS)
each_method = pytest.mark.parametrize(("row", "dataset", "configuration"), FIRST)


def all_weights(method, value):
    return dict.fromkeys(method.term_weights.values(), value)


def test_every_offered_method_is_in_the_table():
    """Or is a second stage, or has no terms."""
    offered = {getattr(semicml_trainers, name) for name in semicml_trainers.__all__ if not name.endswith("epochs")}
    proven = {row.method for row in METHODS} | {nnUNetTrainerSupervisedEMA}
    assert {m for m in offered if not hasattr(m, "first_stage")} == proven


# proof 1


@each_setting
def test_unsupervised_gradient_reaches_the_networks_and_no_teacher(row, dataset, configuration):
    trainer = with_something_seen(
        initialized(dataset, configuration, row.method, rampup_fraction=0.0, **row.attributes)
    )
    (batch,) = draw_batches(trainer, 1)
    terms = unsupervised_terms(trainer, batch)
    assert terms.keys() == trainer.unsupervised_weights().keys()
    for term in terms.values():
        for t in trainer.trainers:
            t.optimizer.zero_grad()
        term.backward(retain_graph=True)
        for t in trainer.trainers:
            moved = {n for n, p in t.network.named_parameters() if p.grad is not None and p.grad.any()}
            assert moved == row.reached(trainer, t)
            # what a method has added to the network, such as a projection head, is in its optimizer, too
            own, student = ({id(p) for p in m.parameters()} for m in (t.network, trainer.student(t)))
            assert {id(p) for group in t.optimizer.param_groups for p in group["params"]} == own | student
            assert all(p.grad is not None and p.grad.any() for p in t.trained_parameters() if id(p) not in own)
    for teacher in trainer.teachers.values():
        assert not any(p.requires_grad or p.grad is not None for p in teacher.network.parameters())


# proof 2


@pytest.mark.parametrize("row", [row for row in METHODS if row.method.teacher_averaging == "ema"])
def test_teacher_follows_its_closed_form(row):
    trainer = initialized(LABELS, "2d", row.method, ema_decay=0.7)
    expected = {t.name: [p.clone() for p in trainer.student(t).parameters()] for t in trainer.trainers}
    students = []
    for batch in draw_batches(trainer, 4):
        trainer.train_step(batch)
        students.append({t.name: [p.clone() for p in trainer.student(t).parameters()] for t in trainer.trainers})
    for keep, student in zip((1 / 2, 2 / 3, 0.7, 0.7), students, strict=True):  # min(1 - 1 / (t + 1), 0.7)
        for name in expected:
            expected[name] = [keep * e + (1 - keep) * s for e, s in zip(expected[name], student[name], strict=True)]
    for name in expected:
        teacher = list(trainer.teachers[name].network.parameters())
        torch.testing.assert_close(teacher, expected[name])
        assert any(not torch.equal(a, b) for a, b in zip(teacher, students[-1][name], strict=True))


# proof 3


@pytest.mark.parametrize("recompute", [False, True])
@each_setting
def test_without_unsupervised_weight_every_step_is_that_of_the_stock_trainer(row, dataset, configuration, recompute):
    off = {**row.attributes, **all_weights(row.method, 0.0), **row.stock}
    assert_steps_of_the_stock_trainer(initialized(dataset, configuration, row.method, recompute=recompute, **off))


class nnUNetTrainerSteep(nnUNetTrainer):
    """A loss whose gradients have to be clipped."""

    def _build_loss(self):
        loss = super()._build_loss()
        return lambda output, target: 1000 * loss(output, target)


@pytest.mark.parametrize("method", [nnUNetTrainerSemiCML, nnUNetTrainerCPS])
def test_gradients_are_clipped_as_by_the_stock_trainer(method):
    own = type(method.__name__, (method,), {"network_trainer": nnUNetTrainerSteep})
    trainer = initialized(LABELS, "2d", own, **all_weights(method, 0.0))
    (batch,) = draw_batches(trainer, 1)
    for of_network in step_gradients(trainer, batch)[1]:
        assert torch.stack([g.norm() for g in of_network]).norm() > 2 * 12
    assert_steps_of_the_stock_trainer(trainer, nnUNetTrainerSteep)


def assert_steps_of_the_stock_trainer(trainer, stock_trainer=nnUNetTrainer):
    """In three steps."""
    stock = []
    for own in trainer.trainers:
        plans, dataset_json = load_plans(own.modality.dataset_name)
        reference = stock_trainer(plans, trainer.configuration_name, 0, dataset_json, torch.device("cpu"))
        reference.initialize()
        reference.network.load_state_dict(own.network.state_dict())
        stock.append(reference)
    for batch in draw_batches(trainer, 3):
        separate = labeled_of(batch)
        losses = trainer.train_step(batch)["supervised"]
        assert list(losses) == [t.name for t in trainer.trainers]
        for own, reference, loss in zip(trainer.trainers, stock, losses.values(), strict=True):
            data, target = separate[own.name.split(" ")[0]]
            assert reference.train_step({"data": data, "target": target})["loss"] == loss
    assert_same_weights(weights(trainer), [t.network.state_dict() for t in stock])


@each_method
def test_unsupervised_weight_changes_the_step(row, dataset, configuration):
    """The counterpart: the equality above is not that of a dead term."""
    on, off = all_weights(row.method, 1.0), {**all_weights(row.method, 0.0), **row.stock}
    trainers = [
        with_something_seen(initialized(dataset, configuration, row.method, rampup_fraction=0.0, **weighted))
        for weighted in (on, off)
    ]
    (batch,) = draw_batches(trainers[0], 1)
    for trainer in trainers:
        trainer.train_step(batch)
    for a, b in zip(*map(weights, trainers), strict=True):
        assert not all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("row", "dataset", "configuration"), [p for p in FIRST if p.values[0].method.term_weights])
def test_weights_are_ramped(row, dataset, configuration, warmup):
    full = all_weights(row.method, 0.7)
    schedule = {"num_epochs": 10, "rampup_fraction": 0.4, "warmup_fraction": warmup / 10}
    trainer = initialized(dataset, configuration, row.method, **schedule, **full)
    ramp = []
    for trainer.current_epoch in range(10):
        (value,) = set(trainer.unsupervised_weights().values())
        ramp.append(value / 0.7)
    rising = [np.exp(-5 * (1 - min(e / 4, 1)) ** 2) for e in range(10 - warmup)]
    assert ramp == pytest.approx([0.0] * warmup + rising)


def test_every_term_has_its_own_weight():
    """Every attribute of `term_weights` moves its terms and no others."""
    for row in METHODS:
        trainer = initialized(LABELS, "2d", row.method, rampup_fraction=0.0)
        for attribute in {*row.method.term_weights.values()}:
            for name in {*row.method.term_weights.values()}:
                setattr(trainer, name, 3.0 if name == attribute else 2.0)
            expected = {term: 3.0 if a == attribute else 2.0 for term, a in row.method.term_weights.items()}
            assert trainer.unsupervised_weights() == expected


# proof 4


@each_method
def test_resumed_training_equals_uninterrupted_training(row, dataset, configuration, tmp_path, monkeypatch):
    schedule = {"num_epochs": 3, "save_every": 2}
    assert_resumes(row.method, dataset, configuration, tmp_path, monkeypatch, **schedule, **row.attributes)


def assert_resumes(method, dataset, configuration, tmp_path, monkeypatch, **attributes):
    """Interrupted after two epochs."""
    killable = type(method.__name__, (KilledMixin, method), {})
    monkeypatch.setenv("nnUNet_semicml_seed", "3")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = make_trainer(dataset, configuration, killable, **attributes, kill_at=-1)
    whole.run_training()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "parts"))
    killed = make_trainer(dataset, configuration, killable, **attributes)
    with pytest.raises(Killed):
        killed.run_training()
    monkeypatch.setenv("nnUNet_semicml_seed", "4")  # must not matter any more
    resumed = make_trainer(dataset, configuration, killable, **attributes, kill_at=-1)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert_same_weights(weights(whole), weights(resumed))
    assert_identical(*(final_checkpoint(trainer) for trainer in (whole, resumed)))


# proof 5, and deployment


@each_setting
def test_whole_training_runs_and_deploys_a_stock_model(row, dataset, configuration):
    method = row.method
    trainer = initialized(dataset, configuration, method, **row.attributes)
    before = weights(trainer)
    trainer.run_training()
    for old, new in zip(before, weights(trainer), strict=True):
        assert not all(torch.equal(old[k], new[k]) for k in old)
    log = trainer.logger.get_checkpoint()
    for term in trainer.unsupervised_weights():
        assert np.isfinite(log[f"unsupervised/{term}"]).all()
        assert len(log[f"weight/{term}"]) == 2
    assert {"checkpoint_final.pth", "unsupervised_terms.png"} <= {f.name for f in Path(trainer.output_folder).iterdir()}
    deployed = [t for t in trainer.trainers if t.deployed]
    assert [t.modality for t in deployed] == trainer.group.modalities
    for t in deployed:
        folder = Path(t.output_folder)
        assert folder.parts[-2:] == (f"{method.__name__}__nnUNetPlans__{configuration}", "fold_0")
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {f.name for f in folder.parent.iterdir()}
        assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= {f.name for f in folder.iterdir()}
        checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert checkpoint["provenance"]["trainer"] == method.__name__
        plans, dataset_json = load_plans(t.modality.dataset_name)
        stock = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        stock.network.load_state_dict(checkpoint["network_weights"])  # no projection head, nothing is missing
        student = t.network.state_dict()
        if method.deploy_average:
            expected = trainer.teachers[t.name].network.state_dict()
            assert not all(torch.equal(expected[k], student[k]) for k in student)
        else:
            expected = student
        assert_same_weights([checkpoint["network_weights"]], [expected])
    assert len(list(Path(deployed[0].output_folder).glob("training_log*"))) == 1


@pytest.mark.parametrize("recompute", [True])
@pytest.mark.parametrize(("dataset", "configuration"), ALONE)
def test_whole_training_runs_with_recomputed_activations(dataset, configuration, recompute):
    trainer = initialized(dataset, configuration, nnUNetTrainerSemiCML, recompute=recompute)
    trainer.run_training()
    assert np.min(trainer.logger.get_checkpoint()["unsupervised/asc"]) > 0


def test_training_state_lies_beside_the_model():
    """A modality dataset has one result folder, in which nnU-Net looks for the checkpoints of both."""
    trainer = initialized(FLAIR, "2d", nnUNetTrainerCPS)
    (first, second), folder = trainer.trainers, Path(trainer.output_folder)
    assert folder == Path(first.output_folder) / "training_state"
    assert Path(second.output_folder) == folder / "FLAIR_network_2"
    assert not second.deployed
    trainer.run_training()
    assert not list(Path(second.output_folder).glob("*.pth"))
    assert (Path(second.output_folder) / "progress.png").exists() is False  # switched off in these tests
    trainer.perform_actual_validation()
    assert (Path(first.output_folder) / "validation" / "summary.json").is_file()
    assert not (Path(second.output_folder) / "validation").exists()


@pytest.mark.parametrize("method", ONE_MODALITY)
def test_method_for_one_modality_trains_all_of_a_group(method):
    """As many independent trainings in one, each deployed with its modality."""
    trainer = initialized(LABELS, "2d", method)
    trainer.run_training()
    for dataset in (FLAIR, "Dataset502_Labels_T1"):
        folder = Path(trainer.trainers[0].output_folder).parents[2] / dataset
        assert (folder / f"{method.__name__}__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth").is_file()
    assert Path(trainer.output_folder).parts[-3] == LABELS


# an averaged network in any method, and the supervised reference


@pytest.mark.parametrize("method", [*(row.method for row in METHODS), nnUNetTrainerSupervisedEMA])
def test_averaged_network_of_any_method_is_deployed(method):
    changes = {"teacher_averaging": "ema", "deploy_average": True}
    trainer = initialized(LABELS, "2d", method, **changes)
    trainer.run_training()
    for t in (t for t in trainer.trainers if t.deployed):
        checkpoint = torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)
        own, student = checkpoint["network_weights"], t.network.state_dict()
        assert own.keys() == student.keys()
        assert not all(torch.equal(own[k], student[k]) for k in student)
        averaged = dict(trainer.averaged_network(t.name).named_parameters())
        assert all(torch.equal(own[k], averaged[k]) for k in averaged)


def test_deployed_average_is_what_validation_sees():
    """Every epoch and after training; the student comes back unchanged."""
    trainer = initialized(FLAIR, "2d", nnUNetTrainerMeanTeacher)
    (t,) = trainer.trainers
    trainer.teachers[t.name].average(perturbed(t.network), 0.5)
    student, teacher = copy.deepcopy(t.network.state_dict()), copy.deepcopy(t.averaged_network.state_dict())
    assert not all(torch.equal(student[k], teacher[k]) for k in student)
    trainer.on_validation_epoch_start()
    assert_same_weights([t.network.state_dict()], [teacher])
    _, loader = trainer.get_dataloaders()
    outputs = [trainer.validation_step(next(loader))]
    trainer.on_validation_epoch_end(outputs)
    assert_same_weights([t.network.state_dict(), t.averaged_network.state_dict()], [student, teacher])


def perturbed(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


def test_best_model_average_is_not_deployed():
    with pytest.raises(ValueError, match='for deploy_average set teacher_averaging to "ema"'):
        initialized(LABELS, "2d", nnUNetTrainerSemiCML, deploy_average=True)


@pytest.mark.parametrize("dataset", [LABELS, FLAIR])
def test_supervised_reference_is_the_stock_training(dataset):
    """Proof 3 without any switch: nothing unlabeled is even drawn."""
    trainer = initialized(dataset, "2d", nnUNetTrainerSupervisedEMA)
    assert_steps_of_the_stock_trainer(trainer)
    (batch,) = draw_batches(trainer, 1)
    assert batch["unlabeled"] == []
    trainer.run_training()
    assert not (Path(trainer.output_folder) / "unsupervised_terms.png").exists()


# warm-up


@each_method
def test_warm_up_is_stock_training_and_teachers_start_from_it(row, dataset, configuration, tmp_path, monkeypatch):
    schedule = {"num_epochs": 4, "warmup_fraction": 0.5, "rampup_fraction": 0.0, "num_iterations_per_epoch": 1}
    trainer = initialized(dataset, configuration, row.method, **{**row.stock, **schedule})
    assert_steps_of_the_stock_trainer(trainer)  # with the weights of the method as they are
    trainer = initialized(dataset, configuration, row.method, **schedule, **row.attributes)
    snapshots = []
    end = trainer.on_train_epoch_end

    def record(outputs):
        assert bool(outputs[0]["unsupervised"]) == (trainer.current_epoch >= 2 and bool(row.method.term_weights))
        end(outputs)
        of_teachers = {n: [p.clone() for p in t.network.parameters()] for n, t in trainer.teachers.items()}
        of_students = {
            t.name: [p.clone() for p in trainer.student(t).parameters()] for t in trainer.trainers if trainer.teachers
        }
        snapshots.append((of_teachers, of_students))

    monkeypatch.setattr(trainer, "on_train_epoch_end", record)
    trainer.run_training()
    for epoch, (teachers, students) in enumerate(snapshots):
        for name in teachers:
            same = all(torch.equal(a, b) for a, b in zip(teachers[name], students[name], strict=True))
            assert same == (epoch < 2)
    if trainer.teacher_averaging == "ema":
        for name, teacher in trainer.teachers.items():
            assert teacher.steps == 2  # only those after the warm-up
            first, second = snapshots[1], snapshots[2]
            expected = [(a + b) / 2 for a, b in zip(first[0][name], second[1][name], strict=True)]  # t = 1 keeps 1/2
            torch.testing.assert_close(second[0][name], expected)
    log = trainer.logger.get_checkpoint()
    for term in trainer.unsupervised_weights():
        assert log[f"weight/{term}"][:2] == [0.0, 0.0]
        assert np.isnan(log[f"unsupervised/{term}"]).tolist() == [True, True, False, False]


def test_warm_up_resumes(tmp_path, monkeypatch):
    """At its end."""
    schedule = {"num_epochs": 4, "warmup_fraction": 0.5, "save_every": 2}
    assert_resumes(nnUNetTrainerMeanTeacher, FLAIR, "2d", tmp_path, monkeypatch, **schedule)


def test_warm_up_without_labels_is_refused():
    with pytest.raises(ValueError, match="warmup_fraction needs a supervised_weight"):
        initialized(LABELS, "2d", nnUNetTrainerSemiCML, warmup_fraction=0.5, supervised_weight=0.0)


# proof 6


@each_method
def test_labels_of_unlabeled_cases_change_nothing(row, dataset, configuration, copy_of_labels):
    assert_labels_of_unlabeled_cases_change_nothing(
        lambda: initialized(dataset, configuration, row.method, rampup_fraction=0.0, **row.attributes)
    )


# proof 8


@each_setting
def test_step_gives_the_gradients_of_the_formula(row, dataset, configuration):
    trainer = with_something_seen(
        initialized(dataset, configuration, row.method, rampup_fraction=0.0, **row.attributes)
    )
    (batch,) = draw_batches(trainer, 1)
    assert_step_equals_reference(trainer, batch)


@each_method
def test_step_with_dropout_gives_the_gradients_of_the_formula(row, dataset, configuration):
    trainer_class = type(row.method.__name__, (row.method,), {"network_trainer": nnUNetTrainerWithDropout})
    own = {"rampup_fraction": 0.0, "micro_batch_size": 8, **row.attributes}
    trainer = with_something_seen(initialized(dataset, configuration, trainer_class, **own))
    assert any("Dropout" in type(m).__name__ for m in trainer.trainers[0].network.modules())
    (batch,) = draw_batches(trainer, 1)
    assert_step_equals_reference(trainer, batch)


@pytest.mark.parametrize("method", [m for m in ONE_MODALITY if m is not nnUNetTrainerUniMatch])  # it drops at random
def test_micro_batches_give_the_gradients_of_the_formula(method):
    trainer = with_something_seen(initialized(FLAIR, "3d_fullres", method, rampup_fraction=0.0, unlabeled_batch_size=8))
    (batch,) = draw_batches(trainer, 1)
    for trainer.micro_batch_size in (3, 1):
        assert_step_equals_reference(trainer, batch, tolerance=2e-4)  # in float64 1e-6 would do
    seen = []
    for t in trainer.trainers:
        t.network.encoder.stages[0].register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    for trainer.micro_batch_size in (4, 3, 1):
        seen.clear()
        trainer.train_step(batch)
        assert max(seen) == trainer.micro_batch_size


@pytest.mark.parametrize("method", [nnUNetTrainerMeanTeacher, nnUNetTrainerSECLRegion, nnUNetTrainerSECLAnatomical])
def test_compiled_networks_and_teachers_learn_the_same(method, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    eager, compiled = (
        initialized(FLAIR, "2d", trainer_class, rampup_fraction=0.0)
        for trainer_class in (method, type(method.__name__, (method,), {"network_trainer": nnUNetTrainerCompiled}))
    )
    (t,) = compiled.trainers
    assert isinstance(t.network, OptimizedModule)
    assert isinstance(compiled.teachers["FLAIR"].predict, OptimizedModule)
    assert all(isinstance(student, OptimizedModule) for student in getattr(compiled, "_projected", {}).values())
    pair = [trainer.student(trainer.trainers[0]).parameters() for trainer in (compiled, eager)]
    with torch.no_grad():
        for own, reference in zip(*pair, strict=True):
            own.copy_(reference)
    for trainer in map(with_something_seen, (eager, compiled)):
        trainer.recompute = trainer is compiled
    (batch,) = draw_batches(eager, 1)
    torch.manual_seed(1)
    expected = reference_gradients(eager, batch)[1]
    torch.manual_seed(1)
    assert_close_gradients(expected, step_gradients(compiled, batch)[1])
    compiled.run_training()
    assert all(g.isfinite().all() for of_network in gradients(compiled) for g in of_network)
    assert "_orig_mod" not in str(compiled.get_method_state()["teachers"]["FLAIR"]["weights"].keys())
    assert "_orig_mod" not in str(t.get_state()["network_weights"].keys())


# refusals and what a checkpoint says


@pytest.mark.parametrize("method", [row.method for row in METHODS if row.method.min_modalities > 1])
def test_method_that_needs_two_modalities_refuses_one(method, results):
    with pytest.raises(NotImplementedError, match=r"needs at least 2 modalities, but .*modalities.json has 1"):
        make_trainer(FLAIR, "2d", method)
    assert not list(results.iterdir())


def test_dataset_without_unlabeled_cases_is_refused(results):
    """One that stock nnU-Net has preprocessed."""
    plans, dataset_json = load_plans(FLAIR)
    plans["dataset_name"] = "Dataset999_Stock"
    with pytest.raises(RuntimeError, match=r"Dataset999_Stock/modalities.json: found no such file"):
        nnUNetTrainerMeanTeacher(plans, "2d", 0, dataset_json, torch.device("cpu"))


@pytest.mark.parametrize("row", METHODS)
def test_teachers_are_kept_in_one_way(row):
    """Which a second stage reads."""
    trainer = initialized(LABELS, "2d", row.method, num_epochs=1)
    trainer.run_training()
    checkpoint = final_checkpoint(trainer)
    assert checkpoint["provenance"]["dataset"] == LABELS
    teachers = checkpoint["method"]["teachers"]
    assert teachers.keys() == ({t.name for t in trainer.trainers} if row.method.teacher_averaging else set())
    for name, state in teachers.items():
        assert state.keys() == {"weights", "steps", "best_dice"}
        assert state["steps"] == (2 if row.method.teacher_averaging == "ema" else 0)
        assert len(state["best_dice"]) <= 1
        (t,) = (t for t in trainer.trainers if t.name == name)
        assert state["weights"].keys() == t.network.state_dict().keys()
    deployed = json.loads((Path(trainer.trainers[0].output_folder).parent / "dataset.json").read_text())
    assert "dataset" not in deployed
