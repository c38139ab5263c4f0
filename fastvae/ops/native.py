"""The operator for CPU tensors: hands addresses and strides to csrc/elbo.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import _native
from .types import Extents, Forward, Gradients, Inputs, Needs, Spec

# A scalar loss can make its gradients while the inputs are in the cache, at the upstream gradient 1.
GRADIENTS_IN_FORWARD = True

# csrc/elbo.hpp: enum class DType
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
_ONE_THREAD_BELOW = 1 << 16  # elements; waking a second thread costs more than it saves
_ONE_THREAD_BELOW_AWAKE = 1 << 14  # between products, whose threads have not gone to sleep

_LIKELIHOOD_CODES = {None: 0, "mse": 1, "gaussian": 2, "bernoulli": 3}
# Outputs of this many bytes lie in memory that is kept from call to call; smaller ones malloc keeps itself.
_POOLED = 2 << 20
_pool = _native.MemoryPool()
_CPU = torch.device("cpu")  # which need not be torch's default
_SCALARS = {dtype: torch.empty((), dtype=dtype, device=_CPU) for dtype in (torch.float32, torch.float64)}
_DLPACK_TYPES = {  # code and bits
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
}

_NO_GRADIENTS = Gradients()

_View = tuple[int, int, int, int, int] | None


def supports(spec: Spec) -> bool:
    """Whether these stages are written in C++."""
    return spec.likelihood in _LIKELIHOOD_CODES and spec.scale_form == "scalar"


def forward(inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
    """Run the stages of `spec`; arguments as checked by ops.checks."""
    result = _outputs(inputs, spec, extents)
    _Call(inputs, spec, extents).run(result, None, _NO_GRADIENTS)
    return result


def forward_and_gradients(
    inputs: Inputs, spec: Spec, extents: Extents, needs: Needs
) -> tuple[Forward, Gradients]:
    """`forward`, and the gradients of the loss itself, in one pass."""
    result, gradients = _outputs(inputs, spec, extents), _gradients(inputs, extents, needs)
    _Call(inputs, spec, extents).run(result, None, gradients)
    return result, gradients


def backward(inputs: Inputs, spec: Spec, extents: Extents, upstream: Forward, needs: Needs) -> Gradients:
    """The gradients for the upstream gradients of the fields of Forward; None is zero."""
    # the value of kl has no part in a gradient
    gradients = _gradients(inputs, extents, needs)
    _Call(inputs._replace(kl=None), spec, extents).run(Forward(), upstream, gradients)
    return gradients


class Plan:
    """A call to be made again and again, with tensors like those given: in nothing but their memory others.

    upstream, needs: of `backward`; `forward_and_gradients` has needs alone, `forward` neither.
    """

    __name__ = "plan"  # a function has one, and so has what torch.fx calls

    def __init__(
        self, inputs: Inputs, spec: Spec, extents: Extents, upstream: Forward | None, needs: Needs | None
    ) -> None:
        call = _Call(inputs, spec, extents)
        values = _outputs(inputs, spec, extents) if upstream is None else Forward()
        gradients = _NO_GRADIENTS if needs is None else _gradients(inputs, extents, needs)
        self._call = _native.ELBOCall(*call.arguments(values, upstream, gradients, _ONE_THREAD_BELOW_AWAKE))
        self._numbers = inputs.beta, inputs.log_scale
        made = [t for t in (*values, *gradients) if t is not None]
        self._kinds = [(t.shape, t.dtype, t.nbytes >= _POOLED) for t in made]
        self._kept: list[Tensor | None] = [None] * len(made)

    def reuse(self, are_free: Iterable[bool]) -> None:
        """Make those values and gradients in the same memory each time that nobody needs at the next call."""
        kinds = zip(self._kinds, are_free, strict=True)
        self._kept = [_empty(*kind) if is_free else None for kind, is_free in kinds]

    @staticmethod
    def serves(inputs: Inputs, upstream: Forward | None) -> bool:
        """Whether these tensors can be read where they lie."""
        read = (*inputs[:6], *(upstream or ()))
        number = not isinstance(inputs.beta, Tensor) or inputs.beta.numel() == 1
        real = inputs.compute_dtype
        vectors = (inputs.kl, inputs.weight, *(() if upstream is None else (*upstream[:3], upstream[4])))
        return (
            number
            and all(t is None or t.is_contiguous() or (t.ndim == 2 and t.stride(1) == 1) for t in read)
            and all(t is None or t.numel() > 0 for t in read)  # which has an address
            and all(t is None or (t.dtype == real and t.is_contiguous()) for t in vectors)
        )

    def __call__(self, *tensors: Tensor | None) -> list[Tensor]:
        """The values and gradients that are made; given the tensors of `Inputs`, then those of `upstream`."""
        made = [
            _empty(*kind) if kept is None else kept
            for kept, kind in zip(self._kept, self._kinds, strict=True)
        ]
        beta, log_scale, seed = tensors[6:9]
        self._call.run_again(
            [t.data_ptr() for t in (*tensors[:6], *tensors[9:], *made) if t is not None],
            None if seed is None else int(seed),
            float(self._numbers[0] if beta is None else beta),
            float(self._numbers[1] if log_scale is None else log_scale),
        )
        return made


class Repeated:
    """This module's functions, for losses whose tensors `Plan.serves` and differ in their memory alone.

    The arguments are put together once. It keeps no tensor, and any number of threads may call it.
    """

    GRADIENTS_IN_FORWARD = GRADIENTS_IN_FORWARD
    backward = staticmethod(backward)

    def __init__(self) -> None:
        self._calls: dict[Needs | None, _native.ELBOCall] = {}

    def forward(self, inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
        return self._run(inputs, spec, extents, None)[0]

    def forward_and_gradients(
        self, inputs: Inputs, spec: Spec, extents: Extents, needs: Needs
    ) -> tuple[Forward, Gradients]:
        return self._run(inputs, spec, extents, needs)

    def _run(
        self, inputs: Inputs, spec: Spec, extents: Extents, needs: Needs | None
    ) -> tuple[Forward, Gradients]:
        values = _outputs(inputs, spec, extents)
        gradients = _NO_GRADIENTS if needs is None else _gradients(inputs, extents, needs)
        call = self._calls.get(needs)
        if call is None:
            arguments = _Call(inputs, spec, extents).arguments(values, None, gradients)
            call = self._calls[needs] = _native.ELBOCall(*arguments)
        addresses = [t.data_ptr() for t in (*inputs[:6], *values, *gradients) if t is not None]
        beta = inputs.beta.item() if isinstance(inputs.beta, Tensor) else inputs.beta
        call.run_again(addresses, None, beta, float(inputs.log_scale))
        return values, gradients


class _Call:
    """One call's arguments in the form of csrc/bind_elbo.cpp. It keeps alive what it points to."""

    def __init__(self, inputs: Inputs, spec: Spec, extents: Extents) -> None:
        self.inputs, self.spec, self.extents = inputs, spec, extents
        self.dtype = inputs.compute_dtype
        self.alive: list[Tensor] = []
        samples, batch, features, latents = extents
        self.x_hat = self._view(inputs.x_hat, samples, batch, features)
        self.x = self._view(inputs.x, 1, batch, features)
        self.mu = self._view(inputs.mu, 1, batch, latents)
        self.logvar = self._view(inputs.logvar, 1, batch, latents)
        self.kl = self._vector(inputs.kl)
        self.weight = self._vector(inputs.weight)
        self.beta, self.beta_latents = 1.0, 0
        if not isinstance(inputs.beta, Tensor):
            self.beta = float(inputs.beta)
        elif inputs.beta.numel() == 1:
            self.beta = inputs.beta.item()
        else:
            self.beta_latents = self._vector(inputs.beta.reshape(-1))
        self.log_scale = float(inputs.log_scale)
        self.noise = None if inputs.seed is None else (int(inputs.seed), spec.offset, spec.first_row)

    def run(self, values: Forward, upstream: Forward | None, gradients: Gradients) -> None:
        _native.elbo(*self.arguments(values, upstream, gradients))

    def arguments(
        self,
        values: Forward,
        upstream: Forward | None,
        gradients: Gradients,
        one_thread_below: int = _ONE_THREAD_BELOW,
    ) -> tuple[Any, ...]:
        """Those of _native.elbo, on one thread for fewer elements than this."""
        spec, extents = self.spec, self.extents
        samples, batch, features, latents = extents
        elements = max(samples * batch * features, samples * batch * latents)
        rows = None
        if upstream is not None:
            rows = (
                self._per_row(upstream.loss),
                self._per_row(upstream.recon),
                self._per_row(upstream.kl),
                self._view(upstream.z, samples, batch, latents),
                self._per_row(upstream.kl_rows),
            )
        return (
            self.dtype == torch.float64,
            extents,
            1 if elements < one_thread_below else torch.get_num_threads(),
            _LIKELIHOOD_CODES[spec.likelihood],
            spec.half,
            spec.per_sample,
            spec.logvar_clamp,
            spec.free_bits,
            (spec.recon_scale(extents), spec.kl_scale(extents), self.beta, self.log_scale, spec.constant),
            self.x_hat,
            self.x,
            self.mu,
            self.logvar,
            self.kl,
            self.weight,
            self.beta_latents,
            self.noise,
            [0 if t is None else t.data_ptr() for t in values],
            rows,
            [0 if t is None else t.data_ptr() for t in gradients],
        )

    def _view(self, tensor: Tensor | None, samples: int, batch: int, columns: int) -> _View:
        """Strides of [samples, batch, columns]; of a copy where the columns have no one stride."""
        if tensor is None:
            return None
        if tensor.is_contiguous():
            return (tensor.data_ptr(), DTYPE_CODES[tensor.dtype], batch * columns, columns, 1)
        rows = tensor.reshape(samples, batch, columns)
        self.alive.append(rows)
        sample, row, column = rows.stride()
        return (rows.data_ptr(), DTYPE_CODES[rows.dtype], sample, row, column)

    def _vector(self, tensor: Tensor | None) -> int:
        """The address of a contiguous vector in the compute type, or 0."""
        if tensor is None:
            return 0
        vector = tensor.detach().to(self.dtype).contiguous()
        self.alive.append(vector)
        return vector.data_ptr()

    def _per_row(self, tensor: Tensor | None) -> tuple[int, int] | None:
        if tensor is None:
            return None
        rows = tensor.to(self.dtype)
        self.alive.append(rows)
        return rows.data_ptr(), rows.stride(0) if rows.ndim else 0


