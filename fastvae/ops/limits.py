"""Where a kernel cannot serve, since it reads and writes memory by itself: plain torch does there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_VMAP = torch._C._dispatch_key_parse("VmapMode")  # of torch.autograd, which is not that of torch.func


def transform() -> str | None:
    """What looks into each operation now and would see none of a kernel's; None is nothing."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    return None


def is_backward_seen() -> bool:
    """Whether something looks into each operation of a backward, among them is_grads_batched=True."""
    return transform() is not None or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)


def in_memory(values: Iterable[object]) -> bool:
    """Whether the elements of those that are tensors lie at their addresses.

    Those of a subclass with operations of its own (DTensor, FakeTensor) lie elsewhere, and the zeros that
    differentiation may make of an unused tensor nowhere.
    """
    for value in values:
        if value is None or type(value) is float:
            continue
        if type(value) is not Tensor and type(value) is not nn.Parameter:
            if not isinstance(value, Tensor):
                continue
            if torch._C._dispatch_keys(value).has(torch._C.DispatchKey.Python):
                return False
        if value._is_zerotensor():
            return False
    return True
