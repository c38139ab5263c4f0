"""Sources: anything with samples, opened as rows that the loader reads.

Most are arrays: `x` of shape [N, ...], `y` of shape [N] where there are labels. Pixels are uint8 and mean
x / 255; everything else is floating point and taken as it is.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import stat
import struct
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from .. import _native
from .mapped import MappedFile, mapped_file, mapped_rows
from .memory import TOO_LARGE, available_memory

Array: TypeAlias = npt.NDArray[Any]
SourceLike: TypeAlias = (
    "Source | Array | torch.Tensor | torch.utils.data.Dataset[Any] | tuple[Any, Any] | str | os.PathLike[str]"
)

X_KEYS = ("x", "images", "data", "arr_0")
Y_KEYS = ("y", "labels", "targets")
EXTENSIONS = ".npy, .npz, IDX (.gz or not), or a folder of IDX files or images"
_IMAGE_CHANNELS = (1, 3, 4)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CSR_KEYS = {"indices", "indptr", "format"}  # any of them: a sparse matrix
_NPY_VERSIONS = ((1, 0), (2, 0), (3, 0))
_NPZ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DEFLATE_LIMIT = 1032  # no deflate stream grows by more than this
_MAX_DIMS = 32  # of an array, in every version of NumPy
_MAX_HEADER = 1 << 16  # bytes of a .npy header, which NumPy reads as Python
_READ_BYTES = 1 << 20
_SCAN_BYTES = 1 << 26


class DataError(ValueError):
    """Data that cannot be used; the message is one line: what, what was got, what was expected."""

    def __init__(self, message: str) -> None:
        # a file's name may hold line breaks, control characters and bytes that are not text
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Source(ABC):
    """Samples by number, and native code that makes batches of them.

    y: int64 [N], or None without labels.
    name: what messages call it.
    classes: the names of the labels 0, 1, ..., where they are known.
    """

    y: npt.NDArray[np.int64] | None
    name: str
    classes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """N."""

    @property
    @abstractmethod
    def item_shape(self) -> tuple[int, ...]:
        """Shape of a sample in a batch, [C, H, W] for images."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of the samples as they are kept: uint8, which means x / 255, or a floating point type."""

    @property
    def has_labels(self) -> bool:
        """Whether batches are (x, y)."""
        return self.y is not None

    @property
    def in_memory(self) -> bool:
        """Whether no disk is waited for."""
        return True

    @abstractmethod
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value in a batch, or bounds of them; may read all data."""

    @abstractmethod
    def rows(self) -> _native.Rows:
        """What a native loader reads, with `n_samples` rows of `item_shape`."""

    def loader(self, indices: npt.NDArray[np.int64] | None, **options: Any) -> Any:
        """A `_native.Loader` of the samples at `indices`, or of all, with its options."""
        return _native.Loader(self.rows(), self.y, indices, **options)


@dataclass(frozen=True)
class ArraySource(Source):
    """Samples in the rows of an array.

    x: [N, ...], C-contiguous uint8 (used as x / 255), float32 or float64, possibly memory-mapped.
    channels_last: x is [N, H, W, C] and its samples come out as [C, H, W].
    """

    x: Array
    y: npt.NDArray[np.int64] | None = None
    name: str = "array"
    channels_last: bool = False
    classes: tuple[str, ...] = ()
    file: MappedFile | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", mapped_file(self.x))

    @property
    def n_samples(self) -> int:
        """N."""
        return int(self.x.shape[0])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of a sample in a batch: [1, H, W] for [H, W], [C, H, W] for [H, W, C], else as in x."""
        shape = tuple(int(size) for size in self.x.shape[1:])
        if self.channels_last:
            return shape[-1:] + shape[:-1]
        return (1, *shape) if len(shape) == 2 else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of x."""
        return self.x.dtype

    @property
    def in_memory(self) -> bool:
        """Whether x is not a memory-mapped file."""
        return self.file is None

    def value_range(self) -> tuple[float, float]:
        """[0, 1] for uint8, whatever is in it; else the smallest and the largest value of x."""
        return (0.0, 1.0) if self.x.dtype == np.uint8 else (float(self.x.min()), float(self.x.max()))

    def rows(self) -> _native.Rows:
        """The rows of x."""
        rows = _native.DenseRows(self.x, item_shape=self.item_shape, channels_last=self.channels_last)
        return rows if self.file is None else mapped_rows(self.x, rows, self.file)


def source_from_arrays(
    x: Array,
    y: Array | None = None,
    name: str = "array",
    classes: tuple[str, ...] = (),
    channels_last: bool | None = None,
) -> ArraySource:
    """A source over arrays in memory or memory-mapped, checked, and copied only where its dtype asks for it.

    x [N, D] gives samples [D]; [N, H, W] gives [1, H, W]; [N, H, W, C] and [N, C, H, W] with C in (1, 3, 4)
    give [C, H, W], and where both could be meant and channels_last does not say, [N, C, H, W] is; any other
    shape stays as it is. uint8 is used as x / 255, bool becomes 0.0 and 1.0, floats become float32. y [N]
    holds integers.

    Raises DataError for an empty array, another dtype, NaN or inf, and labels that do not fit. Floats in a
    mapped file of more than 64 MiB are not looked at here: a loader does as it reads them.
    """
    if x.ndim < 2:
        raise DataError(f"{name}: shape {list(x.shape)}, expected [N, ...] with at least one feature")
    _bytes_of(x.shape, x.dtype, name)
    x = _usable(x, name)
    labels = None if y is None else labels_of(y, x.shape[0], name)
    if channels_last is None:
        channels_last = is_channels_last(x.shape)
    source = ArraySource(x, labels, name, channels_last, classes)
    if x.dtype != np.uint8 and (source.in_memory or x.nbytes <= _SCAN_BYTES):
        _check_finite(x, name)
    return source


def as_source(data: SourceLike) -> Source:
    """Whatever a loader accepts, as a source.

    A Source, an array, a CPU tensor, a CSR matrix of scipy or torch, a pair (x, y) of samples and labels, a
    torch Dataset (see `torch_datasets`), or a path.

    Raises DataError for data that cannot be used, TypeError for anything else.
    """
    match data:
        case Source():
            return data
        case str() | os.PathLike():
            return open_source(data)
        case (x, y):
            return _source_of(x, array_of(y, "y"), "x")
        case torch.utils.data.Dataset():
            from .torch_datasets import dataset_source

            return dataset_source(data)
        case _:
            return _source_of(data, None, "source")


def _source_of(x: object, y: Array | None, name: str) -> Source:
    from .sparse import csr_source, sparse_arrays

    sparse = sparse_arrays(x, name)
    if sparse is not None:
        return csr_source(*sparse, y)
    return source_from_arrays(array_of(x, name), y)


def open_source(path: str | os.PathLike[str], image_size: int | None = None) -> Source:
    """Opens a .npy (memory-mapped), a .npz, an IDX file (gzipped or not), or a folder.

    A .npz holds samples under one of X_KEYS, or a CSR matrix as scipy's `save_npz` writes it, and may hold
    labels under one of Y_KEYS. A .npy has labels where `fastvae data pack` has left its JSON beside it. Of a
    folder, the IDX training files are opened, or else the images in it are decoded into memory; image_size
    makes these squares of that side. Raises DataError.
    """
    path = Path(path)
    if is_image_folder(path):
        from .folders import open_image_folder

        return open_image_folder(path, image_size)
    if os.path.isdir(path):
        return open_idx_folder(path, "train")
    with _opened(path) as stream:
        start = stream.read(4)
    if start == b"\x93NUM":
        return _open_npy(path)
    if start == b"PK\x03\x04":
        return _open_npz(path)
    if path.suffix in (".npy", ".npz"):
        raise DataError(f"{path}: begins with {start!r}, expected a {path.suffix} file as NumPy saves it")
    if start[:2] in (b"\x1f\x8b", b"\0\0"):
        return source_from_arrays(read_idx(path), name=str(path))
    raise DataError(f"{path}: begins with {start!r}, expected {EXTENSIONS}")


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder that is read as images: one without IDX training files."""
    return os.path.isdir(path) and idx_path(path, "train", "images") is None


