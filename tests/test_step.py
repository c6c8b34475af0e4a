"""What a step computes, when and at which precision, and in how much memory; in this process."""

from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import (
    LABELS,
    SETTINGS,
    ArchitectureMixin,
    assert_close_gradients,
    assert_step_equals_reference,
    draw_batches,
    gradients,
    initialized,
    labeled_of,
    nnUNetTrainerCompiled,
    nnUNetTrainerWide,
    reference_gradients,
    step_gradients,
    unlabeled_of,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.profiler import profile

from benchmarks.cost.memory import peak_memory
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training.conductor import LabeledPatches
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised

# micro-batches, held and recomputed activations


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_micro_batches_give_the_gradients_of_the_formula(groups, dataset, configuration, micro_batch_size):
    """Labeled and unlabeled cases, batch Dice (2d) or not, and a last pass that is not full."""
    pairs = combinations([m.unlabeled.keys() for m in groups[dataset].modalities], 2)
    unlabeled = min(len(a & b) for a, b in pairs)  # those that every pair of modalities has
    trainer = initialized(dataset, configuration, rampup_fraction=0.0, asc_cases=unlabeled, unlabeled_batch_size=2)
    trainer.micro_batch_size = micro_batch_size
    (batch,) = draw_batches(trainer, 1)
    assert {len(patches["cases"]) for patches in batch["unlabeled"]} == {unlabeled}
    assert_step_equals_reference(trainer, batch)


def test_contrasted_cases_are_independent_of_the_batch(groups):
    logits = {name: torch.randn(4, 3, 8, 8) for name in ("FLAIR", "T1")}
    for attributes, drawn in (
        ({"asc_cases": 4, "unlabeled_batch_size": 2}, 4),
        ({"asc_cases": 2, "unlabeled_batch_size": 4}, 4),
    ):
        trainer = initialized(LABELS, "2d", **attributes)
        (batch,) = draw_batches(trainer, 1)
        assert len(unlabeled_of(batch, "T1")) == drawn
        terms = {}
        for name, cases in (("asc", attributes["asc_cases"]), ("mse", attributes["unlabeled_batch_size"])):
            terms[name] = initialized(LABELS, "2d", unlabeled_batch_size=cases).unsupervised_terms(
                [{m: z[:cases] for m, z in logits.items()}], None
            )[name]
        torch.testing.assert_close(trainer.unsupervised_terms([logits], None), terms)


@pytest.mark.parametrize("cases", [1, 5])
def test_impossible_number_of_contrasted_cases_is_refused(groups, cases):
    with pytest.raises(ValueError, match=f"between 2 and 4, since there are no more unlabeled cases .* got {cases}"):
        initialized(LABELS, "2d", asc_cases=cases)


@pytest.mark.parametrize(
    ("attributes", "how", "reason"),
    [
        ({}, "held until", "4 unlabeled cases, 4 at a time"),
        ({"unlabeled_batch_size": 5}, "recomputed in", "5 unlabeled cases, 4 at a time"),
        ({"recompute": True}, "recomputed in", "as set"),
        ({"recompute": False, "micro_batch_size": 1}, "held until", "as set"),
    ],
)
def test_what_happens_to_activations_is_chosen_and_the_reason_logged(groups, attributes, how, reason):
    trainer = initialized(LABELS, "2d", **attributes)
    assert f"Activations are {how} the backward pass: {reason}." in Path(trainer.log_file).read_text()


class nnUNetTrainerBatchNorm(ArchitectureMixin, nnUNetTrainer):
    @staticmethod
    def changes(kwargs, dimensions):
        return {"norm_op": f"torch.nn.BatchNorm{dimensions}d"}


class nnUNetTrainerSemiCMLBatchNorm(nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerBatchNorm


def test_batch_normalization_holds_activations(groups):
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLBatchNorm, unlabeled_batch_size=6)
    assert not trainer.recompute
    with pytest.raises(NotImplementedError, match="Batch normalization does not work with recompute"):
        initialized(LABELS, "2d", nnUNetTrainerSemiCMLBatchNorm, recompute=True)


def count_forwards(module, counter, name):
    counter[name] = 0

    def count(*_):
        counter[name] += 1

    module.register_forward_hook(count)


@pytest.mark.parametrize(
    ("recompute", "unlabeled", "forwards", "outputs"),
    [
        (False, 4, [2, 2], 2),  # one of labeled, one of unlabeled cases
        (True, 4, [3, 2], 2),  # the last network keeps its activations; recomputing stops before the output
        (True, 8, [5, 5], 3),  # two micro-batches each, and both again
    ],
)
def test_no_forward_pass_and_no_output_is_computed_in_vain(groups, recompute, unlabeled, forwards, outputs):
    trainer = initialized(LABELS, "2d", recompute=recompute, unlabeled_batch_size=unlabeled)
    (batch,) = draw_batches(trainer, 1)
    counter = {}
    for t in trainer.trainers:
        count_forwards(t.network.encoder, counter, t.name)
        count_forwards(t.network.decoder.seg_layers[0], counter, f"{t.name} coarse output")
        count_forwards(t.network.decoder.seg_layers[-1], counter, f"{t.name} output")
    trainer.train_step(batch)
    for t, number in zip(trainer.trainers, forwards, strict=True):
        assert counter[t.name] == number
        assert counter[f"{t.name} coarse output"] == 1  # of the labeled cases
        assert counter[f"{t.name} output"] == outputs
        assert t.network.decoder.deep_supervision


@pytest.mark.parametrize("recompute", [False, True])
def test_step_never_waits_for_a_value(groups, recompute):
    """On a GPU each of these operations would stop the host until all work is done."""
    trainer = initialized(LABELS, "3d_fullres", recompute=recompute)
    (batch,) = draw_batches(trainer, 1)
    with profile() as profiler:
        trainer.train_step(batch)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::mm" in names  # the Gram matrix: something was recorded
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class nnUNetTrainerSemiCMLWide(nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerWide


@pytest.mark.parametrize("cases", [2, 4])
def test_recomputing_holds_the_activations_of_one_stock_step(groups, cases):
    trainer = initialized(LABELS, "3d_fullres", nnUNetTrainerSemiCMLWide, recompute=True, asc_cases=cases)
    (batch,) = draw_batches(trainer, 1)
    data, target = labeled_of(batch)["FLAIR"]

    def stock():
        trainer._supervised_step(trainer.trainers[0], LabeledPatches(data, target))

    def coupled():
        step_gradients(trainer, batch)

    coupled()  # from here on the gradients are there
    assert peak_memory(coupled) < 1.1 * peak_memory(stock)
    trainer.recompute = False
    assert peak_memory(coupled) > 1.5 * peak_memory(stock)


# precision


class nnUNetTrainerSemiCMLBFloat16(nnUNetTrainerSemiCML):
    """What CUDA does in float16, on the CPU in bfloat16."""

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)
def test_autocast_step_equals_its_reference(groups, dataset, configuration):
    trainer = initialized(dataset, configuration, nnUNetTrainerSemiCMLBFloat16, rampup_fraction=0.0)
    (batch,) = draw_batches(trainer, 1)
    networks = [next(m for m in t.network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)) for t in trainer.trainers]
    dtypes = []
    for convolution in networks:
        convolution.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    assert_step_equals_reference(trainer, batch, tolerance=1e-5)
    assert set(dtypes) == {torch.bfloat16}
    for t in trainer.trainers:
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in t.network.parameters())
        # a cast weight that was cached without gradient would have cut the gradient off
        head = t.network.decoder.seg_layers[-1].weight
        assert head.grad.any()


