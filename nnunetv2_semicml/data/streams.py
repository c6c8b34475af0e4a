"""Labeled and unlabeled patches in one stream, with nnU-Net's augmentation applied to paired modalities.

A draw is a set of modalities whose patches show the same places of the same cases; the labeled and the unlabeled batch
consist of one or several draws.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import ceil
from typing import Any, TypedDict

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunetv2_semicml.data.paired_dataset import PairedDataset

_GEOMETRIC = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)
_VOXELWISE = (ImageOnlyTransform, SegOnlyTransform, MaskImageTransform)


_MOST_DRAWS = 20  # of a patch


class Patches(TypedDict):
    """A draw of B patches; a dict, since nnU-Net's loader pins tensors in dicts and lists alone.

    Attributes:
        cases: their names.
        images: modality -> (B, C_m, *patch).
        targets: modality -> (B, T, *patch) or, for deep supervision, a list with one for each scale; nothing for
            unlabeled cases.
        positions: (B, axes, *patch), see `PairedDataset`, or None.
    """

    cases: Sequence[str]
    images: dict[str, Tensor]
    targets: dict[str, Tensor | list[Tensor]]
    positions: Tensor | None


class PairedTransform(BasicTransform):
    """nnU-Net's augmentation of M modalities: one geometry for all, everything else as for a modality by itself.

    Each modality has its own stock pipeline. Geometric transforms are drawn once and move all modalities together;
    intensities, masks and targets are handled by each modality's own pipeline on its own channels, so that the
    assumptions of those transforms hold (the mask and the regions are read from segmentation channel 0).

    Args:
        pipelines: one pipeline per modality; they differ in nothing but their masking.
        channels: number of image channels of each modality.

    Raises:
        NotImplementedError: for a transform that is not known to move voxels or to leave them in place.
    """

    def __init__(self, pipelines: Sequence[ComposeTransforms], channels: Sequence[int]):
        super().__init__()
        runs = [[(key, list(run)) for key, run in groupby(p.transforms, _is_geometric)] for p in pipelines]
        # stages: (geometric?, the transforms of each modality)
        self.stages = [(same[0][0], [transforms for _, transforms in same]) for same in zip(*runs, strict=True)]
        self.channels = list(channels)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Augment a patch.

        Args:
            data_dict: "image" (C_1 + … + C_M, *spatial), whose further channels are only moved, and "segmentation" (M,
                *spatial).
            **params: none; nnU-Net's signature.

        Returns:
            The same, augmented; targets come out modality by modality.
        """
        for geometric, transforms in self.stages:
            if geometric:
                data_dict = _run(transforms[0], data_dict)
            else:
                moved_only = len(data_dict["image"]) - sum(self.channels)
                *images, moved = data_dict["image"].split([*self.channels, moved_only])
                segmentations = data_dict["segmentation"].split(1)
                parts = [
                    _run(own, {**data_dict, "image": image, "segmentation": segmentation})
                    for own, image, segmentation in zip(transforms, images, segmentations, strict=True)
                ]
                data_dict = {key: _concatenate([part[key] for part in parts]) for key in data_dict}
                if moved_only:
                    data_dict["image"] = torch.cat([data_dict["image"], moved])
        return data_dict


