"""The proofs of DESIGN 8 for the methods beside Semi-CML and PReL, in this process. Losses alone: test_losses."""

import copy
import json
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
    nnUNetTrainerWithDropout,
    reference_gradients,
    step_gradients,
    unlabeled_outputs,
    unsupervised_terms,
    weights,
)
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch._dynamo import OptimizedModule

from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus, nnUNetTrainerSemiCMLPlusPReL
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"
SECL = [nnUNetTrainerSECLRegion, nnUNetTrainerSECLAnatomical]
SELF_ENSEMBLING = [nnUNetTrainerMeanTeacher, nnUNetTrainerUAMT, *SECL]
ALONE = [*SELF_ENSEMBLING, nnUNetTrainerCPS]  # need one modality
COUPLED = [nnUNetTrainerCrossModalCPS, nnUNetTrainerSemiCMLPlus]  # need two
METHODS = [*ALONE, *COUPLED]
WEIGHTS = {
    nnUNetTrainerMeanTeacher: ["consistency_weight"],
    nnUNetTrainerUAMT: ["consistency_weight"],
    nnUNetTrainerCPS: ["pseudo_label_weight"],
    nnUNetTrainerCrossModalCPS: ["pseudo_label_weight"],
    nnUNetTrainerSemiCMLPlus: ["pseudo_label_weight", "asc_weight"],
    nnUNetTrainerSECLRegion: ["contrast_weight"],
    nnUNetTrainerSECLAnatomical: ["contrast_weight"],
}
SETTINGS = [
    (method, dataset, configuration)
    for method in METHODS
    for dataset, configuration in (
        [(LABELS, "2d"), (LABELS, "3d_fullres"), (REGIONS, "3d_fullres"), *INCOMPLETE]
        if method in COUPLED
        else [(FLAIR, "2d"), (FLAIR, "3d_fullres"), (REGIONS_T1, "3d_fullres"), (CHANNELS, "2d")]
    )
]
FIRST = [(m, d, c) for m, d, c in SETTINGS if c == "2d" and d in (LABELS, FLAIR)]  # one of each method
pytestmark = pytest.mark.usefixtures("groups")
each_setting = pytest.mark.parametrize(("method", "dataset", "configuration"), SETTINGS)
each_method = pytest.mark.parametrize(("method", "dataset", "configuration"), FIRST)


def with_labels_seen(trainer):
    """Let the networks of a trainer segment something, so that there are classes to contrast and to agree on."""
    torch.manual_seed(7)
    for t in trainer.trainers:
        with torch.no_grad():
            t.network.decoder.seg_layers[-1].weight.mul_(20)
    for t in trainer.trainers:
        if hasattr(trainer, "student"):
            trainer.teachers[t.name].average(trainer.student(t), 0.0)
        elif hasattr(trainer, "teachers"):
            trainer.teachers[t.name].average(t.unwrapped_network(), 0.0)
    return trainer


# proof 1


@each_setting
def test_unsupervised_gradient_reaches_the_networks_and_no_teacher(method, dataset, configuration):
    trainer = with_labels_seen(initialized(dataset, configuration, method, rampup_fraction=0.0))
    (batch,) = draw_batches(trainer, 1)
    terms = unsupervised_terms(trainer, batch)
    assert terms.keys() == trainer.unsupervised_weights().keys()
    for term in terms.values():
        for t in trainer.trainers:
            t.optimizer.zero_grad()
        term.backward(retain_graph=True)
        for t in trainer.trainers:
            named = dict(t.network.named_parameters())
            moved = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
            if method in SECL:
                stage = trainer.students[t.name].stage
                seen = {n for n in named if any(n.startswith(f"encoder.stages.{s}.") for s in range(stage + 1))}
                assert moved == seen
                assert all(p.grad.any() for p in trainer.students[t.name].head.parameters())
            else:
                unseen = set(named) - moved
                assert all(".seg_layers." in n for n in unseen)  # the deep-supervision heads
                assert len(unseen) == 2 * (len(t.network.decoder.seg_layers) - 1)
    for teacher in getattr(trainer, "teachers", {}).values():
        assert not any(p.requires_grad or p.grad is not None for p in teacher.network.parameters())


