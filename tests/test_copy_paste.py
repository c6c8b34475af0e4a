"""Bidirectional copy-paste, in one modality and between modalities: mixtures, labels, terms, and who labels."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from conftest import LABELS, PATTERNS, REGIONS, draw_batches, initialized, labeled_of, unlabeled_of
from scipy.ndimage import label as components
from test_terms import change

from nnunetv2_semicml.data.modality_group import preprocessed_folder
from nnunetv2_semicml.trainers.nnUNetTrainerBCP import nnUNetTrainerBCP
from nnunetv2_semicml.trainers.nnUNetTrainerBCPPlus import nnUNetTrainerBCPPlus
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalBCP import nnUNetTrainerCrossModalBCP
from nnunetv2_semicml.training.boxes import draw_box, draw_boxes_of_shares

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"
pytestmark = pytest.mark.usefixtures("groups")
each_setting = pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])


def extent(box):
    """First and last voxel of a box along each axis; the box is all that lies between."""
    where = box[0, 0].nonzero()
    first, last = where.min(0).values, where.max(0).values
    assert len(where) == (last - first + 1).prod()
    return first.tolist(), (last - first + 1).tolist()


def test_boxes_have_the_published_sides_and_lie_everywhere():
    torch.manual_seed(0)
    drawn = [extent(draw_box((12, 7, 9), 2 / 3, torch.device("cpu"))) for _ in range(300)]
    assert {tuple(lengths) for _, lengths in drawn} == {(8, 4, 6)}
    for axis, starts in enumerate(zip(*(first for first, _ in drawn), strict=True)):
        assert set(starts) == set(range([5, 4, 4][axis]))
    assert not draw_box((12, 7), 0.0, torch.device("cpu")).any()


@pytest.mark.parametrize("patch_size", [(50, 40), (30, 24, 20)])
def test_boxes_of_shares_have_them(patch_size):
    torch.manual_seed(0)
    boxes = draw_boxes_of_shares(400, patch_size, torch.device("cpu"), 0.5, (0.02, 0.4))
    assert boxes.shape == (400, 1, *patch_size)
    shares = boxes.flatten(1).float().mean(1)
    assert 0.4 < (shares > 0).float().mean() < 0.6
    some = shares[shares > 0]
    assert some.max() <= 0.4
    assert some.min() > 0.005  # sides are rounded down to voxels
    assert some.max() > 0.33
    assert 0.15 < some.mean() < 0.21  # of 0.02 to 0.4, uniform, a little less by rounding
    ratios = []
    for box in boxes[shares > 0]:
        sides = np.array(extent(box[None])[1]) / patch_size
        ratios.append(sides.max() / sides.min())
    assert 3 < max(ratios) < 6  # 1 / 0.3, and rounding
    assert min(ratios) < 1.2
    assert not draw_boxes_of_shares(9, patch_size, torch.device("cpu"), 0.0, (0.02, 0.4)).any()


def test_the_lowest_ratio_of_a_box_is_the_inverse_of_the_largest(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size: torch.zeros(size))  # whatever is uniform has its lowest value
    (box,) = draw_boxes_of_shares(1, (1000, 1000), torch.device("cpu"), 0.5, (0.02, 0.4))
    # sides of a product of 0.02, of which one is 0.3 of the other: √(0.02 · 0.3) and √(0.02 / 0.3)
    assert sorted(extent(box[None])[1]) == [77, 258]


def with_no_two_voxels_alike(batch):
    """Phantoms have a background of zeros, in which no box shows."""
    for patches in (*batch["labeled"], *batch["unlabeled"]):
        patches["images"] = {name: torch.randn_like(image) for name, image in patches["images"].items()}
    return batch


def boxes_of(views, labeled, unlabeled, half, later):
    """The box read off the first view, where it is unlabeled, and off the second, where it is labeled."""
    first = (views[0] != labeled[:half]).any(1).any(0)
    second = (views[1] != unlabeled[later:]).any(1).any(0)
    return first, second


@each_setting
@pytest.mark.parametrize("both_ways", [False, True])
def test_mixtures_are_of_labeled_and_unlabeled_patches_in_both_directions(dataset, configuration, both_ways):
    trainer = initialized(dataset, configuration, nnUNetTrainerBCP, largest_component=False, both_ways=both_ways)
    ((name, teacher),) = trainer.teachers.items()
    change(teacher.network, 0.3)
    batch = with_no_two_voxels_alike(draw_batches(trainer, 1)[0])
    (draw,), (labeled,) = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    (image, target), unlabeled = labeled_of(batch)[name], unlabeled_of(batch, name)
    assert torch.equal(labeled[name].image, image)
    assert len(image) == len(unlabeled)
    half = len(image) if both_ways else len(image) - len(image) // 2
    later = 0 if both_ways else half
    seen = set()
    for _ in range(3):
        views, targets = trainer.views_and_targets(draw, labeled)
        mixed = [view[name] for view in views]
        assert [len(m) for m in mixed] == [half, len(image) - later]
        box, again = boxes_of(mixed, image, unlabeled, half, later)
        assert torch.equal(box, again)  # one box for both
        lengths = extent(box[None, None])[1]
        assert lengths == [n * 2 // 3 for n in trainer.configuration_manager.patch_size]
        seen.add(tuple(extent(box[None, None])[0]))
        assert torch.equal(mixed[0], torch.where(box, unlabeled[:half], image[:half]))
        assert torch.equal(mixed[1], torch.where(box, image[later:], unlabeled[later:]))
        with torch.no_grad():  # the teacher sees the patch as it is
            logits = teacher.network(unlabeled)
        if trainer.label_manager.has_regions:
            by_teacher, by_hand = (logits > 0).float(), target[0].float()
        else:
            classes = torch.arange(logits.shape[1]).view(1, -1, *[1] * len(box.shape))
            by_teacher = (logits.argmax(1, keepdim=True) == classes).float()
            by_hand = (target[0] == classes).float()
        assert by_teacher.any()
        assert torch.equal(targets[0][name].labels, torch.where(box, by_teacher[:half], by_hand[:half]))
        assert torch.equal(targets[1][name].labels, torch.where(box, by_hand[later:], by_teacher[later:]))
        for kind, inside in zip(targets, (False, True), strict=True):
            for where, expected in ((kind[name].from_labels, box == inside), (kind[name].from_teacher, box != inside)):
                assert torch.equal(where, expected.float().expand_as(where))
                assert where.shape == kind[name].labels[:, :1].shape
    assert len(seen) > 1


@pytest.mark.parametrize(("drawn", "unlabeled_batch_size"), [(3, 5), (1, 2), (1, 1), (4, 1)])
def test_every_patch_is_mixed_whatever_the_sizes_of_the_batches(drawn, unlabeled_batch_size):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerBCP, unlabeled_batch_size=unlabeled_batch_size)
    (batch,) = draw_batches(trainer, 1)
    (draw,), (labeled,) = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    own = labeled["FLAIR"]
    labeled = {"FLAIR": type(own)(own.image[:drawn], [scale[:drawn] for scale in own.target])}
    views, _ = trainer.views_and_targets(draw, labeled)
    mixed = torch.cat([view["FLAIR"] for view in views])
    assert all(len(view["FLAIR"]) for view in views)
    assert len(mixed) == max(drawn, unlabeled_batch_size, 2)
    for patch in (*labeled["FLAIR"].image, *draw.images["FLAIR"]):
        assert max((m == patch).float().mean() for m in mixed) > 0.3


@each_setting
def test_terms_are_those_of_either_region_by_itself(dataset, configuration):
    """Proof 7: cross-entropy and Dice over the voxels of a region, the mean over the directions."""
    trainer = initialized(dataset, configuration, nnUNetTrainerBCP)
    (name,) = (t.name for t in trainer.trainers)
    (batch,) = draw_batches(trainer, 1)
    (draw,), (labeled,) = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    _, targets = trainer.views_and_targets(draw, labeled)
    torch.manual_seed(0)
    outputs = [{name: torch.randn_like(kind[name].labels)} for kind in targets]
    regions, expected = trainer.label_manager.has_regions, {}
    for logits, kind in zip(outputs, targets, strict=True):
        z, labels = logits[name].movedim(1, -1), kind[name].labels.movedim(1, -1)
        p = z.sigmoid() if regions else z.softmax(-1)
        for region, where in (("labeled", kind[name].from_labels), ("pseudo", kind[name].from_teacher)):
            inside = where[:, 0].bool()
            if regions:
                ce = -(labels * p.log() + (1 - labels) * (1 - p).log())[inside].mean()
                q, y = p, labels
            else:
                ce = -(labels * p.log()).sum(-1)[inside].mean()
                q, y = p[..., 1:], labels[..., 1:]
            cases = [inside] if trainer.configuration_manager.batch_dice else []
            if not cases:  # one Dice for each patch
                cases = [inside & (torch.arange(len(q)) == b).view(-1, *[1] * (inside.ndim - 1)) for b in range(len(q))]
            dice = [(2 * (q[c] * y[c]).sum(0) + 1) / ((q[c] ** 2).sum(0) + (y[c] ** 2).sum(0) + 1) for c in cases]
            expected.setdefault(f"{region} ce", []).append(ce)
            expected.setdefault(f"{region} dice", []).append(1 - torch.stack(dice).mean())
    found = trainer.unsupervised_terms(outputs, targets)
    assert found.keys() == expected.keys()
    for term, values in expected.items():
        torch.testing.assert_close(found[term], sum(values) / 2)
    assert trainer.unsupervised_weights() == {t: 0.5 if "pseudo" in t else 1.0 for t in found}  # published, no ramp


def test_ignored_voxels_are_not_learned_from():
    trainer = initialized(FLAIR, "2d", nnUNetTrainerBCP)
    (batch,) = draw_batches(trainer, 1)
    (draw,), (labeled,) = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    trainer.label_manager._ignore_label = 3
    ignored = torch.rand(labeled["FLAIR"].full_target.shape) < 0.5
    labeled["FLAIR"].full_target[ignored] = 3
    _, targets = trainer.views_and_targets(draw, labeled)
    half = targets[0]["FLAIR"].labels.shape[0]
    for kind, own in zip(targets, (ignored[:half], ignored[half:]), strict=True):
        counted = kind["FLAIR"].from_labels.bool()
        assert not (counted & own).any()
        assert torch.equal(counted | own | kind["FLAIR"].from_teacher.bool(), torch.ones_like(own))
        assert (kind["FLAIR"].labels.sum(1)[counted[:, 0]] == 1).all()


@each_setting
def test_labeled_patches_are_mixed_among_themselves_in_the_warm_up(dataset, configuration):
    """With nnU-Net's own rule of making coarse targets."""
    trainer = initialized(dataset, configuration, nnUNetTrainerBCP, num_epochs=8)
    (t,) = trainer.trainers
    batch = with_no_two_voxels_alike(draw_batches(trainer, 1)[0])
    image, target = labeled_of(batch)[t.name]
    labeled = trainer.labeled_patches(batch)
    assert trainer.warming_up
    assert trainer.warmup_epochs == 2
    mixed = trainer.labeled_views(labeled, [])[t.name]
    box = (mixed.image != image).any(1).any(0)
    assert extent(box[None, None])[1] == [n * 2 // 3 for n in trainer.configuration_manager.patch_size]
    partner = [i - 1 for i in range(len(image))]
    assert torch.equal(mixed.image, torch.where(box, image[partner], image))
    full = torch.where(box, target[0][partner], target[0])
    downsample = DownsampleSegForDSTransform(t._get_deep_supervision_scales())
    for case, labels in enumerate(full):
        expected = downsample(segmentation=labels)["segmentation"]
        for found, scale in zip(mixed.target, expected, strict=True):
            assert torch.equal(found[case], scale)
    trainer.current_epoch = 2
    assert trainer.labeled_views(labeled, []) is labeled
    assert trainer.labeled_weight == 0


@pytest.mark.parametrize(("method", "patches_of_a_step"), [(nnUNetTrainerBCP, 4), (nnUNetTrainerBCPPlus, 12)])
def test_plus_sees_unmixed_labels_beside_all_mixtures_and_deploys_the_average(method, patches_of_a_step):
    """BCP, instead of these, as many mixtures as there are labeled patches."""
    trainer = initialized(FLAIR, "2d", method, warmup_fraction=0.0, recompute=False)
    (t,) = trainer.trainers
    batch = with_no_two_voxels_alike(draw_batches(trainer, 1)[0])
    image, unlabeled = labeled_of(batch)[t.name][0], unlabeled_of(batch, t.name)
    assert len(image) == len(unlabeled) == 4
    seen = []
    t.network.register_forward_pre_hook(lambda _, images: seen.append(images[0].detach()))
    trainer.train_step(batch)
    patches = torch.cat(seen)
    assert len(patches) == patches_of_a_step
    assert [any(torch.equal(patch, own) for patch in patches) for own in image] == [method is nnUNetTrainerBCPPlus] * 4
    assert not any(torch.equal(patch, own) for patch in patches for own in unlabeled)
    assert trainer.deploy_average == (method is nnUNetTrainerBCPPlus)


@each_setting
def test_labeled_patches_are_mixed_without_deep_supervision_too(dataset, configuration):
    trainer = initialized(dataset, configuration, nnUNetTrainerBCP, num_epochs=8, enable_deep_supervision=False)
    (t,) = trainer.trainers
    batch = with_no_two_voxels_alike(draw_batches(trainer, 1)[0])
    image, target = labeled_of(batch)[t.name]
    mixed = trainer.labeled_views(trainer.labeled_patches(batch), [])[t.name]
    box = (mixed.image != image).any(1).any(0)
    assert 0 < box.float().mean() < 1
    partner = [i - 1 for i in range(len(image))]
    assert torch.equal(mixed.target, torch.where(box, target[partner], target))


@each_setting
def test_largest_component_of_every_class_is_kept(dataset, configuration):
    trainer = initialized(dataset, configuration, nnUNetTrainerBCP)
    (name,) = (t.name for t in trainer.trainers)
    torch.manual_seed(0)
    shape = (2, trainer.label_manager.num_segmentation_heads, *trainer.configuration_manager.patch_size)
    z = 2 * torch.randn(shape)
    p = (
        (z - 4).sigmoid()
        if trainer.label_manager.has_regions
        else (z + 4 * (torch.arange(shape[1]) == 0).view(1, -1, 1, 1)).softmax(1)
    )
    hard = trainer.hard_pseudo_labels(p)
    kept = trainer.segmented(name, p)
    first = 0 if trainer.label_manager.has_regions else 1
    for case in range(2):
        for of_class in range(first, shape[1]):
            before, after = hard[case, of_class].numpy(), kept[case, of_class].numpy()
            found, number = components(before, np.ones((3,) * before.ndim))
            sizes = np.bincount(found.ravel())[1:]
            assert number > 1
            assert after.sum() >= sizes.max()
            assert set(np.unique(found[after > 0])) == {i + 1 for i, size in enumerate(sizes) if size == sizes.max()}
    if first:
        assert torch.equal(kept.sum(1), torch.ones_like(kept[:, 0]))
    trainer.largest_component = False
    assert torch.equal(trainer.segmented(name, p), hard)


# between modalities


@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres"), (PATTERNS, "2d")])
def test_partners_are_the_same_in_all_modalities(dataset, configuration):
    """Boxes, cases and places: the labels of a mixture that come from labels are equal, those of its modalities are."""
    trainer = initialized(dataset, configuration, nnUNetTrainerCrossModalBCP)
    batch = with_no_two_voxels_alike(draw_batches(trainer, 1)[0])
    draws, partners = trainer.unlabeled_draws(batch), trainer.mixing_partners(batch)
    assert len(draws) == len(partners) == {LABELS: 1, REGIONS: 1, PATTERNS: 3}[dataset]
    for draw, labeled, patches in zip(draws, partners, batch["labeled"], strict=False):
        assert draw.images.keys() == labeled.keys() == patches["images"].keys()
        assert len(labeled) > 1
        first, *others = labeled.values()
        for other in others:
            assert torch.equal(first.full_target, other.full_target)
            assert not torch.equal(first.image, other.image)
        views, targets = trainer.views_and_targets(draw, labeled)
        half = len(views[0][next(iter(draw.images))])
        boxes = [
            boxes_of([view[name] for view in views], labeled[name].image, draw.images[name], half, half)[0]
            for name in draw.images
        ]
        for kind in targets:
            (a, *rest) = kind.values()
            for b in rest:
                assert torch.equal(a.from_labels, b.from_labels)
                assert torch.equal(a.labels * a.from_labels, b.labels * b.from_labels)
        assert all(torch.equal(boxes[0], box) for box in boxes)


def test_no_labeled_case_is_left_out_of_the_supervised_loss():
    """Cases that lack a modality cannot be partners of all, but are drawn for their modalities' own batches."""
    trainer = initialized(PATTERNS, "2d", nnUNetTrainerCrossModalBCP)
    names = [t.name for t in trainer.trainers]
    pairs = [("FLAIR", "T1"), ("FLAIR", "T2"), ("T1", "T2")]
    assert trainer.labeled_draws() == [*pairs, *((name,) for name in names)]
    loader, _ = trainer.get_dataloaders()
    loaders = loader.data_loader.loaders["labeled"]
    for draw, of_draw in zip(trainer.labeled_draws(), loaders, strict=True):
        expected = set.intersection(*(set(t.do_split()[0]) for t in trainer.trainers if t.name in draw))
        assert set(of_draw._data.identifiers) == expected
        for name in draw:  # the files are there
            folder = preprocessed_folder(trainer.group.modalities[names.index(name)].dataset_name)
            assert all((folder / "nnUNetPlans_2d" / f"{case}.pkl").is_file() for case in expected)
    (batch,) = draw_batches(trainer, 1)
    own = trainer.labeled_patches(batch)
    for name, patches in zip(names, batch["labeled"][3:], strict=True):
        assert list(patches["images"]) == [name]
        assert torch.equal(own[name].image, patches["images"][name])


@pytest.mark.parametrize("labeled_by", ["own", "better", "others", "all"])
@pytest.mark.parametrize(("dataset", "configuration"), [(LABELS, "2d"), (REGIONS, "3d_fullres")])
def test_labelers_are_those_that_are_asked_for(labeled_by, dataset, configuration):
    trainer = initialized(
        dataset, configuration, nnUNetTrainerCrossModalBCP, labeled_by=labeled_by, largest_component=False
    )
    names = [t.name for t in trainer.trainers]
    for name in names:
        change(trainer.teachers[name].network, 0.3)
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    regions = trainer.label_manager.has_regions
    with torch.no_grad():
        z = {name: trainer.teachers[name].network(draw.images[name]) for name in names}
    p = {name: of.sigmoid() if regions else of.softmax(1) for name, of in z.items()}

    def labels_of(labelers):
        mean = sum(p[name] for name in labelers) / len(labelers)
        if regions:
            return (mean > 0.5).float()
        return torch.stack([mean.argmax(1) == c for c in range(mean.shape[1])], 1).float()

    expected = {
        "own": {name: [name] for name in names},
        "better": dict.fromkeys(names, names),  # nothing has been validated
        "others": {name: [n for n in names if n != name] for name in names},
        "all": dict.fromkeys(names, names),
    }[labeled_by]
    found = trainer.pseudo_labels(draw)
    assert {name: bool((found[name] == labels_of(expected[name])).all()) for name in names} == dict.fromkeys(
        names, True
    )
    if labeled_by == "better":
        trainer.bma_pool_size = 2
        for t, dice in zip(
            trainer.trainers,
            ([0.9, 0.1, 0.2], [0.5, float("nan"), 0.7, 0.05, 0.05], [0.0, 0.0, 0.3]),
            strict=False,
        ):
            # means of the best two: 0.55, 0.6, 0.15; of the worst two and of all, the first one would be better
            t.logger.get_value("mean_fg_dice", step=None).extend(dice)
        found = trainer.pseudo_labels(draw)
        for name in names:
            assert torch.equal(found[name], labels_of([names[1]]))
        assert trainer.labelers("FLAIR", ["FLAIR", "T2"]) == ["FLAIR"]  # of a draw without the best one


def test_the_log_says_who_labels(capsys):
    trainer = initialized(LABELS, "2d", nnUNetTrainerCrossModalBCP, num_epochs=4)
    for epoch, dice, said in (
        (0, (), None),  # warming up
        (1, (), "by the teacher of FLAIR and T1 (best validation Dice values: FLAIR 0.0000, T1 0.0000)"),
        (2, (0.2, 0.35), "by the teacher of T1 (best validation Dice values: FLAIR 0.2000, T1 0.3500)"),
    ):
        trainer.current_epoch = epoch
        for t, value in zip(trainer.trainers, dice, strict=False):
            t.logger.get_value("mean_fg_dice", step=None).append(value)
        trainer.on_train_epoch_start()
        lines = [line for line in capsys.readouterr().out.splitlines() if "pseudo-labels" in line]
        assert [line.split("pseudo-labels ", 1)[1].strip() for line in lines] == ([said] if said else [])


def test_a_named_modality_labels_whatever_was_measured():
    """From the first step on, in draws that show it."""
    options = {"labeled_by": "better", "teaching_modality": "FLAIR"}
    trainer = initialized(LABELS, "2d", nnUNetTrainerCrossModalBCP, **options)
    assert trainer.labelers("T1", ["FLAIR", "T1"]) == ["FLAIR"]
    assert trainer.labelers("T1", ["T1", "T2"]) == ["T1", "T2"]
    for t, dice in zip(trainer.trainers, (0.1, 0.6), strict=True):
        t.logger.get_value("mean_fg_dice", step=None).append(dice)
    assert trainer.labelers("T1", ["FLAIR", "T1"]) == ["FLAIR"]
    assert trainer.labelers("T1", ["T1", "T2"]) == ["T1"]
    with pytest.raises(ValueError, match="teaching_modality must be one of FLAIR, T1; got 'T2'"):
        initialized(LABELS, "2d", nnUNetTrainerCrossModalBCP, teaching_modality="T2")


def test_unknown_labelers_are_refused():
    trainer = initialized(LABELS, "2d", nnUNetTrainerCrossModalBCP, labeled_by="best")
    with pytest.raises(ValueError, match='labeled_by must be "own", "better", "others" or "all", got \'best\''):
        trainer.labelers("FLAIR", ["FLAIR", "T1"])
