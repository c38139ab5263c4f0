"""The data loader: shuffled batches from C++ threads, reproducible from (seed, epoch)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from itertools import starmap
from typing import Any, NoReturn, TypeAlias, cast
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Subset

from . import arguments
from .batching import Batching
from .device import DevicePasses, passes_on
from .mapped import sequential_blocks, shuffled_blocks, window_for
from .source import Source
from .sources import SourceLike, as_source
from .state import LoaderStats, check_same, fingerprint
from .transform import Transform

Batch: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"


class ShuffleWarning(UserWarning):
    """The data are shuffled in windows, as they are too much for the memory at once."""


class DataLoader:
    """Batches of a source, gathered ahead of their consumer by C++ threads.

    Yields x, [B, *item_shape], or (x, y) with y int64 [B] where the source has labels. uint8 becomes x / 255,
    correctly rounded. The last batch may be smaller. A batch is the reader's own, to keep or to change.

    Each `iter()` begins a pass, whose shuffled order is a pure function of (seed, epoch) whatever the machine
    or the number of threads. The first pass is epoch 0, and beginning a pass advances `epoch` by one for the
    next; `set_epoch` says which epoch the next pass is, and where in it to begin. A pass ends its threads
    when it is dropped, as by `break`; `with DataLoader(...) as loader` ends them all. After a fork, begin a
    new pass in the child. `state_dict()` tells where a training stands, `stats` how long it waited for data.

    Data in a memory-mapped file may be larger than the memory: passes have what comes next read ahead, and
    let go of what is done. To shuffle such data, blocks of consecutive samples are put into a random order,
    and the samples of one `window` of it after another are permuted: see docs/data.md. A file that is cut,
    changed or replaced while it is in use, and a float in it that is NaN or infinite, is a DataError when a
    batch meets it.

    source: a Source, an array or CPU tensor [N, ...], a pair (x, y), a CSR matrix, a torch Dataset, or a path
        (see `as_source`).
    batch_size: samples a batch, at least 1.
    seed: of the shuffling and of `transform`, 0 <= seed < 2**64.
    window: samples to shuffle at a time, at least 1, in blocks of at most 1 MiB of them; N or more is all at
        once. Of a file larger than the memory, two windows are in memory at a time. None is all, but for a
        mapped file of more than half of the memory that this machine, or the container, has: then a
        ShuffleWarning tells the window, up to 256 MiB, and so does `note`.
    drop_last: leave out a last batch smaller than batch_size.
    device: a CUDA device ("cuda") that batches are made on. Samples that fit into half of its free memory are
        copied there when the first pass begins, as uint8 if that is what they are, and one kernel launch
        makes a batch of them; other batches are made in pinned memory and copied two ahead, uint8 as such.
        `note` says which. The batches are those of the host, to the last bit; a pass is read on one stream,
        or on streams that wait for each other. None, or the CPU, is the host's memory.
    pin_memory: put batches in the host's memory where a GPU can copy them from while it computes; a `device`
        does without.
    num_workers: threads; 0 gathers in the calling thread, which is best for data in memory where all cores
        compute; None is half of this process's cores, from 2 to 4, and 0 where it has one. For a torch
        Dataset whose items Python makes they are torch's worker processes, and None is none.
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
        pin_memory: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Transform | None = None,
        window: int | None = None,
        indices: npt.ArrayLike | torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size = arguments.integer("batch_size", batch_size, 1, 2**62)
        self.shuffle = bool(shuffle)
        self.seed = arguments.integer("seed", seed, 0, 2**64 - 1)
        self.drop_last = bool(drop_last)
        self._source = as_source(source)
        self._given = source if isinstance(source, Dataset) else self._source
        self.num_workers = arguments.workers(num_workers, self._source)
        self.device = arguments.device(device)
        self.pin_memory = arguments.pins(pin_memory, self.device)
        self.dtype = dtype
        self.transform = transform
        arguments.check_form(self._source, dtype, transform)
        self._epoch = self._first_batch = 0
        self._begun: int | None = None  # the epoch of the pass that was begun last
        self._passes: WeakSet[Any] = WeakSet()
        self._closed = False
        self._fingerprint: str | None = None
        self.set_rank(rank, world_size)
        chosen = None if indices is None else arguments.indices(indices, self._source.n_samples)
        self._n_samples = self._source.n_samples if chosen is None else len(chosen)
        self._notes: dict[str, str] = {}
        self._window_is_given = window is not None
        self.window = self._window(window)
        self._indices = chosen
        arguments.check_memory(self._source, transform, min(self.batch_size, self._n_samples))
        self._maker: Any = None  # of the passes: a native loader, or DevicePasses
        self._make()

    def _make(self) -> None:
        self._maker = None  # which may hold half of a device's memory
        if self.device.type == "cpu":
            self._maker = self._batching.native()
        else:
            self._maker, self._notes["device"] = passes_on(self.device, self._batching)

    @property
    def _batching(self) -> Batching:
        indices = self._indices
        if indices is not None and self.window is not None:
            indices = np.sort(indices)  # blocks of them are to lie together
        return Batching(
            self._source,
            indices,
            self.batch_size,
            self.drop_last,
            self.num_workers,
            self.dtype,
            self.transform,
        )

    def _window(self, given: int | None) -> int | None:
        """The samples to shuffle at a time, None for all; sets `note` where that is not what is asked for."""
        if given is not None:
            given = arguments.integer("window", given, 1, 2**62)
            return given if self.shuffle and given < self._n_samples else None
        if not self.shuffle or self._source.in_memory:
            return None
        window = window_for(self._n_samples, self._row_bytes)
        if window is not None:
            size = f"{self._n_samples * self._row_bytes / 1e9:,.1f} GB"
            note = f"{size}, too much for the memory at once; shuffled in windows of {window:,} samples"
            self._notes["window"] = note
            warnings.warn(f"{self._source.name}: {note}; window= sets another", ShuffleWarning, stacklevel=3)
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
    def note(self) -> str | None:
        """What was chosen for these data by itself, in one line: a window, and where on a device they are."""
        return f"{self._source.name}: {'; '.join(self._notes.values())}" if self._notes else None

    @property
    def dataset(self) -> Dataset[Any] | Source:
        """What batches are of, for `len(loader.dataset)` as with torch's DataLoader, which is `n_samples`.

        A torch Dataset as it was given, else a Source; of `indices` a torch Subset.
        """
        given, indices = cast(Any, self._given), cast(Any, self._indices)
        return given if indices is None else Subset(given, indices)

    @property
    def n_samples(self) -> int:
        """Samples that a pass draws from: of the source, or of `indices`."""
        return self._n_samples

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one sample of a batch, [C, H, W] for images."""
        return tuple(self._maker.item_shape)

    @property
    def has_labels(self) -> bool:
        """Whether batches are (x, y)."""
        return self._source.has_labels

    @property
    def epoch(self) -> int:
        """The epoch that the next pass will be."""
        return self._epoch

    @property
    def stats(self) -> LoaderStats:
        """What was delivered so far, and how long it was waited for."""
        return LoaderStats(*self._maker.meter)

    def state_dict(self) -> dict[str, Any]:
        """Where the pass that was begun last stands, and of which data and options, for JSON.

        It counts the batches that were delivered, not those that are ready. After the last one, it is the
        beginning of the next epoch. It does not depend on the rank, nor on how many there are.
        """
        epoch, batch = self._epoch, self._first_batch
        if self._begun is not None:
            epoch, batch = self._begun, self._maker.position
            if batch == len(self):
                epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._identity(), "window": self.window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next pass go on where `state` stands; it begins there at once.

        A window that this loader has chosen by itself becomes that of the state, so that the order is the
        same on a machine with more or less memory. Raises ValueError, which names what differs, for a state
        of other data, batch size, seed, shuffle, window or drop_last.
        """
        check_same(state, self._identity())
        window = state.get("window")
        if self._window_is_given and window != self.window:
            check_same({**state, "window": window}, {"window": self.window})
        if window is not None:
            window = arguments.integer("window", window, 1, 2**62)
        self.set_epoch(state["epoch"], state["batch"])
        if window != self.window:
            self.window = window
            self._make()

    def _identity(self) -> dict[str, Any]:
        """What a state has to have in common with this loader."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._source, self._indices)
        return {
            "n_samples": self.n_samples,
            "item_shape": list(self._source.item_shape),
            "dtype": str(self._source.dtype),
            "data": self._fingerprint,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def close(self) -> None:
        """Ends the threads of all passes and frees what they have ready; no pass can begin any more.

        `with DataLoader(...) as loader` does it at its end.
        """
        self._closed = True
        for batches in list(self._passes):
            batches.close()
        self._maker.release()

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> NoReturn:
        expected = "another made of the same arguments, which may load this one's state_dict()"
        raise TypeError(f"a DataLoader has threads and is not pickled or copied, expected {expected}")

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Makes the next pass epoch `epoch`, at least 0; the one after it is epoch + 1.

        The pass begins with batch `first_batch` of that epoch, from 0 to len(self), at once: a training that
        is resumed in the middle of an epoch does not read what it has seen.
        """
        epoch, first_batch = (
            arguments.integer("epoch", epoch, 0, 2**62),
            arguments.integer("first_batch", first_batch, 0, len(self)),
        )
        self._epoch, self._first_batch, self._begun = epoch, first_batch, None

    def set_rank(self, rank: int, world_size: int) -> None:
        """Makes passes give one of `world_size` ranks its rows of every batch; others are not read.

        Of B rows rank r has those from ceil(r B / world_size) to ceil((r + 1) B / world_size): a last batch
        of less than world_size rows leaves the last ranks with batches of 0 rows.
        """
        self.world_size = arguments.integer("world_size", world_size, 1, 2**31 - 1)
        self.rank = arguments.integer("rank", rank, 0, self.world_size - 1)

    def __len__(self) -> int:
        """Batches in a pass, the same on all ranks."""
        return len(self._maker)

    def __iter__(self) -> Iterator[Batch]:
        if self._closed:
            raise RuntimeError("the loader is closed, expected no more passes")
        return self._pass()

    def into(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Iterator[Batch]:
        """A pass as of `iter()`, but each batch is made in `x` and `y`, which a CUDA graph may read.

        x: `dtype` [batch_size, *item_shape]; y: int64 [batch_size], where there are labels. Both lie on
        `device`, a GPU, and are contiguous. What is yielded are their first rows, which the next batch
        overwrites. Raises ValueError for other tensors.
        """
        if not isinstance(self._maker, DevicePasses):
            raise ValueError(
                f"the loader's device is {self.device}, expected a CUDA device for batches made in x"
            )
        return self._pass(out=self._maker.checked_out(x, y))

    def _pass(self, **options: Any) -> Iterator[Batch]:
        batches = self._maker.start(
            seed=self.seed,
            epoch=self._epoch,
            shuffle=self.shuffle,
            blocks=self._blocks,
            first_batch=self._first_batch,
            rank=self.rank,
            ranks=self.world_size,
            **options,
        )
        self._begun, self._epoch, self._first_batch = self._epoch, self._epoch + 1, 0
        self._passes.add(batches)
        if isinstance(self._maker, DevicePasses):
            return iter(batches)
        tensor = _bfloat16 if self.dtype == torch.bfloat16 else torch.from_numpy
        made: Iterator[Batch]
        if self.has_labels:
            made = starmap(lambda x, y: (tensor(x), torch.from_numpy(y)), batches)  # which threads may share
        else:
            made = map(tensor, batches)
        return map(_pinned, made) if self.pin_memory else made


def _bfloat16(bits: npt.NDArray[np.int16]) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def _pinned(batch: Batch) -> Batch:
    return (batch[0].pin_memory(), batch[1].pin_memory()) if isinstance(batch, tuple) else batch.pin_memory()