# proof 2


@pytest.mark.parametrize("method", SELF_ENSEMBLING)
def test_teacher_follows_its_closed_form(method):
    trainer = initialized(FLAIR, "2d", method, ema_decay=0.7)
    (t,) = trainer.trainers
    students = []
    expected = [p.clone() for p in trainer.student(t).parameters()]
    for batch in draw_batches(trainer, 4):
        trainer.train_step(batch)
        students.append([p.clone() for p in trainer.student(t).parameters()])
    for keep, student in zip((1 / 2, 2 / 3, 0.7, 0.7), students, strict=True):  # min(1 - 1 / (t + 1), 0.7)
        expected = [keep * e + (1 - keep) * s for e, s in zip(expected, student, strict=True)]
    teacher = list(trainer.teachers[t.name].network.parameters())
    torch.testing.assert_close(teacher, expected)
    assert any(not torch.equal(a, b) for a, b in zip(teacher, students[-1], strict=True))


# proof 3


@pytest.mark.parametrize("two_pass", [False, True])
@each_setting
def test_without_unsupervised_weight_every_step_is_that_of_the_stock_trainer(method, dataset, configuration, two_pass):
    trainer = initialized(dataset, configuration, method, two_pass=two_pass, **dict.fromkeys(WEIGHTS[method], 0.0))
    stock = []
    for own in trainer.trainers:
        plans, dataset_json = load_plans(own.modality.dataset_name)
        reference = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        reference.initialize()
        reference.network.load_state_dict(own.network.state_dict())
        stock.append(reference)
    for batch in draw_batches(trainer, 2):
        separate = labeled_of(batch)
        losses = trainer.train_step(batch)["supervised"]
        for own, reference, loss in zip(trainer.trainers, stock, losses.values(), strict=True):
            data, target = separate[own.name.split(" ")[0]]
            assert reference.train_step({"data": data, "target": target})["loss"] == loss
    assert_same_weights(weights(trainer), [t.network.state_dict() for t in stock])


@each_method
def test_unsupervised_weight_changes_the_step(method, dataset, configuration):
    trainers = [
        with_labels_seen(
            initialized(dataset, configuration, method, rampup_fraction=0.0, **dict.fromkeys(WEIGHTS[method], w))
        )
        for w in (1.0, 0.0)
    ]
    (batch,) = draw_batches(trainers[0], 1)
    for trainer in trainers:
        trainer.train_step(batch)
    for a, b in zip(*map(weights, trainers), strict=True):
        assert not all(torch.equal(a[k], b[k]) for k in a)


@each_method
def test_weights_are_ramped(method, dataset, configuration):
    full = dict.fromkeys(WEIGHTS[method], 0.7)
    trainer = initialized(dataset, configuration, method, num_epochs=10, rampup_fraction=0.4, **full)
    ramp = []
    for trainer.current_epoch in range(10):
        (value,) = set(trainer.unsupervised_weights().values())
        ramp.append(value / 0.7)
    assert ramp == pytest.approx([np.exp(-5 * (1 - min(e / 4, 1)) ** 2) for e in range(10)])


# proof 4


@each_method
def test_resumed_training_equals_uninterrupted_training(method, dataset, configuration, tmp_path, monkeypatch):
    killable = type(method.__name__, (KilledMixin, method), {})
    schedule = {"num_epochs": 3, "save_every": 2}
    monkeypatch.setenv("nnUNet_semicml_seed", "3")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = make_trainer(dataset, configuration, killable, **schedule, kill_at=-1)
    whole.run_training()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "parts"))
    killed = make_trainer(dataset, configuration, killable, **schedule)
    with pytest.raises(Killed):
        killed.run_training()
    monkeypatch.setenv("nnUNet_semicml_seed", "4")  # must not matter any more
    resumed = make_trainer(dataset, configuration, killable, **schedule, kill_at=-1)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    assert_same_weights(weights(whole), weights(resumed))
    assert_identical(*(final_checkpoint(trainer) for trainer in (whole, resumed)))


# proof 5, and deployment


