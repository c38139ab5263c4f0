"""Which implementation runs: native for CPU tensors, triton for CUDA, the reference for every other."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import library, native, reference
from .autograd import fused_elbo
from .checks import check_choice
from .limits import in_memory, transform
from .types import Extents, Forward, Impl, Inputs, Needs, Spec

_IMPLS = ("auto", "reference", "native", "triton")


def resolve_impl(impl: Impl, device: torch.device) -> tuple[str, str]:
    """The implementation that `impl` means for tensors on `device`, and why, in a few words.

    Raises:
        ValueError: an unknown name. RuntimeError: a named implementation that cannot run there.
    """
    check_choice("impl", impl, _IMPLS)
    if impl == "reference":
        return impl, "plain torch, as asked"
    if impl in ("auto", "native") and device.type == "cpu":
        return "native", "C++ operators for CPU tensors"
    if impl in ("auto", "triton") and device.type == "cuda":
        if _triton_available():
            return "triton", "fused Triton kernels for CUDA tensors"
        if impl == "auto":
            return "reference", "plain torch, since triton is not installed"
        raise RuntimeError('impl: got "triton", but triton is not installed; install it, or use impl="auto"')
    if impl == "auto":
        return "reference", f"plain torch, since there are no kernels for {device.type} tensors"
    where = {"native": "CPU", "triton": "CUDA"}[impl]
    raise RuntimeError(
        f'impl: got "{impl}" for tensors on {device}, expected {where} tensors; '
        'move the tensors there, or use impl="auto"'
    )


def run(inputs: Inputs, spec: Spec, extents: Extents, impl: Impl) -> Forward:
    """The stages of `spec` on the implementation that `impl` means for these inputs."""
    kernels = _kernels(impl, inputs, spec)
    if kernels is reference:
        return reference.forward(inputs, spec, extents)
    return fused_elbo(_with_signs_in_memory(inputs), spec, extents, kernels)


def run_with_gradients(
    inputs: Inputs, spec: Spec, extents: Extents, impl: Impl
) -> tuple[Forward, list[tuple[Tensor, Tensor]]]:
    """A scalar loss, and tensors it depends on with its gradients there: where backward may begin.

    These are the inputs where an implementation makes their gradients together with the loss, which is then
    no root of backward itself; else the loss.
    """
    kernels = _kernels(impl, inputs, spec)
    differentiable = (inputs.x_hat, inputs.mu, inputs.logvar, inputs.kl, inputs.log_scale)
    needs = Needs(*(isinstance(t, Tensor) and t.requires_grad for t in differentiable))
    others = any(isinstance(t, Tensor) and t.requires_grad for t in (inputs.x, inputs.weight, inputs.beta))
    if kernels is reference or others:
        result = run(inputs, spec, extents, impl)
        assert result.loss is not None
        return result, [(result.loss, torch.ones_like(result.loss))]
    inputs = _with_signs_in_memory(inputs)
    function = library.forward_and_gradients if library.is_watched() else kernels.forward_and_gradients
    with torch.no_grad():
        result, gradients = function(inputs, spec, extents, needs)
    roots = zip(differentiable, gradients, strict=True)
    return result, [(t, g) for t, g in roots if isinstance(t, Tensor) and g is not None]


def latent_kl_sums(inputs: Inputs, spec: Spec, extents: Extents, impl: Impl) -> Tensor:
    """The KL of each latent, [Z], summed over the batch with its weights; without a gradient."""
    kernels = _kernels(impl, inputs, spec)
    sums: Tensor
    if kernels.__name__.endswith("triton") and not library.is_watched():
        sums = kernels.latent_kl_sums(inputs, spec, extents)
    else:
        sums = reference.latent_kl_sums(inputs, spec, extents)
    return sums


def seed_for(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """64 random bits from a generator on the device of `like`; None is torch's own."""
    if generator is None and library.is_watched():
        return library.draw_seed(like)
    return library.random_bits(like.device, generator)


def _kernels(impl: Impl, inputs: Inputs, spec: Spec) -> ModuleType:
    """The module that runs on these inputs."""
    device = inputs.like.device
    around = transform()
    if around is not None:
        if impl in ("auto", "reference"):
            return reference
        raise RuntimeError(
            f'impl: got "{impl}" inside {around}, which cannot look into a kernel; use '
            'impl="auto", which takes plain torch there'
        )
    if not (library.is_watched() or in_memory(inputs)):
        if impl in ("auto", "reference"):
            return reference
        names = ", ".join(sorted({type(t).__name__ for t in inputs if not in_memory((t,))}))
        raise RuntimeError(
            f'impl: got "{impl}" with elements that are not in memory (of {names}), where a kernel reads; '
            'use impl="auto", which takes plain torch there'
        )
    if device.type == "cpu" and (impl == "auto" or impl == "native"):
        if native.supports(spec):
            return native
        if impl == "auto":
            return reference
        raise RuntimeError(
            f'impl: got "native" with {_described(spec)}, expected "mse", "gaussian" with one variance or '
            '"bernoulli" from logits; use impl="auto", which takes plain torch for the others on a CPU'
        )
    name, _ = resolve_impl(impl, device)
    if name == "reference":
        if impl == "auto" and device.type == "cuda":
            _warn_without_triton()
        return reference
    if inputs.compute_dtype == torch.float64:
        if impl == "triton":
            raise TypeError('impl: got "triton" with float64 tensors, expected float32, bfloat16 or float16')
        return reference
    from . import triton

    return triton


def _with_signs_in_memory(inputs: Inputs) -> Inputs:
    """For what reads memory: a view such as z.conj().imag has its sign elsewhere (torch.Tensor.is_neg)."""
    if library.is_watched():
        return inputs
    for value in inputs:
        if isinstance(value, Tensor) and value.is_neg():
            resolved: list[Any] = [t.resolve_neg() if isinstance(t, Tensor) else t for t in inputs]
            return Inputs(*resolved)
    return inputs


def _described(spec: Spec) -> str:
    if spec.likelihood == "probabilities":
        return '"bernoulli" from probabilities'
    many = "" if spec.scale_form == "scalar" else " and a tensor of variances"
    return f'"{spec.likelihood}"{many}'


def _triton_available() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _warn_without_triton() -> None:
    """Warn once."""
    warnings.warn(
        "fastvae: triton is not installed, so CUDA tensors use the slower reference; pip install triton",
        stacklevel=4,
    )
