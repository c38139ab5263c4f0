"""The operator as torch.library ops: opaque to torch.compile, which cannot look into a native call.

Used only while somebody watches operations: else an op's dispatch costs more than ops.autograd's Function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import reference
from .limits import is_backward_seen
from .types import Extents, Forward, Gradients, Inputs, Needs, Spec

_INPUTS = (
    "Tensor? x_hat, Tensor? x, Tensor? mu, Tensor? logvar, Tensor? kl, Tensor? weight, Tensor? beta, "
    "Tensor? log_scale, Tensor? seed, float beta_value, float log_scale_value, SymInt[] extents, "
    "str? likelihood, str recon_reduction, str kl_reduction, bool half, float[]? logvar_clamp, bool sample, "
    "SymInt offset, SymInt first_row, bool full, float? free_bits, str free_bits_form, str scale_form"
)
_GRADIENTS = "Tensor? g_loss, Tensor? g_recon, Tensor? g_kl, Tensor? g_z, Tensor? g_kl_rows, bool[] needs"
_TENSORS = 9  # the leading tensors of _INPUTS
_ARGUMENTS = 24  # all of them

_library = torch.library.Library("fastvae", "DEF")
_library.define(f"forward({_INPUTS}) -> Tensor[]")
_library.define(f"backward({_INPUTS}, {_GRADIENTS}) -> Tensor[]")
_library.define(f"forward_and_gradients({_INPUTS}, bool[] needs) -> Tensor[]")
_library.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def is_watched() -> bool:
    """Whether operations are compiled, or seen by a TorchDispatchMode (of fake tensors, of a recorder)."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def fused_elbo(inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
    """ops.autograd.fused_elbo as an op that is seen."""
    outputs = torch.ops.fastvae.forward(*_flat(inputs, spec, extents))
    loss, recon, kl_term = outputs[:3] if spec.likelihood else (None, None, None)
    z, kl_rows = outputs[-2:] if spec.sample else (None, None)
    return Forward(loss, recon, kl_term, z, kl_rows)


def forward_and_gradients(
    inputs: Inputs, spec: Spec, extents: Extents, needs: Needs
) -> tuple[Forward, Gradients]:
    """The function of that name of ops.native as an op that is seen; of a loss, without a gradient."""
    loss, recon, kl_term, *found = torch.ops.fastvae.forward_and_gradients(
        *_flat(inputs, replace(spec, terms=True), extents), list(needs)
    )
    gradients = iter(found)
    return Forward(loss, recon, kl_term), Gradients(*(next(gradients) if n else None for n in needs))


def _flat(inputs: Inputs, spec: Spec, extents: Extents) -> tuple[Any, ...]:
    """The arguments of an op."""
    seed = inputs.seed
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=inputs.like.device)
    beta, beta_value = _split(inputs.beta)
    log_scale, log_scale_value = _split(inputs.log_scale)
    return (
        *inputs._replace(beta=beta, log_scale=log_scale, seed=seed),
        beta_value,
        log_scale_value,
        list(extents),
        spec.likelihood,
        spec.recon_reduction,
        spec.kl_reduction,
        spec.half,
        None if spec.logvar_clamp is None else list(spec.logvar_clamp),
        spec.sample,
        spec.offset,
        spec.first_row,
        spec.full,
        spec.free_bits,
        spec.free_bits_form,
        spec.scale_form,
    )


def draw_seed(like: Tensor) -> Tensor:
    """64 random bits from torch's generator on `like`'s device, as an op that is seen."""
    seed: Tensor = torch.ops.fastvae.draw_seed(like)
    return seed


def _draw_seed(like: Tensor) -> Tensor:
    return random_bits(like.device)