@each_setting
def test_whole_training_runs_and_deploys_a_stock_model(method, dataset, configuration):
    trainer = initialized(dataset, configuration, method)
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
        checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert checkpoint["provenance"]["trainer"] == method.__name__
        plans, dataset_json = load_plans(t.modality.dataset_name)
        stock = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        stock.network.load_state_dict(checkpoint["network_weights"])  # no projection head, nothing is missing
        student = t.network.state_dict()
        if method is nnUNetTrainerMeanTeacher:
            expected = trainer.teachers[t.name].network.state_dict()
            assert not all(torch.equal(expected[k], student[k]) for k in student)
        else:
            expected = student
        assert_same_weights([checkpoint["network_weights"]], [expected])
    assert len(list(Path(deployed[0].output_folder).glob("training_log*"))) == 1


def test_training_state_lies_beside_the_model(groups):
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


def test_deployed_teacher_is_what_validation_sees(groups):
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


@pytest.mark.parametrize("method", ALONE)
def test_method_for_one_modality_trains_all_of_a_group(method):
    """As many independent trainings in one, each deployed with its modality."""
    trainer = initialized(LABELS, "2d", method)
    trainer.run_training()
    for dataset in (FLAIR, "Dataset502_Labels_T1"):
        folder = Path(trainer.trainers[0].output_folder).parents[2] / dataset
        assert (folder / f"{method.__name__}__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth").is_file()
    assert Path(trainer.output_folder).parts[-3] == LABELS


# proof 6


@each_method
def test_labels_of_unlabeled_cases_change_nothing(method, dataset, configuration, copy_of_labels):
    assert_labels_of_unlabeled_cases_change_nothing(
        lambda: initialized(dataset, configuration, method, rampup_fraction=0.0)
    )


# proof 8


@each_setting
def test_step_gives_the_gradients_of_the_formula(method, dataset, configuration):
    trainer = with_labels_seen(initialized(dataset, configuration, method, rampup_fraction=0.0))
    (batch,) = draw_batches(trainer, 1)
    assert_step_equals_reference(trainer, batch)


@pytest.mark.parametrize("method", ALONE)
def test_step_with_dropout_gives_the_gradients_of_the_formula(method):
    trainer_class = type(method.__name__, (method,), {"network_trainer": nnUNetTrainerWithDropout})
    trainer = with_labels_seen(initialized(FLAIR, "2d", trainer_class, rampup_fraction=0.0))
    (batch,) = draw_batches(trainer, 1)
    assert_step_equals_reference(trainer, batch)


@pytest.mark.parametrize("method", ALONE)
def test_chunks_give_the_gradients_of_the_formula(method):
    trainer = with_labels_seen(initialized(FLAIR, "3d_fullres", method, rampup_fraction=0.0, unlabeled_batch_size=4))
    (batch,) = draw_batches(trainer, 1)
    for trainer.cases_per_pass in (3, 1):
        assert_step_equals_reference(trainer, batch)


# what the terms are


def test_mean_teacher_compares_with_probabilities_of_noisy_images(groups):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerMeanTeacher)
    (batch,) = draw_batches(trainer, 1)
    (images,) = trainer.unlabeled_images(batch)
    torch.manual_seed(1)
    targets = trainer.unsupervised_targets(images)
    torch.manual_seed(1)
    image = images["FLAIR"]
    noise = (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2) * image.std(dim=(1, 2, 3), keepdim=True)
    with torch.no_grad():
        expected = trainer.teachers["FLAIR"].network(image + noise).softmax(1)
    torch.testing.assert_close(targets["FLAIR"], expected)
    logits = torch.randn(*expected.shape)
    term = trainer.unsupervised_terms({"FLAIR": logits}, targets)["mse"]
    torch.testing.assert_close(term, ((logits.softmax(1) - expected) ** 2).mean())


@pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])
def test_uamt_leaves_out_what_its_teacher_is_uncertain_about(dataset, configuration):
    """By the formula: entropy of the mean of the passes below 3/4 … 1 of ln K, or of ln 2 for each region."""
    trainer = with_labels_seen(initialized(dataset, configuration, nnUNetTrainerUAMT, num_epochs=10))
    (batch,) = draw_batches(trainer, 1)
    (images,) = trainer.unlabeled_images(batch)
    ((name, teacher),) = trainer.teachers.items()
    shares = []
    for trainer.current_epoch in (0, 10):
        torch.manual_seed(1)
        prediction, certain = trainer.unsupervised_targets(images)[name]
        torch.manual_seed(1)
        passes = []
        with torch.no_grad():
            for _ in range(9):
                image = images[name]
                std = image.flatten(1).std(1).reshape(-1, *[1] * (image.ndim - 1))
                logits = teacher.network(image + std * (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2))
                passes.append(logits.sigmoid() if trainer.label_manager.has_regions else logits.softmax(1))
        p = torch.stack(passes[1:]).mean(0)
        if trainer.label_manager.has_regions:
            share = -(p * p.log() + (1 - p) * (1 - p).log()) / np.log(2)
        else:
            share = -(p * p.log()).sum(1, keepdim=True) / np.log(p.shape[1])
        threshold = 0.75 + 0.25 * np.exp(-5 * (1 - trainer.current_epoch / 10) ** 2)
        clear = (share - threshold).abs() > 1e-4
        torch.testing.assert_close(prediction, passes[0])
        assert torch.equal(certain[clear], (share < threshold)[clear])
        assert certain.shape == share.shape
        shares.append(certain.float().mean())
    assert shares[0] < shares[1]
    assert shares[0] > 0


@pytest.mark.parametrize(
    ("method", "dataset", "labelers"),
    [
        (nnUNetTrainerCrossModalCPS, LABELS, {"FLAIR": ["T1"], "T1": ["FLAIR"]}),
        (
            nnUNetTrainerCrossModalCPS,
            REGIONS,
            {"FLAIR": ["T1", "T2"], "T1": ["FLAIR", "T2"], "T2": ["FLAIR", "T1"]},
        ),
        (nnUNetTrainerCPS, FLAIR, {"FLAIR": ["FLAIR network 2"], "FLAIR network 2": ["FLAIR"]}),
        (
            nnUNetTrainerCPS,
            LABELS,
            {
                "FLAIR": ["FLAIR network 2"],
                "FLAIR network 2": ["FLAIR"],
                "T1": ["T1 network 2"],
                "T1 network 2": ["T1"],
            },
        ),
    ],
)
def test_cps_learns_from_the_segmentations_of_the_others(method, dataset, labelers):
    """Proof 7 for the sum: cross-entropy and Dice (squared areas) with what the others segment."""
    trainer = initialized(dataset, "3d_fullres", method)
    torch.manual_seed(0)
    heads, regions = trainer.label_manager.num_segmentation_heads, trainer.label_manager.has_regions
    outputs = {name: torch.randn(2, heads, 4, 4, 4) for name in labelers}
    assert [t.name for t in trainer.trainers] == list(labelers)
    ce = dice = 0
    for name, others in labelers.items():
        z = outputs[name]
        for other in others:
            if regions:
                label = (outputs[other] > 0).float()
                p, q = z.sigmoid(), label
                ce += -(label * p.log() + (1 - label) * (1 - p).log()).mean() / len(others)
            else:
                label = outputs[other].argmax(1)
                p = z.softmax(1)
                ce += -p.gather(1, label[:, None]).log().mean() / len(others)
                p, q = p[:, 1:], torch.stack([label == c for c in range(1, heads)], 1).float()
            axes = (0, 2, 3, 4) if trainer.configuration_manager.batch_dice else (2, 3, 4)
            overlap, areas = (p * q).sum(axes), (p * p).sum(axes) + (q * q).sum(axes)
            dice += (1 - ((2 * overlap + 1) / (areas + 1)).mean()) / len(others)
    found = trainer.unsupervised_terms(outputs, None)
    torch.testing.assert_close(found, {"ce": ce, "dice": dice})


