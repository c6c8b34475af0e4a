"""Contrast between feature vectors of regions or classes (InfoNCE with several positives). Pure PyTorch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus


class ContrastiveLoss(nn.Module):
    """Anchors are attracted by the keys that are positive for them and repelled by those that are negative.

    An anchor a and a key k, unit vectors, are compared by `s(a, k) = <a, k> / tau`. The loss of an anchor is the mean
    over its positives p of

        -log( exp(s(a, p)) / (exp(s(a, p)) + sum_{n negative} exp(s(a, n))) ),

    and the loss is the mean over the anchors that have a positive and a negative; there is nothing to contrast the
    others with. A key that is neither, such as the anchor's own image where only other images count, is left out.

    Written as softplus(log sum_n exp(s(a, n)) - s(a, p)), which neither overflows nor underflows. Computed in (at
    least) float32 outside autocast; the memory is that of a few matrices of anchors times keys.

    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018; several positives as
    in Khosla et al., Supervised contrastive learning, NeurIPS 2020, eq. 2, but without the other positives in the
    denominator, since they are no negatives.

    Args:
        temperature: tau > 0.

    Raises:
        ValueError: if the temperature is not positive.

    Example: one anchor, a positive at 45° to it and a negative at 90°.

        >>> import torch
        >>> from nnunetv2_semicml.losses import ContrastiveLoss
        >>> anchor, keys = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
        >>> positive = torch.tensor([[True, False]])
        >>> round(float(ContrastiveLoss(temperature=1.0)(anchor, keys, positive, ~positive)), 4)
        0.4008
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(self, anchors: Tensor, keys: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            anchors: (A, D), of any length.
            keys: (K, D), of any length.
            positive: (A, K), boolean.
            negative: (A, K), boolean; a key that is positive, too, counts as both. To look for one would make a GPU
                wait.

        Returns:
            The scalar loss, 0 if no anchor counts; in float32 (float64 for float64 input).

        Raises:
            ValueError: if the shapes do not fit.
        """
        pairs = (len(anchors), len(keys))
        if anchors.shape[1:] != keys.shape[1:] or positive.shape != pairs or negative.shape != pairs:
            raise ValueError(
                "expected anchors (A, D), keys (K, D) and masks (A, K), got "
                f"{[tuple(t.shape) for t in (anchors, keys, positive, negative)]}."
            )
        with torch.autocast(anchors.device.type, enabled=False):
            dtype = torch.promote_types(anchors.dtype, torch.float32)
            similarity = normalize(anchors.to(dtype), dim=1) @ normalize(keys.to(dtype), dim=1).T / self.temperature
            counts = positive.any(1) & negative.any(1)
            # an anchor that does not count sums over all keys, since the gradient of an empty sum is not a number
            negatives = similarity.masked_fill(~negative & counts[:, None], float("-inf")).logsumexp(1)
            of_pair = torch.where(positive, softplus(negatives[:, None] - similarity), 0)
            of_anchor = of_pair.sum(1) / positive.sum(1).clamp(min=1)
            return torch.where(counts, of_anchor, 0).sum() / counts.sum().clamp(min=1)


def pool_features(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature vector of every part of every image.

    Args:
        features: (B, D, *spatial).
        weights: how much of each position belongs to each of R parts, (B, R, *spatial), in [0, 1].

    Returns:
        The weighted means (B, R, D), and the weight (B, R) of the parts in positions; the mean of a part without weight
        is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        flat, shares = features.flatten(2).float(), weights.flatten(2).float()
        weight = shares.sum(2)
        return shares @ flat.transpose(1, 2) / weight.clamp(min=1e-6)[..., None], weight
