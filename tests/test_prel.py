"""The proofs of docs/design.md for PReL, and what it takes from Semi-CML, in this process. Averaging: test_teacher."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    PATTERNS,
    REGIONS,
    SETTINGS,
    Killed,
    KilledMixin,
    assert_identical,
    assert_labels_of_unlabeled_cases_change_nothing,
    assert_same_weights,
    assert_step_equals_reference,
    change_tensors,
    draw_batches,
    final_checkpoint,
    initialized,
    labeled_of,
    load_plans,
    make_trainer,
    nnUNetTrainerWithDropout,
    unlabeled_of,
    unsupervised_terms,
    validation_outputs,
    weights,
)
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_terms import area_contrast
from toy import refusal

from nnunetv2_semicml.data.checkpoint_file import content_digest
from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlusPReL import nnUNetTrainerSemiCMLPlusPReL
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL

FIRST_STAGE = "nnUNetTrainerSemiCML__nnUNetPlans__{}/fold_0/checkpoint_final.pth"
BEST_DICE = {"FLAIR": [0.4, 0.5], "MR": [0.4, 0.5], "T1": [0.6, 0.5], "T2": []}  # T1 is made the better one


class nnUNetTrainerSemiCMLPReLWithDropout(nnUNetTrainerSemiCMLPReL):
    first_stage = type("nnUNetTrainerSemiCML", (nnUNetTrainerSemiCML,), {"network_trainer": nnUNetTrainerWithDropout})


@pytest.fixture(scope="module")
def finished(labels_group, regions_group, channels_group, patterns_group, tmp_path_factory):
    """Finished runs of Semi-CML whose pools say that T1 is the better modality, and whose teachers are others."""
    results = tmp_path_factory.mktemp("first_stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
        for dataset, configuration in SETTINGS:
            trainer = initialized(dataset, configuration, num_epochs=1)
            trainer.run_training()
            file = Path(trainer.output_folder) / "checkpoint_final.pth"
            checkpoint = torch.load(file, weights_only=True)
            for name, state in checkpoint["method"]["teachers"].items():
                state["best_dice"] = BEST_DICE[name]
                # after so few epochs the average of the best models is the network itself
                state["weights"] = {k: 1.25 * v for k, v in state["weights"].items()}
            torch.save(checkpoint, file)
    return results


@pytest.fixture
def first_stage(finished, results):
    """The same, in this test's own nnUNet_results."""
    shutil.copytree(finished, results, dirs_exist_ok=True)
    return results


def started(dataset, configuration, trainer_class=nnUNetTrainerSemiCMLPReL, **attributes):
    trainer = initialized(dataset, configuration, trainer_class, **attributes)
    if trainer.network_trainer is nnUNetTrainer:
        trainer._start_from_first_stage()
    else:  # dropout layers change no weights but their names
        trainer._set_labeler("T1", trainer.trainers[1].network.state_dict())
    return trainer


def students_and_teacher(trainer):
    return [t.network for t in trainer.trainers], trainer.labeler.network


# what the stage starts from


def test_networks_and_teacher_are_those_of_semicml(first_stage):
    trainer = started(LABELS, "2d")
    joint = torch.load(first_stage / LABELS / FIRST_STAGE.format("2d"), weights_only=True)
    assert trainer.better_modality == "T1"
    assert trainer.validation_dice == pytest.approx({"FLAIR": 0.45, "T1": 0.55})
    assert_same_weights(weights(trainer), [m["network_weights"] for m in joint["modalities"].values()])
    teacher, network = trainer.labeler.network.state_dict(), joint["modalities"]["T1"]["network_weights"]
    assert_same_weights([teacher], [joint["method"]["teachers"]["T1"]["weights"]])
    assert not any(torch.equal(teacher[k], network[k]) for k in network if network[k].any())
    assert not any(t.optimizer.state for t in trainer.trainers)


def test_networks_are_of_the_kind_of_the_first_stage_unless_another_one_is_named(first_stage):
    for trainer_class, kind, named in (
        (nnUNetTrainerSemiCMLPReLWithDropout, nnUNetTrainerWithDropout, {}),
        (nnUNetTrainerSemiCMLPReL, nnUNetTrainerWithDropout, {"network_trainer": nnUNetTrainerWithDropout}),
        (nnUNetTrainerSemiCMLPReL, nnUNetTrainer, {}),
    ):
        trainer = initialized(LABELS, "2d", trainer_class, **named)
        assert trainer.network_trainer is kind
        has_dropout = [any(isinstance(m, torch.nn.Dropout2d) for m in t.network.modules()) for t in trainer.trainers]
        assert has_dropout == 2 * [kind is nnUNetTrainerWithDropout]


