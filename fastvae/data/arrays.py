"""Samples in the rows of an array.

Pixels are uint8 and mean x / 255; everything else is floating point and taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import _native
from .formats import size_of
from .mapped import MappedFile, in_memory, mapped_file, mapped_rows, sequential_blocks
from .memory import TOO_LARGE, available_memory
from .source import Array, DataError, Source

_IMAGE_CHANNELS = (1, 3, 4)
_SCAN_BYTES = 1 << 26


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
        if self.x.dtype == np.uint8:
            return 0.0, 1.0
        if self.in_memory:
            return float(self.x.min()), float(self.x.max())
        ranges = [(x.min(), x.max()) for x in self._read_in_order()]
        lows, highs = zip(*ranges, strict=True)
        return float(min(lows)), float(max(highs))

    def _read_in_order(self) -> Iterator[npt.NDArray[np.float32]]:
        """All samples by a loader, to which a mapped file that is cut is an error and not the end."""
        row_bytes = self.x[:1].nbytes
        blocks = sequential_blocks(row_bytes)
        loader = _native.Loader(self.rows(), None, None, batch_size=blocks[0], drop_last=False, workers=1)
        yield from loader.start(seed=0, epoch=0, shuffle=False, blocks=blocks, first_batch=0, rank=0, ranks=1)

    def read(self, rows: slice) -> Array:
        """Rows of x, in memory. Raises DataError where they are of a mapped file that was cut."""
        return in_memory(self.x[rows], self.file)

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
    shape stays as it is, small feature maps such as [N, 16, 4, 4] too. uint8 is used as x / 255, bool becomes
    0.0 and 1.0, floats become float32. y [N] holds integers.

    Raises DataError for an empty array, another dtype, NaN or inf, and labels that do not fit. Floats in a
    mapped file of more than 64 MiB are not looked at here: a loader does as it reads them.
    """
    if x.ndim < 2:
        raise DataError(f"{name}: shape {list(x.shape)}, expected [N, ...] with at least one feature")
    size_of(x.shape, x.dtype, name)
    x = _usable(x, name)
    labels = None if y is None else labels_of(y, x.shape[0], name)
    if channels_last is None:
        channels_last = is_channels_last(x.shape)
    source = ArraySource(x, labels, name, channels_last, classes)
    if x.dtype != np.uint8 and (source.in_memory or x.nbytes <= _SCAN_BYTES):
        _check_finite(source)
    return source


def label_array(y: object) -> Array:
    """Labels as a numpy array. Raises TypeError and DataError for anything but an array or a CPU tensor."""
    if not isinstance(y, (np.ndarray, torch.Tensor)):
        expected = "a numpy array or a torch tensor of integers; without labels, give x alone"
        raise TypeError(f"y is a {type(y).__name__}, expected {expected}")
    return array_of(y, "y")


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
    data = data.detach().resolve_conj().resolve_neg()
    try:
        array: Array = (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy()
    except (TypeError, RuntimeError) as error:  # of types and layouts that NumPy does not have
        got = f"a tensor of {data.dtype}, {data.layout}"
        raise DataError(f"{name}: {got}, expected an array that NumPy has ({error})") from error
    if data.dtype != torch.bfloat16:
        return array
    return torch.from_numpy(in_memory(array, mapped_file(array))).view(torch.bfloat16).float().numpy()


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
    file, slowest = mapped_file(x), int(np.argmax(np.abs(x.strides)))  # a piece along another is all over x
    try:
        usable: Array = np.empty(x.shape, dtype)
        given, made = np.moveaxis(x, slowest, 0), np.moveaxis(usable, slowest, 0)
        for rows in pieces(given):
            piece = in_memory(given[rows], file)
            made[rows] = piece * np.uint8(255) if x.dtype == np.bool_ else piece
    except MemoryError as error:
        raise DataError(f"{converted}, more than there is; {TOO_LARGE}") from error
    return usable


def pieces(x: Array) -> Iterator[slice]:
    """All rows of x, some at a time."""
    step = max(1, _SCAN_BYTES // max(1, x[0].nbytes))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _check_finite(source: ArraySource) -> None:
    """Raises DataError for what is NaN or infinite in float32, reading x once, a piece at a time."""
    x, name = source.x, source.name
    count, first = 0, ""
    for rows in pieces(x):
        with np.errstate(invalid="ignore", over="ignore"):
            piece = source.read(rows).astype(np.float32, copy=False)
            if np.isfinite(np.sum(piece, dtype=np.float64)):
                continue
        bad = np.argwhere(~np.isfinite(piece))
        if len(bad) and not first:
            value = piece[tuple(bad[0])]
            first = f"the first {value} at {[rows.start + int(bad[0][0]), *map(int, bad[0][1:])]}"
        count += len(bad)
    if count:
        values = "1 value is" if count == 1 else f"{count} values are"
        raise DataError(f"{name}: {values} NaN or infinite, {first}; expected finite float32")


def labels_of(y: Array, n_samples: int, name: str) -> npt.NDArray[np.int64]:
    """y as int64 [n_samples]. Raises DataError for another shape and for what are no integers."""
    if y.shape != (n_samples,):
        raise DataError(f"{name}: labels of shape {list(y.shape)}, expected [{n_samples}], one a sample")
    if y.dtype.kind not in "biu":
        raise DataError(f"{name}: labels of dtype {y.dtype}, expected integers")
    y = in_memory(y, mapped_file(y))
    if y.dtype.kind == "u" and y.size and y.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: label {y.max()}, expected one that fits into int64")
    return np.require(y, np.int64, ["C", "A", "E"])


def is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether [N, H, W, C] is meant, with C of an image, and not [N, C, H, W].

    Small squares, such as feature maps [N, 16, 4, 4], are no images of as many pixels across as channels.
    """
    if len(shape) != 4 or shape[2] == shape[3]:
        return False
    return shape[1] not in _IMAGE_CHANNELS and shape[3] in _IMAGE_CHANNELS
