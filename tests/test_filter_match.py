"""nnFilterMatch: turned pseudo-labeled patches in the labeled batch, and fewer unlabeled cases by and by."""

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from conftest import (
    LABELS,
    draw_batches,
    final_checkpoint,
    initialized,
    labeled_of,
    unlabeled_of,
    with_something_seen,
)
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_semicml.data.modality_group import preprocessed_folder
from nnunetv2_semicml.trainers.nnUNetTrainerFilterMatch import nnUNetTrainerFilterMatch

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"
pytestmark = pytest.mark.usefixtures("groups")


@pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])
def test_turned_patches_join_under_what_the_network_segments_in_them(dataset, configuration):
    """At every resolution by nnU-Net's own rule."""
    trainer = with_something_seen(initialized(dataset, configuration, nnUNetTrainerFilterMatch))
    (t,) = trainer.trainers
    (batch,) = draw_batches(trainer, 1)
    (image, target), unlabeled = labeled_of(batch)[t.name], unlabeled_of(batch, t.name)
    with torch.no_grad():
        z = t.network(unlabeled)[0]
    if trainer.label_manager.has_regions:
        full = (z > 0).float()
        extra = target[0].shape[1] - full.shape[1]  # where to ignore, for a dataset that has it
        full = torch.cat([full, torch.zeros_like(full[:, :extra])], 1)
    else:
        full = z.argmax(1, keepdim=True).float()
    downsample = DownsampleSegForDSTransform(t._get_deep_supervision_scales())
    turns = set()
    trainer.mirror_from = 0.0
    for _ in range(12):
        joined = trainer.labeled_views(trainer.labeled_patches(batch), trainer.unlabeled_draws(batch))[t.name]
        assert torch.equal(joined.image[: len(image)], image)
        turned = joined.image[len(image) :]
        possible = [(k, axes) for k in (1, 2, 3) for axes in ((), (-1,), (-2,), (-1, -2))]
        turn, *_ = (t for t in possible if torch.equal(turned, unlabeled.rot90(t[0], (-2, -1)).flip(t[1])))
        turns.add(turn)
        labels = full.rot90(turn[0], (-2, -1)).flip(turn[1])
        for scale, own in zip(joined.target, target, strict=True):
            assert torch.equal(scale[: len(image)], own)
            assert scale.dtype == own.dtype
        for case, of_case in enumerate(labels):
            for scale, expected in zip(joined.target, downsample(segmentation=of_case)["segmentation"], strict=True):
                assert torch.equal(scale[len(image) + case].float(), expected)
    assert len(turns) > 2


def test_turns_are_those_that_were_published():
    trainer = initialized(FLAIR, "2d", nnUNetTrainerFilterMatch, num_epochs=30)
    assert trainer.warmup_epochs == 2
    for trainer.current_epoch, mirrored in ((9, False), (10, True)):
        drawn = [trainer.draw_turn((8, 8)) for _ in range(200)]
        assert {k for k, _ in drawn} == {1, 2, 3}
        axes = {tuple(a) for _, a in drawn}
        assert axes == ({(), (-1,), (-2,), (-1, -2)} if mirrored else {()})
        for patch in ((8, 9), (9, 9, 8)):  # the batch has one size
            assert {k for k, _ in (trainer.draw_turn(patch) for _ in range(20))} == {2}
        assert {k for k, _ in (trainer.draw_turn((9, 8, 8)) for _ in range(200))} == {1, 2, 3}
    (batch,) = draw_batches(trainer, 1)
    labeled = trainer.labeled_patches(batch)
    trainer.current_epoch = 1
    assert trainer.labeled_views(labeled, trainer.unlabeled_draws(batch)) is labeled


@pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "3d_fullres"), (REGIONS_T1, "3d_fullres")])
def test_entropy_is_that_of_the_prediction_of_whole_cases(dataset, configuration):
    """Cases of one patch, without test time mirroring: the network sees them padded, as nnU-Net's predictor does."""
    trainer = with_something_seen(initialized(dataset, configuration, nnUNetTrainerFilterMatch))
    (t,) = trainer.trainers
    t.inference_allowed_mirroring_axes = None
    cases = trainer.kept[t.name]
    found = trainer.entropies(t, cases)
    folder = str(preprocessed_folder(dataset) / "nnUNetPlans_3d_fullres_unlabeled")
    data = infer_dataset_class(folder)(folder, cases)
    patch = trainer.configuration_manager.patch_size
    for case, value in zip(cases, found, strict=True):
        image = torch.from_numpy(np.asarray(data.load_case(case)[0][:]))
        missing = [max(0, n - m) for n, m in zip(patch, image.shape[1:], strict=True)]
        if any(m > n for n, m in zip(patch, image.shape[1:], strict=True)):
            continue
        pad = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        with torch.no_grad():
            z = t.network(torch.nn.functional.pad(image[None], pad))[0]
        inside = [slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:], strict=True)]
        z = z[(..., *inside)].double()
        if trainer.label_manager.has_regions:
            expected = (torch.nn.functional.softplus(z) - z * z.sigmoid()).sum()
        else:
            expected = -(z.softmax(1) * z.log_softmax(1)).sum()
        assert value == pytest.approx(float(expected), rel=2e-3)  # nnU-Net adds up half-precision logits
    assert len({round(value) for value in found}) > 1
    assert t.network.training


