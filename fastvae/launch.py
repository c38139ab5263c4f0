"""Launches of compiled kernels: Triton's own way from a call to the driver takes four times as long.

It looks at each argument for what it compiles in, and so finds what it has compiled before. Here that is
found by what can be told at once: whatever is equal here is equal there.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_COMPILED = 4096  # kernels that are kept, each for launches that are alike


class _Reader(NamedTuple):
    """Reads a kernel's arguments: all in order; its pointers; the numbers and choices it is compiled with."""

    values: Callable[[dict[str, Any]], tuple[Any, ...]]
    pointers: Callable[[dict[str, Any]], tuple[Tensor | None, ...]]
    fixed: Callable[[dict[str, Any]], tuple[Any, ...]]


_readers: dict[Any, _Reader] = {}
_compiled: dict[Any, Any] = {}


def launch(kernel: Any, device: torch.device, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """kernel[grid](**arguments) on the current stream of `device`.

    arguments: of the kernel, by name, those that begin with p_ being tensors or None; and options.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, device, grid, arguments)
        return
    if not hasattr(kernel, "params"):  # in the interpreter, which compiles nothing
        kernel[grid](**arguments)
        return
    read = _readers.get(kernel.fn)
    if read is None:
        read = _readers[kernel.fn] = _reader(kernel, arguments)
    values = read.values(arguments)
    # Triton asks of a number whether it is 1, whether 16 divides it, and whether it fits into 32 bits
    likeness = [None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in read.pointers(arguments)]
    key = kernel.fn, device, read.fixed(arguments), *likeness
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*values)
        return
    if len(_compiled) == MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = kernel[grid](**arguments)


def _reader(kernel: Any, arguments: dict[str, Any]) -> _Reader:
    names = [parameter.name for parameter in kernel.params]
    pointers = [name for name in names if name.startswith("p_")]
    free = {p.name for p in kernel.params if p.do_not_specialize or isinstance(arguments[p.name], float)}
    fixed = [name for name in arguments if name not in pointers and name not in free]
    return _Reader(itemgetter(*names), itemgetter(*pointers), itemgetter(*fixed))