def test_checkpoints_tell_which_first_stage_it_was(first_stage):
    """By a digest that changes when the first stage is trained again; that of the continued run stays as it began."""
    file = first_stage / LABELS / FIRST_STAGE.format("2d")
    digest = content_digest(file)
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLKilled, save_every=1, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    initialized(LABELS, "2d", num_epochs=1).run_training()  # another first stage
    assert content_digest(file) != digest
    resumed = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLKilled, kill_at=-1)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    for folder in (resumed.output_folder, *(t.output_folder for t in resumed.trainers)):
        found = torch.load(Path(folder) / "checkpoint_final.pth", weights_only=True)["provenance"]
        assert found["first stage"] == digest


def test_choice_is_logged_and_readable_from_the_checkpoint(first_stage):
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer.run_training()
    method = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=True)["method"]
    assert method["better_modality"] == "T1"
    assert method["validation_dice"] == pytest.approx({"FLAIR": 0.45, "T1": 0.55})
    log = Path(trainer.log_file).read_text()
    assert "The better modality is T1 (mean of the best validation Dice values of nnUNetTrainerSemiCML: FLAIR" in log


def test_modality_never_measured_is_not_the_better_one(first_stage):
    assert started(*SETTINGS[2]).validation_dice == pytest.approx({"FLAIR": 0.45, "T1": 0.55, "T2": 0.0})