@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_plus_is_cross_modal_cps_and_the_contrast_of_semicml(dataset, configuration):
    """Proof 7. Cases beyond the batch, which `asc_cases` adds, are contrasted and nothing else."""
    plus, cps, semicml = (
        initialized(dataset, configuration, method, asc_temperature=0.5, asc_cases=3, unlabeled_batch_size=2)
        for method in (nnUNetTrainerSemiCMLPlus, nnUNetTrainerCrossModalCPS, nnUNetTrainerSemiCML)
    )
    (batch,) = draw_batches(plus, 1)
    outputs = unlabeled_outputs(plus, *plus.unlabeled_images(batch))
    outputs = {name: torch.randn_like(logits) for name, logits in outputs.items()}
    assert {len(logits) for logits in outputs.values()} == {3}
    found = plus.unsupervised_terms(outputs, None)
    expected = cps.unsupervised_terms({name: logits[:2] for name, logits in outputs.items()}, None)
    torch.testing.assert_close(found, expected | {"asc": semicml.unsupervised_terms(outputs, None)["asc"]})
    assert not hasattr(plus, "mse_weight")


def test_prel_goes_on_from_plus(groups):
    first = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPlus)
    with pytest.raises(RuntimeError, match=r"nnUNetv2_train 500 2d 0 -tr nnUNetTrainerSemiCMLPlus -p"):
        make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPlusPReL)
    first.run_training()
    second = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPlusPReL, num_epochs=1)
    second.on_train_start()
    assert_same_weights(weights(first), weights(second))
    teacher = first.teachers[second.better_modality]
    assert_same_weights([teacher.network.state_dict()], [second.teacher.network.state_dict()])
    for epochs in (5, 50, 250):
        variant = getattr(semicml_trainers, f"nnUNetTrainerSemiCMLPlusPReL_{epochs}epochs")
        assert variant.first_stage is getattr(semicml_trainers, f"nnUNetTrainerSemiCMLPlus_{epochs}epochs")


def test_networks_of_one_modality_start_from_different_weights(groups):
    a, b = weights(initialized(FLAIR, "2d", nnUNetTrainerCPS))
    assert not all(torch.equal(a[k], b[k]) for k in a)


# SECL


def slow_contrast(anchors, keys, part_of, image_of, present, own_image, temperature):
    """The loss by its formula, in loops; rows are parts of images."""

    def s(i, k):
        return float(torch.cosine_similarity(anchors[i], keys[k], dim=0)) / temperature

    losses = []
    rows = [i for i in range(len(anchors)) if present[i]]
    for i in rows:
        positives = [k for k in rows if part_of[k] == part_of[i] and (own_image or image_of[k] != image_of[i])]
        negatives = [k for k in rows if part_of[k] != part_of[i]]
        if positives and negatives:
            total = sum(np.exp(s(i, k)) for k in negatives)
            losses.append(np.mean([-np.log(np.exp(s(i, k)) / (np.exp(s(i, k)) + total)) for k in positives]))
    return np.mean(losses)


@pytest.mark.parametrize("method", SECL)
@pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])
def test_contrast_equals_its_formula(method, dataset, configuration):
    """Proof 7 for the term: parts, keys, anchors and masks together."""
    trainer = with_labels_seen(initialized(dataset, configuration, method, noise_std=0.0))
    (batch,) = draw_batches(trainer, 1)
    (images,) = trainer.unlabeled_images(batch)
    ((name, teacher),) = trainer.teachers.items()
    features = unlabeled_outputs(trainer, images)
    keys, parts = trainer.unsupervised_targets(images)[name]
    trainer.min_part = max(1.0, float(parts.flatten(2).sum(2).median()))  # some parts are too small
    found = trainer.unsupervised_terms(features, {name: (keys, parts)})["contrast"].detach()
    with torch.no_grad():
        of_teacher = teacher.network(images[name])

    def pooled(of):
        return torch.stack([
            (of[b] * parts[b, r]).flatten(1).sum(1) / max(float(parts[b, r].sum()), 1e-6)
            for b in range(len(of)) for r in range(parts.shape[1])
        ])  # fmt: skip

    image_of, part_of = np.divmod(np.arange(parts.shape[0] * parts.shape[1]), parts.shape[1])
    present = (parts.flatten(2).sum(2).flatten() >= trainer.min_part).tolist()
    assert 2 < sum(present) < len(present)
    expected = slow_contrast(
        pooled(features[name].detach()),
        pooled(of_teacher),
        part_of,
        image_of,
        present,
        trainer.own_image,
        trainer.contrast_temperature,
    )
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_regions_are_those_of_the_case_and_not_of_the_patch(groups):
    """Without augmentation, the cell follows from where the loader has cropped."""
    trainer = initialized(FLAIR, "3d_fullres", nnUNetTrainerSECLRegion, feature_stage=0)
    loader, _ = trainer.get_dataloaders()
    (unlabeled,) = loader.data_loader.loaders["unlabeled"]
    dataset = unlabeled._data
    image, *_ = dataset.load_case(dataset.identifiers[0])
    assert image.shape[0] == 1 + 3
    corner = torch.from_numpy(image[:, 2:8, 0:6, 3:9]).float()[None]
    patch = torch.nn.functional.pad(corner, (1, 1, 1, 1, 1, 1))  # beyond the case
    _, parts = trainer.features_and_parts(trainer.teachers["FLAIR"], patch[:, :1], patch[:, 1:])
    assert parts.shape == (1, 4**3, 8, 8, 8)
    assert (parts.sum(1)[0, 1:-1, 1:-1, 1:-1] == 1).all()
    assert parts.sum() == 6**3
    for z in range(6):
        for y in range(6):
            for x in range(6):
                where = np.array([2 + z, y, 3 + x]) + 0.5
                cell = np.floor(where / image.shape[1:] * 4).astype(int)
                assert parts[0, cell @ [16, 4, 1], 1 + z, 1 + y, 1 + x] == 1


