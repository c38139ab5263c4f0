"""What stands in for a CUDA graph on a CPU: operations taken down once, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.training.graph import CaptureError, Outputs

_aten = torch.ops.aten
# what a capture does not permit: it waits for the device, or copies what the host has just made
FORBIDDEN = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.lift_fresh.default,
}


class Watched(TorchDispatchMode):
    """Changes nothing, but that fastvae takes its operators from torch.library, as in a Recording."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """The tensor operations that happen in it; `undo` takes back what they have done, `replay` does them.

    A replay calls each with the very tensors and numbers that it had: what Python computed is as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()  # storages, by address; `calls` keeps them alive
        self.given: dict[int, Tensor] = {}  # the other storages, as bytes
        self._before: dict[int, Tensor] = {}
        self._generator = torch.get_rng_state()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            raise CaptureError(f"{func} is not permitted")
        for tensor in tensors_of((args, kwargs)):
            at = _address(tensor)
            if at not in self.made and at not in self.given:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.given[at], self._before[at] = whole, whole.clone()
        result = func(*args, **kwargs)
        given = {_address(t) for t in tensors_of((args, kwargs))}
        self.made |= {_address(t) for t in tensors_of(result)} - given
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for at, tensor in self.given.items():
            tensor.copy_(self._before[at])
        torch.set_rng_state(self._generator)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            own = {_address(t) for t in tensors_of((args, kwargs))}
            for old, new in zip(tensors_of(result), tensors_of(func(*args, **kwargs)), strict=True):
                if _address(old) not in own:  # no view, and not in place
                    old.detach().copy_(new)


class CPUCapture:
    """Captures on a CPU by a Recording. waits: what a warm-up is to report."""

    def __init__(self, waits: str | None = None) -> None:
        self.recordings: list[Recording] = []
        self._waits = waits

    def warm_up(self, function: Callable[[], Outputs], waits: list[str]) -> Outputs:
        if self._waits is not None:
            waits.append(self._waits)
        with Watched():
            return function()

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        recording = Recording()
        try:
            with recording:
                made = function()
        finally:
            recording.undo()
        self.recordings.append(recording)
        return made, recording.replay


def tensors_of(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from tensors_of(part)
    elif isinstance(tree, Mapping):
        yield from tensors_of(tuple(tree.values()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
