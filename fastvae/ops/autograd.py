"""The gradient of the operators: one autograd.Function over an implementation's forward and backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .limits import in_memory, is_backward_seen
from .types import Extents, Forward, Gradients, Inputs, Needs, Spec


def fused_elbo(inputs: Inputs, spec: Spec, extents: Extents, kernels: ModuleType) -> Forward:
    """Run the stages of `spec` on `kernels` (ops.native or ops.triton), differentiably."""
    if library.is_watched():
        # the ops have no gradient with respect to x, weight and beta
        others = (inputs.x, inputs.weight, inputs.beta)
        plain = any(isinstance(t, Tensor) and t.requires_grad for t in others)
        is_seen = torch.compiler.is_compiling() or not plain
        return (library.fused_elbo if is_seen else reference.forward)(inputs, spec, extents)
    if not (torch.is_grad_enabled() and _requires_grad(inputs)):
        result: Forward = kernels.forward(inputs, spec, extents)
        return result
    outputs = _FusedELBO.apply(*inputs, (spec, extents, kernels))  # type: ignore[no-untyped-call]
    return Forward(outputs) if isinstance(outputs, Tensor) else Forward(*outputs)


def _requires_grad(inputs: Inputs) -> bool:
    for value in inputs:  # noqa: SIM110 -- a generator takes longer than the test
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


class _FusedELBO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor | None,
        x: Tensor | None,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl: Tensor | None,
        weight: Tensor | None,
        beta: float | Tensor,
        log_scale: float | Tensor,
        seed: int | Tensor | None,
        call: tuple[Spec, Extents, ModuleType],
    ) -> Forward | Tensor | None:
        spec, extents, kernels = ctx.call = call
        ctx.set_materialize_grads(False)
        numbers = (beta, log_scale, seed)
        ctx.numbers = [None if isinstance(n, Tensor) else n for n in numbers]
        saved = [n if isinstance(n, Tensor) else None for n in numbers]
        ctx.save_for_backward(x_hat, x, mu, logvar, kl, weight, *saved)
        need = ctx.needs_input_grad
        ctx.needs = Needs(need[0], need[2], need[3], need[4], need[7])
        ctx.needs_reference = need[1] or need[5] or need[6]
        ctx.ready = None
        inputs = Inputs(x_hat, x, mu, logvar, kl, weight, beta, log_scale, seed)
        result: Forward
        if kernels.GRADIENTS_IN_FORWARD and spec.likelihood and not (spec.sample or spec.per_sample):
            # the inputs are in the cache now, and a scalar loss is most often the root of backward
            result, ctx.ready = kernels.forward_and_gradients(inputs, spec, extents, ctx.needs)
        else:
            result = kernels.forward(inputs, spec, extents)
        return result if spec.terms or spec.sample else result.loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        is_seen = torch.is_grad_enabled() or is_backward_seen()
        if ctx.needs_reference or is_seen or not in_memory(upstream):
            return _reference_backward(ctx, Forward(*upstream))
        g = _take_ready(ctx, upstream)
        if g is None:
            spec, extents, kernels = ctx.call
            signed = Forward(*(None if t is None else t.resolve_neg() for t in upstream))
            g = kernels.backward(_inputs(ctx), spec, extents, signed, ctx.needs)
        return g[0], None, g[1], g[2], g[3], None, None, g[4], None, None


def _inputs(ctx: Any) -> Inputs:
    """The inputs that forward had."""
    *tensors, beta, log_scale, seed = ctx.saved_tensors
    saved = zip((beta, log_scale, seed), ctx.numbers, strict=True)
    return Inputs(*tensors, *(number if tensor is None else tensor for tensor, number in saved))


def _take_ready(ctx: Any, upstream: tuple[Tensor | None, ...]) -> Gradients | None:
    """The gradients that forward made, if they serve; they are given away once and never changed after.

    A second backward makes them anew: a caller may have changed in place what it was given.
    """
    ready: Gradients | None = ctx.ready
    g_loss, *others = upstream
    if ready is None or g_loss is None or any(g is not None for g in others):
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


def _reference_backward(ctx: Any, upstream: Forward) -> tuple[Tensor | None, ...]:
    """All gradients by the reference's formula: differentiable again, and with respect to every input."""
    spec, extents, _ = ctx.call
    return (*reference.backward(_inputs(ctx), spec, extents, upstream, ctx.needs_input_grad[:8]), None, None)
