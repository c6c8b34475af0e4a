"""Cases whose modalities were cropped and resampled apart, presented to nnU-Net's data loader as one case."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from numpy.typing import DTypeLike, NDArray

Properties = Mapping[str, Any]  # what nnU-Net's preprocessor stores with a case
# class or region -> foreground voxels (K, 1 + axes), or an empty list
Locations = dict[int | tuple[int, ...], NDArray[np.int32] | list[int]]


class SlicedArray(Protocol):
    """An array (channels, *spatial) of which a slice can be read, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels first."""

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[Any]: ...


def common_frame(
    properties: Sequence[Properties],
    shapes: Sequence[Sequence[int]],
    transpose_forward: Sequence[int],
    target_spacing: Sequence[float],
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Place the preprocessed arrays of one case's modalities in a frame that contains them all.

    A crop [lo, hi) of the original grid became R voxels of the target grid. Its middle is put where it belongs, rounded
    to whole voxels relative to the first modality. Without resampling that is exact. With it, the middles of two
    modalities are at most half a voxel apart; towards the ends of the crops at most another half voxel is added, since
    nnU-Net stretches each crop to a whole number of voxels.

    Args:
        properties: what nnU-Net's preprocessor stored with each modality.
        shapes: spatial shape of each modality's preprocessed array.
        transpose_forward: the plans' axis order, which arrays and bounding boxes are already in and spacings are not.
        target_spacing: the configuration's spacing in mm, in transposed order; a 2d configuration has no first axis.

    Returns:
        The shape of the frame and the offset of each modality's array in it, in voxels.
    """
    original = np.array([properties[0]["spacing"][axis] for axis in transpose_forward])
    target = np.array([*original[: len(original) - len(target_spacing)], *target_spacing])
    sizes = np.array(shapes)  # (M, axes)
    boxes = np.array([p["bbox_used_for_cropping"] for p in properties])  # (M, axes, 2)
    starts = boxes.mean(axis=2) * (original / target) - sizes / 2
    offsets = np.rint(starts - starts[0])
    offsets -= offsets.min(axis=0)
    frame = (offsets + sizes).max(axis=0)
    return tuple(int(n) for n in frame), [tuple(int(n) for n in offset) for offset in offsets]


