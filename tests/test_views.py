"""Methods that look at something else than the patches as drawn: none of them needs a step of its own.

Each stands for published ones, in a few lines: mixtures of labeled and unlabeled patches (BCP), weak and several strong
views and perturbed features (FixMatch, UniMatch), pseudo-labeled patches in the labeled batch (nnFilterMatch).
"""

import pytest
import torch
from conftest import (
    CHANNELS,
    LABELS,
    REGIONS,
    assert_step_equals_reference,
    draw_batches,
    initialized,
    labeled_of,
    unlabeled_of,
    unsupervised_terms,
    weights,
    with_something_seen,
)
from torch.nn.functional import interpolate

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.training.conductor import LabeledPatches
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.photometry import draw_photometry

pytestmark = pytest.mark.usefixtures("groups")


class Mixing(nnUNetTrainerSemiSupervised):
    """A box of the labeled patch is pasted into the unlabeled one, and the reverse; an EMA teacher fills in."""

    teacher_averaging = "ema"
    mixes_labeled = True
    supervised_weight = 0.0
    term_weights = {"ce": "mixing_weight", "dice": "mixing_weight"}
    mixing_weight = 1.0
    noise_std = 0.0

    def views_and_targets(self, unlabeled, labeled):
        views, targets = [{}, {}], [{}, {}]
        for name, image in unlabeled.images.items():
            box = torch.zeros_like(image[:1, :1], dtype=torch.bool)
            box[(..., *(slice(n // 4, 3 * n // 4) for n in image.shape[2:]))] = True
            pairs = [
                (labeled[name].image, image),
                (
                    self.one_hot_labels(labeled[name].full_target),
                    self.hard_pseudo_labels(self.mean_prediction(self.teachers[name], image)),
                ),
            ]
            for kind, (own, other) in zip((views, targets), pairs, strict=True):
                kind[0][name], kind[1][name] = torch.where(box, own, other), torch.where(box, other, own)
        return views, targets

    def unsupervised_terms(self, outputs, targets):
        regions = self.label_manager.has_regions
        ce, dice = [], []
        for logits, labels in zip(outputs, targets, strict=True):
            for name, z in logits.items():
                ce.append(soft_cross_entropy(z, labels[name], regions))
                p = self.foreground(self.probabilities(z))
                dice.append(soft_dice_loss(p, self.foreground(labels[name]), True))
        return {"ce": self.over_networks(ce), "dice": self.over_networks(dice)}


class WeakAndStrong(nnUNetTrainerSemiSupervised):
    """The network's own sure prediction of the patch teaches it on two strong views, and on perturbed features."""

    term_weights = {"strong": "strong_weight", "features": "feature_weight"}
    strong_weight = 0.5
    feature_weight = 0.5

    def views_and_targets(self, unlabeled, labeled):
        weak = unlabeled.images
        targets = {t.name: self.own_prediction(t, weak[t.name]) for t in self.learners() if t.name in weak}
        strong = [
            {name: draw_photometry(len(image), image.device).apply(image) for name, image in weak.items()}
            for _ in range(2)
        ]
        return [weak, *strong], targets

    def unlabeled_output(self, trainer, images, view):
        network = trainer.local_network()
        if view:
            return network(images)
        skips = [torch.nn.functional.dropout2d(s.flatten(2)[..., None]).view_as(s) for s in network.encoder(images)]
        return network.decoder(skips)

    def unsupervised_terms(self, outputs, targets):
        def dice(logits):
            return [
                soft_dice_loss(
                    self.foreground(self.probabilities(z)),
                    self.foreground(self.hard_pseudo_labels(targets[name])),
                    False,
                    (targets[name].amax(1, keepdim=True) > 0.5).float(),
                )
                for name, z in logits.items()
            ]

        features, *strong = outputs
        both = [self.over_networks(dice(logits)) for logits in strong]
        return {"strong": sum(both) / 2, "features": self.over_networks(dice(features))}


class PseudoLabeled(nnUNetTrainerSemiSupervised):
    """Unlabeled patches with the labels of an EMA teacher join the labeled batch, under nnU-Net's own loss."""

    teacher_averaging = "ema"
    noise_std = 0.0

    def labeled_views(self, labeled, draws):
        joined = {}
        for name, image in ((n, i) for draw in draws for n, i in draw.images.items()):
            p = self.mean_prediction(self.teachers[name], image)
            full = p.gt(0.5).float() if self.label_manager.has_regions else p.argmax(1, keepdim=True).float()
            scales = [
                torch.cat([target, interpolate(full, target.shape[2:]).to(target.dtype)])
                for target in labeled[name].target
            ]
            joined[name] = LabeledPatches(torch.cat([labeled[name].image, image]), scales)
        return joined

    def views_and_targets(self, unlabeled, labeled):
        return [], None

    def unsupervised_terms(self, outputs, targets):
        return {}


SETTINGS = [(LABELS, "2d"), (REGIONS, "3d_fullres"), (CHANNELS, "3d_fullres")]
each_setting = pytest.mark.parametrize(("dataset", "configuration"), SETTINGS)


@pytest.mark.parametrize("method", [Mixing, WeakAndStrong, PseudoLabeled])
@each_setting
def test_step_gives_the_gradients_of_the_formula(method, dataset, configuration):
    """Proof 8: held, recomputed and, but for random features, in micro-batches."""
    trainer = with_something_seen(initialized(dataset, configuration, method, rampup_fraction=0.0))
    (batch,) = draw_batches(trainer, 1)
    for trainer.micro_batch_size in (None,) if method is WeakAndStrong else (None, 1):
        assert_step_equals_reference(trainer, batch)


@pytest.mark.parametrize("method", [Mixing, WeakAndStrong])
def test_terms_reach_every_network(method):
    trainer = with_something_seen(initialized(LABELS, "3d_fullres", method, rampup_fraction=0.0))
    (batch,) = draw_batches(trainer, 1)
    terms = unsupervised_terms(trainer, batch)
    assert terms.keys() == method.term_weights.keys()
    for term in terms.values():
        for t in trainer.trainers:
            t.optimizer.zero_grad()
        term.backward(retain_graph=True)
        for t in trainer.trainers:
            assert all(p.grad.any() for n, p in t.network.named_parameters() if n.startswith("encoder."))


@each_setting
def test_mixtures_are_of_the_patches_of_one_modality(dataset, configuration):
    trainer = initialized(dataset, configuration, Mixing)
    (batch,) = draw_batches(trainer, 1)
    assert batch["labeled"]  # drawn although there is no supervised loss
    labeled = trainer.labeled_patches(batch)
    for draw in trainer.unlabeled_draws(batch):
        views, targets = trainer.views_and_targets(draw, labeled)
        for name in draw.images:
            image, target = labeled_of(batch)[name]
            center = (..., *(n // 2 for n in image.shape[2:]))
            corner = (..., *(0 for _ in image.shape[2:]))
            unlabeled = unlabeled_of(batch, name)
            assert torch.equal(views[0][name][center], image[center])
            assert torch.equal(views[0][name][corner], unlabeled[corner])
            assert torch.equal(views[1][name][center], unlabeled[center])
            assert torch.equal(views[1][name][corner], image[corner])
            if not trainer.label_manager.has_regions:
                label = target[0][center][:, 0].long()
                assert torch.equal(targets[0][name][center].argmax(1), label)
            else:
                assert torch.equal(targets[0][name][center], target[0][center].float())


def test_views_differ_in_photometry_alone():
    trainer = initialized(LABELS, "2d", WeakAndStrong)
    (batch,) = draw_batches(trainer, 1)
    (draw, *_) = trainer.unlabeled_draws(batch)
    (weak, first, second), _ = trainer.views_and_targets(draw, {})
    for name, image in weak.items():
        for strong in (first[name], second[name]):
            assert strong.shape == image.shape
            assert not torch.equal(strong, image)
            for a, b in zip(image, strong, strict=True):  # the same anatomy at the same place
                assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.5
        assert not torch.equal(first[name], second[name])


def test_pseudo_labeled_patches_are_learned_from():
    """As many more patches as were drawn unlabeled; without them the step is another."""
    trainer = with_something_seen(initialized(LABELS, "2d", PseudoLabeled))
    (batch,) = draw_batches(trainer, 1)
    seen = []
    for t in trainer.trainers:
        t.network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    stock = with_something_seen(initialized(LABELS, "2d", PseudoLabeled))
    stock.labeled_views = lambda labeled, draws: labeled
    for one in (trainer, stock):
        one.train_step(batch)
    assert seen == [8, 8]
    for a, b in zip(weights(trainer), weights(stock), strict=True):
        assert not all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", [Mixing, WeakAndStrong, PseudoLabeled])
def test_whole_training_runs(method):
    trainer = initialized(LABELS, "2d", method)
    before = weights(trainer)
    trainer.run_training()
    for old, new in zip(before, weights(trainer), strict=True):
        assert not all(torch.equal(old[k], new[k]) for k in old)


def test_own_prediction_is_that_of_the_network():
    trainer = initialized(LABELS, "2d", nnUNetTrainerSemiSupervised)
    (t, _), images = trainer.trainers, torch.randn(5, 1, *trainer.configuration_manager.patch_size)
    for trainer.micro_batch_size in (None, 2):
        found = trainer.own_prediction(t, images)
        assert not found.requires_grad
        torch.testing.assert_close(found, t.network(images)[0].softmax(1).detach())
    assert t.network.decoder.deep_supervision