class nnUNetTrainerCrossModalCPSPReL(nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerCrossModalCPS


class nnUNetTrainerSECLPReL(nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerSECLRegion  # its teachers have projection heads


class nnUNetTrainerCPSPReL(nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerCPS  # has no teachers


@pytest.mark.parametrize(
    "second", [nnUNetTrainerCrossModalCPSPReL, nnUNetTrainerSECLPReL, nnUNetTrainerSemiCMLPlusPReL]
)
def test_first_stage_is_any_one_with_teachers(groups, second):
    first = initialized(LABELS, "2d", second.first_stage)
    command = rf"nnUNetv2_train 500 2d 0 -tr {second.first_stage.__name__} -p"
    with pytest.raises(RuntimeError, match=command):
        make_trainer(LABELS, "2d", second)
    first.run_training()
    trainer = initialized(LABELS, "2d", second, num_epochs=1)
    trainer.on_train_start()
    deployed = [(t.averaged_network or t.unwrapped_network()).state_dict() for t in first.trainers]
    assert_same_weights(deployed, [t.unwrapped_network().state_dict() for t in trainer.trainers])
    better = max(first.pools, key=lambda name: np.mean(first.pools[name].values or [0.0]))
    assert trainer.better_modality == better
    expected = dict(first.averaged_network(better).named_parameters())
    found = dict(trainer.labeler.network.named_parameters())
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    trainer.run_training()


def test_averages_of_the_second_stage_start_from_the_first(first_stage):
    """Any method may deploy an average of its own; the labeler is another and stays as it is."""
    options = {"num_epochs": 5, "deploy_average": True, "num_iterations_per_epoch": 1, "may_give_back": False}
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPReL, **options)
    trainer._start_from_first_stage()
    before, labeler = weights(trainer), {k: v.clone() for k, v in trainer.labeler.network.state_dict().items()}
    averages = [trainer.averaged_network(t.name) for t in trainer.trainers]
    assert_same_weights([a.state_dict() for a in averages], before)
    trainer.run_training()
    for t, average in zip(trainer.trainers, averages, strict=True):
        checkpoint = torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)
        assert_same_weights([checkpoint["network_weights"]], [average.state_dict()])
        assert not all(torch.equal(v, t.network.state_dict()[k]) for k, v in average.state_dict().items())
    assert_same_weights([trainer.labeler.network.state_dict()], [labeler])


def test_first_stage_without_teachers_is_refused(groups):
    initialized(LABELS, "2d", nnUNetTrainerCPS, num_epochs=1).run_training()
    assert refusal(make_trainer(LABELS, "2d", nnUNetTrainerCPSPReL).run_training).endswith(
        "/checkpoint_final.pth: found a training of nnUNetTrainerCPS without teachers; expected teachers, of which the "
        "better modality's makes the pseudo-labels. "
        'Set teacher_averaging = "ema" in nnUNetTrainerCPS and train it anew.'
    )


# proof 1


@pytest.mark.parametrize("term", ["asc", "ce", "dice"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_gradient_reaches_every_weight_of_every_learner_alone(first_stage, dataset, configuration, joined, term):
    trainer = started(dataset, configuration, num_epochs=5)
    trainer.current_epoch = 4 if joined else 3
    (batch,) = draw_batches(trainer, 1)
    expected = [t.name for t in trainer.trainers if joined or t.name != "T1"]
    terms = unsupervised_terms(trainer, batch)
    assert set(terms) == {f"{m} {t}" for m in expected for t in ("asc", "ce", "dice")}
    sum(terms[f"{m} {term}"] for m in expected).backward()
    for t in trainer.trainers:
        untouched = [n for n, p in t.network.named_parameters() if p.grad is None or not p.grad.any()]
        if t.name in expected:
            assert all(".seg_layers." in name for name in untouched)
            assert len(untouched) == 2 * (len(t.network.decoder.seg_layers) - 1)
        else:
            assert len(untouched) == len(list(t.network.parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in trainer.labeler.network.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_better_network_rests_until_it_joins_and_the_teacher_always(first_stage, recompute):
    trainer = started(LABELS, "2d", num_epochs=5, recompute=recompute)
    teacher = {k: v.clone() for k, v in trainer.labeler.network.state_dict().items()}
    batches = draw_batches(trainer, 2)
    for trainer.current_epoch, batch, moves in ((3, batches[0], [True, False]), (4, batches[1], [True, True])):
        before = weights(trainer)
        outputs = trainer.train_step(batch)
        moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, weights(trainer), strict=True)]
        assert moved == moves
        assert list(outputs["supervised"]) == [m for m, move in zip(("FLAIR", "T1"), moves, strict=True) if move]
    assert_same_weights([teacher], [trainer.labeler.network.state_dict()])


class nnUNetTrainerSemiCMLPReLScripted(nnUNetTrainerSemiCMLPReL):
    """Measures a given Dice of the better modality T1."""

    def on_validation_epoch_end(self, val_outputs):
        outputs = [validation_outputs(0.9), validation_outputs(self.script[self.current_epoch])]
        super().on_validation_epoch_end([outputs])


@pytest.mark.parametrize(
    ("script", "may_give_back", "given_back"),
    [
        ([0.5, 0.7, 0.5, 0.6], None, True),  # mean at rest 0.6, since it joined 0.55
        ([0.5, 0.7, 0.9, 0.3], True, False),  # 0.6 and 0.6
        ([0.5, 0.5, 0.4, 0.7], True, False),
        ([0.5, 0.7, 0.5, 0.6], False, False),
    ],
)
def test_better_network_is_given_back_if_its_dice_fell(first_stage, script, may_give_back, given_back):
    trainer = started(LABELS, "2d", nnUNetTrainerSemiCMLPReLScripted, num_epochs=4, join_fraction=0.5)
    trainer.script, trainer.may_give_back = script, may_give_back
    before = weights(trainer)
    trainer.run_training()
    deployed = [
        torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)["network_weights"]
        for t in trainer.trainers
    ]
    same = [all(torch.equal(old[k], new[k]) for k in old) for old, new in zip(before, deployed, strict=True)]
    assert same == [False, given_back]
    assert_same_weights(deployed, weights(trainer))
    message = "T1: mean validation Dice 0.6000 at rest, 0.5500 since it joined"
    assert (message in Path(trainer.log_file).read_text()) == given_back


@pytest.mark.parametrize(("may_give_back", "given_back"), [(None, False), (True, True)])
def test_fold_all_has_no_dice_to_judge_by(first_stage, may_give_back, given_back):
    """Unless it is told so."""
    folder = first_stage / LABELS / "nnUNetTrainerSemiCML__nnUNetPlans__2d"
    shutil.copytree(folder / "fold_0", folder / "fold_all")
    options = {"num_epochs": 4, "join_fraction": 0.5, "may_give_back": may_give_back}
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLScripted, "all", **options)
    trainer.initialize()
    trainer._set_labeler("T1", trainer.trainers[1].network.state_dict())
    trainer.better_weights = {k: v.clone() for k, v in trainer.trainers[1].network.state_dict().items()}
    trainer.script = [0.5, 0.7, 0.5, 0.6]
    before = weights(trainer)[1]
    trainer.run_training()
    assert all(torch.equal(before[k], v) for k, v in weights(trainer)[1].items()) == given_back


def test_weights_of_the_terms(first_stage):
    trainer = started(LABELS, "2d", num_epochs=10, pseudo_label_weight=2.0)
    trainer.current_epoch = 7
    resting = trainer.unsupervised_weights()
    trainer.current_epoch = 8
    joined = trainer.unsupervised_weights()
    weaker = {"FLAIR asc": 0.2, "FLAIR ce": 1.8, "FLAIR dice": 1.8}
    assert resting == pytest.approx({**weaker, "T1 asc": 0, "T1 ce": 0, "T1 dice": 0})
    assert joined == pytest.approx({**weaker, "T1 asc": 0.4, "T1 ce": 1.6, "T1 dice": 1.6})


# soft pseudo-labels


@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_pseudo_labels_are_mean_probabilities_of_noisy_passes(first_stage, dataset, configuration):
    trainer = started(dataset, configuration, teacher_passes=3)
    (batch,) = draw_batches(trainer, 1)
    image = unlabeled_of(batch, "T1")
    torch.manual_seed(5)
    found = trainer.soft_pseudo_labels(image)
    torch.manual_seed(5)
    passes = []
    for _ in range(3):
        noise = (0.1 * torch.randn_like(image)).clamp(0.0, 0.2)
        scale = torch.stack([case.std() for case in image]).reshape(-1, *[1] * (image.ndim - 1))
        with torch.no_grad():
            logits = trainer.labeler.network(image + scale * noise)
        passes.append(logits.sigmoid() if trainer.label_manager.has_regions else logits.softmax(1))
    torch.testing.assert_close(found, torch.stack(passes).mean(0))
    assert not torch.equal(passes[0], passes[1])
    assert ((found > 0) & (found < 1)).any()  # never argmax
    assert not found.requires_grad
    if not trainer.label_manager.has_regions:
        torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


def test_pseudo_labels_see_the_patch_of_the_student(first_stage, monkeypatch):
    """They come from the better modality's channel of the very batch, after augmentation."""
    trainer = started(LABELS, "2d", num_epochs=5)
    (batch,) = draw_batches(trainer, 1)
    seen = []
    original = trainer.soft_pseudo_labels
    monkeypatch.setattr(trainer, "soft_pseudo_labels", lambda image: seen.append(image) or original(image))
    trainer.train_step(batch)
    assert len(seen) == 1
    assert torch.equal(seen[0], batch["unlabeled"][0]["images"]["T1"])


@pytest.mark.parametrize("asc_cases", [None, 2, 3])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_terms_equal_the_formulas(first_stage, dataset, configuration, asc_cases):
    """Proof 7 for the sum that is minimized, of 2 unlabeled cases; those beyond, of `asc_cases`, are contrasted."""
    options = {"asc_temperature": 0.5, "asc_cases": asc_cases, "unlabeled_batch_size": 2}
    if asc_cases == 3 and dataset in (REGIONS, PATTERNS):
        asc_cases = options["asc_cases"] = fewest_in_common(ModalityGroup.load(dataset))
    trainer = started(dataset, configuration, num_epochs=5, **options)
    trainer.current_epoch = 4
    (batch,) = draw_batches(trainer, 1)
    heads, regions = trainer.label_manager.num_segmentation_heads, trainer.label_manager.has_regions
    torch.manual_seed(0)
    for draw in trainer.unlabeled_draws(batch):
        image = draw.images["T1"]
        assert len(image) == max(2, asc_cases or 2)
        q, *outputs = (torch.randn(len(image), heads, *image.shape[2:]) for _ in range(1 + len(draw.images)))
        q = q.sigmoid() if regions else q.softmax(1)
        outputs = dict(zip(draw.images, outputs, strict=True))
        terms, term_weights = trainer.unsupervised_terms([outputs], q), trainer.unsupervised_weights()
        total = sum(term_weights[name] * term for name, term in terms.items())
        expected = 0
        for name, z in outputs.items():
            p = z.sigmoid() if regions else z.softmax(1)
            contrast = area_contrast([q, p] if regions else [q[:, 1:], p[:, 1:]], 0.5)
            p, label = p[:2], q[:2]
            entropy = label * p.log() + (1 - label) * (1 - p).log() if regions else (label * p.log()).sum(1)
            p, label = (p, label) if regions else (p[:, 1:], label[:, 1:])
            axes = (0, *range(2, q.ndim)) if configuration == "2d" else tuple(range(2, q.ndim))
            overlap, areas = (p * label).sum(axes), (p**2 + label**2).sum(axes)
            dice = 1 - ((2 * overlap + 1) / (areas + 1)).mean()
            share = 0.2 if name == "T1" else 0.1
            expected += share * contrast + (1 - share) * (dice - entropy.mean())
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_step_compares_with_the_labels_of_the_teacher(first_stage, monkeypatch, dataset, configuration):
    """What a step makes of its batch: outputs of the same patches, and pseudo-labels of the better modality's."""
    trainer = started(dataset, configuration, num_epochs=5, noise_std=0.0)
    (batch,) = draw_batches(trainer, 1)
    seen = []
    original = trainer.unsupervised_terms
    monkeypatch.setattr(trainer, "unsupervised_terms", lambda *given: seen.append(given) or original(*given))
    labeler = torch.load(first_stage / dataset / FIRST_STAGE.format(configuration), weights_only=True)
    labeler = labeler["method"]["teachers"]["T1"]["weights"]
    students = weights(trainer)
    trainer.train_step(batch)
    ((outputs,), q), images = seen[0], batch["unlabeled"][0]["images"]
    activate = torch.sigmoid if trainer.label_manager.has_regions else (lambda z: z.softmax(1))

    def predict(of, name):
        (t,) = (t for t in trainer.trainers if t.name == name)
        t.network.load_state_dict(of)
        t.set_deep_supervision_enabled(False)
        with torch.no_grad():
            return t.network(images[name])

    torch.testing.assert_close(q, activate(predict(labeler, "T1")))
    assert "T1" not in outputs  # it rests
    for name, logits in outputs.items():
        own = students[[t.name for t in trainer.trainers].index(name)]
        torch.testing.assert_close(logits.detach(), predict(own, name))


def fewest_in_common(group):
    """Cases that no two modalities have fewer of together: as many of a draw are surely different ones."""
    cases = [set(m.unlabeled) for m in group.modalities]
    return min(len(a & b) for i, a in enumerate(cases) for b in cases[:i])


# proof 3


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_without_pseudo_labels_every_step_is_that_of_the_stock_trainer(first_stage, dataset, configuration, recompute):
    trainer = started(dataset, configuration, num_epochs=5, pseudo_label_weight=0.0, recompute=recompute)
    stock = {}
    for modality, own in zip(trainer.group.modalities, trainer.trainers, strict=True):
        plans, dataset_json = load_plans(modality.dataset_name)
        reference = nnUNetTrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        reference.initial_lr, reference.num_epochs = trainer.initial_lr, trainer.num_epochs
        reference.initialize()
        reference.network.load_state_dict(own.network.state_dict())
        stock[modality.name] = reference
    batches = draw_batches(trainer, 2)
    for trainer.current_epoch, batch in enumerate(batches, start=3):
        separate = labeled_of(batch)
        for name, loss in trainer.train_step(batch)["supervised"].items():
            data, target = separate[name]
            assert stock[name].train_step({"data": data, "target": target})["loss"] == loss
    assert_same_weights(weights(trainer), [t.network.state_dict() for t in stock.values()])


def test_published_form_has_no_labeled_loss(first_stage):
    """supervised_weight 0: other labels, the same step; with the default, another one."""
    (batch,) = draw_batches(started(LABELS, "2d"), 1)
    for weight, same in ((0.0, True), (1.0, False)):
        trainers = [started(LABELS, "2d", supervised_weight=weight, num_epochs=5) for _ in range(2)]
        (drawn,) = draw_batches(trainers[0], 1)
        assert (not drawn["labeled"]) == same  # nothing is loaded in vain
        other = {"labeled": change_tensors(batch["labeled"], torch.ones_like), "unlabeled": batch["unlabeled"]}
        outputs = []
        for trainer, b in zip(trainers, (batch, other), strict=True):
            torch.manual_seed(0)
            outputs.append(trainer.train_step(b))
        assert bool(outputs[0]["supervised"]) != same
        a, b = (weights(t)[0] for t in trainers)
        assert all(torch.equal(a[k], b[k]) for k in a) == same


# proof 4


class nnUNetTrainerSemiCMLPReLKilled(KilledMixin, nnUNetTrainerSemiCMLPReL):
    pass


def test_resumed_training_equals_uninterrupted_training(finished, results, tmp_path, monkeypatch):
    schedule = {"num_epochs": 4, "save_every": 2, "join_fraction": 0.25}
    for name in ("whole", "parts"):
        shutil.copytree(finished, tmp_path / name)
    monkeypatch.setenv("nnUNet_semicml_seed", "3")

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLKilled, **schedule, kill_at=-1)
    whole.run_training()

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "parts"))
    killed = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLKilled, **schedule)
    with pytest.raises(Killed):
        killed.run_training()
    shutil.rmtree(tmp_path / "parts" / LABELS / Path(FIRST_STAGE.format("2d")).parents[1])  # not needed any more
    monkeypatch.setenv("nnUNet_semicml_seed", "4")  # must not matter any more
    resumed = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLKilled, **schedule, kill_at=-1)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 2
    resumed.run_training()

    assert_same_weights(weights(whole), weights(resumed))
    final = [final_checkpoint(trainer) for trainer in (whole, resumed)]
    log = final[0]["logging"]
    assert log["weight/T1 ce"] == [0.0, 0.0, 0.0, 0.8]
    assert np.isnan(log["unsupervised/T1 ce"]).tolist() == [True, True, True, False]
    assert np.isfinite(log["unsupervised/FLAIR ce"]).all()
    assert_identical(*final)


