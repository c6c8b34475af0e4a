"""FixMatch and UniMatch: what is sure in the weak view is learned in strong ones. By formula."""

import pytest
import torch
from conftest import LABELS, draw_batches, initialized, unlabeled_outputs, with_something_seen
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_semicml.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch
from nnunetv2_semicml.trainers.nnUNetTrainerUniMatch import nnUNetTrainerUniMatch

FLAIR, REGIONS_T1 = "Dataset501_Labels_FLAIR", "Dataset522_Regions_T1"
METHODS = [nnUNetTrainerFixMatch, nnUNetTrainerUniMatch]
pytestmark = pytest.mark.usefixtures("groups")
each_setting = pytest.mark.parametrize(("dataset", "configuration"), [(FLAIR, "2d"), (REGIONS_T1, "3d_fullres")])
each_method = pytest.mark.parametrize("method", METHODS)


def strong_views(method):
    """Published."""
    return {nnUNetTrainerFixMatch: 1, nnUNetTrainerUniMatch: 2}[method]


@each_method
@each_setting
def test_labels_are_what_the_network_is_sure_of(method, dataset, configuration):
    """Without boxes, those of the weak view."""
    trainer = with_something_seen(initialized(dataset, configuration, method, box_probability=0.0))
    (t,) = trainer.trainers
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    views, targets = trainer.views_and_targets(draw, {})
    with torch.no_grad():
        z = t.network(draw.images[t.name])[0]
    if trainer.label_manager.has_regions:
        p = z.sigmoid()
        labels, sure = (z > 0).float(), (p >= 0.95) | (p <= 0.05)
    else:
        labels = (z.argmax(1, keepdim=True) == torch.arange(z.shape[1]).view(1, -1, 1, 1)).float()
        sure = (z.softmax(1) >= 0.95).any(1, keepdim=True)
    assert 0 < sure.float().mean() < 1
    assert len(views) == len(targets) == strong_views(method) + (method is nnUNetTrainerUniMatch)
    for of_view in targets:
        assert torch.equal(of_view[t.name].labels, labels)
        assert torch.equal(of_view[t.name].sure, sure.float())


@each_method
@each_setting
def test_boxes_of_the_next_case_are_pasted_into_images_and_labels_alike(method, dataset, configuration):
    """The image tells its place and case: strong photometry is exchanged for nothing."""
    trainer = with_something_seen(initialized(dataset, configuration, method, box_probability=1.0))
    (t,) = trainer.trainers
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    labels = trainer.sure_labels(draw)[t.name]
    image = draw.images[t.name]
    cases = torch.arange(len(image)).view(-1, *[1] * (image.ndim - 1)).expand_as(image).float()
    drawn = type(draw)({t.name: cases})
    view, targets = trainer.strong_view(drawn, {t.name: labels})  # constant images stay as they are
    inside = view[t.name].round() != cases  # the sum of a blur's taps is one but for rounding
    previous = [i - 1 for i in range(len(image))]
    assert torch.equal(view[t.name][inside].round(), cases[previous][inside])
    for case in inside[:, 0]:
        where = case.nonzero()
        first, last = where.min(0).values, where.max(0).values
        assert len(where) == (last - first + 1).prod()
        assert 0 < case.float().mean() <= 0.4
    for found, whole in zip(targets[t.name], labels, strict=True):
        assert torch.equal(found, torch.where(inside[:, :1], whole[previous], whole))


@each_method
def test_strong_views_differ_in_photometry_alone(method):
    trainer = initialized(FLAIR, "2d", method, box_probability=0.0)
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    image = draw.images["FLAIR"]
    views, _ = trainer.views_and_targets(draw, {})
    strong = [view["FLAIR"] for view in views[: strong_views(method)]]
    for view in strong:
        changed = [not torch.equal(a, b) for a, b in zip(image, view, strict=True)]
        assert any(changed)
        for a, b in zip(image, view, strict=True):
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.5
    if method is nnUNetTrainerUniMatch:
        assert not torch.equal(*strong)
        assert torch.equal(views[-1]["FLAIR"], image)


