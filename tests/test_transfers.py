"""Copies to a device a few items ahead, on a device that does things as late, and as oddly, as it may."""

from __future__ import annotations

import ctypes
import gc
import random
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvae.data.batching import Batching, tensors_of
from fastvae.data.source import Source
from fastvae.data.sources import as_source
from fastvae.data.transfers import CudaCopies, carried


@dataclass
class Mark:
    """Something that a queue comes to. `waits_for` is another mark, without which it does not."""

    action: Callable[[], object] = lambda: None
    waits_for: Mark | None = None
    done: bool = False


@dataclass
class LateCopies:
    """`Copies` that hold on to no memory of the host's; hurry: how often something is done unforced."""

    memory: Tensor
    hurry: float
    queues: tuple[deque[Mark], deque[Mark]] = field(default_factory=lambda: (deque(), deque()))

    def pinned(self, n_bytes: int) -> Tensor:
        raise NotImplementedError

    def room(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def copy(self, host: Tensor, room: Tensor) -> None:
        address, n_bytes = host.data_ptr(), host.nbytes
        offset = address - self.memory.data_ptr()
        assert 0 <= offset <= self.memory.nbytes - n_bytes, "made elsewhere, as all of the memory is in use"
        lying = (ctypes.c_uint8 * n_bytes).from_address(address)
        as_bytes = room.view(torch.uint8)
        self._ask(0, lambda: as_bytes.copy_(torch.frombuffer(lying, dtype=torch.uint8).view_as(as_bytes)))

    def copied(self) -> Mark:
        return self._ask(0)

    def read(self) -> Mark:
        return self._ask(1)

    def before_copies(self, mark: Mark) -> None:
        self._ask(0, waits_for=mark)

    def before_reading(self, mark: Mark) -> None:
        self._ask(1, waits_for=mark)

    def wait(self, mark: Mark) -> None:
        while not mark.done:
            self._do_something()

    def compute(self, action: Callable[[], object]) -> None:
        """Ask for something that reads what `carried` has given."""
        self._ask(1, action)

    def finish(self) -> None:
        while any(self.queues):
            self._do_something()

    def _ask(self, queue: int, *args: Any, **options: Any) -> Mark:
        mark = Mark(*args, **options)
        self.queues[queue].append(mark)
        if random.random() < self.hurry:
            self._do_something()
        return mark

    def _do_something(self) -> None:
        heads = [
            queue for queue in self.queues if queue and (not queue[0].waits_for or queue[0].waits_for.done)
        ]
        if heads:
            mark = random.choice(heads).popleft()
            mark.action()
            mark.done = True
        else:
            assert not any(self.queues), "both queues wait for each other"


@pytest.mark.parametrize("hurry", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_overwritten_before_it_is_read(hurry: float, ahead: int, workers: int, seed: int) -> None:
    """Neither what the native loader has made in lent memory, nor the rooms on the device."""
    x = np.arange(103 * 5, dtype=np.float32).reshape(103, 5)
    source: Source = as_source((x, np.arange(103)))
    native = Batching(source, None, 4, False, workers, torch.float32, None).native()
    memory = torch.empty((3 * workers + 1 + ahead + 2) * native.batch_bytes, dtype=torch.uint8)
    native.use(memory.numpy())
    copies = LateCopies(memory, hurry)
    for epoch in range(3):
        order = {"seed": seed, "epoch": epoch, "shuffle": True, "blocks": (0, 0)}
        batches = native.start(**order, first_batch=0, rank=0, ranks=1)
        items = (tensors_of(batch, torch.float32) for batch in batches)
        got: list[tuple[Tensor, Tensor]] = []
        for i, (x_there, y_there) in enumerate(carried(items, copies, ahead)):
            assert len(x_there) == len(y_there) == min(4, 103 - 4 * i)
            copies.compute(lambda x=x_there, y=y_there, to=got: to.append((x.clone(), y.clone())))
        copies.finish()
        xs, ys = map(torch.cat, zip(*got, strict=True))
        assert sorted(ys.tolist()) == list(range(103))
        assert torch.equal(xs, torch.from_numpy(x)[ys])


@pytest.mark.parametrize("pinned", [True, False])
def test_what_torch_is_asked_for_on_a_gpu(pinned: bool) -> None:
    """With torch.cuda replaced by what takes the same arguments, and the host's memory as the device's."""
    cuda, empty, device = mock.create_autospec(torch.cuda), torch.empty, torch.device("cuda", 0)
    event = torch.cuda.Event
    cuda.Stream.return_value = stream = mock.create_autospec(torch.cuda.Stream, instance=True)
    cuda.current_stream.return_value = current = mock.create_autospec(torch.cuda.Stream, instance=True)
    cuda.Event.side_effect = lambda **_: mock.create_autospec(event, instance=True)
    asked = []

    def on_the_host(*shape: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append((device, pin_memory))
        return empty(*shape, **options)

    pinnings, recorded = [], []

    def pin(tensor: Tensor) -> Tensor:
        pinnings.append(tensor)
        return tensor.clone()

    items = [(torch.full((4, 3), i), torch.full((4,), i)) for i in range(7)]
    with (
        mock.patch.object(torch, "cuda", cuda),
        mock.patch.object(torch, "empty", on_the_host),
        mock.patch.object(Tensor, "is_pinned", return_value=pinned),
        mock.patch.object(Tensor, "pin_memory", pin),
        mock.patch.object(Tensor, "record_stream", lambda _, stream: recorded.append(stream)),
    ):
        copies = CudaCopies(device)
        assert copies.pinned(64).nbytes == 64
        got = [(x.clone(), y.clone()) for x, y in carried(iter(items), copies, ahead=2)]
    assert all(map(torch.equal, chain(*got), chain(*items)))
    assert asked == [("cpu", True), *[(device, False)] * 6]
    assert recorded == [stream] * 6
    assert len(pinnings) == (0 if pinned else 14)
    assert len(stream.wait_event.call_args_list) == len(current.wait_event.call_args_list) == 7
    for copied in (call.args[0] for call in current.wait_event.call_args_list):
        copied.record.assert_called_once_with(stream)
    for read in (call.args[0] for call in stream.wait_event.call_args_list):
        read.record.assert_called_once_with(current)


def lending(pieces: int, workers: int = 0) -> tuple[Any, Tensor]:
    native = Batching(as_source(np.arange(300, dtype=np.uint8).reshape(100, 3)), None, 4, False, workers,
                      torch.uint8, None).native()  # fmt: skip
    memory = torch.empty(pieces * native.batch_bytes, dtype=torch.uint8)
    native.use(memory.numpy())
    return native, memory


def batches_of(native: Any) -> Any:
    return native.start(seed=0, epoch=0, shuffle=False, blocks=(0, 0), first_batch=0, rank=0, ranks=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_lent_memory_is_used_first(workers: int) -> None:
    native, memory = lending(pieces=3 * workers + 3, workers=workers)
    truth = np.arange(300, dtype=np.uint8).reshape(100, 3)

    def is_lent(batch: np.ndarray) -> bool:
        return 0 <= batch.ctypes.data - memory.data_ptr() < memory.nbytes

    assert all(is_lent(batch) for batch in batches_of(native))
    kept = list(batches_of(native))  # more than there is room for
    assert np.array_equal(np.concatenate(kept), truth)
    assert not all(map(is_lent, kept))
    assert 2 * workers + 3 <= sum(map(is_lent, kept)) <= 3 * workers + 3  # a worker may hold one still
    native.release()
    assert not any(map(is_lent, batches_of(native)))
    assert np.array_equal(np.concatenate(kept), truth)


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (np.zeros(640, np.int8), TypeError, "memory is int8, expected contiguous, writable uint8"),
        (np.zeros(1280, np.uint8)[::2], TypeError, "memory is uint8, expected contiguous"),
        (np.frombuffer(bytes(640), np.uint8), TypeError, "expected contiguous, writable"),
        (torch.zeros(704, dtype=torch.uint8).numpy()[1:], ValueError, "at a multiple of 64 bytes"),
    ],
)
def test_memory_that_cannot_be_lent(memory: np.ndarray, error: type[Exception], message: str) -> None:
    native, _ = lending(pieces=1)
    with pytest.raises(error, match=message):
        native.use(memory)


def test_lent_memory_lives_as_long_as_a_batch() -> None:
    native, memory = lending(pieces=2)
    kept = next(batches_of(native))
    lent = memory.numpy()
    native.use(lent)
    alive = weakref.ref(lent)
    inside = next(batches_of(native))
    del native, lent, memory
    gc.collect()
    assert alive() is not None
    assert kept.tolist() == inside.tolist() == np.arange(12).reshape(4, 3).tolist()
    del inside
    gc.collect()
    assert alive() is None