def test_positions_are_augmented_with_the_image(groups):
    """Where an image voxel comes from can be read off its position, after rotation, mirroring and cropping."""
    trainer = initialized(FLAIR, "2d", nnUNetTrainerSECLRegion)
    loader, _ = trainer.get_dataloaders()
    (unlabeled,) = loader.data_loader.loaders["unlabeled"]
    for stage, transforms in unlabeled.transforms.stages:  # intensities as they are
        if not stage:
            for own in transforms:
                own.clear()
    np.random.seed(0)
    torch.manual_seed(0)
    batch = unlabeled.generate_train_batch()
    assert batch["images"]["FLAIR"].shape[1] == 1
    assert batch["positions"].shape[1] == 3
    compared = 0
    samples = torch.cat([batch["images"]["FLAIR"], batch["positions"]], dim=1)
    for key, sample in zip(batch["cases"], samples, strict=True):
        image, *_ = unlabeled._data.load_case(key)
        whole, shape = image[:, :, :, :][0], np.array(image.shape[1:])
        found, position = sample[0].numpy(), sample[1:].numpy()
        where = position * shape[:, None, None] - 0.5
        inside = (position > 0).all(0)
        index = np.rint(where).astype(int)
        near = inside & (np.abs(where - index) < 0.1).all(0) & (index >= 1).all(0)
        near &= (index < (shape - 1)[:, None, None]).all(0)
        expected = whole[tuple(index.clip(0, (shape - 1)[:, None, None]))]
        slope = np.max([np.abs(g) for g in np.gradient(whole)], 0)[tuple(index.clip(0, (shape - 1)[:, None, None]))]
        assert (np.abs(found - expected)[near] <= 0.5 * slope[near] + 0.3).all()
        compared += near.sum()
    assert compared > 20


def test_classes_of_region_labels_are_those_of_nnunet(groups):
    trainer = initialized(REGIONS_T1, "3d_fullres", nnUNetTrainerSECLAnatomical)
    torch.manual_seed(0)
    logits = torch.randn(2, trainer.label_manager.num_segmentation_heads, 4, 4, 4)
    expected = [trainer.label_manager.convert_probabilities_to_segmentation(z.sigmoid()) for z in logits]
    assert torch.equal(trainer.segment(logits), torch.stack(expected).long())
    assert len(trainer.label_manager.all_labels) == 3


