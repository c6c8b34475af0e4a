"""Labeled and unlabeled patches in one stream, with nnU-Net's augmentation applied to paired modalities."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

_GEOMETRIC = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)
_VOXELWISE = (ImageOnlyTransform, SegOnlyTransform, MaskImageTransform)


class PairedTransform(BasicTransform):
    """nnU-Net's augmentation of M modalities: one geometry for all, everything else as for a single modality.

    Each modality has its own stock single-channel pipeline. Geometric transforms are drawn once and move all modalities
    together; intensities, masks and targets are handled by each modality's own pipeline on its own channel, so that the
    assumptions of those transforms hold (the mask and the regions are read from segmentation channel 0).

    Args:
        pipelines: one pipeline per modality; they differ in nothing but their masking.

    Raises:
        NotImplementedError: for a transform that is not known to move voxels or to leave them in place.
    """

    def __init__(self, pipelines: Sequence[ComposeTransforms]):
        super().__init__()
        runs = [[(key, list(run)) for key, run in groupby(p.transforms, _is_geometric)] for p in pipelines]
        # stages: (geometric?, the transforms of each modality)
        self.stages = [(same[0][0], [transforms for _, transforms in same]) for same in zip(*runs, strict=True)]

    def apply(self, data_dict: dict, **params: object) -> dict:
        """Augment a patch: image and segmentation (M, *spatial); target channels come out modality by modality.

        Further channels of the image are only moved.
        """
        for geometric, transforms in self.stages:
            if geometric:
                data_dict = _run(transforms[0], data_dict)
            else:
                moved_only = data_dict["image"][len(transforms) :]
                parts = [{key: value[m : m + 1] for key, value in data_dict.items()} for m in range(len(transforms))]
                parts = [_run(own, part) for own, part in zip(transforms, parts, strict=True)]
                data_dict = {key: _concatenate([part[key] for part in parts]) for key in data_dict}
                if len(moved_only):
                    data_dict["image"] = torch.cat([data_dict["image"], moved_only])
        return data_dict


class UnlabeledDataLoader(nnUNetDataLoader):
    """Draws random patches of unlabeled cases; takes what nnU-Net's loader takes, without foreground oversampling."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, oversample_foreground_percent=0.0, **kwargs)
        self.has_ignore = False  # an ignore label is looked for through labels; there are none

    def get_indices(self) -> np.ndarray:
        """Draw distinct cases as long as there are enough: contrastive losses take two patches for two cases."""
        return np.random.choice(self.indices, self.batch_size, replace=self.batch_size > len(self.indices))


class SemiSupervisedDataLoader(nnUNetDataLoader):
    """Draws a labeled and an unlabeled batch at a time, so that both streams share one budget of worker processes.

    Args:
        *args, **kwargs: for nnU-Net's loader of the labeled cases.
        unlabeled: the loader of the unlabeled cases.
        labeled: whether labeled cases are needed at all.
    """

    def __init__(self, *args: object, unlabeled: UnlabeledDataLoader, labeled: bool = True, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.unlabeled = unlabeled
        self.labeled = labeled

    def generate_train_batch(self) -> dict:
        """Draw nnU-Net's batch and, under "unlabeled", images (B, M, *patch), or more channels if they have positions.

        The placeholder target of the unlabeled cases is dropped.
        """
        batch = super().generate_train_batch() if self.labeled else {}
        batch["unlabeled"] = self.unlabeled.generate_train_batch()["data"]
        return batch


def _is_geometric(transform: BasicTransform) -> bool:
    inner = transform.transform if isinstance(transform, RandomTransform) else transform
    if not isinstance(inner, _GEOMETRIC + _VOXELWISE):
        raise NotImplementedError(
            f"{type(inner).__name__} cannot be used with paired modalities, since nobody said whether it moves voxels."
        )
    return isinstance(inner, _GEOMETRIC)


def _run(transforms: Sequence[BasicTransform], data_dict: dict) -> dict:
    for transform in transforms:
        data_dict = transform(**data_dict)
    return data_dict


def _concatenate(parts: Sequence) -> object:
    if isinstance(parts[0], list):  # deep supervision: one target per scale
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]
    return torch.cat(parts)
