"""Passes whose batches are made on a GPU, and which kind of them a source gets."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from .batching import Batching, Tensors
from .passes import CountedPass, Meter, Place
from .torch_datasets import DatasetSource

_MOST_FEATURES = 2**30  # of a sample, whose places the kernel counts in int32


@dataclass(frozen=True)
class Epoch:
    """Which batches a pass delivers; the arguments of a native loader's `start`."""

    seed: int
    epoch: int
    shuffle: bool
    blocks: tuple[int, int]
    first_batch: int
    rank: int
    ranks: int


class DevicePasses(ABC):
    """What begins passes as a native loader does; their batches are tensors on a device.

    wanted: what the batches are like. row_bytes: of a sample as it is kept on the device, or sent to it.
    """

    def __init__(self, wanted: Batching, device: torch.device, row_bytes: int) -> None:
        self.device = device
        self._wanted, self._row_bytes = wanted, row_bytes
        self._host = wanted.native()  # which makes the same batches, if not here
        self._meter = Meter()
        self._place = Place(0)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of a batch."""
        return tuple(self._host.item_shape)

    def __len__(self) -> int:
        return len(self._host)

    @property
    def meter(self) -> tuple[Any, ...]:
        """Of all passes: batches, samples, bytes read, seconds within `next`, seconds of passes."""
        return astuple(self._meter)

    @property
    def position(self) -> int:
        """Batches delivered of the epoch of the pass that was started last."""
        return self._place.batch

    def start(self, *, out: Tensors | None = None, **epoch: Any) -> CountedPass:
        """The batches of an `Epoch`, x or (x, y): the reader's own, or the first rows of `out`."""
        which = Epoch(**epoch)
        self._place = Place(which.first_batch)
        batches = (made if len(made) > 1 else made[0] for made in self._batches(which, out))
        return CountedPass(batches, self._meter, self._place, self._row_bytes)

    def checked_out(self, x: Tensor, y: Tensor | None) -> Tensors:
        """`start`'s `out` of these. Raises ValueError where a batch cannot be made there."""
        size = min(self._wanted.batch_size, self._wanted.n_samples)
        _check("x", x, (size, *self.item_shape), self._wanted.dtype, self.device)
        if not self._wanted.source.has_labels:
            if y is not None:
                raise ValueError("y is given, expected none, as the samples have no labels")
            return (x,)
        if y is None:
            raise ValueError("y is None, expected a tensor for the labels")
        _check("y", y, (size,), torch.int64, self.device)
        return x, y

    @abstractmethod
    def release(self) -> None:
        """Frees the memory that no batch uses; no pass is begun any more."""

    @abstractmethod
    def _batches(self, which: Epoch, out: Tensors | None) -> Iterator[Tensors]: ...

    def _room(self, size: int, out: Tensors | None) -> tuple[Tensor, Tensor | None]:
        """Memory for the x and the y of a batch."""
        if out is not None:
            x, *y = out
            return x[:size], y[0][:size] if y else None
        x = torch.empty((size, *self.item_shape), dtype=self._wanted.dtype, device=self.device)
        has_labels = self._wanted.source.has_labels
        return x, torch.empty(size, dtype=torch.int64, device=self.device) if has_labels else None


def _check(
    name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    contiguous = given.is_contiguous()
    if (tuple(given.shape), given.dtype, given.device) != (shape, dtype, device) or not contiguous:
        got = f"{given.dtype} of shape {list(given.shape)} on {given.device}"
        got += "" if contiguous else ", not contiguous"
        raise ValueError(f"{name} is {got}, expected {dtype} of shape {list(shape)} on {device}, contiguous")


def passes_on(device: torch.device, wanted: Batching) -> tuple[DevicePasses, str]:
    """Passes on a CUDA device, and where their samples are, in one line.

    The samples are kept on the device where they fit into half of its free memory, and where its kernel makes
    the same of them as the host does; else they are streamed to it.
    """
    from .streaming import Streaming
    from .transfers import CudaCopies

    copies = CudaCopies(device)
    obstacle = _obstacle(wanted)
    if obstacle is None:
        from .resident import Resident, bytes_of

        free, _ = torch.cuda.mem_get_info(device)
        needed = bytes_of(wanted)
        if 2 * needed <= free:
            return Resident(wanted, copies, device), f"kept on {device}, {_size(needed)}"
        obstacle = f"{_size(needed)} are more than half of the {_size(free)} that are free there"
    return Streaming(wanted, copies, device), f"streamed to {device}, as {obstacle}"


def _obstacle(wanted: Batching) -> str | None:
    """Why samples cannot be kept on a device, whatever its memory."""
    transform = wanted.transform
    if isinstance(wanted.source, DatasetSource):
        return "Python makes its items anew"
    if not has_kernel(wanted):
        return "triton is not installed" if wanted.features < _MOST_FEATURES else "a sample is too large"
    if str(wanted.source.dtype) == "float64" and transform and (transform.is_scaled or transform.binarize):
        return "its float64 are transformed in float64"
    return None


def has_kernel(wanted: Batching) -> bool:
    """Whether there is a kernel for samples of this size."""
    return importlib.util.find_spec("triton") is not None and wanted.features < _MOST_FEATURES


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