class nnUNetTrainerResidualEncoder(nnUNetTrainer):
    """Stands for the plans of a ResEnc planner."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        kwargs = dict(configuration_manager.network_arch_init_kwargs)
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
        return get_network_from_plans(
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
        )


@pytest.mark.parametrize("method", SECL)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("feature_stage", [0, 99])
def test_secl_works_with_residual_encoders_and_at_any_stage(method, configuration, feature_stage):
    trainer_class = type(method.__name__, (method,), {"network_trainer": nnUNetTrainerResidualEncoder})
    trainer = initialized(FLAIR, configuration, trainer_class, rampup_fraction=0.0, feature_stage=feature_stage)
    (t,) = trainer.trainers
    assert isinstance(t.network, ResidualEncoderUNet)
    student = with_labels_seen(trainer).students["FLAIR"]
    assert student.stage == min(feature_stage, len(t.network.encoder.stages) - 1)
    (batch,) = draw_batches(trainer, 1)
    image = trainer.unlabeled_images(batch)[0]["FLAIR"]
    with torch.no_grad():
        torch.testing.assert_close(student(image), student.head(t.network.encoder(image)[student.stage]))
    assert_step_equals_reference(trainer, batch)


class nnUNetTrainerCompiled(nnUNetTrainer):
    def _do_i_compile(self):
        return True


@pytest.mark.parametrize("method", [nnUNetTrainerMeanTeacher, *SECL])
def test_compiled_networks_learn_the_same(method, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    members = {"network_trainer": nnUNetTrainerCompiled, "_do_i_compile": lambda self: True}
    eager, compiled = (
        initialized(FLAIR, "2d", trainer_class, rampup_fraction=0.0)
        for trainer_class in (method, type(method.__name__, (method,), members))
    )
    (t,) = compiled.trainers
    assert isinstance(t.network, OptimizedModule)
    assert isinstance(compiled.teachers["FLAIR"].predict, OptimizedModule)
    pair = [trainer.student(trainer.trainers[0]).parameters() for trainer in (compiled, eager)]
    with torch.no_grad():
        for own, reference in zip(*pair, strict=True):
            own.copy_(reference)
    for trainer in map(with_labels_seen, (eager, compiled)):
        trainer.two_pass = trainer is compiled
    (batch,) = draw_batches(eager, 1)
    torch.manual_seed(1)
    expected = reference_gradients(eager, batch)[1]
    torch.manual_seed(1)
    assert_close_gradients(expected, step_gradients(compiled, batch)[1])
    compiled.run_training()
    assert all(g.isfinite().all() for of_network in gradients(compiled) for g in of_network)
    assert "_orig_mod" not in str(compiled.get_method_state()["teacher_weights"]["FLAIR"].keys())
    assert "_orig_mod" not in str(t.get_state()["network_weights"].keys())


# schedules and refusals


@pytest.mark.parametrize("method", METHODS)
def test_schedules(method):
    for epochs in (5, 50, 250):
        variant = getattr(semicml_trainers, f"{method.__name__}_{epochs}epochs")
        assert issubclass(variant, method)
        dataset = LABELS if method in COUPLED else FLAIR
        plans, dataset_json = load_plans(dataset)
        assert variant(plans, "2d", 0, dataset_json, torch.device("cpu")).num_epochs == epochs
    assert method.epochs == 1000


@pytest.mark.parametrize("method", [*COUPLED, nnUNetTrainerSemiCML])
def test_method_that_needs_two_modalities_refuses_one(method, results):
    with pytest.raises(NotImplementedError, match=r"needs at least 2 modalities, but .*modalities.json has 1"):
        make_trainer(FLAIR, "2d", method)
    assert not list(results.iterdir())


def test_dataset_without_unlabeled_cases_is_refused(results, monkeypatch, tmp_path):
    """One that stock nnU-Net has preprocessed."""
    plans, dataset_json = load_plans(FLAIR)
    plans["dataset_name"] = "Dataset999_Stock"
    with pytest.raises(RuntimeError, match=r"Dataset999_Stock/modalities.json: found no such file"):
        nnUNetTrainerMeanTeacher(plans, "2d", 0, dataset_json, torch.device("cpu"))


def test_checkpoint_is_readable_and_says_what_it_is(groups):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerSECLAnatomical)
    trainer.run_training()
    checkpoint = final_checkpoint(trainer)
    assert checkpoint["method"]["projection_heads"].keys() == {"FLAIR"}
    assert checkpoint["method"]["teacher_steps"] == {"FLAIR": 4}
    assert checkpoint["provenance"]["dataset"] == FLAIR
    deployed = json.loads((Path(trainer.trainers[0].output_folder).parent / "dataset.json").read_text())
    assert "dataset" not in deployed
