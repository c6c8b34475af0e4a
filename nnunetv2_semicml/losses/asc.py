"""Area-similarity contrastive (ASC) loss between the predictions of several modalities. Pure PyTorch."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class AreaSimilarityContrastiveLoss(nn.Module):
    """Contrast whole predictions: the modalities of one case attract each other, different cases repel each other.

    An anchor is the prediction of one case from one modality. Its positive is the prediction of the same case from the
    other modality; its negatives are the predictions of all other cases in the batch, from both modalities. Two
    predictions u, v (foreground probabilities flattened over classes and voxels) are compared by their area similarity,
    a soft Dice with squared areas,

        s(u, v) = (2<u, v> + eps) / (<u, u> + <v, v> + eps),

    and the loss of anchor i with positive p(i) is

        -log( exp(s(i, p(i)) / tau) / sum_{k != i} exp(s(i, k) / tau) ),

    averaged over the anchors and, for more than two modalities, over the pairs of modalities. Every similarity is read
    from one Gram matrix of all predictions, computed in (at least) float32 outside autocast, since sums of squares over
    10^6 voxels overflow float16.

    Two predictions that are both empty have no area to compare: their similarity would be 1 through eps alone, or noise
    with an exploding gradient. Such a pair is neither a positive nor a negative, and an anchor without a positive does
    not count in the mean. A prediction is empty if its squared area `<u, u>` is below `empty_area`.

    With `distributed`, the cases of all ranks of the default process group are contrasted with each other. Every rank
    then returns the same loss, and the gradient on its own predictions is the number of ranks times that of the loss,
    since training averages the gradients of the ranks.

    Source: Zhang et al., Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised
    medical image segmentation, Med. Image Anal. 83:102656, 2023.

    Args:
        temperature: tau > 0. Similarities lie in [0, 1], so the published tau = 1 is gentle.
        eps: keeps the similarity defined without area. In voxels, as areas are.
        empty_area: squared area below which a prediction counts as empty, in voxels; the default is less than one
            confident voxel.
        distributed: whether the batch is spread over the ranks, with equally many cases on each.

    Raises:
        ValueError: if temperature or eps is not positive or empty_area is negative.

    Example: two cases, in which both modalities segment the same, or the first case as the second one.

        >>> import torch
        >>> from nnunetv2_semicml.losses import AreaSimilarityContrastiveLoss
        >>> flair = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)  # (B, C, *spatial)
        >>> asc = AreaSimilarityContrastiveLoss()
        >>> round(float(asc([flair, flair])), 4)  # -log(e / (e + 2)): the positive is alike, both negatives are not
        0.5514
        >>> round(float(asc([flair, flair.flip(0)])), 4)  # -log(1 / (1 + 1 + e)): the reverse
        1.5514
    """

    def __init__(self, temperature: float = 1.0, eps: float = 1e-6, empty_area: float = 1.0, distributed: bool = False):
        super().__init__()
        if temperature <= 0 or eps <= 0 or empty_area < 0:
            raise ValueError(
                f"temperature and eps must be positive and empty_area must not be negative, got {temperature=}, "
                f"{eps=}, {empty_area=}."
            )
        self.temperature = temperature
        self.eps = eps
        self.empty_area = empty_area
        self.distributed = distributed

    def forward(self, predictions: Sequence[Tensor]) -> Tensor:
        """Compute the loss.

        Args:
            predictions: M >= 2 tensors of foreground probabilities, one per modality, each (B, C, *spatial) with B
                cases, at least 2 in all ranks, and C foreground classes or regions, without the background.

        Returns:
            The scalar loss, in float32 (float64 for float64 input).

        Raises:
            ValueError: for fewer than two modalities or cases, or if the shapes differ.
        """
        shapes = [tuple(p.shape) for p in predictions]
        cases = shapes[0][0] * (dist.get_world_size() if self.distributed else 1) if shapes else 0
        if len(shapes) < 2 or len(set(shapes)) > 1 or cases < 2:
            raise ValueError(f"expected at least 2 tensors of one shape (B >= 2, C, *spatial), got {shapes}.")

        with torch.autocast(predictions[0].device.type, enabled=False):
            flat = [p.flatten(1) for p in predictions]  # views (B, V) with V = C * voxels
            flat = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in flat]
            gram = _Gram.apply(self.distributed, *flat)  # (N, N) with N = M * cases
            area = gram.diagonal()
            similarity = (2 * gram + self.eps) / (area[:, None] + area[None, :] + self.eps)
            empty = area.detach() < self.empty_area
            losses = []
            for a, b in combinations(range(len(predictions)), 2):
                pair = torch.cat([torch.arange(m * cases, (m + 1) * cases, device=area.device) for m in (a, b)])
                losses.append(self._contrast(similarity[pair][:, pair], empty[pair]))
            return torch.stack(losses).mean()

    def _contrast(self, similarity: Tensor, empty: Tensor) -> Tensor:
        """InfoNCE over the (2B, 2B) similarities of two modalities; row i and row i + B belong to one case."""
        anchors = len(similarity)
        index = torch.arange(anchors, device=similarity.device)
        positive = index.roll(anchors // 2)
        comparable = ~(empty[:, None] & empty[None, :])
        counts = comparable[index, positive]
        left_out = (~comparable | torch.eye(anchors, dtype=torch.bool, device=empty.device)) & counts[:, None]
        logits = (similarity / self.temperature).masked_fill(left_out, float("-inf"))
        loss = logits.logsumexp(1) - logits[index, positive]
        return torch.where(counts, loss, 0).sum() / counts.sum().clamp(min=1)


class _Gram(torch.autograd.Function):
    """G = P P^T of the rows P of M matrices (B, V), modality by modality, rank by rank; nothing of size V is copied.

    The gradient, (dG + dG^T) P, takes one product for each matrix. Between ranks the matrices are exchanged; every rank
    computes the rows of G that are its own.
    """

    # ctx is Any, since PyTorch declares no type that has what is kept in it

    @staticmethod
    def forward(ctx: Any, distributed: bool, *own: Tensor) -> Tensor:
        ctx.world_size, ctx.rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        columns = [p for of_modality in own for p in (_all_gather(of_modality) if distributed else [of_modality])]
        ctx.save_for_backward(*columns)
        rows = torch.stack([torch.cat([p @ q.T for q in columns], dim=1) for p in own])  # (M, B, N)
        if distributed:
            rows = torch.stack(_all_gather(rows), dim=1)  # (M, ranks, B, N)
        return rows.flatten(0, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = ctx.saved_tensors
        blocks = [row.split(len(columns[0]), dim=1) for row in (grad + grad.T).split(len(columns[0]))]
        gradients: list[Tensor | None] = []
        for i in range(ctx.rank, len(columns), ctx.world_size):
            if not ctx.needs_input_grad[1 + i // ctx.world_size]:
                gradients.append(None)
                continue
            gradient = blocks[i][0] @ columns[0]
            for block, column in zip(blocks[i][1:], columns[1:], strict=True):
                gradient.addmm_(block, column)
            gradients.append(gradient.mul_(ctx.world_size) if ctx.world_size > 1 else gradient)
        return None, *gradients


def _all_gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered
