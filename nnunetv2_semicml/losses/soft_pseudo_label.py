"""Losses against soft pseudo-labels, i.e. probabilities instead of classes. Pure PyTorch.

Pseudo-labels and logits have one channel per class, background included (softmax), or one per region (sigmoid). Both
losses are smallest where the prediction equals the pseudo-label, uncertain voxels included: nothing is sharpened.

With `distributed`, the batch is spread over the ranks; see `joint_sum`.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunetv2_semicml.losses.joint_sum import joint_sum


def soft_cross_entropy(
    logits: Tensor, target: Tensor, regions: bool, weight: Tensor | None = None, distributed: bool = False
) -> Tensor:
    """Cross-entropy between probabilities, averaged over cases, voxels and, for regions, over these.

    Args:
        logits: (B, K, *spatial).
        target: probabilities of the same shape; without `regions` they sum to 1 over K.
        regions: binary cross-entropy for each of K regions, instead of one over K classes.
        weight: of every voxel, (B, 1 or K, *spatial), K only for regions; None weights all alike.
        distributed: whether the batch is spread over the ranks.

    Returns:
        The scalar loss, whose minimum over the logits is the (weighted mean) entropy of the target.

    Example: two voxels of one case; the entropy of a sure pseudo-label is 0, that of an undecided one log 2.

        >>> import torch
        >>> from nnunetv2_semicml.losses import soft_cross_entropy
        >>> q = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])  # (B, K, *spatial)
        >>> round(float(soft_cross_entropy(q.clamp(min=1e-9).log(), q, regions=False)), 4)  # (0 + log 2) / 2
        0.3466
    """
    if regions:
        loss = binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        loss = cross_entropy(logits, target, reduction="none").unsqueeze(1)
    if weight is None:
        return loss.mean()
    total, voxels = joint_sum([(weight * loss).sum(), weight.expand_as(loss).sum()], distributed)
    mean: Tensor = total / voxels.clamp(min=torch.finfo(voxels.dtype).eps)
    return mean


def soft_dice_loss(
    prediction: Tensor,
    target: Tensor,
    batch_dice: bool,
    weight: Tensor | None = None,
    smooth: float = 1.0,
    distributed: bool = False,
) -> Tensor:
    """One minus the soft Dice with squared areas, `2<p, q> / (<p, p> + <q, q>)`, averaged over classes or regions.

    With plain areas, sum(p) + sum(q), the minimum for a target between 0 and 1 would lie at a prediction of 0 or 1;
    with squared ones it lies at p = q (Milletari et al., V-Net, 3DV 2016).

    Args:
        prediction: foreground probabilities (B, C, *spatial).
        target: of the same shape.
        batch_dice: sum the areas over the batch, as the plans of nnU-Net say, instead of one Dice for each case.
        weight: of every voxel in every sum, (B, 1 or C, *spatial); None weights all alike.
        smooth: added to both areas' numerator and denominator, in voxels: where neither has an area of about one voxel,
            there is no overlap to speak of and hardly a gradient.
        distributed: whether the batch is spread over the ranks.

    Returns:
        The scalar loss in [0, 1].
    """
    axes = [0] * batch_dice + list(range(2, prediction.ndim))

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (a * b if weight is None else weight * a * b).sum(axes)

    sums = [total(prediction, target), total(prediction, prediction) + total(target, target)]
    overlap, areas = joint_sum(sums, distributed and batch_dice)
    dice: Tensor = ((2 * overlap + smooth) / (areas + smooth)).mean()
    return 1 - dice


def confidence(target: Tensor, regions: bool) -> Tensor:
    """One minus the entropy of probabilities relative to the largest possible one.

    Args:
        target: probabilities (B, K, *spatial).
        regions: K independent probabilities instead of a distribution over K classes.

    Returns:
        (B, K, *spatial) for regions, otherwise (B, 1, *spatial), in [0, 1].
    """
    if regions:
        entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
        return 1 - entropy / math.log(2)
    return 1 + torch.xlogy(target, target).sum(1, keepdim=True) / math.log(target.shape[1])