def idx_path(folder: Path, split: str, kind: str) -> Path | None:
    """The IDX file of a split ("train" or "t10k") and kind ("images" or "labels") in a folder, or None."""
    dims = {"images": 3, "labels": 1}[kind]
    names = (f"{split}-{kind}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_idx_folder(folder: Path, split: str) -> ArraySource:
    """The samples of a split ("train" or "t10k") of a folder of IDX files, with labels where they are there.

    Raises DataError.
    """
    images = idx_path(folder, split, "images")
    if images is None:
        expected = f"{split}-images-idx3-ubyte (or .gz)"
        raise DataError(f"{folder}: a folder without {expected}; expected the IDX files of MNIST's layout")
    labels = idx_path(folder, split, "labels")
    return source_from_arrays(read_idx(images), None if labels is None else read_idx(labels), str(images))


def read_idx(path: Path) -> Array:
    """The array of an IDX file, gzipped or not. Raises DataError."""
    with _opened(path) as raw:
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


def _open_npy(path: Path) -> Source:
    from .packed import read_packed

    x = _map_npy(path)
    packed = read_packed(path, x.shape)
    if packed is None:
        return source_from_arrays(x, name=str(path))
    return source_from_arrays(x, packed.y, str(path), packed.classes, packed.channels_last)


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype[Any], name: object) -> int:
    if len(shape) > _MAX_DIMS:
        raise DataError(f"{name}: {len(shape)} dimensions, expected at most {_MAX_DIMS}")
    if min(shape, default=1) < 1:
        raise DataError(f"{name}: shape {list(shape)} is empty, expected at least one sample and one feature")
    return math.prod(shape) * dtype.itemsize


