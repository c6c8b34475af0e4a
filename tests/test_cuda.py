"""What only a GPU can show, of every method: `make test-gpu`. Skipped where there is none.

SEMICML_TEST_DEVICE=cpu runs what does not need one on the CPU, to try the tests themselves.
"""

import contextlib
import os
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    LABELS,
    Killed,
    KilledMixin,
    assert_close_gradients,
    change_tensors,
    draw_batches,
    initialized,
    step_gradients,
    unsupervised_terms,
    with_something_seen,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_command_line import FLAIR, SECOND, T1, TRAINER, run, single_modality_scans
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch

DEVICE = torch.device(os.environ.get("SEMICML_TEST_DEVICE", "cuda"))
GPUS = torch.cuda.device_count()
METHODS = [
    method
    for name in semicml_trainers.__all__
    if not name.endswith("epochs") and not hasattr(method := getattr(semicml_trainers, name), "first_stage")
]
SCHEDULE = {"num_epochs": 4, "save_every": 2, "num_iterations_per_epoch": 3}
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not GPUS, reason="no GPU"),
    pytest.mark.usefixtures("groups"),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
each_configuration = pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")


def make(method, configuration, device=DEVICE, **attributes):
    """An initialized trainer, with the same weights at every call."""
    dataset = LABELS if method.min_modalities > 1 else FLAIR
    return initialized(dataset, configuration, method, device=device, **SCHEDULE, **attributes)


def on_cpu(trainer):
    return [p.detach().cpu().clone() for t in trainer.trainers for p in t.unwrapped_network().parameters()]


