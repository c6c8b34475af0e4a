import math

import pytest
import torch

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss
from nnunetv2_semicml.losses.consistency import prediction_consistency, sigmoid_rampup


def slow_asc(predictions, temperature=1.0, eps=1e-6):
    """Written from the formula, one pair of predictions at a time."""
    losses = []
    for a in range(len(predictions)):
        for b in range(a + 1, len(predictions)):
            flat = [p.reshape(-1) for modality in (a, b) for p in predictions[modality]]
            cases = len(flat) // 2

            def s(u, v):
                return (2 * (u * v).sum() + eps) / ((u * u).sum() + (v * v).sum() + eps)

            for i in range(2 * cases):
                positive = (i + cases) % (2 * cases)
                numerator = torch.exp(s(flat[i], flat[positive]) / temperature)
                denominator = numerator
                for k in range(2 * cases):
                    if k % cases != i % cases:
                        denominator = denominator + torch.exp(s(flat[i], flat[k]) / temperature)
                losses.append(-torch.log(numerator / denominator))
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


def test_asc_ignores_pairs_without_area():
    torch.manual_seed(0)
    full = [torch.rand(3, 1, 8, 8) for _ in range(2)]
    faint = [torch.cat([p, torch.full((1, 1, 8, 8), 1e-4) * torch.rand(1, 1, 8, 8)]) for p in full]
    for p in faint:
        p.requires_grad_()
    loss = AreaSimilarityContrastiveLoss()(faint)
    # the empty case is no anchor; it is a negative with similarity 0 for the others
    s_zero = 2 * 3 * torch.ones(())
    similarity = [slow_asc(full)]
    assert loss.isfinite()
    assert similarity[0] < loss < similarity[0] + math.log(s_zero)
    loss.backward()
    for p in faint:
        # without the rule the empty case, whose gradient is divided by its tiny area, would dominate
        assert p.grad[3].abs().max() < p.grad[:3].abs().max() * 2


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
    with pytest.raises(ValueError, match="at least 2 tensors"):
        prediction_consistency([a])


def test_rampup():
    assert sigmoid_rampup(0, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(5, 10) == pytest.approx(math.exp(-5 * 0.25))
    assert sigmoid_rampup(10, 10) == sigmoid_rampup(11, 10) == sigmoid_rampup(0, 0) == 1.0
