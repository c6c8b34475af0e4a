"""Where voxels lie, by readers and by hand, and which displacements make another grid. Sentences: test_grid."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from test_grid import make_image

from nnunetv2_semicml.data.grid import GRID_TOLERANCE, Difference, Grid, describe_difference

COS, SIN = 0.8, 0.6


def plane(spacing=(2.0, 1.0), origin=(7.0, 8.0), direction=(1.0, 0.0, 0.0, 1.0), thick=None):
    """That of a 2D image of 6 by 5 pixels, along (x, y), or of a single slice of this thickness."""
    spacing_2d, direction_2d = np.array(spacing), np.reshape(direction, (2, 2))
    if thick is None:  # nnU-Net gives 2D images a first axis of 999 mm
        return Grid(np.array([1, 5, 6]), np.array([999.0, *spacing_2d[::-1]]), np.array(origin),
                    direction_2d * spacing_2d, direction_2d)  # fmt: skip
    direction_3d = np.eye(3)
    direction_3d[:2, :2] = direction_2d
    spacing_3d = np.array([*spacing, thick])
    return Grid(np.array([1, 5, 6]), spacing_3d[::-1], np.array([*origin, 9.0]), direction_3d * spacing_3d,
                direction_3d)  # fmt: skip


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_readers_place_all_corners_where_simpleitk_does(tmp_path, reader):
    image, file = make_image(), str(tmp_path / "image.nii.gz")
    sitk.WriteImage(image, file)
    grid = Grid.of_properties(*reader().read_images([file]))
    places = [
        image.TransformIndexToPhysicalPoint(c)
        for c in np.ndindex(2, 2, 2)
        for c in [(c * np.array([5, 4, 3])).tolist()]
    ]
    turned = (-1, -1, 1) if reader is NibabelIO else (1, 1, 1)  # the world of NIfTI has x and y the other way round
    np.testing.assert_allclose(sorted(grid.corners().tolist()), sorted((np.array(places) * turned).tolist()), atol=1e-5)
    assert grid.shape.tolist() == [4, 5, 6]
    assert grid.spacing.tolist() == pytest.approx([3, 2, 1])


def test_single_slice_lies_on_the_grid_of_a_2d_image_whatever_its_thickness():
    for thick in (1.0, 5.0):
        assert plane(thick=thick).difference(plane()) is None
        assert plane().difference(plane(thick=thick)) is None
        for name in ("direction", "matrix"):  # not every format has them
            assert replace(plane(thick=thick), **{name: None}).difference(plane()) is None


@pytest.mark.parametrize(
    ("changes", "attribute", "found", "expected"),
    [
        ({"origin": (7.0, 8.5)}, "origin", "[7.0, 8.5]", "[7.0, 8.0]"),
        ({"spacing": (2.0, 1.5)}, "spacing", "[999.0, 1.5, 2.0]", "[999.0, 1.0, 2.0]"),
        ({"direction": (COS, -SIN, SIN, COS)}, "direction", "[[0.8, -0.6], [0.6, 0.8]]", "[[1.0, 0.0], [0.0, 1.0]]"),
    ],
)
def test_single_slice_elsewhere_than_a_2d_image_is_told_apart_in_the_plane(changes, attribute, found, expected):
    assert plane(**changes, thick=5.0).difference(plane()) == Difference(attribute, found, expected)
    assert plane(**changes).difference(plane()) == Difference(attribute, found, expected)
    assert plane().difference(plane(**changes, thick=5.0)) == Difference(attribute, expected, found)


@pytest.mark.parametrize(("spacing", "same"), [(2.0199, True), (2.0201, False)])
def test_spacing_alone_is_compared_over_the_extent(spacing, same):
    """A tenth of a voxel over the ten steps from the first to the last of eleven."""
    grid, expected = (Grid(np.array([4, 5, 11]), np.array([3.0, 2.0, s])) for s in (spacing, 2.0))
    assert (grid.difference(expected) is None) == same
    assert (expected.difference(grid) is None) == same


@pytest.mark.parametrize(("moved", "same"), [(0.199, True), (0.201, False)])
def test_displacement_is_a_share_of_the_smallest_step_however_the_axes_lie(moved, same):
    """A step of 2 mm that is oblique to both axes of the world."""
    grid, expected = (
        Grid.of_image(make_image(spacing=(2, 3, 3), origin=origin, direction=(COS, -SIN, 0, SIN, COS, 0, 0, 0, 1)))
        for origin in ((7, 8, 9), (7, 8, 9 + moved))
    )
    assert (grid.difference(expected) is None) == same


def test_displacement_by_the_tolerance_is_none():
    grid, expected = (Grid(np.array([1]), np.array([1.0]), np.array([x]), np.eye(1)) for x in (GRID_TOLERANCE, 0.0))
    assert grid.difference(expected) is None


def test_as_many_digits_are_shown_as_tell_apart():
    for value, shown in ((1.3, "[1.3]"), (1.0004, "[1.0004]"), (1.0000004321, "[1.000000432]")):
        grid, expected = (Grid(np.array([2]), np.array([spacing])) for spacing in (value, 1.0))
        assert describe_difference("spacing", grid, expected) == Difference("spacing", shown, "[1.0]")
    grid, expected = (Grid(np.array([2]), np.ones(1), np.array(origin)) for origin in ([-1e-4, 7.0], [0.0, 8.0]))
    assert describe_difference("origin", grid, expected) == Difference("origin", "[0.0, 7.0]", "[0.0, 8.0]")
    counts = describe_difference("shape", Grid(np.array([2]), np.ones(1)), Grid(np.array([3]), np.ones(1)))
    assert counts == Difference("shape", "[2]", "[3]")


def test_grid_with_a_place_is_compared_with_one_without_by_spacing():
    with_place, without = Grid.of_image(make_image()), Grid(np.array([4, 5, 6]), np.array([3.0, 2.0, 1.0]))
    assert with_place.difference(without) is None
    assert without.difference(with_place) is None
