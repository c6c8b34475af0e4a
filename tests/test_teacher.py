"""Averaging of teachers (proof 2 of docs/design.md), and the noise of their images."""

import copy
from functools import partial

import pytest
import torch
from conftest import LABELS, initialized, nnUNetTrainerWithDropout, validation_outputs, weights
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training.teacher import BestModelPool, Teacher, add_noise

NAN = float("nan")
SCRIPT = {"FLAIR": [0.9, 0.2, 0.4, 0.3, 0.8, 0.5], "T1": [0.1, 0.3, 0.2, 0.1, 0.25, 0.4]}


def unet(**kwargs):
    torch.manual_seed(0)
    stages = {"kernel_sizes": 3, "strides": [1, 2], "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1}
    return PlainConvUNet(1, 2, [2, 4], nn.Conv2d, num_classes=2, deep_supervision=True, **stages, **kwargs)


def changed(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    return other


def test_averages_equal_their_closed_form():
    """Weights that nnU-Net's state_dict lists under several names are averaged once."""
    start = unet()
    teacher = Teacher(start)
    expected = {k: v.clone() for k, v in start.state_dict().items()}
    assert len(expected) > len(list(start.parameters()))
    for keep in (0.9, 0.99, 0.5, 1.0, 0.25):
        student = changed(start)
        teacher.average(student, keep)
        expected = {k: keep * v + (1 - keep) * student.state_dict()[k] for k, v in expected.items()}
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_constant_student_gives_the_geometric_closed_form():
    start = unet()
    teacher, student = Teacher(start), changed(start)
    for _ in range(20):
        teacher.average(student, 0.9)
    for own, old, new in zip(teacher.network.parameters(), start.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own, 0.9**20 * old + (1 - 0.9**20) * new)


def test_keeping_nothing_copies_and_leaves_the_student_alone():
    student = unet()
    teacher = Teacher(changed(student))
    before = copy.deepcopy(student.state_dict())
    teacher.average(student, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    teacher.average(changed(student), 0.5)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_running_statistics_are_averaged_and_counters_copied():
    student = unet(norm_op=nn.BatchNorm2d)
    teacher = Teacher(student)
    student.train()(torch.randn(4, 1, 8, 8))
    old = {k: v.clone() for k, v in teacher.network.named_buffers()}
    teacher.average(student, 0.75)
    for name, own in teacher.network.named_buffers():
        new = student.get_buffer(name)
        torch.testing.assert_close(own, new if name.endswith("tracked") else 0.75 * old[name] + 0.25 * new)


def test_teacher_has_no_gradient_one_output_and_keeps_its_dropout():
    student = unet(dropout_op=nn.Dropout2d, dropout_op_kwargs={"p": 0.5}, norm_op=nn.BatchNorm2d)
    teacher = Teacher(student)
    image = torch.randn(2, 1, 8, 8)
    first, second = teacher.network(image), teacher.network(image)
    assert teacher.predict is teacher.network  # not compiled, which would take minutes
    assert isinstance(first, torch.Tensor)
    assert not first.requires_grad
    assert not torch.equal(first, second)
    assert not any(m.training for m in teacher.network.modules() if isinstance(m, nn.BatchNorm2d))
    assert student.decoder.deep_supervision
    assert all(p.requires_grad for p in student.parameters())


def test_pool_replays_a_sequence_computed_by_hand():
    pool = BestModelPool(3)
    sequence = [
        (0.50, 0.0, [0.50]),  # filling: the teacher is the network
        (0.40, 0.0, [0.50, 0.40]),
        (0.60, 0.0, [0.50, 0.40, 0.60]),  # full
        (0.30, 1.0, [0.50, 0.40, 0.60]),  # not better than the minimum 0.40
        (0.40, 1.0, [0.50, 0.40, 0.60]),  # equal is not better
        (0.80, 0.5, [0.50, 0.80, 0.60]),  # 1 - (0.80 - 0.40) / 0.80
        (NAN, 1.0, [0.50, 0.80, 0.60]),  # no foreground in the validation patches
        (0.625, 0.8, [0.625, 0.80, 0.60]),  # 1 - (0.625 - 0.50) / 0.625
        (0.601, 0.99, [0.625, 0.80, 0.601]),  # 1 - (0.601 - 0.6) / 0.601 is more than that
    ]
    for dice, keep, values in sequence:
        assert pool.update(dice) == pytest.approx(keep)
        assert pool.values == values
    assert BestModelPool(3, pool.values).update(1.0) == pytest.approx(0.601)


def test_pool_without_a_measurement_follows_the_network():
    pool = BestModelPool(2)
    assert pool.update(NAN) == 0.0
    assert pool.values == []


def test_smallest_pool_keeps_the_best_value():
    pool = BestModelPool(1)
    assert [pool.update(dice) for dice in (0.5, 0.4, 0.8)] == [0.0, 1.0, pytest.approx(0.5 / 0.8)]
    assert pool.values == [0.8]


@pytest.mark.parametrize(("size", "values"), [(0, []), (1, [0.1, 0.2])])
def test_pool_without_room_is_refused(size, values):
    with pytest.raises(ValueError, match="a pool needs room"):
        BestModelPool(size, values)


class nnUNetTrainerSemiCMLScripted(nnUNetTrainerSemiCML):
    """Measures a given Dice, and remembers the network of every epoch."""

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        vars(self).setdefault("history", []).append(weights(self))

    def on_validation_epoch_end(self, val_outputs):
        dice = [SCRIPT[t.name][self.current_epoch] for t in self.trainers]
        super().on_validation_epoch_end([[validation_outputs(d) for d in dice]])


@pytest.mark.parametrize(
    ("start", "expected_keeps", "pools"),
    [
        # pool of 2; [epochs 0 … 5]; the start is capped at a fifth of the epochs, here 1
        (
            10,
            {"FLAIR": [0, 0, 0, 1 - 0.1 / 0.3, 1 - 0.5 / 0.8, 1 - 0.1 / 0.5], "T1": [0, 0, 0, 1, 0.8, 0.625]},
            {"FLAIR": [0.8, 0.5], "T1": [0.3, 0.4]},
        ),
        (
            0,
            {"FLAIR": [0, 0, 0.5, 1, 0.5, 1], "T1": [0, 0, 0.5, 1, 0.8, 0.625]},
            {"FLAIR": [0.9, 0.8], "T1": [0.4, 0.3]},
        ),
    ],
)
def test_training_averages_the_best_networks(labels_group, results, start, expected_keeps, pools):
    schedule = {"num_epochs": 6, "num_iterations_per_epoch": 1, "bma_start_epoch": start, "bma_pool_size": 2}
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLScripted, **schedule)
    trainer.run_training()
    for m, (name, keeps) in enumerate(expected_keeps.items()):
        expected = {k: torch.zeros_like(v) for k, v in trainer.history[0][m].items()}
        for keep, networks in zip(keeps, trainer.history, strict=True):
            expected = {k: keep * v + (1 - keep) * networks[m][k] for k, v in expected.items()}
        teacher = trainer.teachers[name].network.state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(teacher[key], value, rtol=1e-5, atol=1e-6)
        assert trainer.pools[name].values == pytest.approx(pools[name])


def test_pools_begin_after_the_warm_up(labels_group, results):
    """Of two of six epochs, whose Dice is not among the best, however high; 10 is capped at a fifth of the others."""
    schedule = {"num_epochs": 6, "num_iterations_per_epoch": 1, "warmup_fraction": 1 / 3, "bma_pool_size": 2}
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLScripted, **schedule)
    trainer.run_training()
    for name, values in (("FLAIR", [0.5, 0.8]), ("T1", [0.25, 0.4])):
        assert sorted(trainer.pools[name].values) == pytest.approx(values)


def test_training_averages_over_steps_instead(labels_group, results):
    trainer = initialized(LABELS, "2d", teacher_averaging="ema", ema_decay=0.7, num_iterations_per_epoch=2)
    expected = weights(trainer)
    average = Teacher.average

    def record(self, network, keep):
        average(self, network, keep)
        m = [t.unwrapped_network() for t in trainer.trainers].index(network)
        a = (1 / 2, 2 / 3, 0.7, 0.7)[len(calls) // 2]  # min(1 - 1 / (t + 1), 0.7)
        expected[m] = {k: a * v + (1 - a) * network.state_dict()[k] for k, v in expected[m].items()}
        calls.append(m)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "average", record)
        trainer.run_training()
    assert calls == [0, 1] * 4
    for teacher, values in zip(trainer.teachers.values(), expected, strict=True):
        for key, value in values.items():
            torch.testing.assert_close(teacher.network.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_unknown_averaging_is_refused(labels_group, results):
    with pytest.raises(ValueError, match='must be "bma" or "ema", got \'swa\''):
        initialized(LABELS, "2d", teacher_averaging="swa")


def test_dropout_of_nnunet_is_found(labels_group, results):
    class nnUNetTrainerSemiCMLWithDropout(nnUNetTrainerSemiCML):
        network_trainer = nnUNetTrainerWithDropout

    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLWithDropout)
    modules = list(trainer.teachers["FLAIR"].network.modules())
    assert any(isinstance(m, nn.Dropout2d) and m.training for m in modules)


def test_noise_is_clamped_and_in_units_of_the_image():
    torch.manual_seed(0)
    image = torch.randn(2, 1, 64, 64)
    image[1] = 100 * image[1] + 7
    noise = add_noise(image, 0.1, (0.0, 0.2)) - image
    scale = image.std((1, 2, 3))
    for case, s in zip(noise / scale[:, None, None, None], (1, 2), strict=True):
        assert case.min() >= -1e-5
        assert case.max() == pytest.approx(0.2, abs=1e-4), s
        assert (case < 1e-5).float().mean() == pytest.approx(0.5, abs=0.03)  # the negative half
        assert (case > 0.2 - 1e-4).float().mean() == pytest.approx(0.0228, abs=0.01)  # two standard deviations
    symmetric = add_noise(image, 0.1, (-0.2, 0.2)) - image
    assert (symmetric[1] / scale[1]).std() == pytest.approx(0.0937, abs=0.005)
    both = torch.cat([image[:1], image[1:]], dim=1)  # one standard deviation for all channels of a case
    drawn = (add_noise(both, 0.1, (-0.2, 0.2)) - both) / both.std()
    assert drawn.std((0, 2, 3)).tolist() == pytest.approx([0.0937] * 2, abs=0.01)
    constant = torch.ones(1, 1, 4, 4)
    assert torch.equal(add_noise(constant, 0.1, (0.0, 0.2)), constant)


def test_compiled_teacher_predicts_with_its_averaged_weights(monkeypatch):
    """In inference mode, before and after it has followed a student."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    student, image = unet(), torch.randn(2, 1, 16, 16)
    teacher = Teacher(student, compiled=True)
    for keep in (1.0, 0.0):
        teacher.average(changed(student), keep)
        with torch.inference_mode():
            found = teacher.predict(image)
        assert teacher.predict is not teacher.network
        torch.testing.assert_close(found, teacher.network(image).detach())
