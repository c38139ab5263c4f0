"""Losses of tensors like those of an earlier one, which passed the checks: its findings serve them too."""

from __future__ import annotations

from collections.abc import Hashable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library, native
from .limits import transform
from .types import Extents, Impl, Inputs, Spec

_KINDS = 64  # that are remembered; a training has a few
_PLAIN = (float, int, NoneType)


class Known(NamedTuple):
    """What ops.autograd takes for a loss of one kind, beside its inputs. It holds no tensor."""

    spec: Spec
    extents: Extents
    kernels: Any  # ops.native, or what it prepares for calls that are alike


_known: dict[Hashable, Known] = {}


def kind_of(
    inputs: Inputs, log_variance: object, log_scale: object, spec: Spec, impl: Impl
) -> Hashable | None:
    """All that the checks of a loss and its arguments in C++ depend on; None where more may matter.

    Of a tensor it is all but its memory and what is in it, and of a number for beta its type alone.
    """
    for number in (log_variance, log_scale, spec.free_bits):
        if type(number) not in _PLAIN:
            return None
    if library.is_watched() or transform() is not None:
        return None
    kind: list[object] = [spec, impl, log_variance, log_scale, torch.get_num_threads()]
    for value in inputs[:7]:
        if (
            type(value) is Tensor
            and value.is_cpu
            and value.layout is torch.strided
            and not value.is_neg()
            and not value._is_zerotensor()
        ):
            kind += value.shape, value.stride(), value.dtype
        elif type(value) in _PLAIN:
            kind.append(type(value))
        else:
            return None
    return tuple(kind)


def find(kind: Hashable | None) -> Known | None:
    """What is known of this kind."""
    return None if kind is None else _known.get(kind)


def learn(kind: Hashable, inputs: Inputs, spec: Spec, extents: Extents, impl: Impl) -> None:
    """Remember a kind by a call of it that went well."""
    if impl == "reference" or not native.supports(spec):
        return
    if len(_known) >= _KINDS:
        _known.clear()
    kernels = native.Repeated() if native.Plan.serves(inputs, None) else native
    _known[kind] = Known(spec, extents, kernels)
