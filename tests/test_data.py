import json
import os
import pickle
from collections import Counter
from itertools import count
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise import gaussian_blur
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from conftest import (
    CHANNELS,
    LABELS,
    REGIONS,
    assert_identical,
    draw_batches,
    initialized,
    labeled_of,
    load_plans,
    make_trainer,
    unlabeled_of,
)
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_terms import area_contrast

from nnunetv2_semicml.data.paired_dataset import PairedArray, _class_locations, common_frame
from nnunetv2_semicml.data.streams import PairedTransform
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training import loaders as loaders_of_training
from nnunetv2_semicml.training.loaders import make_loader, start_loading

SHAPE = (20, 30, 34)
MARKERS = [(6, 9, 8), (10, 15, 17), (14, 21, 26)]
CROPS = [((2, 3, 1), (18, 28, 33)), ((4, 5, 6), (17, 25, 30))]  # the nonzero box of each modality


def loaders(trainer):
    """Of an initialized trainer: kind of cases -> loaders of the training."""
    return trainer.get_dataloaders()[0].data_loader.loaders


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
    loader = make_loader(trainer.trainers, labels_group.labeled, 2, labeled=True, augment=True)
    transforms, patch = loader.transforms, loader.patch_size
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


def test_segmentations_are_moved_alike_whether_they_differ_or_not(labels_group, results):
    """Where all modalities have the same one, it is resampled once."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    loader = make_loader(trainer.trainers, labels_group.labeled, 2, labeled=True, augment=True)
    labels = torch.zeros(2, *loader.patch_size, dtype=torch.int16)
    labels[0, :, 9:20, 12:25] = 1
    labels[1, :, 3:14, 8:16] = 2
    moved = 0
    for seed in range(20):
        targets = {}
        for channels in ((0, 1), (0, 0), (1, 1)):
            torch.manual_seed(seed)
            np.random.seed(seed)
            image = torch.zeros(2, *loader.patch_size)
            targets[channels] = loader.transforms(image=image, segmentation=labels[list(channels)])["segmentation"][0]
        assert torch.equal(targets[0, 0], targets[0, 1][[0, 0]])
        assert torch.equal(targets[1, 1], targets[0, 1][[1, 1]])
        moved += not torch.equal(targets[0, 1], labels)
    assert moved > 10


def test_intensities_are_drawn_for_each_modality(labels_group, results):
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    (loader,) = loaders(trainer)["unlabeled"]
    torch.manual_seed(1)
    np.random.seed(1)
    same = torch.rand(1, *loader.patch_size).repeat(2, 1, 1, 1)
    outputs = [
        loader.transforms(image=same.clone(), segmentation=torch.zeros_like(same).to(torch.int16))["image"]
        for _ in range(20)
    ]
    assert sum(not torch.equal(image[0], image[1]) for image in outputs) > 5


def test_each_modality_is_masked_by_its_own_nonzero_region(labels_group, results):
    """FLAIR is skull-stripped and masked, T1 is not; nnU-Net's transform alone would mask both by channel 0."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    flags = [t.configuration_manager.use_mask_for_norm for t in trainer.trainers]
    (loader,) = loaders(trainer)["unlabeled"]
    patch = loader.patch_size
    segmentation = torch.zeros(2, *patch, dtype=torch.int16)
    segmentation[0, :, :, : patch[2] // 2] = -1
    out = loader.transforms(image=torch.ones(2, *patch), segmentation=segmentation)["image"]
    assert flags == [[True], [False]]
    assert (out[0] == 0).float().mean() > 0.3
    assert (out[1] == 0).float().mean() < 0.3


def test_unknown_transform_is_refused():
    class Shear(BasicTransform):
        pass

    with pytest.raises(NotImplementedError, match="Shear cannot be used with paired modalities"):
        PairedTransform([ComposeTransforms([Shear()])] * 2, [1, 1])


def test_paired_array_reads_like_the_padded_array():
    """Modalities of two channels and of one, and the positions of the voxels."""
    rng = np.random.default_rng(0)
    arrays = [rng.random((2, 5, 6, 7)), rng.random((1, 4, 8, 3))]
    offsets, frame = [(0, 2, 0), (1, 0, 5)], (6, 8, 9)
    full = np.full((3 + 3, *frame), -1.0)
    for channels, array, offset in zip((slice(0, 2), slice(2, 3)), arrays, offsets, strict=True):
        region = tuple(slice(o, o + n) for o, n in zip(offset, array.shape[1:], strict=True))
        full[(channels, *region)] = array
    full[3:] = (np.indices(frame) + 0.5) / np.reshape(frame, (3, 1, 1, 1))
    stored = [blosc2.asarray(a) for a in arrays]
    for positions in (False, True):
        paired = PairedArray(stored, frame, offsets, -1, np.float64, positions)
        expected = full if positions else full[:3]
        assert paired.shape == expected.shape
        for _ in range(50):
            bounds = [sorted(rng.integers(0, n + 1, 2)) for n in frame]
            index = (slice(None), *[slice(int(a), int(b)) for a, b in bounds])
            np.testing.assert_allclose(paired[index], expected[index], rtol=1e-12)
    with pytest.raises(IndexError, match=r"^all channels are read at once, got 0 for them\.$"):
        paired[0, :, :, :]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
@pytest.mark.parametrize("dataset", [LABELS, CHANNELS])
def test_training_reads_what_the_stock_predictor_computes(groups, dataset, configuration, folder):
    """Voxel for voxel, for modalities of one channel and of two, although these are cropped differently."""
    raw = Path(os.environ["nnUNet_raw"]) / dataset / folder
    crops = {}
    for modality in groups[dataset].modalities:
        plans, dataset_json = load_plans(modality.dataset_name)
        manager = PlansManager(plans)
        config = manager.get_configuration(configuration)
        cases = sorted({file.name[:-12] for file in raw.iterdir()})
        names = {case: [raw / f"{case}_{channel:04d}.nii.gz" for channel in modality.channels] for case in cases}
        names = {case: [str(file) for file in files] for case, files in names.items() if files[0].is_file()}
        adapter = PreprocessAdapter(
            list(names.values()),
            None,
            config.preprocessor_class(verbose=False),
            None,
            manager,
            dataset_json,
            config,
        )
        suffix = "_unlabeled" if folder == "imagesUn" else ""
        stored = Path(os.environ["nnUNet_preprocessed"]) / modality.dataset_name / f"{config.data_identifier}{suffix}"
        assert {file.stem for file in stored.glob("*.pkl")} == names.keys()
        for case, predicted in zip(names, adapter, strict=True):
            trained = blosc2.open(str(stored / f"{case}.b2nd"))[:]
            assert len(trained) == len(modality.channels)
            np.testing.assert_array_equal(trained, predicted["data"].numpy())
            crops.setdefault(case, set()).add(str(predicted["data_properties"]["bbox_used_for_cropping"]))
    assert any(len(boxes) == 2 for boxes in crops.values())


def test_only_so_many_files_are_open_at_once(groups, monkeypatch):
    """Those of the cases opened last; another process opens its own."""
    trainer = initialized(LABELS, "2d")
    (loader,) = loaders(trainer)["unlabeled"]
    data = pickle.loads(pickle.dumps(loader._data))
    a, b, c, *_ = data.identifiers
    monkeypatch.setattr(
        "nnunetv2_semicml.data.paired_dataset._MOST_OPEN_FILES", 2 * 2 * 2
    )  # two cases of two modalities, two files each
    first = data.load_case(a)
    assert data.load_case(b) is not first is data.load_case(a)
    data.load_case(c)
    assert set(data._opened) == {b, c}
    again = pickle.loads(pickle.dumps(data)).load_case(a)
    assert again[0] is not first[0]
    box = [(0, 1), (0, 20), (-3, 20)]
    np.testing.assert_array_equal(again[0].read(box), first[0].read(box))


def test_batches_are_deterministic_under_a_seed(labels_group, results):
    trainer = make_trainer(LABELS, "2d")
    trainer.initialize()
    first, second, other = draw_batches(trainer, 2), draw_batches(trainer, 2), draw_batches(trainer, 2, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert_identical(a, b)
        assert not torch.equal(unlabeled_of(a, "T1"), unlabeled_of(c, "T1"))


@pytest.mark.parametrize(
    ("dataset", "configuration", "channels", "targets"),
    [
        (LABELS, "2d", {"FLAIR": 1, "T1": 1}, 1),
        (LABELS, "3d_fullres", {"FLAIR": 1, "T1": 1}, 1),
        (REGIONS, "3d_fullres", {"FLAIR": 1, "T1": 1, "T2": 1}, 2),
        (CHANNELS, "2d", {"MR": 2, "T1": 1}, 1),
    ],
)
def test_batch_shapes(groups, dataset, configuration, channels, targets):
    trainer = make_trainer(dataset, configuration, unlabeled_batch_size=3)
    trainer.initialize()
    (batch,) = draw_batches(trainer, 1)
    patch, batch_size = tuple(trainer.configuration_manager.patch_size), trainer.configuration_manager.batch_size
    labeled = labeled_of(batch)
    assert labeled.keys() == channels.keys()
    for modality, (image, target) in labeled.items():
        assert image.shape == (batch_size, channels[modality], *patch)
        assert target[0].shape == (batch_size, targets, *patch)
        assert unlabeled_of(batch, modality).shape == (3, channels[modality], *patch)
    assert all(patches["positions"] is None for draws in batch.values() for patches in draws)


@pytest.mark.parametrize("patch_size", [None, [6, 32, 32]])  # the latter is augmented slice by slice
@pytest.mark.parametrize("dataset", [CHANNELS, REGIONS])
def test_labeled_patches_are_those_of_the_stock_trainer(groups, dataset, patch_size):
    """Under one seed a modality's loaders draw what nnU-Net's own do, image and targets, to train and to validate."""
    trainer = initialized(dataset, "3d_fullres")
    for t in trainer.trainers if patch_size else ():
        t.configuration_manager.configuration["patch_size"] = patch_size
    for loader, t in zip(loaders(trainer)["labeled"], trainer.trainers, strict=True):
        plans, dataset_json = load_plans(t.modality.dataset_name)
        stock = nnUNetTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        if patch_size:
            stock.configuration_manager.configuration["patch_size"] = patch_size
        validation = make_loader([t], stock.do_split()[1], stock.batch_size, labeled=True, augment=False)
        for ours, theirs in zip((loader, validation), stock.get_dataloaders(), strict=True):
            drawn = []
            for own in (ours, theirs.data_loader):
                np.random.seed(5)
                torch.manual_seed(5)
                drawn.append(own.generate_train_batch())
            found, expected = drawn
            assert found["cases"] == list(expected["keys"])
            assert torch.equal(found["images"][t.name], expected["data"])
            assert len(found["targets"][t.name]) == len(expected["target"])
            assert all(map(torch.equal, found["targets"][t.name], expected["target"]))


def clock(slow):
    """Times at which one of two algorithms (0 or 1) has taken a second, both of which are tried nine times in turn."""
    now = 0
    for call in count():
        yield now
        now += call % 2 == 0 and call // 2 % 18 // 9 == slow


def test_patches_do_not_depend_on_the_clock(groups, monkeypatch):
    """nnU-Net blurs by the faster one of two algorithms, which round differently."""
    drawn = []
    for slow in (0, 1):
        monkeypatch.setattr(gaussian_blur, "time", clock(slow).__next__)
        plans, dataset_json = load_plans("Dataset501_Labels_FLAIR")
        stock = nnUNetTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        patches = []
        for loader in (loaders(initialized(LABELS, "2d"))["unlabeled"][0], stock.get_dataloaders()[0].data_loader):
            np.random.seed(0)
            torch.manual_seed(0)
            patches.append([loader.generate_train_batch() for _ in range(4)])
        drawn.append(patches)
    (ours, theirs), (ours_again, theirs_again) = drawn
    assert_identical(ours, ours_again)
    assert any(not torch.equal(a["data"], b["data"]) for a, b in zip(theirs, theirs_again, strict=True))


def test_unlabeled_patches_of_modalities_show_the_same_places(groups):
    """The stored arrays are exchanged for the coordinates of their voxels in the common frame."""
    trainer = make_trainer(CHANNELS, "3d_fullres")
    trainer.initialize()
    (loader,) = loaders(trainer)["unlabeled"]
    for stage, transforms in loader.transforms.stages:  # intensities as they are
        if not stage:
            for own in transforms:
                own.clear()
    load_case = loader._data.load_case

    def coordinates(identifier):
        image, mask, previous, properties = load_case(identifier)
        z = np.indices(image.shape[1:])[0].astype(np.float32)
        image.arrays = [
            np.stack([z[tuple(slice(o, o + n) for o, n in zip(offset, a.shape[1:], strict=True))]] * a.shape[0])
            for a, offset in zip(image.arrays, image.offsets, strict=True)
        ]
        return image, mask, previous, properties

    loader._data.load_case = coordinates
    np.random.seed(0)
    torch.manual_seed(0)
    compared = 0
    for _ in range(5):
        images = loader.generate_train_batch()["images"]
        mr, t1 = images["MR"], images["T1"]
        assert torch.equal(mr[:, 0], mr[:, 1])
        inside = (mr[:, 0] > 4) & (mr[:, 0] < 18) & (t1[:, 0] > 4) & (t1[:, 0] < 18)
        # at the borders of the crops, which differ, the interpolation falls to 0
        assert ((mr[:, 0] - t1[:, 0]).abs()[inside] < 0.01).float().mean() > 0.9
        compared += inside.sum()
    assert compared > 1000


def test_unlabeled_batch_has_distinct_cases_first_and_no_target(labels_group, results):
    trainer = make_trainer(LABELS, "3d_fullres", unlabeled_batch_size=6)
    trainer.initialize()
    (unlabeled,) = loaders(trainer)["unlabeled"]
    assert set(unlabeled.indices) == set(labels_group.unlabeled)
    for _ in range(20):
        cases = list(unlabeled.get_indices())
        assert len(cases) == 6
        assert set(cases[:4]) == set(labels_group.unlabeled)
        assert len(set(cases[4:])) == 2
    (batch,) = draw_batches(trainer, 1)
    assert set(batch) == {"labeled", "unlabeled"}
    assert not any(patches["targets"] for patches in batch["unlabeled"])
    assert not {case for patches in batch["labeled"] for case in patches["cases"]} & set(labels_group.unlabeled)


def test_patches_of_one_case_are_never_contrasted(labels_group, results):
    """Of six patches of four cases, the first four are, whatever the others show."""
    trainer = make_trainer(LABELS, "2d", unlabeled_batch_size=6)
    trainer.initialize()
    assert "A draw of 6 unlabeled patches has several of a case" in Path(trainer.log_file).read_text()
    torch.manual_seed(0)
    logits = {name: torch.randn(6, 3, 8, 8) for name in ("FLAIR", "T1")}
    predictions = [z.softmax(1)[:4, 1:] for z in logits.values()]
    torch.testing.assert_close(trainer.unsupervised_terms([logits], None)["asc"], area_contrast(predictions, 1.0))


def test_placeholder_of_unlabeled_cases_is_never_a_target(labels_group, results, monkeypatch):
    """Foreground written into the stored nonzero masks of unlabeled cases changes no batch."""
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    before = draw_batches(trainer, 2)
    (unlabeled,) = loaders(trainer)["unlabeled"]
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
        assert_identical(a["unlabeled"], b["unlabeled"])


def test_deployed_dataset_json_lists_no_files(labels_group):
    for modality in labels_group.modalities:
        file = Path(os.environ["nnUNet_preprocessed"]) / modality.dataset_name / "dataset.json"
        content = json.loads(file.read_text())
        assert "dataset" not in content
        assert os.environ["nnUNet_raw"] not in file.read_text()


# where patches come from, looked up in the files that nnU-Net's preprocessor wrote


def stored_case(modality, configuration, case, folder=""):
    """What stock preprocessing has stored: image (C, *own shape), segmentation (1, *own shape), properties."""
    plans, _ = load_plans(modality.dataset_name)
    identifier = PlansManager(plans).get_configuration(configuration).data_identifier + folder
    file = Path(os.environ["nnUNet_preprocessed"]) / modality.dataset_name / identifier / case
    arrays = [blosc2.open(f"{file}{ending}.b2nd")[:] for ending in ("", "_seg")]
    return *arrays, pickle.loads(Path(f"{file}.pkl").read_bytes())


def place_of(patch, array):
    """Where in an array (C, *shape) a patch (C, *size) was cut out, which reads `outside` beyond it, per axis."""
    brightest = np.unravel_index(np.abs(patch).argmax(), patch.shape)
    (found,) = np.argwhere(array == patch[brightest])
    corner = (found - brightest)[1:]
    start, stop = np.maximum(corner, 0), np.minimum(corner + patch.shape[1:], array.shape[1:])
    inside = tuple(slice(a, b) for a, b in zip(start - corner, stop - corner, strict=True))
    cut = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(patch[(slice(None), *inside)], array[(slice(None), *cut)])
    return corner, (slice(None), *inside), (slice(None), *cut)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("dataset", [LABELS, CHANNELS])
def test_patches_are_cut_out_of_the_files_of_their_modality_at_one_place(groups, dataset, labeled):
    """Images voxel for voxel, targets and positions; the crops of the modalities begin at different voxels."""
    trainer = initialized(dataset, "3d_fullres")
    modalities = trainer.group.modalities
    cases = trainer.group.common_cases([m.name for m in modalities], labeled)
    loader = make_loader(trainer.trainers, cases, 2, labeled=labeled, augment=False, positions=True)
    loader.patch_size = np.array([10, 11, 12])
    loader.need_to_pad = np.array([4, 0, 0])  # also beyond the case
    np.random.seed(0)
    apart = set()
    for _ in range(4):
        batch = loader.generate_train_batch()
        for b, case in enumerate(batch["cases"]):
            assert [array.dtype for array in loader._data.load_case(case)[:2]] == [np.float32, np.int16]
            corners, boxes = [], []
            for modality in modalities:
                image, labels, properties = stored_case(modality, "3d_fullres", case, "" if labeled else "_unlabeled")
                corner, inside, cut = place_of(batch["images"][modality.name][b].numpy(), image)
                box = np.array(properties["bbox_used_for_cropping"])
                assert np.array_equal(box[:, 1] - box[:, 0], image.shape[1:])  # nothing was resampled
                corners.append(tuple(corner + box[:, 0]))
                boxes.append(box)
                apart.add((case, *box[:, 0]))
                if labeled:
                    target = batch["targets"][modality.name][0][b].numpy()
                    np.testing.assert_array_equal(target[inside], np.maximum(labels[cut], 0))
            assert len(set(corners)) == 1  # of the scan
            start, end = np.min(boxes, axis=0)[:, 0], np.max(boxes, axis=0)[:, 1]
            where = np.indices(loader.patch_size) + np.reshape(corners[0] - start, (3, 1, 1, 1))
            share = (where + 0.5) / np.reshape(end - start, (3, 1, 1, 1))
            expected = np.where(((share > 0) & (share < 1)).all(axis=0), share, 0)
            np.testing.assert_allclose(batch["positions"][b], expected, rtol=1e-6)
        assert batch["targets"].keys() == ({m.name for m in modalities} if labeled else set())
    assert len(apart) > len({case for case, *_ in apart})


def test_targets_without_deep_supervision_are_those_of_its_first_scale(groups):
    targets = []
    for deep in (True, False):
        trainer = initialized(REGIONS, "3d_fullres", enable_deep_supervision=deep)
        loader = make_loader(trainer.trainers, trainer.group.labeled, 2, labeled=True, augment=True)
        np.random.seed(0)
        torch.manual_seed(0)
        targets.append(loader.generate_train_batch()["targets"])
    assert targets[0].keys() == targets[1].keys() == {"FLAIR", "T1", "T2"}
    for modality, (first, *_) in targets[0].items():
        assert first.any()
        assert torch.equal(targets[1][modality], first)


def test_targets_are_those_of_their_modality(groups):
    """The files of all modalities have the same labels; here those of the second one are read as one class."""
    trainer = initialized(LABELS, "3d_fullres")
    first, second = (m.name for m in trainer.group.modalities)
    loader = make_loader(trainer.trainers, trainer.group.labeled, 2, labeled=True, augment=False)
    load_case = loader._data.load_case

    def with_one_class(identifier):
        image, segmentation, previous, properties = load_case(identifier)
        segmentation.arrays = [segmentation.arrays[0], np.where(segmentation.arrays[1][:] > 0, 1, 0)]
        return image, segmentation, previous, properties

    loader._data.load_case = with_one_class
    np.random.seed(0)
    targets = [loader.generate_train_batch()["targets"] for _ in range(3)]
    assert {value for t in targets for value in np.unique(t[first][0])} == {0, 1, 2}
    for t in targets:
        for a, b in zip(t[first], t[second], strict=True):
            assert torch.equal(b, (a > 0).to(b.dtype))


@pytest.mark.parametrize("dataset", [LABELS, REGIONS])
def test_foreground_is_looked_for_where_the_label_files_have_it(groups, dataset):
    """nnU-Net draws patches around these voxels of the common frame, which begins where the first of the crops does."""
    trainer = initialized(dataset, "3d_fullres")
    loader = make_loader(trainer.trainers, trainer.group.labeled, 2, labeled=True, augment=False)
    moved = 0
    for case in trainer.group.labeled:
        raw = sitk.ReadImage(Path(os.environ["nnUNet_raw"]) / dataset / "labelsTr" / f"{case}.nii.gz")
        labels = sitk.GetArrayFromImage(raw)
        begins = [
            np.array(stored_case(m, "3d_fullres", case)[2]["bbox_used_for_cropping"])[:, 0]
            for m in trainer.group.modalities
        ]
        moved += (begins[0] != np.min(begins, axis=0)).any()
        found = loader._data.load_case(case)[3]["class_locations"]
        assert found.keys() == ({1, 2} if dataset == LABELS else {(1, 2), 2})
        for label, locations in found.items():
            where = tuple((locations[:, 1:] + np.min(begins, axis=0)).T)
            assert len(locations) == np.isin(labels, label).sum()
            assert np.isin(labels[where], label).all()
    assert moved


def test_class_beyond_the_first_crop_is_looked_for_in_the_next():
    first = {1: np.array([[0, 2, 3]]), 2: [], 3: []}
    second = {1: np.array([[0, 7, 7], [0, 8, 8]]), 2: np.array([[0, 4, 5], [0, 0, 1]]), 3: []}
    found = _class_locations([{"class_locations": c} for c in (first, second)], [(10, 20), (30, 40)])
    assert found.keys() == {1, 2, 3}
    np.testing.assert_array_equal(found[1], [[0, 12, 23]])
    np.testing.assert_array_equal(found[2], [[0, 34, 45], [0, 30, 41]])
    assert len(found[3]) == 0


def test_patches_of_several_modalities_are_drawn_around_foreground(groups):
    """As nnU-Net's validation wants them; small patches, whose middle is the voxel that was chosen."""
    trainer = initialized(LABELS, "3d_fullres")
    loader = make_loader(trainer.trainers, trainer.group.labeled, 4, labeled=True, augment=False)
    assert loader.oversample_foreground_percent == nnUNetTrainer(*stock_arguments(LABELS)).oversample_foreground_percent
    loader.oversample_foreground_percent = 1.0
    loader.patch_size, loader.need_to_pad = np.array([5, 5, 5]), np.zeros(3, int)
    np.random.seed(0)
    for _ in range(10):
        for target in loader.generate_train_batch()["targets"].values():
            assert (target[0][:, 0, 2, 2, 2] > 0).all()


def test_cases_are_oversampled_as_the_trainer_says_and_unlabeled_ones_never(groups):
    for probabilistic in (False, True):
        trainer = initialized(LABELS, "2d", probabilistic_oversampling=probabilistic)
        for labeled, cases in ((True, trainer.group.labeled), (False, trainer.group.unlabeled)):
            loader = make_loader(trainer.trainers, cases, 4, labeled=labeled, augment=True)
            np.random.seed(0)
            drawn = {tuple(loader.get_do_oversample(j) for j in range(4)) for _ in range(20)}
            if labeled and probabilistic:  # every patch with a probability of a third
                assert len(drawn) > 4
            else:
                assert drawn == {(False, False, False, labeled)}


def test_ignore_label_is_looked_for_in_labeled_cases_alone(groups):
    """nnU-Net wants a voxel that is annotated in the middle of a patch, and unlabeled cases have none."""
    trainer = initialized(LABELS, "3d_fullres")
    for t in trainer.trainers:
        t.label_manager = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
    labeled, unlabeled = (
        make_loader(trainer.trainers, cases, 2, labeled=has_labels, augment=False)
        for cases, has_labels in ((trainer.group.labeled, True), (trainer.group.unlabeled, False))
    )
    assert len(unlabeled.generate_train_batch()["cases"]) == 2
    load_case = labeled._data.load_case

    def with_one_annotated_voxel(identifier):
        *rest, properties = load_case(identifier)
        properties["class_locations"] = {(-1, 0, 1, 2): np.array([[0, 10, 11, 12]])}
        return *rest, properties

    labeled._data.load_case = with_one_annotated_voxel
    labeled.oversample_foreground_percent = 0.0
    labeled.patch_size, labeled.need_to_pad = np.array([5, 5, 5]), np.zeros(3, int)
    batch = labeled.generate_train_batch()
    for b, case in enumerate(batch["cases"]):
        expected = load_case(case)[0][:, 8:13, 9:14, 10:15]
        np.testing.assert_array_equal(torch.cat([batch["images"][t.name][b] for t in trainer.trainers]), expected)


def stock_arguments(dataset):
    plans, dataset_json = load_plans(dataset)
    return plans, "3d_fullres", 0, dataset_json, torch.device("cpu")


@pytest.mark.parametrize("method", [nnUNetTrainerSemiCML, nnUNetTrainerCPS])
@pytest.mark.parametrize("dataset", [LABELS, CHANNELS])
def test_every_network_gets_the_patches_of_its_modality(groups, dataset, method):
    """Labeled and unlabeled ones, and both networks of a modality the same."""
    trainer = initialized(dataset, "2d", method)
    (batch,) = draw_batches(trainer, 1)
    labeled = trainer.labeled_patches(batch)
    shown = [draw.images for draw in trainer.unlabeled_draws(batch)]
    names = [name.split(" ")[0] for name in labeled]
    networks = 2 if method is nnUNetTrainerCPS else 1
    assert names == [m.name for m in trainer.group.modalities for _ in range(networks)]
    for network, modality in zip(labeled, names, strict=True):
        image, target = labeled_of(batch)[modality]
        assert torch.equal(labeled[network].image, image)
        assert all(map(torch.equal, labeled[network].target, target))
        own = torch.cat([images[network] for images in shown if network in images])
        assert torch.equal(own, unlabeled_of(batch, modality))


def test_networks_are_validated_as_by_the_stock_trainer(groups):
    """On the patches of their modality, which show validation cases and no others."""
    trainer = initialized(LABELS, "2d")
    for t in trainer.trainers:  # so that there is a Dice
        with torch.no_grad():
            t.network.decoder.seg_layers[-1].weight.mul_(20)
    _, loader = trainer.get_dataloaders()
    folds = json.loads((Path(os.environ["nnUNet_preprocessed"]) / LABELS / "splits_final.json").read_text())
    batch = next(loader)
    (patches,) = batch["labeled"]
    assert {*patches["cases"]} <= {*folds[0]["val"]}
    size = trainer.configuration_manager.patch_size
    assert all(image.shape[2:] == tuple(size) for image in patches["images"].values())
    trainer.on_validation_epoch_start()
    for t, found in zip(trainer.trainers, trainer.validation_step(batch), strict=True):
        plans, dataset_json = load_plans(t.modality.dataset_name)
        stock = nnUNetTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))
        stock.initialize()
        stock.network.load_state_dict(t.network.state_dict())
        stock.on_validation_epoch_start()
        expected = stock.validation_step({"data": patches["images"][t.name], "target": patches["targets"][t.name]})
        assert expected["tp_hard"].any()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)


