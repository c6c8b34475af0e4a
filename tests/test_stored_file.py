"""Which damage nnU-Net's readers let pass, and that a second look finds it and never refuses a whole file.

The files are written by SimpleITK, nibabel, skimage and tifffile, or byte by byte; what is in them is known from there.
"""

import gzip
import hashlib
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import skimage.io
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_semicml.data import stored_file
from nnunetv2_semicml.data.stored_file import check_stored_file, digest_of, state_of

SHAPE = (20, 30, 40)


def noise(dtype: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape).astype(dtype)


def by_itk(is_packed: bool) -> Callable:
    return lambda file, voxels: sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file), is_packed)


def by_nibabel(kind: type, order: str = "<") -> Callable:
    def write(file: Path, voxels: np.ndarray) -> None:
        header = kind.header_class(endianness=order)
        header.set_data_dtype(voxels.dtype)
        nibabel.save(kind(voxels, np.eye(4), header), file)

    return write


def by_tifffile(**options) -> Callable:
    return lambda file, voxels: tifffile.imwrite(file, voxels, **({"photometric": "minisblack"} | options))


def by_skimage(file: Path, voxels: np.ndarray) -> None:
    skimage.io.imsave(file, voxels, check_contrast=False)


NUMBERS = ("uint8", "int16", "float32", "float64")
# writer, ending, reader, shape, types of voxels; of a file cut to 70 %: whether the reader raises an error, and whether
# check_stored_file finds it
FORMATS = {
    "NIfTI": (by_itk(True), ".nii.gz", SimpleITKIO, SHAPE, NUMBERS, False, True),
    "NIfTI of nibabel": (by_nibabel(nibabel.Nifti1Image), ".nii.gz", SimpleITKIO, SHAPE, NUMBERS, False, True),
    "NIfTI, big-endian": (by_nibabel(nibabel.Nifti1Image, ">"), ".nii.gz", SimpleITKIO, SHAPE, NUMBERS, False, True),
    "NIfTI, plain": (by_itk(False), ".nii", SimpleITKIO, SHAPE, NUMBERS, False, True),
    "NIfTI by nibabel": (by_itk(True), ".nii.gz", NibabelIO, SHAPE, NUMBERS, True, True),
    "NIfTI by nibabel, plain": (by_itk(False), ".nii", NibabelIO, SHAPE, NUMBERS, True, True),
    "NIfTI-2": (by_nibabel(nibabel.Nifti2Image), ".nii.gz", NibabelIO, SHAPE, NUMBERS, True, True),
    "NIfTI-2, plain, big-endian": (by_nibabel(nibabel.Nifti2Image, ">"), ".nii", NibabelIO, SHAPE, NUMBERS, True, True),
    "NRRD": (by_itk(True), ".nrrd", SimpleITKIO, SHAPE, NUMBERS, True, False),
    "NRRD, plain": (by_itk(False), ".nrrd", SimpleITKIO, SHAPE, NUMBERS, True, False),
    "MetaImage": (by_itk(True), ".mha", SimpleITKIO, SHAPE, NUMBERS, True, False),
    "MetaImage, plain": (by_itk(False), ".mha", SimpleITKIO, SHAPE, NUMBERS, True, False),
    "GIPL": (by_itk(False), ".gipl", SimpleITKIO, SHAPE, NUMBERS, False, True),
    "PNG": (by_skimage, ".png", NaturalImage2DIO, (60, 70), ("uint8", "uint16"), True, False),
    "PNG, color": (by_skimage, ".png", NaturalImage2DIO, (60, 70, 3), ("uint8",), True, False),
    "BMP": (by_skimage, ".bmp", NaturalImage2DIO, (60, 70), ("uint8",), True, False),
    "TIFF": (by_skimage, ".tif", NaturalImage2DIO, (60, 70), ("uint8", "uint16", "float32"), True, False),
    "TIFF, packed": (by_tifffile(compression="zlib"), ".tif", NaturalImage2DIO, (60, 70), ("uint8",), True, False),
    "TIFF of SimpleITK": (by_itk(False), ".tif", NaturalImage2DIO, (60, 70), ("uint8", "uint16"), True, True),
    "TIFF, pages": (by_itk(False), ".tiff", Tiff3DIO, SHAPE, ("uint8", "int16", "float32"), False, True),
    "TIFF, pages, packed": (by_itk(True), ".tif", Tiff3DIO, SHAPE, ("uint8", "int16", "float32"), False, True),
    "TIFF, pages of tifffile": (by_tifffile(), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
    "TIFF, pages, LZW": (by_tifffile(compression="lzw"), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
    "TIFF, pages, zlib": (by_tifffile(compression="zlib"), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
    "TIFF, pages, big-endian": (by_tifffile(byteorder=">"), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
    "TIFF, pages, tiles": (by_tifffile(tile=(16, 16)), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
    "TIFF, pages, ImageJ": (by_tifffile(imagej=True), ".tif", Tiff3DIO, SHAPE, ("uint8", "float32"), True, True),
    "BigTIFF, pages": (by_tifffile(bigtiff=True), ".tif", Tiff3DIO, SHAPE, NUMBERS, True, True),
}


@pytest.mark.parametrize(
    ("writer", "ending", "reader", "shape", "dtype", "reader_notices", "found"),
    [
        pytest.param(writer, ending, reader, shape, dtype, *outcome, id=f"{name}, {dtype}")
        for name, (writer, ending, reader, shape, dtypes, *outcome) in FORMATS.items()
        for dtype in dtypes
    ],
)
def test_formats(tmp_path, capfd, writer, ending, reader, shape, dtype, reader_notices: bool, found: bool):
    """What the reader lets pass is found; a whole file passes."""
    file = tmp_path / f"image_0000{ending}"
    writer(file, noise(dtype, shape))
    whole = file.read_bytes()
    assert check_stored_file(file) == ("", 0)
    reader().read_images([str(file)])

    file.write_bytes(whole[: len(whole) * 7 // 10])
    damage, not_finite = check_stored_file(file)
    assert (bool(damage), not_finite) == (found, 0)
    if reader_notices:
        with pytest.raises(Exception):  # noqa: B017, PT011 - every library raises errors of its own
            reader().read_images([str(file)])
    else:
        with np.errstate(over="ignore"):  # there may be anything
            reader().read_images([str(file)])


@pytest.mark.parametrize("lacking", [1, 4, 8, 1000])
@pytest.mark.parametrize("name", ["NIfTI", "NIfTI, plain", "NIfTI-2", "NIfTI-2, plain, big-endian", "GIPL"])
def test_last_bytes(tmp_path: Path, name: str, lacking: int):
    write, ending, *_ = FORMATS[name]
    file = tmp_path / f"image{ending}"
    write(file, noise("int16"))
    file.write_bytes(file.read_bytes()[:-lacking])
    size = 2 * 20 * 30 * 40
    is_packed = ending.endswith(".gz")
    assert check_stored_file(file).damage == (
        "a gzip stream without its end" if is_packed else f"{size - lacking} of {size} bytes of voxels"
    )


def test_name_does_not_matter(tmp_path: Path):
    file = tmp_path / "image.nii.gz"
    by_itk(True)(file, noise("int16"))
    content = file.read_bytes()
    for name in ("IMAGE.NII.GZ", "image.gipl", "image"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert check_stored_file(str(tmp_path / name)).damage == "a gzip stream without its end"


def test_short_content_in_a_whole_stream(tmp_path: Path):
    """As if the program that packed the file had been given half of it."""
    plain, packed = tmp_path / "image.nii", tmp_path / "image.nii.gz"
    by_itk(False)(plain, noise("int16"))
    packed.write_bytes(gzip.compress(plain.read_bytes()[: 352 + 12345]))
    assert SimpleITKIO().read_images([str(packed)])[0].shape == (1, *SHAPE)
    assert check_stored_file(packed) == ("12345 of 48000 bytes of voxels", 0)


@pytest.mark.parametrize("place", [-8, -1, 1000])
def test_damaged_stream(tmp_path: Path, place: int):
    """The checksum, the length and the voxels."""
    file = tmp_path / "image.nii.gz"
    by_itk(True)(file, noise("int16"))
    content = bytearray(file.read_bytes())
    content[place] ^= 255
    file.write_bytes(content)
    damage, not_finite = check_stored_file(file)
    assert damage.startswith("a damaged gzip stream (Error -3 while decompressing data: ")
    assert not_finite == 0


# --------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("block", [3, 997, 2**20])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_counts_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype, kind, order, ending, block: int):
    """Wherever a block ends, and among the voxels only."""
    monkeypatch.setattr(stored_file, "_BLOCK", block)
    voxels = noise(dtype, (5, 6, 7))
    voxels.flat[[0, 9, 100, 209]] = np.nan, np.inf, -np.inf, np.nan
    file = tmp_path / f"image{ending}"
    by_nibabel(kind, order)(file, voxels)
    assert check_stored_file(file) == ("", 4)
    if ending == ".nii":
        file.write_bytes(file.read_bytes() + 99 * b"\xff")  # NaN in either type
        assert check_stored_file(file) == ("", 4)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_itk_hides_not_finite_voxels_of_nifti(tmp_path: Path, ending: str):
    """Which is why they are counted; in other formats it shows them."""
    voxels = noise("float32")
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    file = tmp_path / f"image{ending}"
    by_itk(True)(file, voxels)
    assert SimpleITKIO().read_images([str(file)])[0][0, 0, 0, :3].tolist() == [0, 0, 0]
    assert check_stored_file(file) == ("", 3)
    for ending_of_others in (".nrrd", ".mha", ".gipl"):
        other = tmp_path / f"image{ending_of_others}"
        by_itk(False)(other, voxels)
        assert np.count_nonzero(~np.isfinite(SimpleITKIO().read_images([str(other)])[0])) == 3
        assert check_stored_file(other) == ("", 0)


def test_integers_and_vectors_have_no_nan(tmp_path: Path):
    file = tmp_path / "image.nii"
    by_nibabel(nibabel.Nifti1Image)(file, np.full(SHAPE, -1, np.int32))  # the bytes of NaN
    assert check_stored_file(file) == ("", 0)
    sitk.WriteImage(sitk.GetImageFromArray(noise("uint8", (*SHAPE, 3)), isVector=True), str(file))
    assert check_stored_file(file) == ("", 0)
    file.write_bytes(gipl(np.full(SHAPE, -1, np.int16), 719555000, 0))
    assert check_stored_file(file) == ("", 0)


# -------------------------------------------------------------------------------------------------------- odd headers


def gipl(voxels: np.ndarray, magic: int, fourth: int) -> bytes:
    """A GIPL whose fourth dimension, which it does not have, is stored as 0 or 1."""
    header = struct.pack(">5H", *voxels.shape[::-1], fourth, {"float32": 64, "int16": 15}[voxels.dtype.name])
    header += struct.pack(">3f", 1, 1, 1)
    header = header.ljust(248, b"\0") + b"user"  # whatever the writer wants there
    return header + struct.pack(">I", magic) + voxels.astype(voxels.dtype.newbyteorder(">")).tobytes()


def nifti(voxels: np.ndarray, extra: bytes = b"\0" * 4, **fields) -> bytes:
    """A NIfTI-1 written field by field, with what stands between header and voxels."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(voxels.shape[::-1])
    header.set_data_dtype(voxels.dtype)
    header["magic"], header["vox_offset"] = b"n+1", 348 + len(extra)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + extra + voxels.tobytes()


ODD = noise("float32")
PLAIN = nifti(ODD)
# what SimpleITK reads like any other file
ODD_FILES = {
    "quaternion longer than 1": (".nii.gz", gzip.compress(nifti(ODD, qform_code=1, quatern_d=1.000002))),
    "extension": (".nii", nifti(ODD, b"\1\0\0\0" + struct.pack("<2i", 32, 6) + b"a comment".ljust(24))),
    "voxels after a gap": (".nii", nifti(ODD, bytes(4) + 48 * b"\xff")),  # NaN, if they were voxels
    "offset 0": (".nii", nifti(ODD, b"", vox_offset=0)),
    "fraction of a byte": (".nii", nifti(ODD, vox_offset=352.7)),
    "wrong number of bits": (".nii", nifti(ODD, bitpix=64)),
    "further dimensions": (".nii", nifti(ODD, dim=[3, 40, 30, 20, 7, 7, 7, 7])),
    "dimension 0": (".nii", nifti(ODD, dim=[4, 40, 30, 20, 0, 0, 0, 0])),
    "size of the header not given": (".nii", nifti(ODD, sizeof_hdr=0)),
    "not packed in spite of its name": (".nii.gz", PLAIN),
    "zeros after the stream": (".nii.gz", gzip.compress(PLAIN) + bytes(512)),
    "text after the stream": (".nii.gz", gzip.compress(PLAIN) + b"signature"),
    "one byte after the stream": (".nii.gz", gzip.compress(PLAIN) + b"\x1f"),
    "two streams": (".nii.gz", gzip.compress(PLAIN[:999]) + gzip.compress(PLAIN[999:])),
    "bytes after the voxels": (".nii.gz", gzip.compress(PLAIN + b"signature")),
    "GIPL": (".gipl", gipl(ODD, 719555000, 0)),
    "GIPL, other number": (".gipl", gipl(ODD, 4026526128, 1)),
}


@pytest.mark.parametrize("block", [1000, 2**20])
@pytest.mark.parametrize(("ending", "content"), ODD_FILES.values(), ids=ODD_FILES)
def test_passes_what_itk_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, content: bytes, block):
    monkeypatch.setattr(stored_file, "_BLOCK", block)
    file = tmp_path / f"image{ending}"
    file.write_bytes(content)
    assert np.array_equal(np.squeeze(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))), ODD)
    assert check_stored_file(file) == ("", 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"qform_code": 1, "quatern_d": 1.000002},  # nibabel does not load this one
        {"extra": b"", "vox_offset": 0},
        {"vox_offset": 352.7},
        {"bitpix": 8},
        {"dim": [3, 40, 30, 20, 7, 7, 7, 7]},
        {"dim": [1, 24000, 1, 1, 1, 1, 1, 1]},
        {"dim": [7, 40, 30, 20, 1, 1, 1, 1]},
    ],
)
def test_odd_header_does_not_hide_damage(tmp_path: Path, fields: dict):
    voxels = ODD.copy()
    voxels[0, 0, 0] = voxels[1, 2, 3] = np.nan
    content = nifti(voxels, **fields)
    file = tmp_path / "image.nii.gz"
    file.write_bytes(gzip.compress(content, 0))
    assert check_stored_file(file) == ("", 2)
    start = len(content) - 96000
    for left in (95999, 1, 0):
        file.write_bytes(gzip.compress(content[: start + left], 0))
        assert check_stored_file(file) == (f"{left} of 96000 bytes of voxels", 0)


def test_nibabel_does_not_load_what_itk_reads(tmp_path: Path):
    """Which is why it must not be the judge."""
    file = tmp_path / "image.nii.gz"
    file.write_bytes(ODD_FILES["quaternion longer than 1"][1])
    with pytest.raises(ValueError, match="w2 should be positive"):
        nibabel.load(file)


@pytest.mark.parametrize(("magic", "fourth"), [(719555000, 0), (4026526128, 1)])
def test_gipl_cut_off(tmp_path: Path, magic: int, fourth: int):
    file = tmp_path / "image.gipl"
    for left in (95999, 0):
        file.write_bytes(gipl(ODD, magic, fourth)[: 256 + left])
        assert check_stored_file(file) == (f"{left} of 96000 bytes of voxels", 0)
    file.write_bytes(struct.pack(">5H", 40000, 1, 1, fourth, 8).ljust(252, b"\0") + struct.pack(">I", magic) + b"1")
    assert check_stored_file(file) == ("1 of 40000 bytes of voxels", 0)  # extents have no sign


@pytest.mark.parametrize("behind", [-1, 0, 1, 2])
def test_second_stream_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int):
    """Wherever a block ends."""
    first, second = gzip.compress(PLAIN[:999]), gzip.compress(PLAIN[999:])
    monkeypatch.setattr(stored_file, "_BLOCK", len(first) + behind)
    file = tmp_path / "image.nii.gz"
    file.write_bytes(first + second)
    assert check_stored_file(file) == ("", 0)
    file.write_bytes((first + second)[:-1])
    assert check_stored_file(file) == ("a gzip stream without its end", 0)


def test_other_packed_files_are_read_to_the_end(tmp_path: Path):
    file = tmp_path / "image.gz"
    file.write_bytes(gzip.compress(np.random.default_rng(3).bytes(5000))[:-1])
    assert check_stored_file(file) == ("a gzip stream without its end", 0)


def test_voxels_in_another_file(tmp_path: Path):
    for name in ("image.img", "image.mhd", "image.nhdr"):
        by_itk(False)(tmp_path / name, ODD)
    for file in tmp_path.iterdir():
        assert check_stored_file(file) == ("", 0)


def tiff(following: int, entries: int = 0) -> bytes:
    """A directory without entries, which says where the next one is."""
    return b"II*\0" + struct.pack("<IHI", 8, entries, following)


NOT_UNDERSTOOD = {
    "empty": b"",
    "one byte": b"\x1f",
    "text": b"404 Not Found",
    "noise": np.random.default_rng(2).bytes(2000),
    "packed text": gzip.compress(b"404 Not Found"),
    "half a header": PLAIN[:200],
    "half a header, packed": gzip.compress(PLAIN[:200]),
    "NIfTI: offset NaN": nifti(ODD, vox_offset=np.nan),
    "NIfTI: offset infinite": nifti(ODD, vox_offset=np.inf),
    "NIfTI: unknown type": nifti(ODD, datatype=12345),
    "NIfTI: no dimension": nifti(ODD, dim=[0, 40, 30, 20, 1, 1, 1, 1]),
    "NIfTI: 8 dimensions": nifti(ODD, dim=[8, 400, 30, 20, 1, 1, 1, 1]),
    "NIfTI: dimensions below 0": nifti(ODD, dim=[3, -400, -300, 20, 1, 1, 1, 1]),
    "NIfTI: voxels elsewhere": nifti(ODD, magic=b"ni1")[:352],
    "GIPL: unknown type": bytes(252) + struct.pack(">I", 719555000),
    "GIPL: another number": gipl(ODD, 719555001, 0)[:-1],
    "TIFF: in a circle": tiff(8),
    "TIFF: too many entries": tiff(0, 4097),
}


@pytest.mark.parametrize("content", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_finds_nothing_in_what_it_does_not_understand(tmp_path: Path, content: bytes):
    file = tmp_path / "image.nii.gz"
    file.write_bytes(content)
    assert check_stored_file(file) == ("", 0)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (tiff(20000), 20000),
        (tiff(0)[:-2], 8),
        (tiff(0)[:8], 8),
        (tiff(0, 1), 8),
        (tiff(0, 4096), 8),
        (b"MM\0+" + struct.pack(">HHQ", 8, 0, 2**63 + 5), 2**63 + 5),
    ],
)
def test_tiff_directory_behind_the_end(tmp_path: Path, content: bytes, start: int):
    file = tmp_path / "image.tif"
    file.write_bytes(content)
    assert check_stored_file(file) == (f"{len(content)} bytes of a TIFF file that goes on at byte {start}", 0)


def packed_a_thousandfold(file: Path, header: bytes) -> int:
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(header)
        for _ in range(64):
            stream.write(bytes(2**20))
    return 2**20


def packed_not_at_all(file: Path, header: bytes) -> int:
    """In two streams; the first one is a block."""
    content = header + bytes(2**26)
    first, second = (gzip.compress(part, 0) for part in (content[: 2**20], content[2**20 :]))
    file.write_bytes(first + second)
    return len(first)


def plain(file: Path, header: bytes) -> int:
    file.write_bytes(header)
    with file.open("rb+") as stream:
        stream.truncate(len(header) + 2**26)
    return 2**20


@pytest.mark.parametrize("write", [packed_a_thousandfold, packed_not_at_all, plain])
def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable):
    """However 64 MiB are stored."""
    file = tmp_path / "image.nii.gz"
    block = write(file, nifti(np.zeros((1, 1, 1), np.float32), dim=[3, 2048, 1024, 8, 1, 1, 1, 1])[:352])
    monkeypatch.setattr(stored_file, "_BLOCK", block)
    tracemalloc.start()
    try:
        assert check_stored_file(file) == ("", 0)
        digest_of(file)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_state_is_size_time_and_digest_of_all_bytes(tmp_path: Path):
    file, content = tmp_path / "image.nii.gz", np.random.default_rng(4).bytes(2**20 + 12345)
    file.write_bytes(content)
    os.utime(file, ns=(1, 1234567891000000000))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert state_of(str(file)) == (len(content), 1234567891000000000, digest)


def test_no_such_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        check_stored_file(tmp_path / "image.nii.gz")
