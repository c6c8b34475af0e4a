"""Losses: by slow implementations written from their formulas, by closed forms, and over several ranks."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import slow_contrast
from torch import distributed as dist

from benchmarks.cost.memory import peak_memory
from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import masked_consistency, prediction_consistency
from nnunetv2_semicml.losses.contrastive import ContrastiveLoss, pool_features
from nnunetv2_semicml.losses.soft_pseudo_label import confidence, soft_cross_entropy, soft_dice_loss


def slow_asc(predictions, temperature=1.0, eps=1e-6, empty_area=0.0):
    """Written from the formula, one pair of predictions at a time."""
    losses = []
    for a in range(len(predictions)):
        for b in range(a + 1, len(predictions)):
            flat = [p.reshape(-1) for modality in (a, b) for p in predictions[modality]]
            cases, of_pair = len(flat) // 2, []

            def s(u, v):
                return (2 * (u * v).sum() + eps) / ((u * u).sum() + (v * v).sum() + eps)

            def comparable(u, v):
                return (u * u).sum() >= empty_area or (v * v).sum() >= empty_area

            for i in range(2 * cases):
                positive = (i + cases) % (2 * cases)
                if not comparable(flat[i], flat[positive]):
                    continue
                numerator = torch.exp(s(flat[i], flat[positive]) / temperature)
                denominator = numerator
                for k in range(2 * cases):
                    if k % cases != i % cases and comparable(flat[i], flat[k]):
                        denominator = denominator + torch.exp(s(flat[i], flat[k]) / temperature)
                of_pair.append(-torch.log(numerator / denominator))
            losses.append(torch.stack(of_pair).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("cases", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 6, 7),  # C, y, x
        (3, 4, 5, 6),  # C, z, y, x
    ],
)
def test_asc_equals_the_formula(modalities, cases, temperature, shape):
    torch.manual_seed(0)
    predictions = [torch.rand(cases, *shape, dtype=torch.float64, requires_grad=True) for _ in range(modalities)]
    loss = AreaSimilarityContrastiveLoss(temperature)(predictions)
    expected = slow_asc(predictions, temperature)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, predictions)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, predictions))


@pytest.mark.parametrize("cases", [2, 4])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_asc_closed_forms(cases, temperature):
    loss = AreaSimilarityContrastiveLoss(temperature)
    same = torch.ones(cases, 1, 4, 4)
    # all predictions alike: nothing tells the positive from the 2B - 2 negatives
    assert loss([same, same]).item() == pytest.approx(math.log(2 * cases - 1), rel=1e-5)
    # the modalities agree and the cases do not overlap: s = 1 for the positive, 0 for the negatives
    apart = torch.eye(cases).reshape(cases, 1, cases, 1).repeat(1, 1, 1, 8)
    e = math.exp(1 / temperature)
    assert loss([apart, apart]).item() == pytest.approx(-math.log(e / (e + 2 * cases - 2)), rel=1e-4)


def test_asc_gradient_is_correct_to_second_differences():
    torch.manual_seed(0)
    predictions = [torch.rand(3, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *p: AreaSimilarityContrastiveLoss(0.5)(p), predictions)


def test_asc_defaults_are_the_published_ones():
    """A temperature of 1, next to no eps, and less than a voxel is empty."""
    torch.manual_seed(0)
    predictions = [torch.rand(3, 2, 3, 3, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(AreaSimilarityContrastiveLoss()(predictions), slow_asc(predictions, 1.0, 1e-6))
    assert AreaSimilarityContrastiveLoss().empty_area == 1.0


def test_asc_equals_the_formula_with_any_eps():
    torch.manual_seed(0)
    predictions = [torch.rand(3, 2, 3, 3, dtype=torch.float64) for _ in range(2)]
    expected = slow_asc(predictions, 0.5, 0.7)
    torch.testing.assert_close(AreaSimilarityContrastiveLoss(0.5, eps=0.7)(predictions), expected)


@pytest.mark.parametrize("empty_area", [0.0, 0.5, 1.0])
def test_asc_leaves_out_pairs_of_empty_predictions(empty_area):
    """Cases that are empty in both modalities, in one, in none, and one whose area is just not below the limit."""
    torch.manual_seed(0)
    predictions = [0.1 + torch.rand(4, 1, 8, 8, dtype=torch.float64) for _ in range(2)]
    predictions[0][:2] *= 1e-3
    predictions[1][1] *= 1e-3
    predictions[0][2], predictions[1][2] = 0.0, 0.0
    predictions[0][2, 0, 0, 0] = empty_area**0.5
    for p in predictions:
        p.requires_grad_()
    found = AreaSimilarityContrastiveLoss(0.5, empty_area=empty_area)(predictions)
    expected = slow_asc(predictions, 0.5, empty_area=empty_area)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, predictions) for loss in (found, expected)))


def test_gradient_of_asc_is_not_dominated_by_empty_predictions():
    """Without the rule it would be: that of an empty case is divided by its tiny area."""
    torch.manual_seed(0)
    predictions = [torch.cat([torch.rand(3, 1, 8, 8), 1e-4 * torch.rand(1, 1, 8, 8)]) for _ in range(2)]
    for p in predictions:
        p.requires_grad_()
    AreaSimilarityContrastiveLoss()(predictions).backward()
    for p in predictions:
        assert p.grad[3].abs().max() < p.grad[:3].abs().max() * 2


def test_asc_of_a_constant_sends_gradients_to_the_others():
    """Such as pseudo-labels, whichever of the predictions they are."""
    torch.manual_seed(0)
    for constant in range(3):
        predictions = [torch.rand(2, 1, 4, 4, dtype=torch.float64) for _ in range(3)]
        learning = [p.requires_grad_() for i, p in enumerate(predictions) if i != constant]
        found = torch.autograd.grad(AreaSimilarityContrastiveLoss()(predictions), learning)
        torch.testing.assert_close(found, torch.autograd.grad(slow_asc(predictions), learning))


def test_asc_without_any_area_is_zero_and_differentiable():
    predictions = [torch.zeros(2, 1, 4, 4, requires_grad=True) for _ in range(2)]
    loss = AreaSimilarityContrastiveLoss()(predictions)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in predictions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asc_is_float32_inside_autocast(dtype):
    big = torch.ones(2, 1, 64, 64, 64)  # areas of 262144 voxels: beyond float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = AreaSimilarityContrastiveLoss()([big.to(dtype), big.to(dtype)])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [(2, 1, 4, 4)],  # one modality
        [(1, 1, 4, 4), (1, 1, 4, 4)],  # one case: no negatives
        [(2, 1, 4, 4), (2, 2, 4, 4)],  # different classes
        [(2, 1, 4, 4), (2, 1, 4, 5)],  # different patches
    ],
)
def test_asc_refuses_ill_shaped_input(shapes):
    with pytest.raises(ValueError, match="at least 2 tensors of one shape"):
        AreaSimilarityContrastiveLoss()([torch.rand(s) for s in shapes])


@pytest.mark.parametrize("arguments", [{"temperature": 0}, {"eps": 0}, {"empty_area": -1}])
def test_asc_refuses_meaningless_parameters(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        AreaSimilarityContrastiveLoss(**arguments)


def test_consistency_is_the_mean_squared_difference_over_pairs():
    torch.manual_seed(0)
    a, b, c = torch.rand(3, 2, 2, 4, 4, 4).unbind()
    assert prediction_consistency([a, b]).item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-6)
    pairs = ((a - b) ** 2 + (a - c) ** 2 + (b - c) ** 2).mean().item() / 3
    assert prediction_consistency([a, b, c]).item() == pytest.approx(pairs, rel=1e-6)
    assert prediction_consistency([a, a]).item() == 0
    for others in ([], [b[:, :1]]):  # one broadcast to both classes would go unnoticed
        with pytest.raises(ValueError, match="at least 2 tensors"):
            prediction_consistency([a, *others])


# soft pseudo-labels


def soft_target(regions, shape=(2, 3, 4, 5), dtype=torch.float64):
    torch.manual_seed(1)
    logits = 2 * torch.randn(shape, dtype=dtype)
    return logits.sigmoid() if regions else logits.softmax(1)


def logits_of(target, regions):
    return target.logit() if regions else target.log()


def slow_soft_losses(logits, target, regions, weight, batch_dice):
    """Written from the formulas, one voxel at a time: (cross-entropy, Dice)."""
    cases, channels = logits.shape[:2]
    q = target.reshape(cases, channels, -1)
    z = logits.reshape(cases, channels, -1)
    w = weight.expand(cases, weight.shape[1], *logits.shape[2:]).reshape(cases, weight.shape[1], -1)
    p = 1 / (1 + torch.exp(-z)) if regions else torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    ce, norm = 0.0, 0.0
    for b in range(cases):
        for v in range(q.shape[2]):
            if regions:
                for r in range(channels):
                    wr = w[b, min(r, w.shape[1] - 1), v]
                    entropy = -q[b, r, v] * torch.log(p[b, r, v]) - (1 - q[b, r, v]) * torch.log(1 - p[b, r, v])
                    ce, norm = ce + wr * entropy, norm + wr
            else:
                ce = ce - w[b, 0, v] * sum(q[b, k, v] * torch.log(p[b, k, v]) for k in range(channels))
                norm = norm + w[b, 0, v]
    dices = []
    for case in [range(cases)] if batch_dice else [[b] for b in range(cases)]:
        for k in range(0 if regions else 1, channels):
            overlap = areas = 0.0
            for b in case:
                wk = w[b, min(k, w.shape[1] - 1)]
                overlap = overlap + (wk * p[b, k] * q[b, k]).sum()
                areas = areas + (wk * (p[b, k] ** 2 + q[b, k] ** 2)).sum()
            dices.append((2 * overlap + 1) / (areas + 1))
    return ce / norm, 1 - torch.stack(dices).mean()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 2, 3, 4, 2)])
def test_soft_label_losses_equal_the_formulas(shape, regions, weighted, batch_dice):
    target = soft_target(regions, shape)
    torch.manual_seed(2)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = confidence(target, regions) if weighted else None
    p = logits.sigmoid() if regions else logits.softmax(1)
    first = 0 if regions else 1
    losses = (
        soft_cross_entropy(logits, target, regions, weight),
        soft_dice_loss(p[:, first:], target[:, first:], batch_dice, weight),
    )
    ones = torch.ones(shape[0], 1, *shape[2:], dtype=torch.float64)
    expected = slow_soft_losses(logits, target, regions, weight if weighted else ones, batch_dice)
    for loss, slow in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, slow)
        (own,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(own, torch.autograd.grad(slow, logits, retain_graph=True)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_soft_label_losses_are_smallest_at_the_pseudo_label(regions, weighted):
    target = soft_target(regions)
    weight = confidence(target, regions) if weighted else None

    def losses(logits):
        p = logits.sigmoid() if regions else logits.softmax(1)
        return torch.stack(
            [soft_cross_entropy(logits, target, regions, weight), soft_dice_loss(p, target, False, weight)]
        )

    best = logits_of(target, regions).requires_grad_()
    lowest = losses(best)
    for loss in lowest:
        (gradient,) = torch.autograd.grad(loss, best, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    torch.testing.assert_close(lowest[1], torch.zeros((), dtype=torch.float64))
    if not weighted:
        entropy = -(torch.xlogy(target, target) + (torch.xlogy(1 - target, 1 - target) if regions else 0))
        torch.testing.assert_close(lowest[0], entropy.mean() if regions else entropy.sum(1).mean())
    for _ in range(20):
        assert (losses(best.detach() + 0.1 * torch.randn_like(best)) > lowest).all()
    # the hard version of an uncertain pseudo-label is worse than the pseudo-label itself
    assert (losses((best.detach() * 20).clamp(-30, 30)) > lowest).all()


@pytest.mark.parametrize("regions", [False, True])
def test_soft_label_gradient_points_to_the_pseudo_label(regions):
    """The gradient of the cross-entropy with respect to a logit is p - q, over the number of voxels."""
    target = soft_target(regions)
    logits = torch.zeros_like(target).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_cross_entropy(logits, target, regions), logits)
    p = logits.sigmoid() if regions else logits.softmax(1)
    number = target.numel() if regions else target.numel() / target.shape[1]
    torch.testing.assert_close(gradient, (p - target).detach() / number)
    foreground = (logits.sigmoid() if regions else logits.softmax(1))[:, 1:]
    (of_dice,) = torch.autograd.grad(soft_dice_loss(foreground, target[:, 1:], False), foreground)
    difference = (foreground - target[:, 1:]).detach()
    assert (of_dice * difference).sum() > 0  # a step against the gradient goes towards the pseudo-label
    assert torch.corrcoef(torch.stack([of_dice.flatten(), difference.flatten()]))[0, 1] > 0.9


def test_soft_dice_of_nearly_empty_cases_is_gentle():
    p = torch.full((1, 1, 64, 64), 1e-3, dtype=torch.float64, requires_grad=True)
    loss = soft_dice_loss(p, torch.zeros_like(p), False)
    assert loss.item() < 0.01
    assert torch.autograd.grad(loss, p)[0].abs().max() < 0.01


def test_confidence_closed_forms():
    certain, undecided = torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 1 / 3)
    target = torch.stack([certain, undecided]).T.reshape(1, 3, 1, 2)
    torch.testing.assert_close(confidence(target, False), torch.tensor([[[[1.0, 0.0]]]]))
    regions = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(confidence(regions, True), torch.tensor([1.0, 0.0, 1.0]).reshape(1, 3, 1, 1))


def test_soft_label_losses_without_any_confidence_are_zero_and_finite():
    target = torch.full((2, 2, 4, 4), 0.5)
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    weight = torch.zeros(2, 1, 4, 4)
    loss = soft_cross_entropy(logits, target, False, weight) + soft_dice_loss(logits.softmax(1), target, False, weight)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


@pytest.mark.parametrize("regions", [False, True])
def test_soft_label_losses_survive_extreme_logits(regions):
    target = torch.zeros(1, 2, 2, 2)
    target[:, 1] = 1
    logits = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    loss = soft_cross_entropy(logits, target, regions)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


# contrast of features


def random_masks(anchors, keys):
    """Each pair positive, negative or neither; anchors without the one, the other or both come first."""
    kind = torch.randint(0, 3, (anchors, keys))
    kind[0], kind[1], kind[2] = 0, 1, 2
    return kind == 1, kind == 2


@pytest.mark.parametrize(("anchors", "keys", "dimension"), [(4, 3, 2), (9, 20, 16)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrast_equals_the_formula(anchors, keys, dimension, temperature):
    torch.manual_seed(0)
    features = [torch.randn(n, dimension, dtype=torch.float64, requires_grad=True) for n in (anchors, keys)]
    masks = random_masks(anchors, keys)
    loss = ContrastiveLoss(temperature)(*features, *masks)
    expected = slow_contrast(*features, *masks, temperature)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, features)
    torch.testing.assert_close(found, torch.autograd.grad(expected, features))
    assert all(g.any() for g in found)


@pytest.mark.parametrize("negatives", [1, 7])
def test_contrast_closed_forms(negatives):
    """All alike: chance, log(1 + N). Positive alike and negatives opposite: softplus of their distance."""
    v = torch.tensor([[1.0, 0.0]])
    positive = torch.tensor([[True] + [False] * negatives])
    keys = v.repeat(1 + negatives, 1)
    alike = ContrastiveLoss(0.5)(v, keys, positive, ~positive)
    assert float(alike) == pytest.approx(math.log(1 + negatives), rel=1e-6)
    keys[1:] *= -3.0  # lengths do not matter
    apart = ContrastiveLoss(0.5)(v, keys, positive, ~positive)
    assert float(apart) == pytest.approx(math.log(1 + negatives * math.exp(-4)), rel=1e-6)


def test_contrast_without_pairs_is_zero_with_zero_gradient():
    anchors = torch.randn(3, 4, requires_grad=True)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    for positive, negative in ((nothing, nothing), (~nothing, nothing), (nothing, ~nothing)):
        loss = ContrastiveLoss()(anchors, torch.randn(5, 4), positive, negative)
        (gradient,) = torch.autograd.grad(loss, anchors)
        assert loss == 0
        assert (gradient == 0).all()


def test_contrast_is_safe_where_exponentials_are_not():
    """exp(1 / 0.001) overflows even float64."""
    v = torch.tensor([[1.0, 0.0]], requires_grad=True)
    keys = torch.tensor([[-1.0, 0.0], [1.0, 1e-3]])
    positive = torch.tensor([[True, False]])
    loss = ContrastiveLoss(1e-3)(v, keys, positive, ~positive)
    assert float(loss.detach()) == pytest.approx(2000, rel=1e-3)
    assert torch.autograd.grad(loss, v)[0].isfinite().all()
    zero = torch.zeros(1, 2, requires_grad=True)
    assert torch.autograd.grad(ContrastiveLoss(0.1)(zero, keys, positive, ~positive), zero)[0].isfinite().all()


def test_contrast_is_as_sharp_as_published_unless_told_otherwise():
    torch.manual_seed(0)
    features, masks = [torch.randn(6, 8), torch.randn(7, 8)], random_masks(6, 7)
    torch.testing.assert_close(ContrastiveLoss()(*features, *masks), slow_contrast(*features, *masks, 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrast_of_half_precision_features_is_float32(dtype):
    torch.manual_seed(0)
    features, masks = [torch.randn(6, 8).to(dtype), torch.randn(7, 8).to(dtype)], random_masks(6, 7)
    loss = ContrastiveLoss()(*features, *masks)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ContrastiveLoss()(*(f.float() for f in features), *masks), atol=0, rtol=0)


def test_contrast_under_autocast_is_float32():
    torch.manual_seed(0)
    features, masks = [torch.randn(6, 8), torch.randn(7, 8)], random_masks(6, 7)
    expected = ContrastiveLoss()(*features, *masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert ContrastiveLoss()(*features, *masks) == expected


def test_contrast_needs_memory_of_anchors_times_keys():
    """Not of their product with the dimension, as the pairwise differences or products of all features would."""
    anchors, keys = (torch.randn(n, 512, requires_grad=True) for n in (300, 400))
    masks = random_masks(300, 400)
    used = peak_memory(lambda: ContrastiveLoss()(anchors, keys, *masks).backward())
    assert used < 12 * 4 * 300 * 400 + 8 * 4 * 700 * 512
    assert used < 0.1 * 4 * 300 * 400 * 512


@pytest.mark.parametrize(
    ("anchors", "keys", "positive", "negative"),
    [
        ((3, 4), (5, 6), (3, 5), (3, 5)),  # dimensions differ
        ((3, 4), (5, 4), (5, 3), (3, 5)),  # a mask the wrong way round
        ((3, 4), (5, 4), (3, 5), (5, 3)),
        ((3, 4), (5, 4), (3, 5), (1, 5)),  # one that would be broadcast
    ],
)
def test_contrast_refuses_other_shapes(anchors, keys, positive, negative):
    masks = [torch.zeros(shape, dtype=torch.bool) for shape in (positive, negative)]
    with pytest.raises(ValueError, match=r"^expected anchors \(A, D\), keys \(K, D\) and masks \(A, K\), got \["):
        ContrastiveLoss()(torch.zeros(anchors), torch.zeros(keys), *masks)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_contrast_refuses_other_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        ContrastiveLoss(temperature)


@pytest.mark.parametrize("spatial", [(4, 5), (2, 3, 4)])
def test_pooled_features_are_weighted_means(spatial):
    torch.manual_seed(0)
    features, weights = torch.randn(2, 6, *spatial), torch.rand(2, 3, *spatial)
    weights[0, 1] *= 1e-3  # less than a position altogether
    weights[1, 2] = 0
    means, weight = pool_features(features, weights)
    for b in range(2):
        for r in range(3):
            total = weights[b, r].sum()
            expected = (features[b] * weights[b, r]).flatten(1).sum(1) / total if total else torch.zeros(6)
            torch.testing.assert_close(means[b, r], expected)
            assert weight[b, r] == pytest.approx(float(total))


@pytest.mark.parametrize("channels", [1, 3])
def test_masked_consistency_is_the_mean_where_the_mask_is_set(channels):
    torch.manual_seed(0)
    p, q = torch.rand(2, 3, 4, 5, requires_grad=True), torch.rand(2, 3, 4, 5)
    mask = torch.rand(2, channels, 4, 5) > 0.5
    loss = masked_consistency(p, q, mask)
    torch.testing.assert_close(loss, ((p - q) ** 2)[mask.expand_as(p)].mean())
    assert loss.requires_grad
    nothing = masked_consistency(p, q, torch.zeros_like(mask))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, p)[0].any()


def test_masked_consistency_of_one_voxel_is_its_own():
    p, q = torch.rand(1, 1, 4, 5), torch.rand(1, 1, 4, 5)
    mask = torch.zeros_like(p, dtype=torch.bool)
    mask[0, 0, 1, 2] = True
    torch.testing.assert_close(masked_consistency(p, q, mask), (p - q)[0, 0, 1, 2] ** 2)


# over several ranks; real processes: test_distributed


@pytest.fixture
def on_ranks(monkeypatch):
    """Call a function on as many threads as there are ranks; what they exchange waits until all have brought theirs."""

    def run(ranks, function):
        own, brought, barrier = threading.local(), {}, threading.Barrier(ranks, timeout=20)

        def exchange(tensor):
            assert tensor.is_contiguous()  # as the backends want it
            brought[own.rank] = tensor.clone()
            barrier.wait()
            everything = [brought[rank] for rank in range(ranks)]
            barrier.wait()
            return everything

        def all_gather(gathered, tensor):
            for place, value in zip(gathered, exchange(tensor), strict=True):
                assert place.is_contiguous()
                place.copy_(value)

        def start(rank):
            own.rank = rank
            return function(rank)

        monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
        monkeypatch.setattr(dist, "get_rank", lambda: own.rank)
        monkeypatch.setattr(dist, "all_gather", all_gather)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sum(exchange(tensor))))
        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(start, range(ranks)))

    return run


def joint_losses(z, target, distributed):
    """Losses of three predictions that are quantities of all ranks."""
    p, weight = [logits.softmax(1) for logits in z], confidence(target, False)
    asc = AreaSimilarityContrastiveLoss(0.5, distributed=distributed)
    return {
        "asc": asc(p),
        "asc with a constant first": asc([target, p[2], p[0]]),
        "asc with a constant last": asc([p[1], p[2], target]),
        "ce": soft_cross_entropy(z[0], target, False, weight, distributed),
        "dice": soft_dice_loss(p[1], target, True, weight, distributed=distributed),
        "masked": masked_consistency(p[2], target, target > 0.3, distributed),
    }


def gradients_of(losses, z):
    """Of every loss by itself, with zeros where it does not look."""
    found = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        found[name] = [torch.zeros_like(a) if g is None else g for a, g in zip(z, gradients, strict=True)]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_of_ranks_are_those_of_the_joint_batch(on_ranks, ranks):
    """Every rank has the loss, and as many times its gradient as there are ranks, over which training averages."""
    torch.manual_seed(0)
    logits, target = [torch.randn(6, 3, 4, 5, dtype=torch.float64) for _ in range(3)], soft_target(False, (6, 3, 4, 5))
    whole = [z.clone().requires_grad_() for z in logits]
    expected = joint_losses(whole, target, False)

    def on_rank(rank):
        share = [z.chunk(ranks)[rank].clone().requires_grad_() for z in logits]
        losses = joint_losses(share, target.chunk(ranks)[rank], True)
        return losses, gradients_of(losses, share)

    found = on_ranks(ranks, on_rank)
    for losses, _ in found:
        torch.testing.assert_close(losses, expected)
    for name, gradients in gradients_of(expected, whole).items():
        for m, gradient in enumerate(gradients):
            own = torch.cat([of_rank[name][m] for _, of_rank in found])
            torch.testing.assert_close(own, ranks * gradient)


def test_case_by_case_losses_of_ranks_average_to_those_of_the_joint_batch(on_ranks):
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 4, 5, dtype=torch.float64), soft_target(False, (4, 3, 4, 5))

    def losses(z, q, distributed):
        ce = soft_cross_entropy(z, q, False, distributed=distributed)
        return torch.stack([ce, soft_dice_loss(z.softmax(1), q, False, distributed=distributed)])

    found = on_ranks(2, lambda rank: losses(logits.chunk(2)[rank], target.chunk(2)[rank], True))
    torch.testing.assert_close(sum(found) / 2, losses(logits, target, False))
    assert not torch.equal(*found)


def test_predictions_are_exchanged_in_whatever_order_they_lie_in_memory(on_ranks):
    torch.manual_seed(0)
    predictions = [torch.rand(4, 5, 4).permute(2, 0, 1).unsqueeze(1) for _ in range(2)]  # voxels before cases
    asc = AreaSimilarityContrastiveLoss(distributed=True)
    found = on_ranks(2, lambda rank: asc([p.chunk(2)[rank] for p in predictions]))
    torch.testing.assert_close(found, [AreaSimilarityContrastiveLoss()(predictions)] * 2)


def test_too_few_cases_on_all_ranks_together_are_refused(on_ranks):
    """One on each is enough."""
    p = torch.rand(2, 1, 1, 4, 4)
    expected = AreaSimilarityContrastiveLoss()([p.flatten(0, 1)] * 2)
    found = on_ranks(2, lambda rank: AreaSimilarityContrastiveLoss(distributed=True)([p[rank], p[rank]]))
    torch.testing.assert_close(found, [expected] * 2)
    with pytest.raises(ValueError, match="at least 2 tensors"):
        on_ranks(1, lambda rank: AreaSimilarityContrastiveLoss(distributed=True)([p[0], p[0]]))
