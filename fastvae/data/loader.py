"""The data loader: shuffled batches from C++ threads, reproducible from (seed, epoch)."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .. import _native
from .mapped import sequential_blocks, shuffled_blocks, window_for
from .sources import DataError, Source, SourceLike, as_source
from .transform import Transform

Batch: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
}
_MAX_WORKERS = 4  # a few threads reach the memory's rate


class ShuffleWarning(UserWarning):
    """The data are shuffled in windows, as they are too much for the memory at once."""


class DataLoader:
    """Batches of a source, gathered ahead of their consumer by C++ threads.

    Yields x, [B, *item_shape], or (x, y) with y int64 [B] where the source has labels. uint8 becomes x / 255,
    correctly rounded. The last batch may be smaller. A batch is the reader's own, to keep or to change.

    Each `iter()` begins a pass, whose shuffled order is a pure function of (seed, epoch) whatever the machine
    or the number of threads. The first pass is epoch 0, and beginning a pass advances `epoch` by one for the
    next; `set_epoch` says which epoch the next pass is, and where in it to begin. A pass ends its threads
    when it is dropped, as by `break`. After a fork, begin a new pass in the child.

    Data in a memory-mapped file may be larger than the memory: passes have what comes next read ahead, and
    let go of what is done. To shuffle such data, blocks of consecutive samples are put into a random order,
    and the samples of one `window` of it after another are permuted. A file that is cut, changed or replaced
    while it is in use, and a float in it that is NaN or infinite, is a DataError when a batch meets it.

    source: a Source, an array or CPU tensor [N, ...], a pair (x, y), or a path (see `sources`).
    batch_size: samples a batch, at least 1.
    seed: of the shuffling and of `transform`, 0 <= seed < 2**64.
    window: samples to shuffle at a time, at least 1, in blocks of at most 1 MiB of them; N or more is all at
        once. None is all, but for a mapped file of more than half of the memory that this machine, or the
        container, has: then a ShuffleWarning tells the window, up to 256 MiB, and so does `note`.
    drop_last: leave out a last batch smaller than batch_size.
    num_workers: threads; 0 gathers in the calling thread, which is best for data in memory where all cores
        compute; None is half of this process's cores and at most 4.
    dtype: of x: torch.float32, bfloat16 or float16 (rounded to nearest), or uint8 for a source of uint8,
        whose numbers then stay as they are.
    transform: what is done to each sample, see `Transform`; it may change `item_shape`.
    indices: int64 [M], the samples to use (others are left out); all of them by default.
    rank, world_size: of several processes, each with its rows of every batch (see `set_rank`).

    Raises DataError for data that cannot be used, ValueError and TypeError for other bad arguments.
    """

    def __init__(
        self,
        source: SourceLike,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Transform | None = None,
        window: int | None = None,
        indices: npt.ArrayLike | torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size = _integer("batch_size", batch_size, 1, 2**62)
        self.shuffle = bool(shuffle)
        self.seed = _integer("seed", seed, 0, 2**64 - 1)
        self.drop_last = bool(drop_last)
        self.num_workers = _workers(num_workers)
        self._source = as_source(source)
        self.dtype = dtype
        self.transform = transform
        _check_form(self._source, dtype, transform)
        self._epoch = self._first_batch = 0
        self.set_rank(rank, world_size)
        chosen = None if indices is None else _indices(indices)
        self._n_samples = self._source.n_samples if chosen is None else len(chosen)
        self.note: str | None = None
        self.window = self._window(window)
        if chosen is not None and self.window is not None:
            chosen.sort()  # blocks of them are to lie together
        self._native = _native.Loader(
            self._source.rows(),
            self._source.y,
            chosen,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            workers=self.num_workers,
            dtype=_DTYPES[dtype],
            transform=None if transform is None else transform.native(self._source.dtype == np.uint8),
        )

    def _window(self, given: int | None) -> int | None:
        """The samples to shuffle at a time, None for all; sets `note` where that is not what is asked for."""
        if given is not None:
            given = _integer("window", given, 1, 2**62)
            return given if self.shuffle and given < self._n_samples else None
        if not self.shuffle or self._source.in_memory:
            return None
        window = window_for(self._n_samples, self._row_bytes)
        if window is not None:
            size = f"{self._n_samples * self._row_bytes / 1e9:,.1f} GB"
            self.note = (
                f"{self._source.name}: {size}, too much for the memory at once; shuffled in windows of "
                f"{window:,} samples"
            )
            warnings.warn(f"{self.note}; window= sets another", ShuffleWarning, stacklevel=3)
        return window

    @property
    def _row_bytes(self) -> int:
        return math.prod(self._source.item_shape) * self._source.dtype.itemsize

    @property
    def _blocks(self) -> tuple[int, int]:
        """Samples a block and blocks a window of a pass; (0, 0) where there are none."""
        if self.window is not None:
            return shuffled_blocks(self.window, self._row_bytes)
        return (0, 0) if self.shuffle or self._source.in_memory else sequential_blocks(self._row_bytes)

    @property
    def n_samples(self) -> int:
        """Samples that a pass draws from: of the source, or of `indices`."""
        return self._n_samples

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one sample of a batch, [C, H, W] for images."""
        return self._native.item_shape

    @property
    def has_labels(self) -> bool:
        """Whether batches are (x, y)."""
        return self._source.has_labels

    @property
    def epoch(self) -> int:
        """The epoch that the next pass will be."""
        return self._epoch

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Makes the next pass epoch `epoch`, at least 0; the one after it is epoch + 1.

        The pass begins with batch `first_batch` of that epoch, from 0 to len(self), at once: a training that
        is resumed in the middle of an epoch does not read what it has seen.
        """
        self._epoch = _integer("epoch", epoch, 0, 2**62)
        self._first_batch = _integer("first_batch", first_batch, 0, len(self))

    def set_rank(self, rank: int, world_size: int) -> None:
        """Makes passes give one of `world_size` ranks its rows of every batch; others are not read.

        Of B rows rank r has those from ceil(r B / world_size) to ceil((r + 1) B / world_size): a last batch
        of less than world_size rows leaves the last ranks with batches of 0 rows.
        """
        self.world_size = _integer("world_size", world_size, 1, 2**31)
        self.rank = _integer("rank", rank, 0, self.world_size - 1)

    def __len__(self) -> int:
        """Batches in a pass, the same on all ranks."""
        return len(self._native)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        first_batch, self._first_batch = self._first_batch, 0
        batches = self._native.start(
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            blocks=self._blocks,
            first_batch=first_batch,
            rank=self.rank,
            ranks=self.world_size,
        )
        tensor = _bfloat16 if self.dtype == torch.bfloat16 else torch.from_numpy
        if self.has_labels:
            return ((tensor(x), torch.from_numpy(y)) for x, y in batches)
        return map(tensor, batches)


def _bfloat16(bits: npt.NDArray[np.int16]) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def _check_form(source: Source, dtype: torch.dtype, transform: Transform | None) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, expected torch.float32, bfloat16, float16 or uint8")
    if dtype == torch.uint8 and source.dtype != np.uint8:
        got = f"torch.uint8 for {source.name} of {source.dtype}"
        raise ValueError(f"dtype is {got}, expected a floating point dtype")
    if transform is None:
        return
    if dtype == torch.uint8 and transform.is_scaled:
        raise ValueError("dtype is torch.uint8 with a transform of scale and shift, expected one of the two")
    transform.check(source.item_shape)
    if transform.binarize and source.dtype != np.uint8 and source.in_memory:
        low, high = source.value_range()
        if low < 0 or high > 1:
            got = f"{source.name}: binarize of values from {low:g} to {high:g}"
            raise DataError(f"{got}, expected probabilities, in [0, 1]")


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value}, expected an integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} is {value!r}, expected an integer") from error
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {low} <= {name} <= {high}")
    return number


def _workers(num_workers: int | None) -> int:
    if num_workers is not None:
        return _integer("num_workers", num_workers, 0, 256)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, which share the cores
    return min(_MAX_WORKERS, cores // (2 * processes))


def _indices(indices: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.int64]:
    array = np.asarray(indices)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise ValueError(f"indices is {got}, expected integers of shape [M]")
    return np.array(array, dtype=np.int64)
