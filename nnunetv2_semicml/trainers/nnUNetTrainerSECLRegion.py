"""SECL with region-aware sampling: the same region of other patients is positive.

Source: see training/secl.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.secl import WithSelfEnsemblingContrast, shrink
from nnunetv2_semicml.training.teacher import Teacher


@with_schedules
class nnUNetTrainerSECLRegion(WithSelfEnsemblingContrast):
    """Scans of one kind share a layout: what lies at the same place in another patient is alike.

    The parts are the cells of a grid that is laid over each case, not over the patch: nnU-Net crops, rotates and
    mirrors, so that the place in the patch says nothing.

    Attributes:
        regions_per_axis: cells of the grid along an axis of the case; not varied.
        contrast_weight: of the term. Chosen on one draw of validation patients; three draws and longer training show no
            measurable difference to 0.1 (benchmarks/study/validation.md at commit cb2e976).
    """

    needs_positions = True
    min_unlabeled = 2  # the same region of another case is positive
    own_image = False
    regions_per_axis = 4
    contrast_weight = 1.0

    def features_and_parts(self, teacher: Teacher, image: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The cells of the grid; what reaches beyond the case belongs to none."""
        assert positions is not None  # of `needs_positions`
        features, n = teacher.predict(image), self.regions_per_axis
        size = features.shape[2:]
        inside = shrink((positions > 0).all(1, keepdim=True).float(), size) == 1
        cell = torch.zeros((), dtype=torch.long, device=image.device)
        for along_axis in shrink(positions, size).unbind(1):
            cell = cell * n + (along_axis * n).long().clamp(max=n - 1)
        regions = one_hot(cell, n ** positions.shape[1]).movedim(-1, 1)
        return features, (regions * inside).float()