# proof 5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_whole_training_runs_and_learns(first_stage, dataset, configuration, recompute):
    trainer = started(dataset, configuration, recompute=recompute, join_fraction=0.5)
    before = weights(trainer)
    trainer.run_training()
    for t, old, new in zip(trainer.trainers, before, weights(trainer), strict=True):
        assert t.name == "T1" or not all(torch.equal(old[k], new[k]) for k in old)
    log = trainer.logger.get_checkpoint()
    for m in trainer.group.modalities:
        for term in ("asc", "ce", "dice"):
            values = np.array(log[f"unsupervised/{m.name} {term}"])
            assert np.isnan(values).tolist() == [m.name == "T1", False]
            assert (values[~np.isnan(values)] > 0).all()
    for t in trainer.trainers:
        assert np.isnan(t.logger.get_checkpoint()["train_losses"]).tolist() == [t.name == "T1", False]
        checkpoint = torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert checkpoint["provenance"]["trainer"] == "nnUNetTrainerSemiCMLPReL"
        assert "teacher" not in str(checkpoint.keys())
        files = {f.name for f in Path(t.output_folder_base).iterdir()}
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= files
    assert (Path(trainer.output_folder) / "unsupervised_terms.png").is_file()


def test_schedule_and_rate_reach_the_modality_trainers(first_stage):
    plans, dataset_json = load_plans(LABELS)
    trainer = nnUNetTrainerSemiCMLPReL(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    assert [t.num_epochs for t in trainer.trainers] == [600] * 2
    assert [t.lr_scheduler.max_steps for t in trainer.trainers] == [600] * 2
    assert [t.optimizer.param_groups[0]["lr"] for t in trainer.trainers] == [1e-3] * 2


# proof 6


def test_labels_of_unlabeled_cases_change_nothing(first_stage, copy_of_labels):
    assert_labels_of_unlabeled_cases_change_nothing(lambda: started(LABELS, "2d", num_epochs=5))


# proof 8


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerSemiCMLPReL, nnUNetTrainerSemiCMLPReLWithDropout])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
@pytest.mark.parametrize("supervised_weight", [0.0, 1.0])
def test_step_gives_the_gradients_of_the_formula(first_stage, dataset, configuration, trainer_class, supervised_weight):
    trainer = started(dataset, configuration, trainer_class, num_epochs=5, supervised_weight=supervised_weight)
    trainer.current_epoch = 4
    (batch,) = draw_batches(trainer, 1)
    assert_step_equals_reference(trainer, batch)