class PairedDataLoader(nnUNetDataLoader):
    """Draws patches of a `PairedDataset`; takes what nnU-Net's loader takes.

    Unlabeled cases are drawn without foreground oversampling and without their placeholder targets. The first ones of a
    batch are different cases, as many as there are, since contrastive losses take two patches for two cases. A patch in
    which a modality has the same value everywhere, such as one beyond its field of view, is drawn again from the same
    case: there is nothing to compare, and instance normalization multiplies its gradient until float16 overflows.

    Args:
        data: the cases.
        *args, **kwargs: for nnU-Net's loader.
        channels: modality -> number of its image channels, in the dataset's order.
    """

    def __init__(self, data: PairedDataset, *args: Any, channels: Mapping[str, int], **kwargs: Any):
        super().__init__(data, *args, **kwargs)
        self.batch_size: int
        self.channels = channels
        self._wanted: list[str] = []  # cases, if they are given
        if not data.labeled:
            self.has_ignore = False  # an ignore label is looked for through labels; there are none

    def get_indices(self) -> Sequence[str]:
        """Draw the cases of a batch."""
        if self._wanted:
            return self._wanted
        if self._data.labeled:
            return list(super().get_indices())
        rounds = ceil(self.batch_size / len(self.indices))
        drawn = np.concatenate([np.random.permutation(self.indices) for _ in range(rounds)])
        return [str(case) for case in drawn[: self.batch_size]]

    def generate_train_batch(self) -> Patches:
        """Draw nnU-Net's batch and split it by modality."""
        batch = super().generate_train_batch()
        if not self._data.labeled:
            self._replace_empty(batch)
        sizes = list(self.channels.values())
        *images, positions = batch["data"].split([*sizes, batch["data"].shape[1] - sum(sizes)], dim=1)
        targets = {}
        if self._data.labeled:
            scales = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
            of_modalities = zip(*(scale.chunk(len(sizes), dim=1) for scale in scales), strict=True)
            for name, of_modality in zip(self.channels, of_modalities, strict=True):
                targets[name] = list(of_modality) if isinstance(batch["target"], list) else of_modality[0]
        return {
            "cases": list(batch["keys"]),
            "images": dict(zip(self.channels, images, strict=True)),
            "targets": targets,
            "positions": positions if self._data.positions else None,
        }

    def _replace_empty(self, batch: dict[str, Any]) -> None:
        """Draw patches again that show nothing of a modality, unless their cases seem to have no others."""
        planned = self.batch_size
        for _ in range(_MOST_DRAWS):
            empty = [place for place, patch in enumerate(batch["data"]) if self._is_empty(patch)]
            if not empty:
                break
            self._wanted = [batch["keys"][place] for place in empty]
            self.batch_size = len(empty)
            again = super().generate_train_batch()["data"]
            self._wanted, self.batch_size = [], planned
            batch["data"][empty] = again

    def _is_empty(self, patch: Tensor) -> bool:
        *images, _ = patch.flatten(1).split([*self.channels.values(), len(patch) - sum(self.channels.values())])
        return any(bool((image == image[:, :1]).all()) for image in images)


class SemiSupervisedDataLoader(SlimDataLoaderBase):
    """Draws a labeled and an unlabeled batch at a time, so that all streams share one budget of worker processes.

    Args:
        labeled: the loaders of labeled cases.
        unlabeled: the loaders of unlabeled cases.
    """

    def __init__(self, labeled: Sequence[PairedDataLoader], unlabeled: Sequence[PairedDataLoader] = ()):
        super().__init__(None, 0)
        self.loaders = {"labeled": labeled, "unlabeled": unlabeled}

    def generate_train_batch(self) -> dict[str, list[Patches]]:
        """Draw from every loader: "labeled" and "unlabeled" patches."""
        return {kind: [loader.generate_train_batch() for loader in loaders] for kind, loaders in self.loaders.items()}


def _is_geometric(transform: BasicTransform) -> bool:
    inner = transform.transform if isinstance(transform, RandomTransform) else transform
    if not isinstance(inner, _GEOMETRIC + _VOXELWISE):
        raise NotImplementedError(
            f"{type(inner).__name__} cannot be used with paired modalities, since nobody said whether it moves voxels."
        )
    return isinstance(inner, _GEOMETRIC)


def _run(transforms: Sequence[BasicTransform], data_dict: dict[str, Any]) -> dict[str, Any]:
    for transform in transforms:
        data_dict = transform(**data_dict)
    return data_dict


def _concatenate(parts: list[Any]) -> Tensor | list[Tensor]:
    """Put the channels of modalities together: tensors or, for deep supervision, lists with a tensor for each scale."""
    if isinstance(parts[0], list):
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]
    return torch.cat(parts)