def apart(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def last_epoch(trainer):
    """Ramps are over, and the scaler, which starts so high that first steps overflow, is where it comes to rest."""
    trainer.current_epoch = trainer.num_epochs - 1
    if trainer.grad_scaler is not None:
        trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    return trainer


def unscaled_gradients(trainer, batch):
    """Those of a step in the scale of float32."""
    torch.manual_seed(2)
    _, found = step_gradients(trainer, batch)
    scale = 1.0 if trainer.grad_scaler is None else trainer.grad_scaler.get_scale()
    return [[g / scale for g in of_network] for of_network in found]


@each_method
@each_configuration
def test_training_in_float16_resumes_as_if_it_had_not_been_interrupted(method, configuration, monkeypatch):
    monkeypatch.setenv("nnUNet_semicml_seed", "3")

    class Interrupted(KilledMixin, method):
        pass

    Interrupted.__name__ = method.__name__
    whole = make(method, configuration)
    start = on_cpu(whole)
    whole.run_training()
    killed = make(Interrupted, configuration)
    with contextlib.suppress(Killed):
        killed.run_training()
    resumed = make(method, configuration)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    end, again = on_cpu(whole), on_cpu(resumed)
    assert all(w.isfinite().all() for w in end)
    assert apart(start, end) > 0
    # kernels of CUDA may add in any order
    assert apart(end, again) <= 0.01 * apart(start, end)
    if whole.grad_scaler is not None:
        assert whole.grad_scaler.get_scale() >= 2**8


@each_method
@each_configuration
def test_activations_recomputed_or_held_give_the_same_gradients(method, configuration):
    trainer = last_epoch(with_something_seen(make(method, configuration)))
    (batch,) = draw_batches(trainer, 1)
    found = []
    for trainer.recompute in (False, True):
        found.append(unscaled_gradients(trainer, batch))
    assert all(g.isfinite().all() for of_network in found[0] for g in of_network)
    assert_close_gradients(*found, tolerance=2e-3)


@each_method
@each_configuration
def test_terms_are_those_of_the_cpu(method, configuration):
    if not method.term_weights:
        pytest.skip("has no terms")
    trainers = {}
    for device in (torch.device("cpu"), DEVICE):
        trainers[device.type] = last_epoch(with_something_seen(make(method, configuration, device, noise_std=0.0)))
    cpu, gpu = trainers["cpu"], trainers[DEVICE.type]
    for a, b in zip(gpu.trainers, cpu.trainers, strict=True):
        a.unwrapped_network().load_state_dict(b.unwrapped_network().state_dict())
    gpu.set_method_state(cpu.get_method_state())
    (batch,) = draw_batches(cpu, 1)
    found = []
    for trainer in (cpu, gpu):
        torch.manual_seed(2)
        found.append({name: term.item() for name, term in unsupervised_terms(trainer, batch).items()})
    if method.__name__ in ("nnUNetTrainerFixMatch", "nnUNetTrainerUniMatch", "nnUNetTrainerUAMT"):
        assert found[0].keys() == found[1].keys()  # what they draw on a GPU is not what they draw on the CPU
    else:
        assert found[1] == pytest.approx(found[0], rel=0.05, abs=1e-3)


@needs_gpu
@each_method
def test_a_step_waits_for_the_gpu_no_more_often_than_the_steps_of_stock_nnunet(method):
    trainer = make(method, "2d")
    (batch,) = draw_batches(trainer, 1)
    batch = change_tensors(batch, torch.Tensor.pin_memory)
    stock = {t.name: p for t, p in zip(trainer.trainers, trainer.labeled_patches(batch).values(), strict=True)}

    def stock_steps():
        for t in trainer.trainers:
            nnUNetTrainer.train_step(t, {"data": stock[t.name].image, "target": stock[t.name].target})

    counts = []
    for step in (lambda: trainer.train_step(batch), stock_steps):
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[0] <= counts[1] + len(method.term_weights)


@needs_gpu
def test_batches_come_in_pinned_memory(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    training, validation = make(nnUNetTrainerSemiCML, "2d").get_dataloaders()
    try:
        seen = []
        change_tensors(next(training), seen.append)
        assert len(seen) >= 4
        assert all(tensor.is_pinned() for tensor in seen)
    finally:
        for loader in (training, validation):
            loader._finish()


@needs_gpu
@pytest.mark.parametrize("method", [nnUNetTrainerSemiCML, nnUNetTrainerUniMatch], ids=lambda m: m.__name__)
@each_configuration
def test_compiled_networks_have_the_gradients_of_eager_ones(method, configuration, monkeypatch):
    # As in a process of its own: once the datasets of other tests had made the number of classes dynamic, inductor of
    # PyTorch 2.11 failed on nnU-Net's compiled Dice loss.
    torch._dynamo.reset()
    eager = last_epoch(make(method, configuration))
    (batch,) = draw_batches(eager, 1)
    monkeypatch.setenv("nnUNet_compile", "t")
    compiled = last_epoch(make(method, configuration))
    assert all(isinstance(t.network, OptimizedModule) for t in compiled.trainers)
    assert_close_gradients(
        *(unscaled_gradients(trainer, batch) for trainer in (eager, compiled)),
        tolerance=0.05,
    )
    compiled.train_step(batch)


@needs_gpu
def test_nccl_averages_the_gradients_of_one_process(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29511")
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        trainer = make(nnUNetTrainerSemiCML, "2d")
        assert trainer.is_ddp
        trainer.run_training()
        assert all(w.isfinite().all() for w in on_cpu(trainer))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("num_gpus", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="one GPU"))])
def test_both_stages_are_trained_and_deployed_by_command_lines(num_gpus, nnunet_folders, tmp_path, monkeypatch):
    """On the GPU, as users do it; with two, by NCCL."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).with_name("trainers")))
    on_device = ["-device", DEVICE.type]
    for trainer in (TRAINER, SECOND):
        words = [LABELS, "2d", 0, "-tr", trainer, *on_device]
        run("nnUNetv2_train", *words, *(["-num_gpus", num_gpus] if num_gpus > 1 else []))
    monkeypatch.delenv("nnUNet_extTrainer")  # whoever predicts needs nothing of this package
    scans = single_modality_scans(tmp_path / "scans", 1)
    model = ["-d", T1, "-c", "2d", "-f", 0, "-tr", SECOND]
    run("nnUNetv2_predict", "-i", scans, "-o", tmp_path / "out", *model, *on_device)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list(scans.iterdir())) > 0
