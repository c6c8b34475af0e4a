"""Proof 7 of docs/design.md for the terms of every method: what is compared with what. Losses alone: test_losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    REGIONS,
    assert_step_equals_reference,
    draw_batches,
    initialized,
    slow_contrast,
    unlabeled_outputs,
    weights,
    with_something_seen,
)
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSECLAnatomical import nnUNetTrainerSECLAnatomical
from nnunetv2_semicml.trainers.nnUNetTrainerSECLRegion import nnUNetTrainerSECLRegion
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPlus import nnUNetTrainerSemiCMLPlus
from nnunetv2_semicml.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"
SECL = [nnUNetTrainerSECLRegion, nnUNetTrainerSECLAnatomical]
pytestmark = pytest.mark.usefixtures("groups")


@torch.no_grad()
def change(network, size=0.1):
    """Give a teacher weights that are not those of its student."""
    for p in network.parameters():
        p.add_(size * torch.randn_like(p))


def test_mean_teacher_compares_with_probabilities_of_noisy_images(groups):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerMeanTeacher)
    change(trainer.teachers["FLAIR"].network)
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    torch.manual_seed(1)
    (seen,), targets = trainer.views_and_targets(draw, {})
    torch.manual_seed(1)
    image = draw.images["FLAIR"]
    assert torch.equal(seen["FLAIR"], image)
    noise = (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2) * image.std(dim=(1, 2, 3), keepdim=True)
    with torch.no_grad():
        expected = trainer.teachers["FLAIR"].network(image + noise).softmax(1)
    torch.testing.assert_close(targets["FLAIR"], expected)
    logits = torch.randn(*expected.shape)
    term = trainer.unsupervised_terms([{"FLAIR": logits}], targets)["mse"]
    torch.testing.assert_close(term, ((logits.softmax(1) - expected) ** 2).mean())


@pytest.mark.parametrize(
    ("dataset", "configuration", "warmup"), [(FLAIR, "2d", 0), (REGIONS_T1, "3d_fullres", 0), (FLAIR, "2d", 5)]
)
def test_uamt_leaves_out_what_its_teacher_is_uncertain_about(dataset, configuration, warmup):
    """By the formula: entropy of the mean of the passes below 3/4 … 1 of ln K, or of ln 2 for each region."""
    settings = {"num_epochs": 10 + warmup, "warmup_fraction": warmup / (10 + warmup)}
    trainer = with_something_seen(initialized(dataset, configuration, nnUNetTrainerUAMT, **settings))
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    ((name, teacher),) = trainer.teachers.items()
    change(teacher.network, 0.02)
    shares = []
    for progress in (0.0, 0.5, 1.0):  # after the warm-up
        trainer.current_epoch = warmup + round(10 * progress)
        torch.manual_seed(1)
        prediction, certain = trainer.views_and_targets(draw, {})[1][name]
        torch.manual_seed(1)
        passes = []
        with torch.no_grad():
            for _ in range(9):
                image = draw.images[name]
                std = image.flatten(1).std(1).reshape(-1, *[1] * (image.ndim - 1))
                logits = teacher.network(image + std * (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2))
                passes.append(logits.sigmoid() if trainer.label_manager.has_regions else logits.softmax(1))
        p = torch.stack(passes[1:]).mean(0)
        if trainer.label_manager.has_regions:
            share = -(p * p.log() + (1 - p) * (1 - p).log()) / np.log(2)
        else:
            share = -(p * p.log()).sum(1, keepdim=True) / np.log(p.shape[1])
        threshold = 0.75 + 0.25 * np.exp(-5 * (1 - progress) ** 2)
        clear = (share - threshold).abs() > 1e-4
        torch.testing.assert_close(prediction, passes[0])
        assert torch.equal(certain[clear], (share < threshold)[clear])
        assert certain.shape == share.shape
        z = torch.randn_like(logits)
        q = z.sigmoid() if trainer.label_manager.has_regions else z.softmax(1)
        squares = (q - prediction).square()[certain.expand_as(q)]
        term = trainer.unsupervised_terms([{name: z}], {name: (prediction, certain)})["mse"]
        torch.testing.assert_close(term, squares.mean())
        shares.append(certain.float().mean())
    assert 0 < shares[0] < shares[1] < shares[2]


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
    heads = trainer.label_manager.num_segmentation_heads
    outputs = {name: torch.randn(2, heads, 4, 4, 4) for name in labelers}
    assert [t.name for t in trainer.trainers] == list(labelers)
    ce, dice = cross_supervision(trainer, outputs, labelers)
    found = trainer.unsupervised_terms([outputs], None)
    torch.testing.assert_close(found, {"ce": ce, "dice": dice})


def cross_supervision(trainer, outputs, labelers):
    """Cross-entropy and Dice with what the labelers segment by their formulas; the sum over the networks."""
    heads, regions = trainer.label_manager.num_segmentation_heads, trainer.label_manager.has_regions
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
            axes = tuple(range(2, p.ndim))
            axes = (0, *axes) if trainer.configuration_manager.batch_dice else axes
            overlap, areas = (p * q).sum(axes), (p * p).sum(axes) + (q * q).sum(axes)
            dice += (1 - ((2 * overlap + 1) / (areas + 1)).mean()) / len(others)
    return ce, dice


def area_contrast(predictions, temperature):
    """The contrast of M predictions (B, C, *patch) by its formula, pair by pair of modalities, in loops."""

    def s(u, v):
        return float((2 * (u * v).sum() + 1e-6) / ((u * u).sum() + (v * v).sum() + 1e-6)) / temperature

    cases, losses = len(predictions[0]), []
    for a in range(len(predictions)):
        for b in range(a + 1, len(predictions)):
            both = [*predictions[a], *predictions[b]]
            for i, anchor in enumerate(both):
                others = [np.exp(s(anchor, other)) for k, other in enumerate(both) if k != i]
                losses.append(-np.log(np.exp(s(anchor, both[(i + cases) % len(both)])) / sum(others)))
    return torch.tensor(np.mean(losses), dtype=torch.float32)


@pytest.mark.parametrize("asc_cases", [None, 2, 3])
@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_semicml_compares_and_contrasts_probabilities(dataset, configuration, asc_cases):
    """Of 2 unlabeled cases in the batch; cases beyond it, which `asc_cases` adds, are contrasted and nothing else."""
    options = {"asc_temperature": 0.5, "asc_cases": asc_cases, "unlabeled_batch_size": 2}
    semicml = initialized(dataset, configuration, nnUNetTrainerSemiCML, **options)
    (batch,) = draw_batches(semicml, 1)
    (draw,) = semicml.unlabeled_draws(batch)
    (outputs,) = unlabeled_outputs(semicml, semicml.views_and_targets(draw, {})[0])
    assert {len(logits) for logits in outputs.values()} == {asc_cases or 2}
    torch.manual_seed(0)
    outputs = {name: torch.randn_like(logits) for name, logits in outputs.items()}
    regions = semicml.label_manager.has_regions
    p = [z.sigmoid() if regions else z.softmax(1)[:, 1:] for z in outputs.values()]
    pairs = [(p[a][:2] - p[b][:2]).square().mean() for a in range(len(p)) for b in range(a + 1, len(p))]
    expected = {"mse": torch.stack(pairs).mean(), "asc": area_contrast(p, 0.5)}
    torch.testing.assert_close(semicml.unsupervised_terms([outputs], None), expected)


@pytest.mark.parametrize("better", ["", "FLAIR", "T1"])
@pytest.mark.parametrize("asc_cases", [None, 3])
@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_plus_teaches_weaker_modalities_on_unmixed_patches(dataset, configuration, asc_cases, better):
    """The better one labels and is not taught; before there is one, all teach each other. Cases beyond the batch, which
    `asc_cases` adds, are contrasted and neither mixed nor labeled."""
    options = {"asc_temperature": 0.5, "asc_cases": asc_cases, "unlabeled_batch_size": 2}
    trainer = initialized(dataset, configuration, nnUNetTrainerSemiCMLPlus, **options)
    copy_paste = initialized(dataset, configuration, nnUNetTrainerCrossModalBCP)
    names = [t.name for t in trainer.trainers]
    for t in trainer.trainers if better else ():
        t.logger.log("mean_fg_dice", 0.6 if t.name == better else 0.5, 0)
    (batch,) = draw_batches(trainer, 1)
    (draw,), (labeled,) = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    *mixtures, unmixed = trainer.views_and_targets(draw, labeled)[0]
    for name in names:
        assert torch.equal(unmixed[name], draw.images[name])
        assert len(unmixed[name]) == (asc_cases or 2)
        pairs = max(2, len(labeled[name].image))
        assert [len(view[name]) for view in mixtures] == [pairs, pairs]
    targets = trainer.views_and_targets(draw, labeled)[1]
    torch.manual_seed(0)
    outputs = [
        {
            name: torch.randn(len(image), *targets[0][name].labels.shape[1:], requires_grad=True)
            for name, image in v.items()
        }
        for v in (*mixtures, unmixed)
    ]
    found = trainer.unsupervised_terms(outputs, targets)
    assert found.keys() == trainer.term_weights.keys()
    of_batch = {name: z[:2].detach() for name, z in outputs[-1].items()}
    labelers = {n: [o for o in ([better] if better else names) if o != n] for n in names}
    ce, dice = cross_supervision(trainer, of_batch, {n: of for n, of in labelers.items() if of})
    regions = trainer.label_manager.has_regions
    p = [(z.sigmoid() if regions else z.softmax(1)[:, 1:]).detach() for z in outputs[-1].values()]
    expected = copy_paste.unsupervised_terms(outputs[:-1], targets)
    num_taught = len(names) - bool(better)
    expected |= {"unmixed ce": ce / num_taught, "unmixed dice": dice / num_taught, "asc": area_contrast(p, 0.5)}
    torch.testing.assert_close(found, expected)
    sum(found[term] for term in ("unmixed ce", "unmixed dice", "asc")).backward()
    assert {name for name, z in outputs[-1].items() if z.grad is None} == ({better} if better else set())
    assert all(z.grad is None for view in outputs[:-1] for z in view.values())


ONE_WAY, BOTH_WAYS = {"FLAIR": [], "T1": ["FLAIR"]}, {"FLAIR": ["T1"], "T1": ["FLAIR"]}


@pytest.mark.parametrize(
    ("fold", "options", "dice", "expected"),
    [
        (0, {}, {"FLAIR": 0.5, "T1": 0.44}, ONE_WAY),
        (0, {}, {"FLAIR": 0.5, "T1": 0.46}, BOTH_WAYS),
        (0, {}, {"FLAIR": 0.46, "T1": 0.5}, BOTH_WAYS),
        (0, {}, {"FLAIR": 0.0, "T1": 0.0}, BOTH_WAYS),
        (0, {"teaches_from": 0.8}, {"FLAIR": 0.5, "T1": 0.44}, BOTH_WAYS),
        (0, {"teaching_modality": "FLAIR"}, {"FLAIR": 0.46, "T1": 0.5}, ONE_WAY),
        (0, {"teaching_modality": "FLAIR", "taught_both_ways": True}, {"FLAIR": 0.5, "T1": 0.1}, BOTH_WAYS),
        (0, {"taught_both_ways": False}, {"FLAIR": 0.5, "T1": 0.5}, ONE_WAY),
        (0, {"taught_both_ways": True}, {"FLAIR": 0.5, "T1": 0.1}, BOTH_WAYS),
        ("all", {}, {"FLAIR": 0.5, "T1": 0.49}, ONE_WAY),
        ("all", {"taught_both_ways": True}, {"FLAIR": 0.5, "T1": 0.1}, BOTH_WAYS),
    ],
)
def test_modalities_that_are_about_equally_good_teach_each_other(fold, options, dice, expected):
    """Measured on validation cases; the log says who learns from whom."""
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPlus, warmup_fraction=0.0, **options)
    trainer.fold = fold
    for t in trainer.trainers:
        t.logger.log("mean_fg_dice", dice[t.name], 0)
    assert trainer.unmixed_labelers(["FLAIR", "T1"]) == expected
    assert trainer.unmixed_labelers(["T1"]) == {"T1": []}
    trainer.on_train_epoch_start()
    who = {str(ONE_WAY): "T1 from FLAIR", str(BOTH_WAYS): "FLAIR from T1, T1 from FLAIR"}[str(expected)]
    lines = Path(trainer.log_file).read_text().splitlines()
    assert lines[-1].rstrip().endswith(f" on unmixed patches learns {who}")


def test_of_three_modalities_those_near_the_best_teach_the_others():
    trainer = initialized(REGIONS, "3d_fullres", nnUNetTrainerSemiCMLPlus)
    a, b, c = (t.name for t in trainer.trainers)
    for t, dice in zip(trainer.trainers, (0.3, 0.5, 0.47), strict=True):
        t.logger.log("mean_fg_dice", dice, 0)
    assert trainer.unmixed_labelers([a, b, c]) == {a: [b, c], b: [c], c: [b]}


def test_plus_whose_networks_label_for_themselves_is_copy_paste():
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPlus, labeled_by="own")
    (batch,) = draw_batches(trainer, 1)
    trainer.train_step(batch)
    assert trainer.unmixed_labelers(["FLAIR", "T1"]) == {"FLAIR": [], "T1": []}


def test_networks_of_one_modality_start_from_different_weights(groups):
    a, b = weights(initialized(FLAIR, "2d", nnUNetTrainerCPS))
    assert not all(torch.equal(a[k], b[k]) for k in a)


# SECL


@pytest.mark.parametrize("method", SECL)
@pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])
def test_contrast_equals_its_formula(method, dataset, configuration):
    """Proof 7 for the term: noise, parts, keys, anchors and masks together."""
    trainer = with_something_seen(initialized(dataset, configuration, method))
    ((name, teacher),) = trainer.teachers.items()
    change(teacher.network, 0.02)
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    image = draw.images[name]
    torch.manual_seed(1)
    views, targets = trainer.views_and_targets(draw, {})
    (features,) = unlabeled_outputs(trainer, views)
    torch.manual_seed(1)
    std = image.flatten(1).std(1).reshape(-1, *[1] * (image.ndim - 1))
    noisy = image + std * (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2)
    with torch.no_grad():
        anchors = trainer.students[name].head(trainer.trainers[0].network.encoder(image)[2])
        keys = teacher.network.head(teacher.network.network.encoder(noisy)[2])
        parts = parts_of(method, trainer, teacher.network.network(noisy), draw.positions, keys.shape[2:])
    weight = parts.flatten(2).sum(2).flatten()
    trainer.min_part = max(1.0, float(weight.median()))  # some parts are too small
    found = trainer.unsupervised_terms([features], targets)["contrast"].detach()

    def pooled(of):
        return torch.stack([
            (of[b] * parts[b, r]).flatten(1).sum(1) / max(float(parts[b, r].sum()), 1e-6)
            for b in range(len(of)) for r in range(parts.shape[1])
        ])  # fmt: skip

    image_of, part_of = np.divmod(np.arange(len(weight)), parts.shape[1])
    present = (weight >= trainer.min_part).numpy()
    assert 2 < sum(present) < len(present)
    both = present[:, None] & present[None, :]
    same_part = part_of[:, None] == part_of[None, :]
    other_image = image_of[:, None] != image_of[None, :]
    positive = both & same_part & (other_image | (method is nnUNetTrainerSECLAnatomical))  # there, its own image, too
    temperature = {nnUNetTrainerSECLAnatomical: 0.5, nnUNetTrainerSECLRegion: 0.1}[method]
    expected = slow_contrast(pooled(anchors), pooled(keys), positive, both & ~same_part, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def parts_of(method, trainer, logits, positions, size):
    """How much of every position of a feature map belongs to each class, or to each of 4 cells along each axis."""

    def shrunk(voxels):  # the patch is a multiple of the feature map
        blocks = [side for n, of in zip(size, voxels.shape[2:], strict=True) for side in (n, of // n)]
        return voxels.reshape(*voxels.shape[:2], *blocks).mean(tuple(range(3, 2 * len(size) + 2, 2)))

    if method is nnUNetTrainerSECLAnatomical:
        if trainer.label_manager.has_regions:
            labels = [trainer.label_manager.convert_probabilities_to_segmentation(z.sigmoid()) for z in logits]
            labels = torch.stack(labels)
        else:
            labels = logits.argmax(1)
        return shrunk(torch.stack([labels == label for label in (0, 1, 2)], dim=1).float())
    inside = (shrunk((positions > 0).float()) == 1).all(1)
    cells = (shrunk(positions) * 4).floor().clamp(0, 3).unbind(1)
    of_axes = torch.cartesian_prod(*[torch.arange(4)] * len(cells))
    return torch.stack(
        [inside & torch.stack([a == b for a, b in zip(cells, cell, strict=True)]).all(0) for cell in of_axes], dim=1
    ).float()


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


def test_a_position_rounded_to_the_end_of_a_case_is_in_the_last_region(groups):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerSECLRegion, feature_stage=0)
    image = torch.zeros(1, 1, 8, 8)
    _, parts = trainer.features_and_parts(trainer.teachers["FLAIR"], image, torch.ones(1, 3, 8, 8))
    assert (parts.argmax(1) == 4**3 - 1).all()
    assert (parts.sum(1) == 1).all()


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
    student = with_something_seen(trainer).students["FLAIR"]
    assert student.stage == min(feature_stage, len(t.network.encoder.stages) - 1)
    (batch,) = draw_batches(trainer, 1)
    image = trainer.unlabeled_draws(batch)[0].images["FLAIR"]
    first, last = (m for m in student.head if list(m.parameters()))
    with torch.no_grad():
        features = t.network.encoder(image)[student.stage].movedim(1, -1)  # two layers, voxel by voxel
        hidden = features @ first.weight.flatten(1).T + first.bias
        projected = torch.where(hidden > 0, hidden, 0.01 * hidden) @ last.weight.flatten(1).T + last.bias
        torch.testing.assert_close(student(image), projected.movedim(-1, 1))
        assert projected.shape[-1] == trainer.projection_dimension
    assert_step_equals_reference(trainer, batch)


@pytest.mark.parametrize("smooth", [1.0, 1e-5])
def test_pseudo_labels_without_foreground_teach_that_there_is_none_as_far_as_dice_is_smooth(smooth):
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiCMLPlus, dice_smooth=smooth)
    p = torch.full((2, 2, 4, 4), 0.25)
    _, dice = trainer.ce_and_dice(torch.zeros(2, 3, 4, 4), p, torch.zeros(2, 3, 4, 4))
    area = 2 * 16 * 0.25**2  # the plans say batch Dice
    torch.testing.assert_close(dice, torch.tensor(1 - smooth / (area + smooth)))