def _outputs(inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
    """Uninitialised results of the stages that run."""
    dtype, mu = inputs.compute_dtype, inputs.mu
    loss = recon = kl = z = kl_rows = None
    if spec.likelihood:
        loss = _rows(extents, dtype) if spec.per_sample else torch.empty_like(_SCALARS[dtype])
        if spec.terms:
            recon, kl = torch.empty_like(loss), torch.empty_like(loss)
    if spec.sample and mu is not None:
        z = mu.new_empty(mu.shape if extents.samples == 1 else (extents.samples, *mu.shape))
        kl_rows = _rows(extents, dtype)
    return Forward(loss, recon, kl, z, kl_rows)


def _gradients(inputs: Inputs, extents: Extents, needs: Needs) -> Gradients:
    """Uninitialised gradients, contiguous in the shapes of their inputs."""
    x_hat, mu, logvar, kl, log_scale = needs
    return Gradients(
        _empty_like(inputs.x_hat) if x_hat else None,
        _empty_like(inputs.mu) if mu else None,
        _empty_like(inputs.logvar) if logvar else None,
        _rows(extents, inputs.compute_dtype) if kl else None,
        torch.empty_like(inputs.log_scale, dtype=inputs.compute_dtype) if log_scale else None,  # type: ignore[arg-type]
    )


def _rows(extents: Extents, dtype: torch.dtype) -> Tensor:
    return _empty((extents.batch,), dtype, False)


def _empty_like(tensor: Any) -> Tensor:
    """`_empty` in the shape and dtype of another tensor."""
    if tensor.nbytes < _POOLED and tensor.is_contiguous():
        return torch.empty_like(tensor)  # twice as fast, where every microsecond counts
    return _empty(tensor.shape, tensor.dtype, tensor.nbytes >= _POOLED)


def _empty(shape: Sequence[int], dtype: torch.dtype, is_pooled: bool) -> Tensor:
    """An uninitialised contiguous tensor, in pooled memory or in its own."""
    if not is_pooled:
        return torch.empty(shape, dtype=dtype, device=_CPU)
    made: Tensor = from_dlpack(_pool.lend(shape, *_DLPACK_TYPES[dtype]))
    return made
