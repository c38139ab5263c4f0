"""The gradient of the operators: one autograd.Function over an implementation's forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .types import Extents, Forward, Gradients, Inputs, Needs, Spec


def fused_elbo(inputs: Inputs, spec: Spec, extents: Extents, kernels: ModuleType) -> Forward:
    """Run the stages of `spec` on `kernels` (ops.native or ops.triton), differentiably."""
    if torch.compiler.is_compiling():
        return library.fused_elbo(inputs, spec, extents)
    if not torch.is_grad_enabled():
        result: Forward = kernels.forward(inputs, spec, extents)
        return result
    return Forward(*_FusedELBO.apply(*inputs, spec, extents, kernels))  # type: ignore[no-untyped-call]


class _FusedELBO(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Forward:
        *saved, ctx.spec, ctx.extents, ctx.kernels = arguments
        ctx.set_materialize_grads(False)
        ctx.constants = [None if isinstance(v, Tensor) else v for v in saved]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in saved))
        inputs, spec, extents, kernels = Inputs(*saved), ctx.spec, ctx.extents, ctx.kernels
        need = ctx.needs_input_grad
        ctx.needs = Needs(need[0], need[2], need[3], need[4], need[7])
        ctx.ready = None
        if kernels.GRADIENTS_IN_FORWARD and spec.likelihood and not (spec.sample or spec.per_sample):
            # the inputs are in the cache now, and a scalar loss is most often the root of backward
            result, ctx.ready = kernels.forward_and_gradients(inputs, spec, extents, ctx.needs)
        else:
            result = kernels.forward(inputs, spec, extents)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        rare = (ctx.needs_input_grad[1], ctx.needs_input_grad[5], ctx.needs_input_grad[6])
        if torch.is_grad_enabled() or any(rare):
            return _reference_backward(ctx, upstream)
        g = _take_ready(ctx, upstream)
        if g is None:
            g = ctx.kernels.backward(
                Inputs(*_saved(ctx)), ctx.spec, ctx.extents, Forward(*upstream), ctx.needs
            )
        return g.x_hat, None, g.mu, g.logvar, g.kl, None, None, g.log_scale, None, None, None, None


def _saved(ctx: Any) -> list[Any]:
    """The fields of Inputs that forward had."""
    return [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]


def _take_ready(ctx: Any, upstream: Sequence[Tensor | None]) -> Gradients | None:
    """The gradients that forward made, if they serve; they are given away once and never changed after.

    A second backward makes them anew: a caller may have changed in place what it was given.
    """
    ready: Gradients | None = ctx.ready
    g_loss = upstream[0]
    if ready is None or g_loss is None or any(g is not None for g in upstream[1:]):
        return None
    ctx.ready = None
    scale = g_loss.item()
    if scale == 1.0:
        return ready
    made = [g for g in ready if g is not None]
    if scale == 0.0 or any(g.dtype.itemsize < 4 for g in made):
        return None  # 0 * inf is not the gradient, and 16 bits have been rounded already
    for g in made:
        g.mul_(scale)
    return ready


def _reference_backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """All gradients by the reference's formula: differentiable again, and with respect to every input."""
    create_graph = torch.is_grad_enabled()
    saved = _saved(ctx)
    wanted = [i for i in range(8) if ctx.needs_input_grad[i]]
    for i in wanted:
        # an alias, since x_hat may itself depend on mu: partial derivatives are asked for
        saved[i] = saved[i].view_as(saved[i]) if create_graph else saved[i].detach().requires_grad_()
    with torch.enable_grad():
        outputs = reference.forward(Inputs(*saved), ctx.spec, ctx.extents)
        pairs = [
            (o, g.reshape(o.shape))
            for o, g in zip(outputs, upstream, strict=True)
            if o is not None and g is not None and o.requires_grad
        ]
        gradients: list[Tensor | None] = [None] * 12
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [saved[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, found, strict=True):
                gradients[i] = g
    return tuple(gradients)