class PairedArray:
    """M arrays (C_m, *own shape) at their offsets in one frame, read as a single array (C_1 + … + C_M, *frame).

    Only what is asked for is read and decompressed. Voxels outside of an array have the fill value. With `positions`,
    further channels, one for each axis, tell where in the frame a voxel lies, from just above 0 to just below 1.
    """

    def __init__(
        self,
        arrays: Sequence[SlicedArray],
        frame: tuple[int, ...],
        offsets: Sequence[tuple[int, ...]],
        fill: float,
        dtype: DTypeLike,
        positions: bool = False,
    ):
        self.arrays = arrays
        self.offsets = offsets
        self.channels = sum(array.shape[0] for array in arrays)
        self.shape = (self.channels + len(frame) * positions, *frame)
        self.fill = fill
        self.dtype = np.dtype(dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        if index[0] != slice(None):
            raise IndexError(f"all channels are read at once, got {index[0]} for them.")
        wanted = [range(n)[s] for s, n in zip(index[1:], self.shape[1:], strict=True)]
        return self.read([(along.start, along.stop) for along in wanted])

    def read(self, box: Sequence[tuple[int, int]]) -> NDArray[Any]:
        """Read a box that may reach beyond the frame, where the value is the fill value and positions are 0.

        Args:
            box: first voxel and the one after the last, along every axis.
        """
        out = np.full((self.shape[0], *(stop - start for start, stop in box)), self.fill, self.dtype)
        end = 0
        for array, offset in zip(self.arrays, self.offsets, strict=True):
            own = slice(end, end + array.shape[0])
            end = own.stop
            source, target = _overlap(box, offset, array.shape[1:])
            if all(along.start < along.stop for along in source):
                here, there = (own, *target), (slice(None), *source)
                out[here] = array[there]
        if end < self.shape[0]:
            out[end:] = 0
            source, target = _overlap(box, (0,) * len(box), self.shape[1:])
            for axis, along in enumerate(source):
                places = (np.arange(along.start, along.stop) + 0.5) / self.shape[1 + axis]
                out[end + axis][target] = places.reshape([-1 if a == axis else 1 for a in range(len(box))])
        return out


def _overlap(
    box: Sequence[tuple[int, int]], offset: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a box and an array at an offset overlap, in the array and in the box; slices without length if nowhere."""
    source, target = [], []
    for (start, stop), begin, size in zip(box, offset, shape, strict=True):
        first, last = max(start, begin), min(stop, begin + size)
        source.append(slice(first - begin, last - begin))
        target.append(slice(first - start, last - start))
    return tuple(source), tuple(target)


Case = tuple[PairedArray, PairedArray, None, dict[str, Locations]]  # what nnU-Net's loader expects of a dataset
_MOST_OPEN_FILES = 64  # of a dataset and process: few beside the 1024 that systems allow, enough for few labels


class PairedDataset:
    """Cases with all of M modalities, each as one case. Stands in for nnU-Net's dataset in its data loader.

    The channels of a case's image are those of its modalities, one modality after the other, and its segmentation has
    one channel per modality: the preprocessed files of the modalities, voxel for voxel.

    Args:
        datasets: modality -> its preprocessed nnU-Net dataset.
        identifiers: the cases to serve; every dataset has them.
        transpose_forward: see `common_frame`.
        target_spacing: see `common_frame`.
        labeled: whether the segmentations are labels. If not, they are mere masks of the nonzero region (0 inside, -1
            outside) that nnU-Net's augmentation needs, and there are no foreground locations.
        positions: whether images have a further channel for each axis, the position of every voxel in its case as a
            share of the extent, in (0, 1); where augmentation and padding look beyond the case, it becomes 0.
    """

    def __init__(
        self,
        datasets: Mapping[str, nnUNetBaseDataset],
        identifiers: Sequence[str],
        transpose_forward: Sequence[int],
        target_spacing: Sequence[float],
        labeled: bool,
        positions: bool,
    ):
        self.datasets = datasets
        self.identifiers = sorted(identifiers)
        self.transpose_forward = transpose_forward
        self.target_spacing = target_spacing
        self.labeled = labeled
        self.positions = positions
        self._opened: dict[str, Case] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files, which another process opens for itself."""
        return {**self.__dict__, "_opened": {}}

    def load_case(self, identifier: str) -> Case:
        """Open a case, or take it from those that were opened last and are still open.

        Returns:
            Image (C_1 + … + C_M, *frame) in float32, followed by the positions if there are any, segmentation (M,
            *frame) in int16, no previous stage, and properties with the foreground locations in the frame
            (`class_locations` as nnU-Net has them).
        """
        if identifier not in self._opened:
            while len(self._opened) * 2 * len(self.datasets) >= _MOST_OPEN_FILES:
                del self._opened[next(iter(self._opened))]
            self._opened[identifier] = self._open(identifier)
        return self._opened[identifier]

    def _open(self, identifier: str) -> Case:
        opened = [dataset.load_case(identifier) for dataset in self.datasets.values()]
        images, segmentations, _, properties = zip(*opened, strict=True)
        shapes = [image.shape[1:] for image in images]
        frame, offsets = common_frame(properties, shapes, self.transpose_forward, self.target_spacing)
        return (
            PairedArray(images, frame, offsets, 0, np.float32, self.positions),
            PairedArray(segmentations, frame, offsets, -1, np.int16),
            None,
            {"class_locations": _class_locations(properties, offsets) if self.labeled else {}},
        )


def _class_locations(properties: Sequence[Properties], offsets: Sequence[tuple[int, ...]]) -> Locations:
    """Foreground locations, each class's from the first modality whose crop contains it, moved to the frame."""
    found: Locations = {}
    for own, offset in zip(properties, offsets, strict=True):
        for label, locations in own["class_locations"].items():
            if len(found.get(label, ())) == 0:
                found[label] = (locations + np.array([0, *offset])).astype(np.int32) if len(locations) else []
    return found
