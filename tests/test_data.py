import json
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from conftest import LABELS, REGIONS, draw_batches, load_plans, make_trainer
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semicml.data.paired_dataset import PairedArray, common_frame
from nnunetv2_semicml.data.streams import PairedTransform

SHAPE = (20, 30, 34)
MARKERS = [(6, 9, 8), (10, 15, 17), (14, 21, 26)]
CROPS = [((2, 3, 1), (18, 28, 33)), ((4, 5, 6), (17, 25, 30))]  # the nonzero box of each modality


def pair_up(images, target_spacing):
    """Stock preprocessing of each modality (1, *SHAPE), 2 mm, alone -> all in the common frame."""
    plans, dataset_json = load_plans("Dataset501_Labels_FLAIR")
    plans["configurations"]["3d_fullres"].update(
        spacing=list(target_spacing), normalization_schemes=["NoNormalization"], use_mask_for_norm=[False]
    )
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    arrays, properties = [], []
    for image in images:
        array, _, own = DefaultPreprocessor(verbose=False).run_case_npy(
            image.astype(np.float32), None, {"spacing": [2.0, 2.0, 2.0]}, manager, configuration, dataset_json
        )
        arrays.append(array)
        properties.append(own)
    frame, offsets = common_frame(
        properties, [a.shape[1:] for a in arrays], manager.transpose_forward, configuration.spacing
    )
    paired = PairedArray(arrays, frame, offsets, np.nan, np.float32)
    return paired[(slice(None), *[slice(0, n) for n in frame])], [p["bbox_used_for_cropping"] for p in properties]


def test_markers_fall_on_the_same_voxel_without_resampling(labels_group):
    images = []
    for low, high in CROPS:
        image = np.zeros((1, *SHAPE))
        image[(0, *[slice(a, b) for a, b in zip(low, high, strict=True)])] = 1
        for marker in MARKERS:
            image[(0, *marker)] = 9
        images.append(image)
    paired, boxes = pair_up(images, (2.0, 2.0, 2.0))
    assert boxes[0] != boxes[1]
    first, second = (np.argwhere(channel == 9) for channel in paired)
    assert len(first) == len(MARKERS)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("spacing", [(1.7, 1.6, 1.9), (2.0, 1.3, 1.3), (2.3, 2.9, 2.6), (1.1, 4.0, 3.1)])
