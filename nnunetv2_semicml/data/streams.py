"""Labeled and unlabeled patches in one stream, with nnU-Net's augmentation applied to paired modalities.

A draw is a set of modalities whose patches show the same places of the same cases; the labeled and the unlabeled batch
consist of one or several draws.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from math import ceil
from typing import Any, TypedDict

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import ThreadpoolController
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
    assumptions of those transforms hold (the mask and the regions are read from segmentation channel 0). Blur is by
    convolution, as nnU-Net has it unless a measurement of time says that Fourier transforms are faster, which round
    differently: patches would depend on what else a machine is doing, and a training could not be repeated.

    Args:
        pipelines: one pipeline per modality; they differ in nothing but their masking.
        channels: number of image channels of each modality.

    Raises:
        NotImplementedError: for a transform that is not known to move voxels or to leave them in place.
    """

    def __init__(self, pipelines: Sequence[ComposeTransforms], channels: Sequence[int]):
        super().__init__()
        for transform in (_inner(t) for p in pipelines for t in p.transforms):
            if isinstance(transform, GaussianBlurTransform):
                transform.benchmark = False
        runs = [[(key, list(run)) for key, run in groupby(p.transforms, _is_geometric)] for p in pipelines]
        # stages: (geometric?, the transforms of each modality)
        self.stages = [(same[0][0], [transforms for _, transforms in same]) for same in zip(*runs, strict=True)]
        self.channels = list(channels)
        self.looks_at_segmentation = any(isinstance(t, MaskImageTransform) for p in pipelines for t in p.transforms)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Augment a patch.

        Args:
            data_dict: "image" (C_1 + … + C_M, *spatial), whose further channels are only moved, and, unless nothing
                looks at it, "segmentation" (M, *spatial).
            **params: none; nnU-Net's signature.

        Returns:
            The same, augmented; targets come out modality by modality.
        """
        for geometric, transforms in self.stages:
            if geometric:
                data_dict = _move(transforms[0], data_dict)
            else:
                moved_only = len(data_dict["image"]) - sum(self.channels)
                *images, moved = data_dict["image"].split([*self.channels, moved_only])
                of_modalities: list[dict[str, Any]] = [{**data_dict, "image": image} for image in images]
                if "segmentation" in data_dict:
                    for of_modality, segmentation in zip(
                        of_modalities, data_dict["segmentation"].split(1), strict=True
                    ):
                        of_modality["segmentation"] = segmentation
                parts = [_run(own, part) for own, part in zip(transforms, of_modalities, strict=True)]
                data_dict = {key: _concatenate([part[key] for part in parts]) for key in data_dict}
                if moved_only:
                    data_dict["image"] = torch.cat([data_dict["image"], moved])
        return data_dict


class PairedDataLoader(nnUNetDataLoader):
    """Draws patches of a `PairedDataset` where nnU-Net's loader would; takes what that takes.

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
        if not data.labeled:
            self.has_ignore = False  # an ignore label is looked for through labels; there are none

    def get_indices(self) -> Sequence[str]:
        """Draw the cases of a batch."""
        if self._data.labeled:
            return list(super().get_indices())
        rounds = ceil(self.batch_size / len(self.indices))
        # of numbers, which takes less time than of names
        drawn = np.concatenate([np.random.permutation(len(self.indices)) for _ in range(rounds)])
        return [str(self.indices[number]) for number in drawn[: self.batch_size]]

    def generate_train_batch(self) -> Patches:
        """Draw a batch as nnU-Net does, and keep the modalities apart."""
        cases = self.get_indices()
        with torch.no_grad():
            drawn = [self._draw(case, self.get_do_oversample(number)) for number, case in enumerate(cases)]
        images, targets = zip(*drawn, strict=True)
        *of_modalities, positions = zip(*(self._split(image) for image in images), strict=True)
        return {
            "cases": cases,
            "images": {name: torch.stack(own) for name, own in zip(self.channels, of_modalities, strict=True)},
            "targets": self._targets_by_modality(targets) if self._data.labeled else {},
            "positions": torch.stack(positions) if self._data.positions else None,
        }

    def _draw(self, case: str, foreground: bool) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """An augmented patch; if it shows nothing of a modality, another one, as long as there seems to be one."""
        image, target = self._cut_out(case, foreground)
        for _ in range(0 if self._data.labeled else _MOST_DRAWS):
            if not self._is_empty(image):
                break
            image, target = self._cut_out(case, foreground)
        return image, target

    def _cut_out(self, case: str, foreground: bool) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Image (all channels, *patch) and, of a case with labels, target (M, *patch), a list if it has several scales.

        Of unlabeled cases the nonzero mask is read only if a modality's pipeline looks at it.
        """
        image, segmentation, _, properties = self._data.load_case(case)
        box = list(zip(*self.get_bbox(image.shape[1:], foreground, properties["class_locations"]), strict=True))
        sample = {"image": torch.from_numpy(image.read(box))}
        if self._data.labeled or self.transforms.looks_at_segmentation:
            sample["segmentation"] = torch.from_numpy(segmentation.read(box))
        if self.patch_size_was_2d:
            sample = {key: array[:, 0] for key, array in sample.items()}
        sample = self.transforms(**sample)
        return sample["image"], sample.get("segmentation")

    def _split(self, image: Tensor) -> Sequence[Tensor]:
        """A patch by modality, and the positions, or no channel, at the end."""
        sizes = list(self.channels.values())
        parts: Sequence[Tensor] = image.split([*sizes, len(image) - sum(sizes)])
        return parts

    def _is_empty(self, image: Tensor) -> bool:
        *of_modalities, _ = self._split(image)
        return any(bool((own.flatten(1) == own.flatten(1)[:, :1]).all()) for own in of_modalities)

    def _targets_by_modality(self, targets: Sequence[Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
        of_scales = [list(target) if isinstance(target, list) else [target] for target in targets]
        several = isinstance(targets[0], list)
        scales = [torch.stack(scale).chunk(len(self.channels), dim=1) for scale in zip(*of_scales, strict=True)]
        by_modality = zip(*scales, strict=True)
        return {name: list(own) if several else own[0] for name, own in zip(self.channels, by_modality, strict=True)}


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
        """Draw from every loader, in one thread as nnU-Net does: "labeled" and "unlabeled" patches."""
        with _thread_pools().limit(limits=1):
            return {
                kind: [loader.generate_train_batch() for loader in loaders] for kind, loaders in self.loaders.items()
            }


@cache
def _thread_pools() -> ThreadpoolController:
    """Those of this process, looked for once: that takes longer than to load a patch."""
    return ThreadpoolController()


def _inner(transform: BasicTransform) -> BasicTransform:
    return transform.transform if isinstance(transform, RandomTransform) else transform


def _is_geometric(transform: BasicTransform) -> bool:
    inner = _inner(transform)
    if not isinstance(inner, _GEOMETRIC + _VOXELWISE):
        raise NotImplementedError(
            f"{type(inner).__name__} cannot be used with paired modalities, since nobody said whether it moves voxels."
        )
    return isinstance(inner, _GEOMETRIC)


def _run(transforms: Sequence[BasicTransform], data_dict: dict[str, Any]) -> dict[str, Any]:
    for transform in transforms:
        data_dict = transform(**data_dict)
    return data_dict


def _move(transforms: Sequence[BasicTransform], data_dict: dict[str, Any]) -> dict[str, Any]:
    """Apply geometric transforms. Segmentations that are the same in all modalities are resampled once."""
    segmentation = data_dict.get("segmentation")
    if segmentation is None or len(segmentation) == 1 or bool((segmentation != segmentation[:1]).any()):
        return _run(transforms, data_dict)
    data_dict = _run(transforms, {**data_dict, "segmentation": segmentation[:1]})
    return {**data_dict, "segmentation": data_dict["segmentation"].repeat_interleave(len(segmentation), dim=0)}


def _concatenate(parts: list[Any]) -> Tensor | list[Tensor]:
    """Put the channels of modalities together: tensors or, for deep supervision, lists with a tensor for each scale."""
    if isinstance(parts[0], list):
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]
    return torch.cat(parts)
