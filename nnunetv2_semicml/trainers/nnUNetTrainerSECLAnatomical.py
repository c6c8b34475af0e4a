"""SECL with anatomical-aware sampling: the same class, by pseudo-labels, is positive.

Source: see training/secl.py.
"""

import torch
from torch import Tensor

from nnunetv2_semicml.training.schedules import with_schedules
from nnunetv2_semicml.training.secl import WithSelfEnsemblingContrast, shrink
from nnunetv2_semicml.training.teacher import Teacher


@with_schedules
class nnUNetTrainerSECLAnatomical(WithSelfEnsemblingContrast):
    """Features of one class are alike in all images, and unlike those of the other classes, background included.

    The parts are the classes of the teacher's segmentation of the unlabeled image, made on the fly. A position of the
    feature map belongs to a class by the share of its voxels.

    Attributes:
        contrast_temperature: see `ContrastiveLoss`. Chosen on one draw of validation patients; three draws and longer
            training show no measurable difference to 0.1 (benchmarks/study/validation.md at commit cb2e976).
    """

    contrast_temperature = 0.5

    def features_and_parts(self, teacher: Teacher, image: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The segmented classes."""
        features, logits = teacher.predict(image, with_logits=True)
        labels = self.segment(logits)[:, None]
        classes = [shrink((labels == label).float(), features.shape[2:]) for label in self.label_manager.all_labels]
        return features, torch.cat(classes, dim=1)