def test_modalities_stay_aligned_with_resampling(labels_group, spacing):
    """The intensity is the world coordinate, so that every voxel of the frame tells where it comes from."""
    rng = np.random.default_rng(0)
    world = 100 + 2.0 * np.indices(SHAPE)  # mm
    in_the_middle, anywhere = [], []
    for _ in range(10):
        axis = rng.integers(3)
        images = []
        for _ in range(2):
            inside = tuple(slice(int(rng.integers(0, 4)), n - int(rng.integers(0, 4))) for n in SHAPE)
            image = np.zeros((1, *SHAPE))
            image[(0, *inside)] = world[(axis, *inside)]
            images.append(image)
        paired, _ = pair_up(images, spacing)
        line = np.moveaxis(paired, axis + 1, -1)
        line = line[:, line.shape[1] // 2, line.shape[2] // 2]  # (2, voxels along the axis)
        apart = np.abs(line[0] - line[1]) / spacing[axis]
        apart = apart[~np.isnan(apart)][2:-2]  # the interpolation bends at the ends
        in_the_middle.append(apart[len(apart) // 2])
        anywhere.append(apart.max())
    assert max(in_the_middle) <= 0.5 + 0.05
    assert max(anywhere) <= 1.0
    assert np.median(anywhere) <= 0.5


def test_markers_stay_together_under_augmentation(labels_group, results):
    """The full stock pipeline: label channels move exactly alike, image markers within the blur of the intensities."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    transforms = loader.data_loader.transforms
    patch = loader.data_loader.patch_size
    geometry_changed = 0
    for seed in range(40):
        torch.manual_seed(seed)
        np.random.seed(seed)
        image = torch.zeros(2, *patch)
        image[:, patch[0] // 2 - 1 : patch[0] // 2 + 2, 9:12, 12:15] = 5.0
        segmentation = (image > 1).to(torch.int16)
        out = transforms(image=image, segmentation=segmentation)
        target = out["segmentation"][0]
        assert torch.equal(target[0], target[1])
        if target[0].any():
            centres = [np.argwhere(np.asarray(c) > 0).mean(0) for c in target]
            peaks = [np.array(np.unravel_index(int(channel.argmax()), channel.shape)) for channel in out["image"]]
            if all(np.abs(p - c).max() <= 3 for p, c in zip(peaks, centres, strict=True)):
                assert np.abs(peaks[0] - peaks[1]).max() <= 3
            geometry_changed += np.abs(centres[0] - [patch[0] // 2, 10, 13]).max() > 2
    assert geometry_changed > 5


def test_intensities_are_drawn_for_each_modality(labels_group, results):
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    torch.manual_seed(1)
    np.random.seed(1)
    same = torch.rand(1, *loader.data_loader.patch_size).repeat(2, 1, 1, 1)
    outputs = [
        loader.data_loader.transforms(image=same.clone(), segmentation=torch.zeros_like(same).to(torch.int16))["image"]
        for _ in range(20)
    ]
    assert sum(not torch.equal(image[0], image[1]) for image in outputs) > 5


def test_each_modality_is_masked_by_its_own_nonzero_region(labels_group, results):
    """FLAIR is skull-stripped and masked, T1 is not; nnU-Net's transform alone would mask both by channel 0."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    flags = [t.configuration_manager.use_mask_for_norm for t in trainer.trainers]
    loader, _ = trainer.get_dataloaders()
    patch = loader.data_loader.patch_size
    segmentation = torch.zeros(2, *patch, dtype=torch.int16)
    segmentation[0, :, :, : patch[2] // 2] = -1
    out = loader.data_loader.unlabeled.transforms(image=torch.ones(2, *patch), segmentation=segmentation)["image"]
    assert flags == [[True], [False]]
    assert (out[0] == 0).float().mean() > 0.3
    assert (out[1] == 0).float().mean() < 0.3


def test_unknown_transform_is_refused():
    class Shear(BasicTransform):
        pass

    with pytest.raises(NotImplementedError, match="Shear cannot be used with paired modalities"):
        PairedTransform([ComposeTransforms([Shear()])] * 2)


def test_paired_array_reads_like_the_padded_array():
    rng = np.random.default_rng(0)
    arrays = [rng.random((1, 5, 6, 7)), rng.random((1, 4, 8, 3))]
    offsets, frame = [(0, 2, 0), (1, 0, 5)], (6, 8, 9)
    full = np.full((2, *frame), -1.0)
    for channel, (array, offset) in enumerate(zip(arrays, offsets, strict=True)):
        region = tuple(slice(o, o + n) for o, n in zip(offset, array.shape[1:], strict=True))
        full[(channel, *region)] = array[0]
    paired = PairedArray([blosc2.asarray(a) for a in arrays], frame, offsets, -1, np.float64)
    assert paired.shape == full.shape
    for _ in range(50):
        bounds = [sorted(rng.integers(0, n + 1, 2)) for n in frame]
        index = (slice(None), *[slice(int(a), int(b)) for a, b in bounds])
        np.testing.assert_array_equal(paired[index], full[index])
    with pytest.raises(IndexError, match="all modalities are read at once"):
        paired[0, :, :, :]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_training_reads_what_the_stock_predictor_computes(labels_group, configuration, folder):
    """Voxel for voxel, although the two modalities of a case are cropped differently."""
    raw = Path(os.environ["nnUNet_raw"]) / LABELS / folder
    crops = []
    for modality in labels_group.modalities:
        plans, dataset_json = load_plans(modality.dataset_name)
        manager = PlansManager(plans)
        config = manager.get_configuration(configuration)
        files = sorted(raw.glob(f"*_{modality.channel:04d}.nii.gz"))
        adapter = PreprocessAdapter(
            [[str(f)] for f in files],
            None,
            config.preprocessor_class(verbose=False),
            None,
            manager,
            dataset_json,
            config,
        )
        suffix = "_unlabeled" if folder == "imagesUn" else ""
        stored = Path(os.environ["nnUNet_preprocessed"]) / modality.dataset_name / f"{config.data_identifier}{suffix}"
        for file, predicted in zip(files, adapter, strict=True):
            trained = blosc2.open(str(stored / file.name.replace(f"_{modality.channel:04d}.nii.gz", ".b2nd")))[:]
            np.testing.assert_array_equal(trained, predicted["data"].numpy())
            crops.append((modality.name, file.name[:-12], str(predicted["data_properties"]["bbox_used_for_cropping"])))
    by_case = {}
    for _, case, box in crops:
        by_case.setdefault(case, set()).add(box)
    assert any(len(boxes) == 2 for boxes in by_case.values())


def test_batches_are_deterministic_under_a_seed(labels_group, results):
    trainer = make_trainer(LABELS, "2d")
    trainer.initialize()
    first, second, other = draw_batches(trainer, 2), draw_batches(trainer, 2), draw_batches(trainer, 2, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a["data"], b["data"])
        assert torch.equal(a["unlabeled"], b["unlabeled"])
        assert all(torch.equal(x, y) for x, y in zip(a["target"], b["target"], strict=True))
        assert not torch.equal(a["unlabeled"], c["unlabeled"])


@pytest.mark.parametrize(
    ("dataset", "configuration", "modalities", "targets"),
    [(LABELS, "2d", 2, 1), (LABELS, "3d_fullres", 2, 1), (REGIONS, "3d_fullres", 3, 2)],
)
def test_batch_shapes(labels_group, regions_group, results, dataset, configuration, modalities, targets):
    trainer = make_trainer(dataset, configuration, unlabeled_batch_size=3)
    trainer.initialize()
    (batch,) = draw_batches(trainer, 1)
    patch = tuple(trainer.configuration_manager.patch_size)
    assert batch["data"].shape == (trainer.batch_size, modalities, *patch)
    assert batch["unlabeled"].shape == (3, modalities, *patch)
    assert batch["target"][0].shape == (trainer.batch_size, modalities * targets, *patch)


def test_unlabeled_batch_has_distinct_cases_and_no_target(labels_group, results):
    trainer = make_trainer(LABELS, "3d_fullres", unlabeled_batch_size=4)
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    unlabeled = loader.data_loader.unlabeled
    assert all(len(set(unlabeled.get_indices())) == 4 for _ in range(20))
    assert set(unlabeled.indices) == set(labels_group.unlabeled)
    batch = next(loader)
    assert set(batch) == {"data", "target", "keys", "unlabeled"}
    assert not set(batch["keys"]) & set(labels_group.unlabeled)


def test_placeholder_of_unlabeled_cases_is_never_a_target(labels_group, results, monkeypatch):
    """Foreground written into the stored nonzero masks of unlabeled cases changes no batch."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    before = draw_batches(trainer, 2)
    loader, _ = trainer.get_dataloaders()
    unlabeled = loader.data_loader.unlabeled
    load_case = unlabeled._data.load_case

    def with_foreground(identifier):
        image, mask, previous, properties = load_case(identifier)
        mask.arrays = [np.where(a[:] == 0, 2, a[:]).astype(np.int16) for a in mask.arrays]
        return image, mask, previous, properties

    stored = [np.unique(a[:]) for case in labels_group.unlabeled for a in load_case(case)[1].arrays]
    assert all(set(values) <= {-1, 0} for values in stored)
    monkeypatch.setattr(
        type(unlabeled._data),
        "load_case",
        lambda self, i: with_foreground(i) if not self.labeled else load_labeled(self, i),
    )
    load_labeled = load_case.__func__
    after = draw_batches(trainer, 2)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a["unlabeled"], b["unlabeled"])


def test_deployed_dataset_json_lists_no_files(labels_group):
    for modality in labels_group.modalities:
        file = Path(os.environ["nnUNet_preprocessed"]) / modality.dataset_name / "dataset.json"
        content = json.loads(file.read_text())
        assert "dataset" not in content
        assert os.environ["nnUNet_raw"] not in file.read_text()
