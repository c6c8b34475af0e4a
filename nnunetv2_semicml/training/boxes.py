"""Boxes in which one patch is pasted into another. Drawn from PyTorch's generator of the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_box(patch_size: Sequence[int], side: float, device: torch.device) -> Tensor:
    """Draw a box at random that lies within the patch.

    Args:
        patch_size: of 2 or 3 dimensions.
        side: share of each side of the patch; the box has ⌊side · n⌋ voxels along a side of n.
        device: where it goes.

    Returns:
        (1, 1, *patch), boolean, true in the box.
    """
    lengths = [int(n * side) for n in patch_size]
    return _box(patch_size, lengths, device)


def draw_boxes_of_shares(
    cases: int,
    patch_size: Sequence[int],
    device: torch.device,
    probability: float,
    shares: tuple[float, float],
    largest_ratio: float = 1 / 0.3,
) -> Tensor:
    """Draw for every case whether there is a box, how large it is, its shape and its place.

    As in the code of UniMatch, whose patches are square; lengths are in sides of the patch here, and of three axes two
    are chosen, between which the ratio lies.

    Args:
        cases: B.
        patch_size: of 2 or 3 dimensions.
        device: where they go.
        probability: of a box.
        shares: lowest and highest share of the patch that is in the box.
        largest_ratio: of its sides; the smallest one is its inverse.

    Returns:
        (B, 1, *patch), boolean, true in the box.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(()))

    boxes = []
    for _ in range(cases):
        lengths = [0] * len(patch_size)
        if float(torch.rand(())) < probability:
            share = uniform(*shares)
            while True:  # some ratios are too large for a large box
                sides = torch.full((len(patch_size),), share ** (1 / len(patch_size)))
                first, second = torch.randperm(len(patch_size))[:2]
                ratio = uniform(1 / largest_ratio, largest_ratio) ** 0.5
                sides[first] *= ratio
                sides[second] /= ratio
                if sides.max() <= 1:
                    break
            lengths = [int(n * side) for n, side in zip(patch_size, sides.tolist(), strict=True)]
        boxes.append(_box(patch_size, lengths, device))
    return torch.cat(boxes)


def _box(patch_size: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    starts = [int(torch.randint(n - length + 1, ())) for n, length in zip(patch_size, lengths, strict=True)]
    box = torch.zeros(1, 1, *patch_size, dtype=torch.bool)
    inside = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    box[0, 0][tuple(inside)] = True
    return box.to(device, non_blocking=True)
