"""From the host's memory to a GPU's: copies on a stream of their own, beside what is computed there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """Copies to a device, which end some time later, and marks in what was asked of it.

    There are two queues, that of the copies and that of the reader; what is in one of them happens in order.
    """

    def pinned(self, n_bytes: int) -> Tensor:
        """Memory of the host, uint8 [n_bytes], that copies read without going through other memory."""
        ...

    def room(self, like: Tensor) -> Tensor:
        """Memory of the device for copies of tensors like this one."""
        ...

    def copy(self, host: Tensor, room: Tensor) -> None:
        """Ask for a copy. `host` is to be kept until it has ended."""
        ...

    def copied(self) -> Any:
        """A mark after all copies that were asked for."""
        ...

    def read(self) -> Any:
        """A mark after all that the reader has asked for."""
        ...

    def before_copies(self, mark: Any) -> None:
        """Have copies that are asked for from now on wait for a mark."""
        ...

    def before_reading(self, mark: Any) -> None:
        """Have what the reader asks for from now on wait for a mark."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait, here on the host, for a mark."""
        ...


class CudaCopies:
    """`Copies` to a CUDA device; the reader is whoever computes on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def room(self, like: Tensor) -> Tensor:
        room = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        room.record_stream(self._stream)  # it may be dropped before a copy to it has ended
        return room

    def copy(self, host: Tensor, room: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            # torch keeps memory that it has pinned itself until the copy has ended
            room.copy_(host if host.is_pinned() else host.pin_memory(), non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(blocking=True)  # who waits leaves the core to those who make batches
        mark.record(self._stream)
        return mark

    def read(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def before_copies(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def before_reading(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


class _Slot:
    """Room on the device for one item, and the item in the host's memory while it may still be read."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._host: tuple[Tensor, ...] = ()
        self._room: tuple[Tensor, ...] = ()
        self._copied: Any = None
        self._read: Any = None

    def send(self, host: tuple[Tensor, ...]) -> None:
        copies = self._copies
        if self._copied is None:
            self._room = tuple(map(copies.room, host))
            self._read = copies.read()  # who had this memory before may still be using it
        else:
            copies.wait(self._copied)  # what is in the host's memory is let go of below
        copies.before_copies(self._read)
        for tensor, room in zip(host, self._room, strict=True):
            copies.copy(tensor, room[: len(tensor)])
        self._copied, self._host = copies.copied(), host

    def receive(self) -> Iterator[tuple[Tensor, ...]]:
        self._copies.before_reading(self._copied)
        yield tuple(room[: len(host)] for host, room in zip(self._host, self._room, strict=True))
        self._read = self._copies.read()


def carried(items: Iterable[tuple[Tensor, ...]], copies: Copies, ahead: int) -> Iterator[tuple[Tensor, ...]]:
    """The items, tensors in the host's memory, on the device, with `ahead` of them on the way at a time.

    An item is for the reader until it asks for the next one. None may be longer than the first. Of the host's
    memory, `ahead` + 1 items are kept, beside the one that `items` is making.
    """
    sent: deque[_Slot] = deque()
    slots = cycle([_Slot(copies) for _ in range(ahead + 1)])
    for item, slot in zip(items, slots, strict=False):
        slot.send(item)
        sent.append(slot)
        if len(sent) > ahead:
            yield from sent.popleft().receive()
    while sent:
        yield from sent.popleft().receive()
