"""Arrays in mapped files: what is read of them at a time, and what guards the reading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _native
from .memory import available_memory, memory_limit
from .source import DataError

_MAPPINGS = Path("/proc/self/maps")
BLOCK_BYTES = 1 << 20  # read in one piece
WINDOW_BYTES = 256 << 20  # shuffled at a time
_SEQUENTIAL_BLOCKS = 16  # read ahead of an unshuffled pass
_LEAST_BLOCKS = 32  # of a window, so that it has samples from all over the data
_COMFORTABLE = 2  # times as much memory as data: a shuffled pass may have all of them in it
_LEAST_WINDOWS = 16  # that the memory can hold
_OWN_SHARE = 4  # a quarter of the memory may hold what is read past the page cache


@dataclass(frozen=True)
class MappedFile:
    """The file that an array lies in.

    offset: where in it the array begins, in bytes.
    shared: its pages are the file's; those of a private mapping may have been written to.
    read_only: nobody writes to the file by this mapping.
    watch: sees whether it stays as it was when this was made.
    """

    offset: int
    shared: bool
    read_only: bool
    watch: _native.WatchedFile


def mapped_file(x: npt.NDArray[Any]) -> MappedFile | None:
    """The file that x is a mapping of, by whomever; None for memory, and for a file without a name by now.

    Raises DataError for one that was cut since it was mapped.
    """
    root: Any = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    if root.flags.owndata:
        return None
    address = x.ctypes.data
    for line in _MAPPINGS.read_bytes().removesuffix(b"\n").split(b"\n"):
        extent, allowed, offset, _, inode, *path = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in extent.split(b"-"))
        if begin <= address < end:
            break
    else:
        return None
    name = path[0].replace(b"\\012", b"\n") if path else b""  # as line breaks in it are shown
    if inode == b"0" or not os.path.isfile(name):
        return None
    writable, shared = b"w" in allowed, b"s" in allowed
    watch = _native.WatchedFile(name, _printable(os.fsdecode(name)), writable and shared)
    file = MappedFile(int(offset, 16) + address - begin, shared, not writable, watch)
    steps = sum((size - 1) * max(0, stride) for size, stride in zip(x.shape, x.strides, strict=True))
    if x.size and watch.size < (end := file.offset + steps + x.itemsize):
        cut = f"changed while in use: {watch.size} bytes, was mapped with {end} or more"
        raise DataError(f"{watch.name}: {cut}; open it again when it is whole")
    return file


def in_memory(x: npt.NDArray[Any], file: MappedFile | None) -> npt.NDArray[Any]:
    """x, copied where it lies in a file. Raises DataError for one that was cut or changed meanwhile.

    Read in another way, a mapping of a file that is cut ends the process.
    """
    if file is None:
        return x
    if x.nbytes > (free := available_memory()):
        got = f"{x.nbytes} bytes to be read into memory, more than the {free} that are free"
        raise DataError(f"{file.watch.name}: {got}")
    return file.watch.copy(x)


def mapped_rows(x: npt.NDArray[Any], rows: _native.DenseRows, file: MappedFile) -> _native.MappedRows:
    """`rows`, which are those of x, guarded."""
    room = room_for(x.nbytes) if file.read_only else 0
    return _native.MappedRows(
        rows, file.watch, offset=file.offset, row_shape=x.shape[1:], shared=file.shared, room=room
    )


def room_for(n_bytes: int) -> int:
    """Bytes of memory that blocks of a file may be read into past the page cache; 0 for one that fits there.

    Of a larger one the cache keeps nothing until it is needed again, and is slow to fill and to empty.
    """
    limit = memory_limit()
    return limit // _OWN_SHARE if n_bytes > limit else 0


def sequential_blocks(row_bytes: int) -> tuple[int, int]:
    """Rows a block and blocks a window, in which an unshuffled pass reads ahead."""
    return max(1, BLOCK_BYTES // row_bytes), _SEQUENTIAL_BLOCKS


def shuffled_blocks(window: int, row_bytes: int) -> tuple[int, int]:
    """Rows a block and blocks a window of about `window` rows."""
    block = max(1, min(BLOCK_BYTES // row_bytes, window // _LEAST_BLOCKS))
    return block, max(1, window // block)


def window_for(n_samples: int, row_bytes: int) -> int | None:
    """The rows to shuffle at a time of data on disk, or None for all, where the memory holds them with ease.

    It depends on the data and on how much memory the machine or the container has, not on what is free now.
    """
    limit = memory_limit()
    if n_samples * row_bytes * _COMFORTABLE <= limit:
        return None
    return max(1, min(WINDOW_BYTES, limit // _LEAST_WINDOWS) // row_bytes)


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
