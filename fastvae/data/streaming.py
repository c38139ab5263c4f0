"""Data that are made in the host's memory and sent to a GPU a few batches ahead, as uint8 where they can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from .. import _native
from .batching import Batching, Tensors, tensors_of
from .device import DevicePasses, Epoch, has_kernel
from .transfers import Copies, carried
from .transform import Transform

AHEAD = 2  # batches on the way to the device
_PINNED = 1 << 30  # bytes of pinned memory at the most; beyond it, batches are pinned by another copy


def sent(wanted: Batching) -> Batching:
    """Batches as they travel: of uint8 samples uint8, which the device widens and scales; else as wanted."""
    if not wanted.is_uint8 or not has_kernel(wanted):
        return wanted
    transform = replace(wanted.transform or Transform(), scale=None, shift=0.0)
    return replace(wanted, dtype=torch.uint8, transform=None if transform == Transform() else transform)


class Streaming(DevicePasses):
    """Passes over batches of the native loader, copied beside what the device computes."""

    def __init__(self, wanted: Batching, copies: Copies, device: torch.device) -> None:
        travelling = sent(wanted)
        super().__init__(wanted, device, wanted.features * travelling.dtype.itemsize)
        self._copies, self._dtype = copies, travelling.dtype
        self._native = travelling.native()
        self._gather = None
        if travelling.dtype != wanted.dtype:
            from .gather import Gather

            given = wanted.transform or Transform()
            scaling = Transform(scale=given.scale, shift=given.shift)
            self._gather = Gather(self.item_shape, wanted.dtype, scaling, is_uint8=True, device=device)
        self._is_pinned = not isinstance(self._native, _native.Loader)  # what Python makes lies where it will

    def release(self) -> None:
        self._native.release()

    def _batches(self, which: Epoch, out: Tensors | None) -> Iterator[Tensors]:
        if not self._is_pinned:
            self._pin()
        hosts = (tensors_of(batch, self._dtype) for batch in self._native.start(**asdict(which)))
        return self._made(carried(hosts, self._copies, AHEAD), out)

    def _pin(self) -> None:
        """Has batches made in pinned memory: what is ready, in workers' hands, on the way, and the next."""
        batches, bytes_of_batch = 3 * self._wanted.workers + 1 + AHEAD + 2, self._native.batch_bytes
        self._native.use(
            self._copies.pinned(min(batches, _PINNED // bytes_of_batch) * bytes_of_batch).numpy()
        )
        self._is_pinned = True

    def _made(self, batches: Iterator[Tensors], out: Tensors | None) -> Iterator[Tensors]:
        for sent_x, *sent_y in batches:
            x, y = self._room(len(sent_x), out)
            if self._gather is None:
                x.copy_(sent_x)
            else:
                self._gather(sent_x, x)
            yield (x,) if y is None else (x, y.copy_(sent_y[0]))