def test_unlabeled_cases_are_drawn_alike(groups):
    """All of them, in any order, and all as often; also if a batch has fewer."""
    trainer = initialized(LABELS, "2d")
    for size in (2, 3, 6):
        loader = make_loader(trainer.trainers, trainer.group.unlabeled, size, labeled=False, augment=True)
        np.random.seed(0)
        drawn = [tuple(loader.get_indices()) for _ in range(400)]
        counts = Counter(case for batch in drawn for case in batch)
        assert counts.keys() == set(trainer.group.unlabeled)
        assert all(n == pytest.approx(400 * size / 4, rel=0.2) for n in counts.values())
        first = Counter(batch[0] for batch in drawn)
        assert all(first[case] == pytest.approx(100, abs=40) for case in trainer.group.unlabeled)
        assert len(set(drawn)) > 10


@pytest.mark.parametrize(("workers", "cached"), [(1, 3), (7, 3), (12, 6)])
def test_workers_load_as_many_batches_in_advance_as_half_of_them(monkeypatch, workers, cached):
    """Three at least."""
    started = []
    monkeypatch.setattr(
        loaders_of_training, "NonDetMultiThreadedAugmenter", lambda *own, **named: started.append((own, named))
    )
    loader = object()
    start_loading(loader, workers, pin_memory=True)
    options = {"num_processes": workers, "num_cached": cached, "pin_memory": True, "wait_time": 0.002}
    assert started == [((loader, None), options)]