# what is refused


def test_missing_first_stage_is_named_with_the_command_to_run(labels_group, results):
    file = results / LABELS / FIRST_STAGE.format("2d")
    sentence = (
        "{}: found {}; expected the finished nnUNetTrainerSemiCML from which this stage starts. "
        "Run first: nnUNetv2_train 500 2d 0 -tr nnUNetTrainerSemiCML -p nnUNetPlans{}"
    )
    assert refusal(make_trainer, LABELS, "2d", nnUNetTrainerSemiCMLPReL) == sentence.format(file, "no such file", "")
    assert not list(results.iterdir())
    own = Path(str(file.parent).replace("nnUNetTrainerSemiCML__", "nnUNetTrainerSemiCMLPReL__"))
    own.mkdir(parents=True)
    (own / "training_log.txt").touch()  # of a training that has no checkpoint to continue from
    assert refusal(make_trainer, LABELS, "2d", nnUNetTrainerSemiCMLPReL) == sentence.format(file, "no such file", "")
    file.parent.mkdir(parents=True)
    (file.parent / "checkpoint_latest.pth").touch()
    expected = sentence.format(file, "an unfinished training", " --c")
    assert refusal(make_trainer, LABELS, "2d", nnUNetTrainerSemiCMLPReL) == expected


def test_first_stage_lost_after_a_checkpoint_is_named(first_stage):
    """A new start in a folder that an earlier run has left."""
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL, num_epochs=1)
    trainer.run_training()
    (first_stage / LABELS / FIRST_STAGE.format("2d")).unlink()
    with pytest.raises(RuntimeError, match="Run first: nnUNetv2_train 500 2d 0 -tr nnUNetTrainerSemiCML"):
        make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL).run_training()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dataset", "Dataset007_Other", "dataset Dataset500_Labels"),
        ("modalities", ["T1", "FLAIR"], "modalities"),
        ("plans", "other", "plans nnUNetPlans"),
        ("configuration", "3d_fullres", "configuration 2d"),
        ("fold", 3, "fold 0"),
        ("digest of plans", "0123", "the same"),
        ("digest of cases", "0123", "the same"),
        ("digest of fold", "0123", "the same"),
        ("trainer", "nnUNetTrainerSemiCML_5epochs", "trainer nnUNetTrainerSemiCML"),
    ],
)
def test_first_stage_of_another_run_is_refused(first_stage, key, value, expected):
    file = first_stage / LABELS / FIRST_STAGE.format("2d")
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["provenance"][key] = value
    torch.save(checkpoint, file)
    key = key.replace("digest of", "other")
    remedy = r"Train nnUNetTrainerSemiCML anew for this dataset, plans, configuration and fold\.$"
    sentence = rf"found a checkpoint of {key}.*; expected {expected}.* {remedy}"
    with pytest.raises(RuntimeError, match=sentence):
        make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL).run_training()


