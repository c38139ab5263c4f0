"""A step on a GPU as CUDA graphs: taken down once for each kind of batch, and launched by a single call.

What a graph has taken down is done again at each launch, on the same memory: numbers that Python computed
stay what they were, and what changes has to be in tensors. See "CUDA Graphs" in torch's notes on CUDA.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .distributed import Share

WARM_UPS = 3  # steps of a kind as they are written, which compile, allocate and choose, before it is captured
MOST_GRAPHS = 8  # kinds of batches that are captured; each keeps a copy of a batch

# those whose capture failed: torch's allocators may go on asking them whether a stream is theirs
_broken: list[torch.cuda.CUDAGraph] = []

Make = Callable[[Tensor, Share], Iterable[Tensor]]
Outputs = tuple[Tensor, ...]


class CaptureError(RuntimeError):
    """A function could not be captured; the message says why. Nothing has been computed by it."""


class Capture(Protocol):
    """How a device runs a function that is to be captured, and captures it."""

    def warm_up(self, function: Callable[[], Outputs], waits: list[str]) -> Outputs:
        """Run it; the places where it waits for the device are added to `waits`."""

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Where its results will be, and what computes them. Nothing has been computed by then.

        Raises CaptureError, and then all is as it was.
        """


class Graphs:
    """Calls a function of a batch: captured for each kind of batch that comes often, else as it is written.

    A kind is one shape, layout, dtype and share. The function does the same on the device for all batches of
    a kind; what it changes is in tensors that were there before, and so is what it reads beside the batch. It
    gives tensors.

    modules: what it computes with. capture: how. abandon: is called where it was not done to the end.
    reason: for which nothing is captured, printed once; None while something is, or is to be.
    """

    def __init__(self, modules: list[nn.Module], capture: Capture, abandon: Callable[[], None]) -> None:
        self._modules = modules
        self._capture = capture
        self._abandon = abandon
        self._failed: str | None = None
        self.reason: str | None = None
        self.forget()

    def __call__(self, make: Make, x: Tensor, share: Share) -> Outputs:
        """What make(x, share) gives; `make` is the same at each call."""
        kind = x.shape, x.stride(), x.dtype, share
        if kind in self.captured:
            return self.captured[kind](x)
        if self.reason is not None or len(self.captured) == MOST_GRAPHS:
            return tuple(make(x, share))
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen > WARM_UPS:
            try:
                graph = self.captured[kind] = _Graph(make, x, share, self._capture)
            except CaptureError as error:
                self._abandon()
                self._give_up(f"it could not be captured: {error}")
                return tuple(make(x, share))
            return graph(x)
        waits: list[str] = []
        made = self._capture.warm_up(lambda: tuple(make(x, share)), waits)
        if waits and seen == WARM_UPS:  # before, what is made for the first time may wait
            self._give_up(f"it waits for the GPU, in {waits[0]}")
        return made

    def reset(self, reason: str | None) -> None:
        """Forget what was captured, if its modules have been changed since or if a `reason` is against it."""
        reason = self._failed or reason
        if reason is not None and reason != self.reason:
            print(f"the step is not captured as a CUDA graph: {reason}", flush=True)
        self.reason = reason
        if reason is not None or likeness_of(self._modules) != self._likeness:
            self.forget()

    def forget(self) -> None:
        """Capture anew, as after tensors have been replaced."""
        self.captured: dict[Any, _Graph] = {}
        self._seen: dict[Any, int] = {}
        self._likeness = likeness_of(self._modules)

    def _give_up(self, reason: str) -> None:
        self._failed = reason
        self.reset(None)


class _Graph:
    """A captured function of batches like x: gives its results for one."""

    def __init__(self, make: Make, x: Tensor, share: Share, capture: Capture) -> None:
        self._x = x.clone()
        self._made, self._replay = capture.capture(lambda: tuple(make(self._x, share)))

    def __call__(self, x: Tensor) -> Outputs:
        self._x.copy_(x)
        self._replay()
        return tuple(t.clone() for t in self._made)  # the next replay writes into the same memory


class CUDACapture:
    """Captures on a GPU; what runs there before does so on the stream of the capture, as torch asks for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # one for all graphs: nothing in it outlives a replay

    def warm_up(self, function: Callable[[], Outputs], waits: list[str]) -> Outputs:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _noting_waits(waits):
            made = function()
        current.wait_stream(self._stream)
        return made

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        noise = torch.cuda.get_rng_state(self._device)
        # those that eager steps use may be freed by others who capture, torch.compile for one
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),  # to come back to in any case
                # threads that load data or write checkpoints may go on
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                made = function()
        except Exception as error:
            _broken.append(graph)
            self._recover(noise)
            first = error.__context__ or error  # the end of a capture that has failed fails as well
            raise CaptureError(str(first).partition("\n")[0]) from error
        return made, graph.replay

    def _recover(self, noise: Tensor) -> None:
        """Bring generator and allocator out of the capture, which torch leaves in it where its end fails."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.Generator(self._device)
        generator.set_state(noise)
        torch.cuda.default_generators[index].graphsafe_set_state(generator)
        with contextlib.suppress(RuntimeError):  # where it is out of it already
            torch._C._cuda_endAllocateToPool(index, self._pool)


@contextlib.contextmanager
def _noting_waits(places: list[str]) -> Iterator[None]:
    """While it lasts, the lines where this thread or autograd's waits for the GPU are added to `places`.

    As far as torch.cuda.set_sync_debug_mode knows of them, by whose warnings they are found.
    """
    caller, mode = threading.current_thread(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if not str(message).startswith("called a synchronizing CUDA operation"):
                show(message, category, filename, lineno, *rest)
                return
            thread = threading.current_thread()
            if thread is caller or thread.name.startswith("Dummy-"):  # which Python has not started
                places.append(f"{filename}:{lineno}")

        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def likeness_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What a graph takes for granted of modules: equal where nothing of it has been changed.

    That is, of each module in them: which it is, its mode, the numbers and words among its attributes, its
    hooks, and where its parameters and buffers lie.
    """
    found: list[Any] = []
    for top in modules:
        for module in top.modules():
            found.append(id(module))
            found += [(name, value) for name, value in vars(module).items() if _is_plain(value)]
            found += [
                tuple(hooks)  # the numbers that torch gives them
                for hooks in (
                    module._forward_pre_hooks,
                    module._forward_hooks,
                    module._backward_pre_hooks,
                    module._backward_hooks,
                )
            ]
            found += [
                (name, id(t), t.data_ptr(), t.shape, t.stride(), t.requires_grad)
                for name, t in (*module._parameters.items(), *module._buffers.items())
                if t is not None
            ]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
