"""Training on several GPUs (-num_gpus): two gloo processes on the CPU, compared with one process and each other."""

import contextlib
import os
import shutil
import socket
from pathlib import Path

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as nnunet_trainer_module
import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    PATTERNS,
    Killed,
    KilledMixin,
    assert_close_gradients,
    assert_identical,
    change_tensors,
    draw_batches,
    final_checkpoint,
    gradients,
    initialized,
    make_trainer,
    step_gradients,
    weights,
)
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import masked_consistency
from nnunetv2_semicml.losses.soft_pseudo_label import confidence, soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.trainers.nnUNetTrainerFilterMatch import nnUNetTrainerFilterMatch
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch

RANKS = 2
SCHEDULE = {"num_epochs": 4, "save_every": 2, "bma_pool_size": 1, "rampup_fraction": 0.5, "unlabeled_batch_size": 4}
FIXED = {"rampup_fraction": 0.0, "asc_cases": 4, "unlabeled_batch_size": 2}  # of Semi-CML, for gradients
EXAMPLES = {
    "2d": (LABELS, "2d", FIXED),
    "3d_fullres": (LABELS, "3d_fullres", FIXED),
    "incomplete": (PATTERNS, "2d", {"rampup_fraction": 0.0, "unlabeled_batch_size": 2}),  # a draw for every pair
}
SECOND_STAGE = {"noise_std": 0.0, "teacher_passes": 1, "join_fraction": 1.0, **FIXED}


class OnCPU:
    """nnU-Net takes a CUDA device for every process."""

    device = property(lambda self: torch.device("cpu"), lambda self, value: None)


class nnUNetTrainerOnCPU(OnCPU, nnUNetTrainer):
    pass


class nnUNetTrainerSemiCMLOnCPU(OnCPU, KilledMixin, nnUNetTrainerSemiCML):
    network_trainer = nnUNetTrainerOnCPU


class nnUNetTrainerSECLAnatomicalOnCPU(OnCPU, nnUNetTrainerSECLAnatomical):
    network_trainer = nnUNetTrainerOnCPU


class nnUNetTrainerSemiCMLPlusOnCPU(OnCPU, nnUNetTrainerSemiCMLPlus):
    network_trainer = nnUNetTrainerOnCPU


class nnUNetTrainerUniMatchOnCPU(OnCPU, nnUNetTrainerUniMatch):
    network_trainer = nnUNetTrainerOnCPU


class nnUNetTrainerFilterMatchOnCPU(OnCPU, nnUNetTrainerFilterMatch):
    network_trainer = nnUNetTrainerOnCPU


OTHERS = {
    "Semi-CML Plus": (nnUNetTrainerSemiCMLPlusOnCPU, {}),
    "UniMatch": (nnUNetTrainerUniMatchOnCPU, {}),
    "nnFilterMatch": (nnUNetTrainerFilterMatchOnCPU, {"filtered_share": 0.5}),
}


class nnUNetTrainerSemiCMLPReLOnCPU(OnCPU, nnUNetTrainerSemiCMLPReL):
    first_stage = nnUNetTrainerSemiCMLOnCPU


def second_stage(**attributes):
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPReLOnCPU, **attributes)
    trainer._start_from_first_stage()
    return trainer


# what every process does


def example_losses(slices, distributed):
    """Losses of random predictions and their gradients on some cases."""
    torch.manual_seed(0)
    logits = [torch.randn(4, 3, 6, 6)[slices].requires_grad_() for _ in range(3)]
    target = torch.randn(4, 3, 6, 6).softmax(1)[slices]
    predictions = [z.softmax(1) for z in logits]
    asc = AreaSimilarityContrastiveLoss(0.5, distributed=distributed)
    losses = {
        "asc": asc([p[:, 1:] for p in predictions]),
        "asc to a constant": asc([target[:, 1:], predictions[0][:, 1:]]),
        "ce": soft_cross_entropy(logits[0], target, False, distributed=distributed),
        "ce weighted": soft_cross_entropy(logits[0], target, False, confidence(target, False), distributed),
        "dice": soft_dice_loss(predictions[0], target, False, distributed=distributed),
        "masked mse": masked_consistency(predictions[0], target, target > 0.3, distributed),
        "batch dice": soft_dice_loss(predictions[0], target, True, confidence(target, False), distributed=distributed),
    }
    unused = [torch.zeros_like(z) for z in logits]
    found = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        grads = [g if g is not None else zero for g, zero in zip(grads, unused, strict=True)]
        found[name] = (loss.detach(), grads)
    return found


