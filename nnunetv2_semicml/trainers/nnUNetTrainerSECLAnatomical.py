"""SECL with anatomical-aware sampling: the same class, by pseudo-labels, is positive; and its schedules.

Source: see nnUNetTrainerSECL.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.trainers.nnUNetTrainerSECL import nnUNetTrainerSECL, shrink
from nnunetv2_semicml.trainers.teacher import Teacher


class nnUNetTrainerSECLAnatomical(nnUNetTrainerSECL):
    """Features of one class are alike in all images, and unlike those of the other classes, background included.

    The parts are the classes of the teacher's segmentation of the unlabeled image, made on the fly. A position of the
    feature map belongs to a class by the share of its voxels.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        # Chosen on one draw of validation patients; three draws and longer training show no measurable difference to
        # 0.1 (benchmarks/study/validation.md).
        self.contrast_temperature = 0.5

    def features_and_parts(self, teacher: Teacher, image: Tensor, positions: None) -> tuple[Tensor, Tensor]:
        """The segmented classes."""
        features, logits = teacher.predict(image, with_logits=True)
        labels = self.segment(logits)[:, None]
        classes = [shrink((labels == label).float(), features.shape[2:]) for label in self.label_manager.all_labels]
        return features, torch.cat(classes, dim=1)


class nnUNetTrainerSECLAnatomical_5epochs(nnUNetTrainerSECLAnatomical):
    """For trying things out."""

    epochs = 5


class nnUNetTrainerSECLAnatomical_50epochs(nnUNetTrainerSECLAnatomical):
    """A twentieth of nnU-Net's schedule."""

    epochs = 50


class nnUNetTrainerSECLAnatomical_250epochs(nnUNetTrainerSECLAnatomical):
    """A quarter of nnU-Net's schedule."""

    epochs = 250
