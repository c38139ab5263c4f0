"""Files of arrays, .npy, .npz and IDX, none of which is trusted.

Layouts: NumPy's format 1.0 to 3.0 (NEP 1); IDX as of the MNIST database (LeCun, Cortes and Burges 1998).
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from .memory import TOO_LARGE, available_memory
from .source import Array, DataError

EXTENSIONS = ".npy, .npz, IDX (.gz or not), or a folder of IDX files or images"
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NPY_VERSIONS = ((1, 0), (2, 0), (3, 0))
_NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DEFLATE_LIMIT = 1032  # no deflate stream grows by more than this
_MAX_DIMS = 32  # of an array, in every version of NumPy
_MAX_HEADER = 1 << 16  # bytes of a .npy header, which NumPy reads as Python
_READ_BYTES = 1 << 20


def opened(path: Path) -> io.BufferedReader:
    """A file for reading. Raises DataError where there is none, and for what is no regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:  # a name may be none for the system
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}; expected {EXTENSIONS}") from error


def read_idx(path: Path) -> Array:
    """The array of an IDX file, gzipped or not. Raises DataError."""
    with opened(path) as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        room = path.stat().st_size * (_DEFLATE_LIMIT if zipped else 1)
        try:
            with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
                return _read_idx(stream, room, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from error


def _read_idx(stream: io.BufferedIOBase, room: int, path: Path) -> Array:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] == 0:
        raise DataError(f"{path}: magic number 0x{magic.hex()}, expected IDX, for example 0x00000803")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path}: truncated within its header, expected {magic[3]} dimensions")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    return _read_array(stream, shape, np.dtype(_IDX_TYPES[magic[2]]), room, path)


def map_npy(path: Path) -> Array:
    """The array of a .npy, memory-mapped. Raises DataError for one that is not whole."""
    with opened(path) as stream:
        shape, fortran, dtype = _npy_header(stream, path)
        offset = stream.tell()
    expected, got = size_of(shape, dtype, path), path.stat().st_size - offset
    if got != expected:
        what = "truncated" if got < expected else "trailing bytes"
        promised = f"its header says shape {list(shape)}, {expected} bytes"
        raise DataError(f"{path}: {what}: {promised}, but {got} follow; save it again")
    try:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {expected} bytes could not be mapped into memory ({error})") from error


def read_member(archive: zipfile.ZipFile, key: str, path: Path) -> Array:
    """An array of a .npz, whose directory of sizes is not to be trusted."""
    name = f"{path}[{key}]"
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in _NPZ_METHODS:
        raise DataError(f"{name}: compressed by method {info.compress_type}, expected deflate, as NumPy does")
    room = min(info.compress_size, path.stat().st_size) * _DEFLATE_LIMIT
    with archive.open(info) as member:
        stream = cast(zipfile.ZipExtFile, member)
        shape, fortran, dtype = _npy_header(stream, name)
        if shape == (0,):  # of a matrix of zeros
            return np.empty(0, dtype)
        array = _read_array(stream, shape[::-1] if fortran else shape, dtype, room, name)
    return array.T if fortran else array


def size_of(shape: tuple[int, ...], dtype: np.dtype[Any], name: object) -> int:
    """Bytes of an array. Raises DataError for an empty one and for one of too many dimensions."""
    if len(shape) > _MAX_DIMS:
        raise DataError(f"{name}: {len(shape)} dimensions, expected at most {_MAX_DIMS}")
    if min(shape, default=1) < 1:
        raise DataError(f"{name}: shape {list(shape)} is empty, expected at least one sample and one feature")
    return math.prod(shape) * dtype.itemsize


def _read_array(
    stream: io.BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype[Any], room: int, name: object
) -> Array:
    """Reads the rest of a stream into an array, when it has exactly the size that its header promised."""
    expected = size_of(shape, dtype, name)
    promised = f"its header says shape {list(shape)}, {expected} bytes"
    if expected > room:
        raise DataError(f"{name}: truncated: {promised}, but the file can hold no more than {room}")
    if expected > (memory := available_memory()):
        raise DataError(f"{name}: {promised}, more than the {memory} that are free; {TOO_LARGE}")
    try:
        array = np.empty(shape, dtype)
    except MemoryError as error:
        raise DataError(f"{name}: {promised}, more than there is; {TOO_LARGE}") from error
    got = 0
    view = memoryview(array.reshape(-1).view(np.uint8).data)
    while got < expected and (count := stream.readinto(view[got : got + _READ_BYTES])):
        got += count
    if got < expected:
        raise DataError(f"{name}: truncated: {promised}, but {got} are there; fetch it again")
    if stream.read(1):
        raise DataError(f"{name}: trailing bytes: {promised}, but more follow")
    return array


def _npy_header(stream: io.BufferedIOBase, name: object) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_VERSIONS:
            raise ValueError(f"of version {version}")
        size = stream.read(2 if version == (1, 0) else 4)
        if int.from_bytes(size, "little") > _MAX_HEADER:
            raise ValueError(f"of {int.from_bytes(size, 'little')} bytes")
        header = io.BytesIO(size + stream.read(int.from_bytes(size, "little")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what NumPy reads as Python
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # NumPy reads the header as Python, which fails in many ways
        raise DataError(f"{name}: not a .npy header ({' '.join(str(error).split())[:200]})") from error
    if dtype.hasobject:
        raise DataError(f"{name}: dtype object, which is pickled and never loaded; save numbers instead")
    if dtype.subdtype or dtype.names or dtype.itemsize == 0:
        raise DataError(f"{name}: dtype {str(dtype)[:200]}, expected one number a place; save a plain array")
    return tuple(map(int, shape)), fortran, dtype
