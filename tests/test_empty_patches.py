"""Unlabeled patches that show nothing of a modality: float16 cannot differentiate them, so there are none."""

import numpy as np
import pytest
import torch
from conftest import (
    CHANNELS,
    LABELS,
    PATTERNS,
    ArchitectureMixin,
    draw_batches,
    initialized,
    step_gradients,
    unlabeled_of,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.data.streams import PairedDataLoader
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.training.loaders import make_loader


class nnUNetTrainerDeep(ArchitectureMixin, nnUNetTrainer):
    """About as many layers as in real plans."""

    @staticmethod
    def changes(kwargs, dimensions):
        return {"n_conv_per_stage": [4] * kwargs["n_stages"]}


class nnUNetTrainerCrossModalCPSFloat16(nnUNetTrainerCrossModalCPS):
    """What CUDA does, on the CPU."""

    network_trainer = nnUNetTrainerDeep

    def _autocast(self):
        return torch.autocast("cpu", torch.float16)

    def _scale(self, loss):
        return 2**16 * loss  # that of nnU-Net's scaler in the beginning


def crop_beside(dataset, case):
    """The case with its first modality in a third of the slices alone, as if its field of view was smaller."""
    image, segmentation, *rest = dataset._open(case)
    first, *others = image.arrays
    few = np.s_[:, : first.shape[1] // 3]
    image.arrays, segmentation.arrays = [first[few], *others], [segmentation.arrays[0][few], *segmentation.arrays[1:]]
    return image, segmentation, *rest


def narrowed(trainer, monkeypatch):
    """A batch in whose cases most slices of the frame show nothing of the first modality."""
    original = PairedDataLoader.generate_train_batch

    def generate(self):
        if not self._data.labeled:
            self._data.load_case = lambda case: crop_beside(self._data, case)
        return original(self)

    monkeypatch.setattr(PairedDataLoader, "generate_train_batch", generate)
    return draw_batches(trainer, 1)[0]


@pytest.mark.parametrize("dataset", [LABELS, CHANNELS, PATTERNS])
def test_every_unlabeled_patch_shows_something_of_every_modality(groups, monkeypatch, dataset):
    trainer = initialized(dataset, "2d", nnUNetTrainerCrossModalCPS)
    for own in trainer.trainers:
        images = unlabeled_of(narrowed(trainer, monkeypatch), own.name)
        assert (images.flatten(1).std(1) > 0).all()
        assert len({image.sum().item() for image in images}) > 1


def test_patches_are_drawn_again_from_the_same_case(groups):
    """Voxels tell of which case they are."""
    trainer = initialized(LABELS, "2d")
    cases = trainer.group.unlabeled
    loader = make_loader(trainer.trainers, cases, 4, labeled=False, augment=False)
    original = loader._data

    def numbered(case):
        image, *rest = crop_beside(original, case)
        noise = np.random.default_rng(0)
        image.arrays = [cases.index(case) + 1 + 0.5 * noise.random(array.shape) for array in image.arrays]
        return image, *rest

    original.load_case = numbered
    np.random.seed(0)
    batch = loader.generate_train_batch()
    for patches in batch["images"].values():
        assert [cases[int(patch.max()) - 1] for patch in patches] == batch["cases"]


def test_such_a_patch_is_what_float16_cannot_differentiate(groups, monkeypatch):
    """With a patch that shows nothing the gradient is not a number, and without one it is."""
    trainer = initialized(LABELS, "2d", nnUNetTrainerCrossModalCPSFloat16, rampup_fraction=0.0)
    batch = narrowed(trainer, monkeypatch)
    assert all(g.isfinite().all() for of_network in step_gradients(trainer, batch)[1] for g in of_network)
    batch["unlabeled"][0]["images"]["FLAIR"][0] = 0
    assert not all(g.isfinite().all() for g in step_gradients(trainer, batch)[1][0])


def test_case_without_any_contrast_is_drawn_all_the_same(groups, monkeypatch):
    trainer = initialized(LABELS, "2d", nnUNetTrainerCrossModalCPS)
    monkeypatch.setattr(PairedDataLoader, "_is_empty", lambda self, patch: True)
    (batch,) = draw_batches(trainer, 1)
    assert len(unlabeled_of(batch, "T1")) == 4


def test_labeled_patches_are_drawn_once_as_by_nnunet(groups, monkeypatch):
    trainer = initialized(LABELS, "2d")
    monkeypatch.setattr(PairedDataLoader, "_is_empty", lambda self, patch: True)
    loader = make_loader(trainer.trainers, trainer.group.labeled, 4, labeled=True, augment=False)
    drawn, original = [], loader._cut_out
    loader._cut_out = lambda *place: drawn.append(place) or original(*place)
    assert loader.generate_train_batch()["cases"] == [case for case, _ in drawn]