def test_surest_cases_are_left_out_of_the_stream(monkeypatch, capsys):
    """The 15th percentile, after every third of the schedule, for every modality by itself, and in checkpoints."""
    trainer = initialized(LABELS, "2d", nnUNetTrainerFilterMatch, num_epochs=3, num_iterations_per_epoch=1)
    order = {"FLAIR": [3.0, 1.0, 4.0, 2.0], "T1": [1.0, 2.0, 3.0, 4.0]}
    names = list(trainer.kept["FLAIR"])
    values = {m: dict(zip(names, of, strict=True)) for m, of in order.items()}
    monkeypatch.setattr(trainer, "entropies", lambda t, cases: [values[t.name][case] for case in cases])
    drawn, step = [], trainer.train_step

    def record(batch):
        drawn.append({name: set(p["cases"]) for p in batch["unlabeled"] for name in p["images"]})
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", record)
    trainer.run_training()
    assert [len(cases["FLAIR"]) for cases in drawn] == [4, 3, 2]
    assert drawn[1] == {"FLAIR": {names[0], names[2], names[3]}, "T1": set(names[1:])}
    assert drawn[2] == {"FLAIR": {names[0], names[2]}, "T1": set(names[2:])}
    assert "FLAIR: patches of 3 of 4 unlabeled cases are drawn from now on" in capsys.readouterr().out
    assert final_checkpoint(trainer)["method"]["kept"] == {"FLAIR": [names[0], names[2]], "T1": names[2:]}


def test_cases_are_left_out_after_every_third_of_the_schedule(monkeypatch):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerFilterMatch, num_epochs=12)
    done = []
    monkeypatch.setattr(trainer, "_filter_cases", lambda t: done.append((trainer.current_epoch, t.name)))
    monkeypatch.setattr(trainer, "restart_training_stream", lambda: None)
    for trainer.current_epoch in range(12):
        trainer.on_epoch_start()
    assert done == [(4, "FLAIR"), (8, "FLAIR")]


def test_a_case_at_the_percentile_is_kept(monkeypatch):
    trainer = initialized(LABELS, "2d", nnUNetTrainerFilterMatch, filtered_share=0.5)
    names = list(trainer.kept["FLAIR"])
    trainer.kept["FLAIR"] = names[:3]
    monkeypatch.setattr(trainer, "entropies", lambda t, cases: [3.0, 1.0, 2.0])
    trainer._filter_cases(trainer.trainers[0])  # the median is the value of a case
    assert trainer.kept["FLAIR"] == [names[0], names[2]]


def test_one_case_may_be_left(monkeypatch):
    trainer = initialized(LABELS, "2d", nnUNetTrainerFilterMatch)
    names = list(trainer.kept["FLAIR"])
    trainer.kept["FLAIR"] = names[:2]
    monkeypatch.setattr(trainer, "entropies", lambda t, cases: [2.0, 1.0])
    for _ in range(2):  # of one case the least sure one is this one
        trainer._filter_cases(trainer.trainers[0])
        assert trainer.kept == {"FLAIR": names[:1], "T1": names}
        monkeypatch.setattr(trainer, "entropies", lambda t, cases: [2.0])


def test_workers_of_the_old_stream_end(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = initialized(FLAIR, "2d", nnUNetTrainerFilterMatch)
    trainer.dataloader_train, validation = trainer.get_dataloaders()
    old = trainer.dataloader_train
    assert isinstance(old, NonDetMultiThreadedAugmenter)
    (name,) = trainer.kept
    trainer.kept[name] = trainer.kept[name][:1]
    trainer.restart_training_stream()
    assert old is not trainer.dataloader_train
    assert not any(process.is_alive() for process in old._processes)
    assert set(next(trainer.dataloader_train)["unlabeled"][0]["cases"]) == set(trainer.kept[name])
    for stream in (trainer.dataloader_train, validation):
        stream._finish()