def averaged_gradients(trainer, batch):
    """Of one step with activations held and recomputed, on this process's share of a batch."""
    rank, found = dist.get_rank(), {}
    share = change_tensors(batch, lambda tensor: tensor.chunk(RANKS)[rank])
    for trainer.recompute in (False, True):
        step_gradients(trainer, share)
        for t in trainer.trainers:
            for work in trainer._average_gradients(t):
                work.wait()
        found[trainer.recompute] = gradients(trainer)
    return found


def process(rank, folder, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    MetaLogger.plot_progress_png = lambda self, folder: None
    nnunet_trainer_module.DDP = lambda network, device_ids: DistributedDataParallel(network)  # device_ids are GPUs
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    batches = torch.load(folder / "batches.pt", weights_only=False)
    found = {"losses": example_losses(slice(2 * rank, 2 * rank + 2), distributed=True)}
    os.environ["nnUNet_results"] = str(folder / "examples")  # others may train the same

    for name, (dataset, configuration, attributes) in EXAMPLES.items():
        os.environ["nnUNet_semicml_seed"] = "0"
        trainer = initialized(dataset, configuration, nnUNetTrainerSemiCMLOnCPU, **attributes)
        found[name] = (weights_without_wrapper(trainer), averaged_gradients(trainer, batches[name]))

    def run(name, kill_at):
        os.environ["nnUNet_results"] = str(folder / name)
        return make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLOnCPU, **SCHEDULE, kill_at=kill_at)

    whole = run("whole", kill_at=-1)
    whole.run_training()
    found["drawn"] = set(whole.dataloader_train.data_loader.loaders["unlabeled"][0].indices)
    found["trained"] = {
        "weights": weights_without_wrapper(whole),
        "method": whole.get_method_state(),
        "log": whole.logger.get_checkpoint(),
        "terms": whole.unsupervised_weights(),
    }
    killed = run("parts", kill_at=2)
    with contextlib.suppress(Killed):
        killed.run_training()
    os.environ["nnUNet_semicml_seed"] = "1"  # must not matter any more
    resumed = run("parts", kill_at=-1)
    dist.barrier()
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    found["resumed"] = weights_without_wrapper(resumed)

    os.environ["nnUNet_results"] = str(folder / "whole")
    stage = second_stage(**SECOND_STAGE)
    found["second stage"] = averaged_gradients(stage, batches["2d"])
    stage = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReLOnCPU, join_fraction=0.5, unlabeled_batch_size=4)
    stage.run_training()
    found["second stage trained"] = {
        "weights": weights_without_wrapper(stage),
        "better modality": stage.better_modality,
        "method": stage.get_method_state(),
    }
    stage.perform_actual_validation()
    secl = make_trainer("Dataset501_Labels_FLAIR", "2d", nnUNetTrainerSECLAnatomicalOnCPU, rampup_fraction=0.0)
    secl.run_training()  # seeds differ by rank, so that the projection heads do at first
    found["SECL trained"] = {"weights": weights_without_wrapper(secl), "method": secl.get_method_state()}
    for name, (trainer_class, attributes) in OTHERS.items():
        other = make_trainer(LABELS, "2d", trainer_class, **attributes)
        other.run_training()
        state, log = other.get_method_state(), other.logger.get_checkpoint()
        found[f"{name} trained"] = {"weights": weights_without_wrapper(other), "method": state, "log": log}
    torch.save(found, folder / f"found_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def weights_without_wrapper(trainer):
    return [{k: v.clone() for k, v in t.unwrapped_network().state_dict().items()} for t in trainer.trainers]


# what comes of it


@pytest.fixture(scope="module")
def batches(labels_group, patterns_group):
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        for name, (dataset, configuration, attributes) in EXAMPLES.items():
            trainer = initialized(dataset, configuration, **attributes)
            (found[name],) = draw_batches(trainer, 1)
    return found


@pytest.fixture(scope="module")
def ranks(labels_group, batches, tmp_path_factory):
    """What the processes found, and the folder of their results."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(batches, folder / "batches.pt")
    for name in ("examples", "whole", "parts"):
        (folder / name).mkdir()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        torch.multiprocessing.spawn(process, args=(folder, port), nprocs=RANKS)
    return folder, [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_losses_are_those_of_the_joint_batch(ranks):
    _, found = ranks
    for name, (loss, grads) in example_losses(slice(0, 4), distributed=False).items():
        here = [f["losses"][name] for f in found]
        torch.testing.assert_close(sum(loss for loss, _ in here) / RANKS, loss)
        for i, gradient in enumerate(grads):
            joint = torch.cat([g[i] for _, g in here]) / RANKS  # the gradients will be averaged
            torch.testing.assert_close(joint, gradient)
    assert any(g.any() for g in grads)


def reordered(batch):
    """A joint batch whose unlabeled batch is that of all ranks: the first half of each rank's cases."""

    def reorder(tensor):
        shares = tensor.chunk(RANKS)
        return torch.cat([*(share[:1] for share in shares), *(share[1:] for share in shares)])

    return {**batch, "unlabeled": change_tensors(batch["unlabeled"], reorder)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("example", ["2d", "3d_fullres", "incomplete"])
def test_gradients_are_those_of_one_process_with_the_joint_batch(ranks, batches, results, example, recompute):
    dataset, configuration, attributes = EXAMPLES[example]
    trainer = initialized(dataset, configuration, **attributes)
    first_weights, _ = ranks[1][0][example]
    for t, w in zip(trainer.trainers, first_weights, strict=True):
        t.network.load_state_dict(w)
    _, expected = step_gradients(trainer, reordered(batches[example]))
    for found in ranks[1]:
        own_weights, found_gradients = found[example]
        assert_identical(own_weights, first_weights)
        assert_close_gradients(expected, found_gradients[recompute])


@pytest.mark.parametrize("recompute", [False, True])
def test_second_stage_has_the_gradients_of_one_process(ranks, batches, results, recompute):
    folder, found = ranks
    shutil.copytree(folder / "whole" / LABELS, results / LABELS)
    trainer = second_stage(**SECOND_STAGE)
    _, expected = step_gradients(trainer, reordered(batches["2d"]))
    for of_rank in found:
        # the bias of a convolution before a normalization has no gradient but rounding errors
        assert_close_gradients(expected, of_rank["second stage"][recompute], tolerance=2e-4)


@pytest.mark.parametrize(
    "what", ["trained", "second stage trained", "resumed", "SECL trained", *(f"{n} trained" for n in OTHERS)]
)
def test_all_ranks_end_with_the_same(ranks, what):
    """Networks, teachers, projection heads, pools, ramp, log and the choice of the better modality."""
    first, second = (f[what] for f in ranks[1])
    for log in (f.get("log", {}) for f in (first, second) if isinstance(f, dict)):
        for key in ("epoch_start_timestamps", "epoch_end_timestamps"):
            log.pop(key, None)
    assert_identical(first, second)


def test_cases_are_left_out_by_all_ranks_together(ranks, labels_group):
    """Half of all, whichever rank has drawn from them; and what vanishes is measured over all patches."""
    first, second = (f["nnFilterMatch trained"] for f in ranks[1])
    for name, kept in first["method"]["kept"].items():
        assert len(kept) == len(labels_group.unlabeled) / 2
        assert kept == second["method"]["kept"][name]
        for kind in ("pseudo", "labeled"):
            assert not np.isnan(first["log"][f"{kind}_volume/{name}"]).any()


def test_ranks_draw_from_different_cases(ranks, labels_group):
    drawn = [f["drawn"] for f in ranks[1]]
    assert not drawn[0] & drawn[1]
    assert drawn[0] | drawn[1] == set(labels_group.unlabeled)


def test_resumed_training_equals_uninterrupted_training(ranks):
    folder, found = ranks
    for of_rank in found:
        assert_identical(of_rank["trained"]["weights"], of_rank["resumed"])
    assert not list(folder.rglob("*.tmp"))


def test_checkpoints_and_pictures_are_those_of_one_process(ranks):
    """Readable by one process, which goes on from them; written once."""
    folder, found = ranks
    model = "nnUNetTrainerSemiCMLOnCPU__nnUNetPlans__2d/fold_0"
    for dataset in (LABELS, "Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"):
        files = {f.name for f in (folder / "whole" / dataset / model).iterdir()}
        assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= files
        assert len([f for f in files if f.startswith("training_log")]) == 1
    joint = torch.load(folder / "whole" / LABELS / model / "checkpoint_final.pth", weights_only=True)
    assert len(joint["random_states"]) == RANKS
    assert_identical([dict(m["network_weights"]) for m in joint["modalities"].values()], found[0]["trained"]["weights"])
    for dataset in ("Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"):
        second = model.replace("SemiCML", "SemiCMLPReL")
        assert (folder / "whole" / dataset / second / "validation" / "summary.json").is_file()


def test_batch_that_cannot_be_shared_out_is_refused(labels_group, results, monkeypatch):
    """nnU-Net's own batch Dice gathers shares of different size, and breaks."""
    for name, value in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 0)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(NotImplementedError, match=r"4 cases do not fit -num_gpus 3\. Choose a divisor"):
        make_trainer(LABELS, "2d")


def test_one_process_goes_on_from_the_checkpoint_of_two(ranks, results):
    folder, found = ranks
    shutil.copytree(folder / "whole" / LABELS, results / LABELS)
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLOnCPU, **{**SCHEDULE, "num_epochs": 5}, kill_at=-1)
    trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert_identical(weights(trainer), found[0]["trained"]["weights"])
    trainer.run_training()
    assert final_checkpoint(trainer)["current_epoch"] == 5
