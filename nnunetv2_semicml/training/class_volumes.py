"""What pseudo-labels show of every class, beside what labels show: rare classes tend to vanish from pseudo-labels."""

import torch
from torch import Tensor

PSEUDO, LABELED = "pseudo_volume/", "labeled_volume/"
"""Of keys of the log, before the name of a network: the share of voxels, class by class."""


class ClassVolumes:
    """Adds up, without waiting for the device, which share of the voxels of patches every class has."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._added: dict[str, int] = {}

    def add(self, key: str, labels: Tensor) -> None:
        """Count a batch.

        Args:
            key: of the log.
            labels: zeros and ones, or probabilities (B, C, *patch) of the C foreground classes or regions.
        """
        share = labels.detach().float().mean((0, *range(2, labels.ndim)))
        self._sums[key] = self._sums[key] + share if key in self._sums else share
        self._added[key] = self._added.get(key, 0) + 1

    def take(self, key: str, classes: int) -> list[float]:
        """The mean share of each class over the batches since the last call; NaN if there were none."""
        total = self._sums.pop(key, torch.full((classes,), torch.nan))
        return [float(share) for share in total.cpu() / self._added.pop(key, 1)]