def _read_array(
    stream: io.BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype[Any], room: int, name: object
) -> Array:
    """Reads the rest of a stream into an array, when it has exactly the size that its header promised."""
    expected = _bytes_of(shape, dtype, name)
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


def _map_npy(path: Path) -> Array:
    with _opened(path) as stream:
        shape, fortran, dtype = _npy_header(stream, path)
        offset = stream.tell()
    expected, got = _bytes_of(shape, dtype, path), path.stat().st_size - offset
    if got != expected:
        what = "truncated" if got < expected else "trailing bytes"
        promised = f"its header says shape {list(shape)}, {expected} bytes"
        raise DataError(f"{path}: {what}: {promised}, but {got} follow; save it again")
    try:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {expected} bytes could not be mapped into memory ({error})") from error


def _open_npz(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            x_key = next((key for key in X_KEYS if key in keys), None)
            y_key = next((key for key in Y_KEYS if key in keys), None)
            if _CSR_KEYS & set(keys):
                return _open_sparse_npz(archive, keys, y_key, path)
            if x_key is None:
                raise DataError(f"{path}: arrays {_some(keys)}, expected one of {', '.join(X_KEYS)}")
            x = _read_member(archive, x_key, path)
            y = None if y_key is None else _read_member(archive, y_key, path)
    except DataError:
        raise
    except Exception as error:  # zipfile's readers fail in many ways
        raise DataError(f"{path}: not a whole .npz file ({error}); save it again") from error
    return source_from_arrays(x, y, str(path))


def _open_sparse_npz(archive: zipfile.ZipFile, keys: list[str], y_key: str | None, path: Path) -> Source:
    """A CSR matrix as scipy's `save_npz` lays it out, or without its `format`."""
    from .sparse import csr_source

    layout = _read_member(archive, "format", path) if "format" in keys else np.array(b"csr")
    if layout.dtype.kind not in "SU" or layout.size != 1 or layout.astype("U").item() != "csr":
        raise DataError(f"{path}: a sparse matrix of format {str(layout)[:20]}, expected csr; save x.tocsr()")
    missing = [key for key in ("data", "indices", "indptr", "shape") if key not in keys]
    if missing:
        raise DataError(
            f"{path}: a sparse matrix without {', '.join(missing)}; save it as scipy's save_npz does"
        )
    shape = _read_member(archive, "shape", path)
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise DataError(f"{path}[shape]: {shape.dtype} of shape {list(shape.shape)}, expected 2 integers")
    data, indices, indptr = (_read_member(archive, key, path) for key in ("data", "indices", "indptr"))
    y = None if y_key is None else _read_member(archive, y_key, path)
    return csr_source(data, indices, indptr, (int(shape[0]), int(shape[1])), y, str(path))


def _read_member(archive: zipfile.ZipFile, key: str, path: Path) -> Array:
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


def _some(names: list[str]) -> str:
    return str(names if len(names) <= 8 else [*names[:8], "..."])


def _opened(path: Path) -> io.BufferedReader:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:  # a name may be none for the system
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}; expected {EXTENSIONS}") from error


