"""Consistency of predictions, between modalities or with a teacher. Pure PyTorch."""

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

    Example:

        >>> import torch
        >>> from nnunetv2_semicml.losses import prediction_consistency
        >>> prediction_consistency([torch.ones(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)])
        tensor(0.2500)
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
