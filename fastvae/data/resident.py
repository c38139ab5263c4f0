"""Data that are kept on a GPU: one kernel launch a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import _native
from .batching import Batching, Tensors, tensors_of
from .device import DevicePasses, Epoch
from .gather import Gather
from .mapped import sequential_blocks
from .passes import share
from .source import DataError
from .transfers import Copies, carried

_UPLOAD_BYTES = 16 << 20  # read and copied at a time
_WINDOW = 1 << 18  # samples whose order is made, and copied, at a time


def stored(wanted: Batching) -> Batching:
    """The same samples as they are kept: channels first, uint8 or float32, nothing done to them yet."""
    dtype = torch.uint8 if wanted.is_uint8 else torch.float32
    size = max(1, _UPLOAD_BYTES // (wanted.features * dtype.itemsize))
    return replace(wanted, dtype=dtype, transform=None, batch_size=size, drop_last=False)


def bytes_of(wanted: Batching) -> int:
    """Bytes that the samples take on a device, each with its label and its number."""
    return wanted.n_samples * (wanted.features * (1 if wanted.is_uint8 else 4) + 16)


class Resident(DevicePasses):
    """Passes over samples that are copied to the device once, when the first pass begins."""

    def __init__(self, wanted: Batching, copies: Copies, device: torch.device) -> None:
        kept = stored(wanted)
        super().__init__(wanted, device, wanted.features * kept.dtype.itemsize)
        self._copies = copies
        self._samples = kept.native()
        source, rows = wanted.source, self._samples.indices
        n = wanted.n_samples
        self._gather = Gather(
            source.item_shape, wanted.dtype, wanted.transform, is_uint8=wanted.is_uint8, device=device
        )
        # taken now, so that the loaders made after this one see what is left
        self._x = torch.empty((n, *source.item_shape), dtype=kept.dtype, device=device)
        self._y = torch.empty(n, dtype=torch.int64, device=device) if source.has_labels else None
        draws = wanted.transform is not None and wanted.transform.draws
        self._numbers = torch.from_numpy(rows).to(device) if draws and rows is not None else None
        self._is_there = False
        self._blocks = (0, 0) if source.in_memory else sequential_blocks(self._row_bytes)

    def release(self) -> None:
        self._x = self._x[:0].clone()
        self._y = self._numbers = None

    def _batches(self, which: Epoch, out: Tensors | None) -> Iterator[Tensors]:
        if not self._is_there:
            self._upload()
        n, batch_size = len(self._x), self._wanted.batch_size
        key = self._gather.key(which.seed, which.epoch)
        each = max(1, _WINDOW // batch_size) * batch_size
        for begin, rows in self._windows(which, each):
            for first in range(begin, min(begin + each, len(self) * batch_size), batch_size):
                start, end = (
                    first + row for row in share(min(batch_size, n - first), which.rank, which.ranks)
                )
                x, y = self._room(end - start, out)
                self._gather(
                    self._x,
                    x,
                    rows=rows,
                    first=start if rows is None else start - begin,
                    key=key,
                    numbers=self._numbers,
                    labels=self._y,
                    labels_out=y,
                )
                yield (x,) if y is None else (x, y)

    def _windows(self, which: Epoch, each: int) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Places in the order of the epoch, `each` after one another, and the rows from there on."""
        n, begins = len(self._x), range(which.first_batch * self._wanted.batch_size, len(self._x), each)
        if not which.shuffle:
            yield from ((begin, None) for begin in begins)
            return
        orders = (
            (torch.from_numpy(_native.epoch_order(
                n, which.seed, which.epoch, which.blocks, begin, min(each, n - begin)
            )),)
            for begin in begins
        )  # fmt: skip
        for begin, (rows,) in zip(begins, carried(orders, self._copies, ahead=1), strict=True):
            yield begin, rows

    def _upload(self) -> None:
        batches = self._samples.start(
            seed=0, epoch=0, shuffle=False, blocks=self._blocks, first_batch=0, rank=0, ranks=1
        )
        first = 0
        for x, *y in (tensors_of(batch, self._x.dtype) for batch in batches):
            self._check(x, first)
            self._x[first : first + len(x)].copy_(x)
            if self._y is not None:
                self._y[first : first + len(x)].copy_(y[0])
            first += len(x)
        self._copies.wait(self._copies.read())  # whichever stream the reader will be on
        self._samples.release()
        self._is_there = True

    def _check(self, x: torch.Tensor, first: int) -> None:
        """Raises DataError where floats from sample `first` on are to be binarized and are no probabilities.

        Those in memory were looked at before.
        """
        source, transform = self._wanted.source, self._wanted.transform
        if transform is None or not transform.binarize or self._wanted.is_uint8 or source.in_memory:
            return
        low, high = x.aminmax()
        if low < 0 or high > 1:
            place = first + int(((x < 0) | (x > 1)).nonzero()[0, 0])
            row = place if self._samples.indices is None else self._samples.indices[place]
            got = f"{source.name}: no probability in row {row}"
            raise DataError(f"{got}; expected values in [0, 1] to binarize")