def test_autocast_gradient_is_that_of_float32_to_its_precision(groups):
    (half, full) = (
        initialized(LABELS, "3d_fullres", trainer_class, rampup_fraction=0.0, recompute=True)
        for trainer_class in (nnUNetTrainerSemiCMLBFloat16, nnUNetTrainerSemiCML)
    )
    (batch,) = draw_batches(full, 1)
    assert_close_gradients(step_gradients(full, batch)[1], step_gradients(half, batch)[1], tolerance=0.05)


# compilation


class nnUNetTrainerSemiCMLCompiled(nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerCompiled


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_compiled_networks_learn_the_same(groups, monkeypatch, configuration, recompute):
    """Traced and differentiated by torch.compile; without its code generation, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    eager, compiled = (
        initialized(LABELS, configuration, trainer_class, rampup_fraction=0.0, recompute=recompute)
        for trainer_class in (nnUNetTrainerSemiCML, nnUNetTrainerSemiCMLCompiled)
    )
    assert all(isinstance(t.network, OptimizedModule) for t in compiled.trainers)
    for t, reference in zip(compiled.trainers, eager.trainers, strict=True):
        t.unwrapped_network().load_state_dict(reference.network.state_dict())
    recompiled = []
    for batch in draw_batches(eager, 2):
        assert_close_gradients(reference_gradients(eager, batch)[1], step_gradients(compiled, batch)[1])
        recompiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert recompiled[0] > 0
    assert recompiled[1] == recompiled[0]  # switching deep supervision off and on again compiles nothing anew
    compiled.run_training()
    assert all(g.isfinite().all() for of_network in gradients(compiled) for g in of_network)
    assert "_orig_mod" not in str(compiled.trainers[0].get_state()["network_weights"].keys())


def test_own_prediction_is_that_of_the_network(groups):
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiSupervised)
    (t, _), images = trainer.trainers, torch.randn(5, 1, *trainer.configuration_manager.patch_size)
    for trainer.micro_batch_size in (None, 2):
        found = trainer.own_prediction(t, images)
        assert not found.requires_grad
        torch.testing.assert_close(found, t.network(images)[0].softmax(1).detach())
    assert t.network.decoder.deep_supervision
