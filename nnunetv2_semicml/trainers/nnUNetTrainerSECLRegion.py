"""SECL with region-aware sampling: the same region of other patients is positive; and its schedules.

Source: see nnUNetTrainerSECL.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nnunetv2_semicml.trainers.nnUNetTrainerSECL import nnUNetTrainerSECL, shrink
from nnunetv2_semicml.trainers.teacher import Teacher


class nnUNetTrainerSECLRegion(nnUNetTrainerSECL):
    """Scans of one kind share a layout: what lies at the same place in another patient is alike.

    The parts are the cells of a grid that is laid over each case, not over the patch: nnU-Net crops, rotates and
    mirrors, so that the place in the patch says nothing.
    """

    needs_positions = True
    min_unlabeled = 2  # the same region of another case is positive
    own_image = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.regions_per_axis = 4  # not varied
        # Chosen on one draw of validation patients; three draws and longer training show no measurable difference to
        # 0.1 (benchmarks/study/validation.md).
        self.contrast_weight = 1.0

    def features_and_parts(self, teacher: Teacher, image: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of the grid; what reaches beyond the case belongs to none."""
        features, n = teacher.predict(image), self.regions_per_axis
        size = features.shape[2:]
        inside = shrink((positions > 0).all(1, keepdim=True).float(), size) == 1
        cell = 0
        for along_axis in shrink(positions, size).unbind(1):
            cell = cell * n + (along_axis * n).long().clamp(max=n - 1)
        regions = one_hot(cell, n ** positions.shape[1]).movedim(-1, 1)
        return features, (regions * inside).float()


class nnUNetTrainerSECLRegion_5epochs(nnUNetTrainerSECLRegion):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerSECLRegion_50epochs(nnUNetTrainerSECLRegion):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerSECLRegion_250epochs(nnUNetTrainerSECLRegion):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
