"""What nnU-Net's readers do not notice about an image file as it is stored: damage, and NaN that ITK turns into zeros.

A second look beside the reader, which alone decides what can be read: what this module does not understand counts as
nothing found. It goes by the content of a file, never by its name. Imports nothing of the package.

Of files that are cut off somewhere among the voxels, nnU-Net 2.8.1 reads without a word: NIfTI and GIPL by SimpleITKIO,
with zeros or arbitrary memory in the place of what is missing, and TIFF whose pages follow one another, as SimpleITK
writes them, by Tiff3DIO, with fewer pages. The readers notice in all others: NRRD, MetaImage, PNG, BMP, TIFF of one
page, and NIfTI by NibabelIO (tests/test_stored_file.py has the table).
"""

import hashlib
import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from nibabel import nifti1, nifti2

_BLOCK = 2**20  # bytes
_LONGEST_HEADER = 540  # bytes, that of NIfTI-2
_GZIP = b"\x1f\x8b"
_ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")
_NIFTI = {b"n+1": nifti1.header_dtype, b"n+2": nifti2.header_dtype}  # single files; "ni1" has its voxels in another one
# Guy's Image Processing Lab, always big-endian: ends of the header, type of voxels -> bytes
_GIPL_HEADER = 256
_GIPL = (719555000, 4026526128)
_GIPL_VOXELS = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
# TIFF: start of the file -> byte order, place of the first offset, and format of an offset and of a number of entries
_TIFF = {
    b"II\x2a\0": ("<", 4, "I", "H"),
    b"MM\0\x2a": (">", 4, "I", "H"),
    b"II\x2b\0": ("<", 8, "Q", "Q"),
    b"MM\0\x2b": (">", 8, "Q", "Q"),
}
_TIFF_ENTRY = {"I": 12, "Q": 20}  # bytes
_MOST_ENTRIES = 4096  # of a TIFF directory; tifffile, too, takes more for an error of the program that wrote the file


class Findings(NamedTuple):
    """What is wrong with a file as it is stored.

    Attributes:
        damage: what there is instead of the whole file, in words that may follow "found", e.g. "12345 of 67890 bytes of
            voxels"; "" if the file is whole or nothing can be said. Damage is looked for in gzip, NIfTI, GIPL and TIFF.
        not_finite: number of values that are NaN or infinite, in a NIfTI of floating-point numbers; 0 in other files,
            in which the reader leaves such values to be seen, and in damaged ones.
    """

    damage: str
    not_finite: int


class FileState(NamedTuple):
    """By what a file is known again.

    Attributes:
        size: in bytes.
        modified: time of modification, in ns.
        digest: of its bytes.
    """

    size: int
    modified: int
    digest: str


class _Voxels(NamedTuple):
    start: int  # byte of the unpacked content
    size: int  # bytes
    dtype: np.dtype[Any]


def check_stored_file(file: str | Path) -> Findings:
    """Read a file once, in blocks.

    Raises:
        OSError: it cannot be opened; then no reader can, either.
    """
    with Path(file).open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        if start in _TIFF:
            return Findings(_find_missing_page(stream, *_TIFF[start]), 0)
        is_packed = start.startswith(_GZIP)
        blocks = _unpacked(stream) if is_packed else iter(partial(stream.read, _BLOCK), b"")
        try:
            return _examine_content(blocks, is_packed)
        except EOFError:
            return Findings("a gzip stream without its end", 0)
        except zlib.error as error:
            return Findings(f"a damaged gzip stream ({error})", 0)


def digest_of(file: str | Path) -> str:
    """Digest of the bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(file).open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def state_of(file: str | Path) -> FileState:
    """State of a file as it is now."""
    status = Path(file).stat()
    return FileState(status.st_size, status.st_mtime_ns, digest_of(file))


def _unpacked(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a gzip file; raises EOFError or zlib.error if its stream is cut off or damaged."""
    packed = stream.read(_BLOCK)
    while packed.startswith(_GZIP):  # several streams may follow one another, and padding, which readers ignore
        inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        while not inflate.eof:
            packed = packed or stream.read(_BLOCK)
            if not packed:
                raise EOFError
            yield inflate.decompress(packed, _BLOCK)
            packed = inflate.unconsumed_tail
        packed = inflate.unused_data
        if len(packed) < len(_GZIP):
            packed += stream.read(_BLOCK)


