"""Grids are the same by whatever reader, and differences are said in words."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_semicml.data.grid import GRID_TOLERANCE, Difference, Grid

TILTED = (1, 0, 0, 0, 0.8, -0.6, 0, 0.6, 0.8)


def make_image(shape=(4, 5, 6), spacing=(1, 2, 3), origin=(7, 8, 9), direction=TILTED) -> sitk.Image:
    image = sitk.GetImageFromArray(np.zeros(shape, np.float32))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def test_corners_are_where_simpleitk_has_them():
    image = make_image()
    corners = Grid.of_image(image).corners()
    assert len(corners) == 8
    for corner in (0, 0, 0), (5, 0, 3), (5, 4, 3):
        place = image.TransformIndexToPhysicalPoint(corner)
        assert np.isclose(corners, place).all(axis=1).sum() == 1


def test_readers_of_a_file_find_the_grid_of_the_image(tmp_path):
    file = str(tmp_path / "image.nii.gz")
    sitk.WriteImage(make_image(), file)
    grid = Grid.of_image(sitk.ReadImage(file))
    assert grid.shape.tolist() == [4, 5, 6]
    assert grid.spacing.tolist() == [3, 2, 1]
    by_simpleitk = Grid.of_properties(*SimpleITKIO().read_images([file]))
    assert by_simpleitk.difference(grid) is None
    by_nibabel = Grid.of_properties(*NibabelIO().read_images([file]))  # in its own world, x and y turned round
    np.testing.assert_allclose(by_nibabel.corners() * (-1, -1, 1), grid.corners(), atol=1e-5)


@pytest.mark.parametrize(("reader", "attribute"), [(SimpleITKIO, "direction"), (NibabelIO, "affine")])
def test_turned_image_is_said_to_be_turned(tmp_path, reader, attribute):
    """In the words of the file, as far as the reader tells; by its first voxel and its spacing it looks the same."""
    files = []
    for name, direction in (("turned", TILTED), ("straight", (1, 0, 0, 0, 1, 0, 0, 0, 1))):
        files.append(str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(make_image(direction=direction), files[-1])
    turned, straight = (Grid.of_properties(*reader().read_images([file])) for file in files)
    assert turned.difference(straight).attribute == attribute
    turned, straight = (Grid.of_image(sitk.ReadImage(file)) for file in files)
    assert turned.difference(straight).attribute == "direction"


def test_axis_of_the_channels_does_not_count(tmp_path):
    """SimpleITK stores spacing, origin and direction of a fourth axis, too."""
    file = str(tmp_path / "image.nii.gz")
    sitk.WriteImage(sitk.JoinSeries([make_image(), make_image()], 70, 5), file)
    voxels, properties = SimpleITKIO().read_images([file])
    assert len(voxels) == 2
    grid = Grid.of_properties(voxels, properties)
    assert grid.difference(Grid.of_image(make_image())) is None
    assert grid.difference(Grid.of_image(make_image(origin=(7, 8, 10)))) is not None


def test_formats_without_a_place_are_compared_by_spacing():
    voxels = np.zeros((1, 4, 5, 6))
    grid, other = (Grid.of_properties(voxels, {"spacing": spacing}) for spacing in ((3, 2, 1), (3, 2, 1.5)))
    assert Tiff3DIO.supported_file_endings  # such as this one
    assert grid.difference(other) == Difference("spacing", "[3.0, 2.0, 1.0]", "[3.0, 2.0, 1.5]")
    for without in (grid, *(replace(Grid.of_image(make_image()), **{name: None}) for name in ("origin", "matrix"))):
        with pytest.raises(ValueError, match=r"^the file of this image does not say where its voxels are\.$"):
            without.corners()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"shape": (4, 5, 7)}, Difference("shape", "[4, 5, 7]", "[4, 5, 6]")),
        ({"spacing": (1, 2, 3.1)}, Difference("spacing", "[3.1, 2.0, 1.0]", "[3.0, 2.0, 1.0]")),
        ({"origin": (7, 8, 9.2)}, Difference("origin", "[7.0, 8.0, 9.2]", "[7.0, 8.0, 9.0]")),
        ({"origin": (7, 8, 9 + 0.9 * GRID_TOLERANCE)}, None),  # as a share of 1 mm, the smallest spacing
        ({"spacing": (1, 2, 3 + 1e-4)}, None),
        # the spacing is another one by rounding alone
        (
            {"spacing": (1, 2, 3.0005), "origin": (7, 8, 19)},
            Difference("origin", "[7.0, 8.0, 19.0]", "[7.0, 8.0, 9.0]"),
        ),
    ],
)
def test_difference_is_named_if_voxels_lie_elsewhere(changes, difference):
    assert Grid.of_image(make_image(**changes)).difference(Grid.of_image(make_image())) == difference


def test_difference_has_the_digits_that_show_it():
    far = make_image(shape=(4, 5, 6000), spacing=(1.00005, 2, 3))
    expected = make_image(shape=(4, 5, 6000))
    found = Grid.of_image(far).difference(Grid.of_image(expected))
    assert found == Difference("spacing", "[3.0, 2.0, 1.00005]", "[3.0, 2.0, 1.0]")