@each_method
@each_setting
def test_terms_are_dice_of_the_sure_voxels(method, dataset, configuration):
    """Proof 7: over the batch, of all classes, the background included; published weights in nnU-Net's unit of loss."""
    trainer = with_something_seen(initialized(dataset, configuration, method))
    (t,) = trainer.trainers
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    _, targets = trainer.views_and_targets(draw, {})
    torch.manual_seed(0)
    outputs = [{t.name: torch.randn_like(of_view[t.name].labels)} for of_view in targets]
    losses = []
    for logits, of_view in zip(outputs, targets, strict=True):
        z, (labels, sure) = logits[t.name], of_view[t.name]
        p = z.sigmoid() if trainer.label_manager.has_regions else z.softmax(1)
        sure = sure.expand_as(p).bool()
        of_classes = []
        for c in range(p.shape[1]):
            q, y = p[:, c][sure[:, c]], labels[:, c][sure[:, c]]
            of_classes.append(1 - (2 * (q * y).sum() + 1e-5) / ((q * q).sum() + (y * y).sum() + 1e-5))
        losses.append(torch.stack(of_classes).mean())
    found, weights = trainer.unsupervised_terms(outputs, targets), trainer.unsupervised_weights()
    if method is nnUNetTrainerFixMatch:
        torch.testing.assert_close(found, {"strong": losses[0]})
        assert weights == {"strong": 2.0}
    else:
        torch.testing.assert_close(found, {"strong": (losses[0] + losses[1]) / 2, "features": losses[2]})
        # published: (L + s1 / 4 + s2 / 4 + fp / 2) / 2 of L = (CE + Dice) / 2, half of nnU-Net's loss
        assert weights == {"strong": 2 * (0.25 + 0.25), "features": 2 * 0.5}


@each_setting
def test_channels_of_features_are_dropped_at_every_resolution(dataset, configuration):
    trainer = initialized(dataset, configuration, nnUNetTrainerUniMatch)
    (t,) = trainer.trainers
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    views, _ = trainer.views_and_targets(draw, {})
    seen = []
    t.network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append([skip.clone() for skip in inputs[0]]))
    shares, of_cases = [], []
    for _ in range(10):
        seen.clear()
        unlabeled_outputs(trainer, views)
        *strong, dropped = seen
        clean = t.network.encoder(draw.images[t.name])
        for skips, view in zip(strong, views, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(skips, t.network.encoder(view[t.name]), strict=True))
        for skip, whole in zip(dropped, clean, strict=True):
            gone = (skip == 0).flatten(2).all(2)
            kept = (skip == 2 * whole).flatten(2).all(2)  # dropout keeps the mean
            assert (gone | kept).all()
            shares.append(gone.float().mean())
            of_cases.append(gone.float().mean(1))
    assert ((torch.cat(of_cases) > 0) & (torch.cat(of_cases) < 1)).float().mean() > 0.5  # not cases as a whole
    assert 0.4 < torch.stack(shares).mean() < 0.6


class Whole(nn.Module):
    """A network that is not made of encoder and decoder."""

    part = "neither"

    def __init__(self, channels, heads):
        super().__init__()
        self.layer = nn.Conv2d(channels, heads, 1)
        setattr(self, self.part, nn.Identity())

    def forward(self, x):
        return self.layer(x)


class nnUNetTrainerWhole(nnUNetTrainer):
    """Another architecture."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return Whole(num_input_channels, num_output_channels)

    def set_deep_supervision_enabled(self, enabled):
        """There is none."""


@pytest.mark.parametrize("part", ["neither", "encoder", "decoder"])
def test_networks_without_features_to_drop_are_refused(part, monkeypatch):
    monkeypatch.setattr(Whole, "part", part)
    named = type("nnUNetTrainerUniMatch", (nnUNetTrainerUniMatch,), {"network_trainer": nnUNetTrainerWhole})
    with pytest.raises(
        NotImplementedError, match=r"encoder and a decoder: Whole has none. Train nnUNetTrainerFixMatch"
    ):
        initialized(FLAIR, "2d", named)


def test_networks_of_a_group_learn_from_themselves_alone():
    """Another T1 image changes nothing for FLAIR."""
    trainer = initialized(LABELS, "2d", nnUNetTrainerFixMatch)
    (batch,) = draw_batches(trainer, 1)
    draws = trainer.unlabeled_draws(batch)
    assert [list(draw.images) for draw in draws] == [["FLAIR"], ["T1"]]
    torch.manual_seed(0)
    views, _ = trainer.views_and_targets(draws[0], {})
    assert [list(view) for view in views] == [["FLAIR"]]