def _examine_content(blocks: Iterator[bytes], to_the_end: bool) -> Findings:
    head = b""
    while len(head) < _LONGEST_HEADER and (block := next(blocks, None)) is not None:
        head += block
    voxels = _find_nifti_voxels(head) or _find_gipl_voxels(head)
    if voxels is None:
        for _ in blocks if to_the_end else ():
            pass
        return Findings("", 0)
    length, not_finite = _count_not_finite(itertools.chain([head], blocks), voxels)
    if (found := max(0, length - voxels.start)) < voxels.size:
        return Findings(f"{found} of {voxels.size} bytes of voxels", 0)
    return Findings("", not_finite)


def _find_nifti_voxels(head: bytes) -> _Voxels | None:
    for (magic, structure), order in itertools.product(_NIFTI.items(), _ORDERS):
        structure = structure.newbyteorder(order)
        if len(head) < structure.itemsize:
            continue
        header = np.frombuffer(head, structure, count=1)[0]
        ndim, offset, datatype = int(header["dim"][0]), float(header["vox_offset"]), int(header["datatype"])
        shape = header["dim"][1 : 1 + ndim].tolist()
        if (
            (header["sizeof_hdr"], header["magic"]) == (structure.itemsize, magic)
            and 1 <= ndim <= 7
            and min(shape) > 0
            and np.isfinite(offset)
            and datatype in nifti1.data_type_codes.dtype
        ):
            # the type and not bitpix, which readers ignore
            dtype = cast(np.dtype[Any], nifti1.data_type_codes.dtype[datatype]).newbyteorder(order)
            # ITK reads behind the header whatever lies within it
            start = max(int(offset), structure.itemsize)
            return _Voxels(start, math.prod(shape) * dtype.itemsize, dtype)
    return None


def _find_gipl_voxels(head: bytes) -> _Voxels | None:
    # of a shorter head these are fewer bytes, whose number is a smaller one
    if int.from_bytes(head[_GIPL_HEADER - 4 : _GIPL_HEADER], "big") not in _GIPL:
        return None
    *shape, datatype = struct.unpack(">5H", head[:10])
    if datatype not in _GIPL_VOXELS:
        return None
    # dimensions that the image does not have are stored as 0 or 1; the type is that of bytes, since ITK keeps NaN
    size = math.prod(max(1, extent) for extent in shape) * _GIPL_VOXELS[datatype]
    return _Voxels(_GIPL_HEADER, size, np.dtype(np.uint8))


def _count_not_finite(blocks: Iterable[bytes], voxels: _Voxels) -> tuple[int, int]:
    """Bytes in all blocks, and how many of the voxels are NaN or infinite, where they are floating-point numbers."""
    length = not_finite = 0
    rest = b""  # the first part of a number whose second part is in the next block
    for block in blocks:
        first = voxels.start - length
        length += len(block)
        if voxels.dtype.kind == "f":
            values = rest + block[max(0, first) : max(0, first + voxels.size)]
            end = len(values) - len(values) % voxels.dtype.itemsize
            not_finite += int(np.count_nonzero(~np.isfinite(np.frombuffer(values[:end], voxels.dtype))))
            rest = values[end:]
    return length, not_finite


def _find_missing_page(stream: BinaryIO, order: str, place: int, offset_format: str, number_format: str) -> str:
    """In words, the first directory of a page that the file promises and does not have; "" if it has all."""

    length = stream.seek(0, os.SEEK_END)

    def read(position: int, form: str) -> int | None:
        size = struct.calcsize(order + form)
        if position + size > length:
            return None
        stream.seek(position)
        return int(struct.unpack(order + form, stream.read(size))[0])

    visited: set[int] = set()
    offset = read(place, offset_format)
    while offset and offset not in visited:
        visited.add(offset)
        entries = read(offset, number_format)
        if entries is not None and entries > _MOST_ENTRIES:
            return ""
        following = None
        if entries is not None:
            end = offset + struct.calcsize(order + number_format) + entries * _TIFF_ENTRY[offset_format]
            following = read(end, offset_format)
        if following is None:
            return f"{length} bytes of a TIFF file that goes on at byte {offset}"
        offset = following
    return ""