def test_damaged_first_stage_is_refused(first_stage):
    file = first_stage / LABELS / FIRST_STAGE.format("2d")
    file.write_bytes(file.read_bytes()[:1000])
    sentence = r"found a damaged file .*; expected a checkpoint of nnUNetTrainerSemiCML. Train nnUNetTrainerS"
    with pytest.raises(RuntimeError, match=sentence):
        make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL).run_training()


def test_digests_tell_what_a_run_belongs_to(labels_group, results):
    """Of plans, cases and fold each changes with its own."""
    plans, _ = load_plans(LABELS)
    original = labels_group.provenance(plans, "2d", 0)
    assert original == ModalityGroup.load(LABELS).provenance(json.loads(json.dumps(plans)), "2d", 0)
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in original.values())

    def changed(group, plans, configuration, fold):
        other = group.provenance(plans, configuration, fold)
        return {key.removeprefix("digest of ") for key, digest in other.items() if digest != original[key]}

    assert changed(labels_group, plans, "3d_fullres", 0) == {"plans"}
    assert changed(labels_group, plans, "2d", 1) == changed(labels_group, plans, "2d", "all") == {"fold"}
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"][0] += 1
    assert changed(labels_group, plans, "2d", 0) == {"plans"}
    plans, _ = load_plans(LABELS)
    for kind in ("labeled", "unlabeled"):
        other = ModalityGroup.load(LABELS)
        case = next(iter(getattr(other.modalities[1], kind)))
        getattr(other.modalities[1], kind)[case] = "0123"
        assert changed(other, plans, "2d", 0) == {"cases"}


def test_semicml_checkpoint_does_not_continue_prel(first_stage):
    file = first_stage / LABELS / FIRST_STAGE.format("2d")
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL)
    sentence = "found a checkpoint of trainer nnUNetTrainerSemiCML; expected trainer nnUNetTrainerSemiCMLPReL"
    with pytest.raises(RuntimeError, match=sentence):
        trainer.load_checkpoint(str(file))