def random_bits(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """64 random bits from torch's generator on `device`, as an int64 tensor there."""
    # random_ of an empty tensor gives the same, but not under torch.func.vmap(randomness="different")
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def _split(value: float | Tensor) -> tuple[Any, float]:
    """A schema has no type for a number or a tensor."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


def plan(op: Any, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """An op's implementation as a function of the tensors among its arguments alone, and these.

    Without dispatcher and gradient, and with all else prepared: for calls with tensors like these in all but
    memory.
    """
    from . import native

    if op is not _OPS.draw_seed.default:
        call, tensors = _Call.of(arguments)
        inputs, upstream = call.split(tensors)
        if call.kernels is native and native.Plan.serves(inputs, upstream):
            return native.Plan(inputs, call.spec, call.extents, upstream, call.needs), tensors
    return _bind(op, arguments)


def _bind(op: Any, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """An op's implementation as a function of the tensors among its arguments, and these."""
    if op is _OPS.draw_seed.default:
        return _draw_seed, arguments
    call, tensors = _Call.of(arguments)
    return call.run, tensors


class _Call:
    """What of an op's arguments is no tensor."""

    def __init__(
        self, kernels: ModuleType, beta: float, log_scale: float, extents: Extents, spec: Spec, needs: Any
    ) -> None:
        self.kernels, self.extents, self.spec = kernels, extents, spec
        self.beta, self.log_scale = beta, log_scale
        self.needs = None if needs is None else Needs(*needs)

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> tuple[_Call, tuple[Any, ...]]:
        """The call, and its tensors."""
        tensors, (beta, log_scale, extents, *choices) = arguments[:_TENSORS], arguments[_TENSORS:_ARGUMENTS]
        rest = arguments[_ARGUMENTS:]
        if choices[4] is not None:  # logvar_clamp
            choices[4] = tuple(choices[4])
        needs = rest[-1] if rest else None
        call = cls(_kernels(tensors), beta, log_scale, Extents(*extents), Spec(*choices), needs)
        return call, (*tensors, *rest[:-1])

    def split(self, tensors: tuple[Any, ...]) -> tuple[Inputs, Forward | None]:
        """Inputs and upstream gradients."""
        x_hat, x, mu, logvar, kl, weight, beta, log_scale, seed, *upstream = tensors
        inputs = Inputs(
            x_hat, x, mu, logvar, kl, weight,
            self.beta if beta is None else beta, self.log_scale if log_scale is None else log_scale, seed,
        )  # fmt: skip
        return inputs, Forward(*upstream) if upstream else None

    def run(self, *tensors: Any) -> list[Tensor]:
        """What the op gives for these tensors."""
        inputs, upstream = self.split(tensors)
        given = inputs, self.spec, self.extents
        made: Iterable[Tensor | None]
        if upstream is not None:
            made = self.kernels.backward(*given, upstream, self.needs)
        elif self.needs is not None:
            values, gradients = self.kernels.forward_and_gradients(*given, self.needs)
            made = (*values, *gradients)
        else:
            made = self.kernels.forward(*given)
        return [t for t in made if t is not None]


def _kernels(tensors: tuple[Any, ...]) -> ModuleType:
    kernels: ModuleType
    if Inputs(*tensors).like.device.type == "cpu":
        from . import native as kernels
    else:
        from . import triton as kernels
    return kernels


def _implementation(op: Any) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        function, tensors = _bind(op, arguments)
        return function(*tensors)

    return run


def _forward_meta(*arguments: Any) -> list[Tensor]:
    inputs = Inputs(*arguments[:_TENSORS])
    samples, batch, _, _ = arguments[_TENSORS + 2]
    likelihood, recon_reduction = arguments[_TENSORS + 3 : _TENSORS + 5]
    sample = arguments[_TENSORS + 8]
    dtype = inputs.compute_dtype
    outputs = []
    if likelihood is not None:
        shape = (batch,) if recon_reduction == "none" else ()
        outputs = [inputs.like.new_empty(shape, dtype=dtype) for _ in range(3)]
    if sample and inputs.mu is not None:
        mu = inputs.mu
        outputs.append(mu.new_empty(mu.shape if samples == 1 else (samples, *mu.shape)))
        outputs.append(mu.new_empty((batch,), dtype=dtype))
    return outputs


def _backward_meta(*arguments: Any) -> list[Tensor]:
    inputs = Inputs(*arguments[:_TENSORS])
    batch, needs = arguments[_TENSORS + 2][1], arguments[-1]
    gradients = [
        *(None if t is None else t.new_empty(t.shape) for t in (inputs.x_hat, inputs.mu, inputs.logvar)),
        inputs.like.new_empty((batch,), dtype=inputs.compute_dtype),
        torch.empty_like(inputs.log_scale) if isinstance(inputs.log_scale, Tensor) else None,
    ]
    return [t for t, needed in zip(gradients, needs, strict=True) if needed and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]
    ctx.has = (ctx.rest[3] is not None, ctx.rest[8])


def _gradient(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    need = ctx.needs_input_grad
    if need[1] or need[5] or need[6]:
        raise NotImplementedError(
            "fastvae: the gradient with respect to x, weight or beta is not compiled; "
            'use impl="reference" inside torch.compile'
        )
    has_terms, has_sample = ctx.has
    terms = upstream[:3] if has_terms else [None] * 3
    sampled = upstream[-2:] if has_sample else [None] * 2
    # the op of a gradient has none itself, and no rule for transforms
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_backward_seen()):
        call, tensors = _Call.of((*ctx.saved_tensors, *ctx.rest))
        inputs, _ = call.split(tensors)
        values = Forward(*terms, *sampled)
        made = reference.backward(inputs, call.spec, call.extents, values, need[:8])
        return (*made, None, *(None for _ in ctx.rest))
    needs = Needs(need[0], need[2], need[3], need[4], need[7])
    found = iter(
        torch.ops.fastvae.backward(*ctx.saved_tensors, *ctx.rest, *terms, *sampled, [bool(n) for n in needs])
    )
    g = [next(found) if needed else None for needed in needs]
    gradients = (g[0], None, g[1], g[2], g[3], None, None, g[4], None)
    return (*gradients, *(None for _ in ctx.rest))


_OPS = torch.ops.fastvae
OPS = {
    _OPS.forward.default,
    _OPS.backward.default,
    _OPS.forward_and_gradients.default,
    _OPS.draw_seed.default,
}
for _op in OPS:
    for _device in ("CPU", "CUDA"):
        _library.impl(_op.name(), _implementation(_op), _device)
torch.library.register_fake("fastvae::forward", _forward_meta, lib=_library)
torch.library.register_fake("fastvae::backward", _backward_meta, lib=_library)
torch.library.register_fake(
    "fastvae::forward_and_gradients", lambda *a: _forward_meta(*a) + _backward_meta(*a), lib=_library
)
torch.library.register_fake(
    "fastvae::draw_seed", lambda like: like.new_empty((), dtype=torch.int64), lib=_library
)
torch.library.register_autograd("fastvae::forward", _gradient, setup_context=_setup_context, lib=_library)
