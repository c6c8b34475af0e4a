"""Grids of images: where their voxels lie, and whether two images lie on one grid.

Imports numpy and SimpleITK; nothing of nnU-Net and nothing of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

# Files of a case lie on one grid if no voxel is displaced by more than this share of the voxel size: programs round
# what they store in headers differently.
GRID_TOLERANCE = 0.1

_PLACED_BY = ("spacing", "origin", "direction", "affine")


class Difference(NamedTuple):
    """In what two grids differ.

    Attributes:
        attribute: of `Grid`.
        found: its value in words, with as many digits as tell the two apart.
        expected: likewise.
    """

    attribute: str
    found: str
    expected: str


@dataclass(frozen=True, eq=False)  # compared by `difference`
class Grid:
    """The grid of an image of n axes; what its file does not store is None.

    Attributes:
        shape: voxels along the axes of arrays, (z, y, x).
        spacing: of these axes, in mm.
        origin: where the first voxel is, (x, y, z), in mm.
        matrix: (n, n), whose columns lead from a voxel to the next one along x, y and z, in mm.
        direction: the same without the spacing, where the file stores the two apart.
        affine: (4, 4), where the file stores origin and matrix like this.
    """

    shape: NDArray[np.int64]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64] | None = None
    matrix: NDArray[np.float64] | None = None
    direction: NDArray[np.float64] | None = None
    affine: NDArray[np.float64] | None = None

    @classmethod
    def of_image(cls, image: sitk.Image) -> "Grid":
        """That of a SimpleITK image."""
        spacing = np.array(image.GetSpacing())
        direction = np.reshape(image.GetDirection(), (len(spacing),) * 2)
        return cls(
            shape=np.array(image.GetSize()[::-1]),
            spacing=spacing[::-1],
            origin=np.array(image.GetOrigin()),
            matrix=direction * spacing,
            direction=direction,
        )

    @classmethod
    def of_properties(cls, voxels: NDArray[Any], properties: Mapping[str, Any]) -> "Grid":
        """That of voxels (channels, *spatial) and properties, as nnU-Net's readers return them."""
        shape, spacing = np.array(voxels.shape[1:]), np.array(properties["spacing"])
        if "sitk_stuff" in properties:
            stored = properties["sitk_stuff"]
            # a fourth axis is that of the channels, or has one entry; a 2D image has two axes
            n = min(3, len(stored["spacing"]))
            direction = np.reshape(stored["direction"], (len(stored["spacing"]),) * 2)[:n, :n]
            matrix = direction * np.array(stored["spacing"][:n])
            return cls(shape, spacing, np.array(stored["origin"][:n]), matrix, direction=direction)
        if "nibabel_stuff" in properties:
            affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
            return cls(shape, spacing, affine[:3, 3], affine[:3, :3], affine=affine)
        return cls(shape, spacing)

    def corners(self) -> NDArray[np.float64]:
        """Where the centers of the corner voxels are, (2**n, n), in mm.

        Raises:
            ValueError: without an origin and a matrix.
        """
        if self.origin is None or self.matrix is None:
            raise ValueError("the file of this image does not say where its voxels are.")
        # a single slice may have three axes in the array and two in the file
        ends = self.shape[::-1][: len(self.origin)] - 1
        indices = np.array(list(product(*((0, end) for end in ends))))
        return np.asarray(indices @ self.matrix.T + self.origin)

    def difference(self, expected: "Grid") -> Difference | None:
        """What makes this another grid than the expected one; None if it is the same within `GRID_TOLERANCE`."""
        if self.shape.tolist() != expected.shape.tolist():
            return describe_difference("shape", self, expected)
        own, other = self._on_axes_of(expected), expected._on_axes_of(self)
        if own._displacement(other) <= GRID_TOLERANCE:
            return None
        for attribute in _PLACED_BY:
            a, b = getattr(own, attribute), getattr(other, attribute)
            if a is not None and b is not None and not np.allclose(a, b, atol=1e-3):
                return describe_difference(attribute, own, other)
        return describe_difference("spacing", own, other)

    def _on_axes_of(self, other: "Grid") -> "Grid":
        """The grid of a single slice without its third axis, if the other one is that of a 2D image."""
        if self.origin is None or other.origin is None or len(self.origin) <= len(other.origin):
            return self
        return Grid(
            self.shape,
            np.array([other.spacing[0], *self.spacing[1:]]),
            self.origin[:2],
            None if self.matrix is None else self.matrix[:2, :2],
            None if self.direction is None else self.direction[:2, :2],
        )

    def _displacement(self, expected: "Grid") -> float:
        """How far the corners of two grids of one shape are apart at most, as a share of the smallest spacing."""
        if self.matrix is None or expected.matrix is None:
            # the format knows spacings alone, which are compared over the extent of the image
            apart = np.abs(self.spacing - expected.spacing) * (self.shape - 1)
            return float(apart.max() / expected.spacing.min())
        smallest = np.linalg.norm(expected.matrix, axis=0).min()
        return float(np.linalg.norm(self.corners() - expected.corners(), axis=1).max() / smallest)


def describe_difference(attribute: str, grid: Grid, expected: Grid) -> Difference:
    """An attribute in which two grids differ."""
    values = [np.asarray(getattr(each, attribute)) for each in (grid, expected)]
    for digits in (0, 3, 6, 9, 17):
        rounded = [np.round(v, digits) + 0.0 for v in values]  # -0.0 becomes 0.0
        found, other = (str(v.astype(float if digits else int).tolist()) for v in rounded)
        # three digits at least, unless these are counts
        if found != other and (digits or attribute == "shape"):
            break
    return Difference(attribute, found, other)
