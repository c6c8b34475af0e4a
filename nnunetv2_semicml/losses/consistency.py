"""Consistency of predictions, between modalities or with a teacher, and the ramp of its weight. Pure PyTorch."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from nnunetv2_semicml.losses.joint_sum import joint_sum


def prediction_consistency(predictions: Sequence[Tensor]) -> Tensor:
    """Mean squared difference between the foreground probabilities of every pair of modalities.

    Args:
        predictions: M >= 2 tensors of foreground probabilities, one per modality, each (B, C, *spatial).

    Returns:
        The scalar loss, averaged over pairs, cases, classes and voxels.

    Raises:
        ValueError: for fewer than two modalities or if the shapes differ.

    Source: Zhang et al., Med. Image Anal. 83:102656, 2023 (mean squared error between the modalities' predictions).
    """
    shapes = [tuple(p.shape) for p in predictions]
    if len(shapes) < 2 or len(set(shapes)) > 1:
        raise ValueError(f"expected at least 2 tensors of one shape, got {shapes}.")
    pairs = [torch.nn.functional.mse_loss(a, b) for a, b in combinations(predictions, 2)]
    return torch.stack(pairs).mean()


def masked_consistency(prediction: Tensor, target: Tensor, mask: Tensor, distributed: bool = False) -> Tensor:
    """Mean squared difference between probabilities where a mask is set; 0 if it is set nowhere.

    Args:
        prediction: probabilities (B, K, *spatial).
        target: of the same shape.
        mask: boolean, (B, 1 or K, *spatial).
        distributed: whether the batch is spread over the ranks, see `joint_sum`.

    Returns:
        The scalar loss, averaged over classes and masked voxels.

    Source: Yu et al., MICCAI 2019 (uncertainty-aware Mean Teacher), eq. 4.
    """
    squared = (prediction - target).square()
    weight = mask.to(squared.dtype).expand_as(squared)
    total, voxels = joint_sum([(weight * squared).sum(), weight.sum()], distributed)
    loss: Tensor = total / voxels.clamp(min=1)
    return loss


def sigmoid_rampup(step: float, length: float) -> float:
    """Weight exp(-5 (1 - t/T)^2) that rises from 0.0067 at t = 0 to 1 at t >= T (Laine & Aila, ICLR 2017).

    Args:
        step: t, in the unit of `length`.
        length: T; 0 means no ramp.
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(step / length, 0.0), 1.0)) ** 2)