def array_of(data: object, name: str) -> Array:
    """A numpy array or CPU tensor as a numpy array. Raises TypeError and DataError for anything else."""
    if isinstance(data, np.ndarray):
        if isinstance(data, np.ma.MaskedArray):
            raise DataError(f"{name}: a masked array, expected one without gaps; use {name}.filled()")
        return data
    if not isinstance(data, torch.Tensor):
        expected = "a Source, a numpy array, a torch tensor or Dataset, a CSR matrix, a pair (x, y) or a path"
        raise TypeError(f"{name} is a {type(data).__name__}, expected {expected}")
    if data.device.type != "cpu":
        raise DataError(f"{name}: a tensor on {data.device}, expected one on the CPU; use {name}.cpu()")
    data = data.detach()
    return (data.float() if data.dtype == torch.bfloat16 else data).numpy()


def _usable(x: Array, name: str) -> Array:
    """x with a dtype the loader reads, contiguous; itself where it is already."""
    dtypes: dict[str, type] = {
        "b1": np.uint8,
        "u1": np.uint8,
        "f2": np.float32,
        "f4": np.float32,
        "f8": np.float64,
    }
    dtype = dtypes.get(x.dtype.str[1:])
    if dtype is None:
        raise DataError(f"{name}: dtype {x.dtype}, expected uint8 (for x / 255), bool or float; convert it")
    if x.dtype == dtype and x.flags.c_contiguous and x.flags.aligned:
        return np.ascontiguousarray(x)
    needed = x.size * np.dtype(dtype).itemsize
    converted = f"{name}: {x.dtype} of shape {list(x.shape)} takes {needed} bytes to convert"
    if needed > available_memory():
        raise DataError(f"{converted}, more than is free; {TOO_LARGE}")
    try:
        if x.dtype == np.bool_:
            return np.ascontiguousarray(x).view(np.uint8) * np.uint8(255)
        return np.require(x, dtype, ["C", "A"])
    except MemoryError as error:
        raise DataError(f"{converted}, more than there is; {TOO_LARGE}") from error


def _check_finite(x: Array, name: str) -> None:
    """Raises DataError for what is NaN or infinite in float32, reading x once, a piece at a time."""
    step = max(1, _SCAN_BYTES // max(1, x[0].nbytes))
    count, first = 0, ""
    for start in range(0, x.shape[0], step):
        with np.errstate(invalid="ignore", over="ignore"):
            piece = x[start : start + step].astype(np.float32, copy=False)
            if np.isfinite(np.sum(piece, dtype=np.float64)):
                continue
        bad = np.argwhere(~np.isfinite(piece))
        if len(bad) and not first:
            value = piece[tuple(bad[0])]
            first = f"the first {value} at {[start + int(bad[0][0]), *map(int, bad[0][1:])]}"
        count += len(bad)
    if count:
        raise DataError(f"{name}: {count} values are NaN or infinite, {first}; expected finite float32")


def labels_of(y: Array, n_samples: int, name: str) -> npt.NDArray[np.int64]:
    """y as int64 [n_samples]. Raises DataError for another shape and for what are no integers."""
    if y.shape != (n_samples,):
        raise DataError(f"{name}: labels of shape {list(y.shape)}, expected [{n_samples}], one a sample")
    if y.dtype.kind not in "biu":
        raise DataError(f"{name}: labels of dtype {y.dtype}, expected integers")
    if y.dtype.kind == "u" and y.size and y.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: label {y.max()}, expected one that fits into int64")
    return np.ascontiguousarray(y, dtype=np.int64)


def is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether [N, H, W, C] is meant, with C of an image, and not [N, C, H, W]."""
    return len(shape) == 4 and shape[1] not in _IMAGE_CHANNELS and shape[3] in _IMAGE_CHANNELS
