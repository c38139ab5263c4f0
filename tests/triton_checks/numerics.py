"""One call of the operator, by the Triton launcher and by the reference in float64 and in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from fastvae.ops import reference
from fastvae.ops import triton as launcher
from fastvae.ops.types import Extents, Forward, Gradients, Inputs, Needs, ScaleForm, Spec

FIELDS = ("x_hat", "mu", "logvar", "kl", "log_scale")
NOISE_TOLERANCE = 4e-6  # the implementations' normals agree to this


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor_with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


# Triton 3.6's interpreter makes loop bounds from arrays of one element in a way that numpy 2.4 refuses
interpreter._patch_lang_tensor = _patch_lang_tensor_with_index


@dataclass(frozen=True)
class Case:
    """What one check is run on. layout: see `lay`; beta: a number, "scalar" or "latents" for a tensor."""

    samples: int = 1
    batch: int = 6
    features: int = 19
    latents: int = 5
    likelihood: Any = "mse"
    recon_reduction: Any = "batchmean"
    kl_reduction: Any = "batchmean"
    half: bool = False
    dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype | None = None
    latent_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    beta: Any = 1.0
    log_scale: Any = 0.0
    weighted: bool = False
    clamp: tuple[float, float] | None = None
    kl_given: bool = False
    sample: bool = False
    offset: int = 0
    first_row: int = 0
    upstream: str = "random"
    spread: float = 1.0
    full: bool = True
    free_bits: float | None = None
    terms: bool = True

    @property
    def scale_form(self) -> ScaleForm:
        return self.log_scale if self.log_scale in ("features", "elements", "samples") else "scalar"

    @property
    def spec(self) -> Spec:
        return Spec(
            self.likelihood, self.recon_reduction, self.kl_reduction, self.half, self.clamp,
            self.sample, self.offset, self.first_row, self.full, self.free_bits, scale_form=self.scale_form,
            terms=self.terms,
        )  # fmt: skip

    @property
    def extents(self) -> Extents:
        return Extents(self.samples, self.batch, self.features, 1 if self.kl_given else self.latents)


def lay(values: Tensor, layout: str) -> Tensor:
    """Contiguous values in another layout; "expanded" repeats the first row."""
    rows, columns = values.shape[-2], values.shape[-1]
    if layout == "chunked":
        return torch.cat([values, torch.full_like(values, 9.0)], -1).chunk(2, -1)[0]
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return values[..., :1, :].contiguous().expand(values.shape)
    if layout == "sliced":
        wide = values.new_full((*values.shape[:-2], 2 * rows, 3 * columns), 9.0)
        wide[..., ::2, 1::3] = values
        return wide[..., ::2, 1::3]
    if layout == "unaligned":
        flat = values.new_empty(values.numel() + 1)
        flat[1:] = values.flatten()
        return flat[1:].view(values.shape)
    if layout == "trailing":
        # [.., rows, columns, 1, 2] of which a permutation of the last two has no view as columns
        pair = values.new_empty((*values.shape[:-1], 2, columns // 2)).transpose(-1, -2)
        pair.copy_(values.reshape(pair.shape))
        return pair
    return values


def make_inputs(case: Case, generator: torch.Generator, device: str) -> Inputs:
    """Random inputs of a case."""
    lead = () if case.samples == 1 else (case.samples,)
    x_dtype = case.x_dtype or case.dtype
    latent_dtype = case.latent_dtype or case.dtype

    def normal(*shape: int) -> Tensor:
        return case.spread * torch.randn(shape, generator=generator)

    def placed(values: Tensor, dtype: torch.dtype) -> Tensor:
        return lay(values.to(device, dtype), case.layout)

    x_hat = x = mu = logvar = kl = weight = None
    beta, log_scale = case.beta, case.log_scale
    if case.likelihood:
        x_hat = placed(normal(*lead, case.batch, case.features), case.dtype)
        x = torch.rand((case.batch, case.features), generator=generator)
        x = placed(x * 255 if x_dtype == torch.uint8 else x, x_dtype)
    if case.kl_given:
        kl = torch.rand(case.batch, generator=generator).to(device)
    else:
        mu = placed(normal(case.batch, case.latents), latent_dtype)
        logvar = placed(normal(case.batch, case.latents), latent_dtype)
    if case.weighted:
        weight = torch.rand(case.batch, generator=generator).to(device)
        weight[::3] = 0
    if beta == "scalar":
        beta = torch.tensor(0.7, device=device)
    elif beta == "latents":
        beta = torch.rand(case.latents, generator=generator).to(device)
        beta[0] = 0
    if case.likelihood == "probabilities":
        x_hat = placed(torch.rand((*lead, case.batch, case.features), generator=generator), case.dtype)
    if log_scale == "learned":
        log_scale = torch.tensor(-0.6, device=device)
    elif case.scale_form != "scalar":
        log_scale = placed(normal(*case.spec.scale_shape(case.extents)), case.dtype)
    seed = torch.randint(-(2**62), 2**62, (), generator=generator).to(device) if case.sample else None
    return Inputs(x_hat, x, mu, logvar, kl, weight, beta, log_scale, seed)


def make_upstream(
    case: Case, forward: Forward, generator: torch.Generator, device: str
) -> list[Tensor | None]:
    """Upstream gradients for the outputs of a forward, in float32 (z: its dtype)."""

    def like(output: Tensor | None) -> Tensor | None:
        if output is None:
            return None
        g = torch.randn(output.shape, generator=generator).to(device, output.dtype)
        if case.upstream == "large":
            return -65536 * g
        if case.upstream == "expanded":
            return g.flatten()[:1].reshape([1] * g.dim()).expand(g.shape) if g.numel() else g
        if case.upstream == "strided" and g.dim():
            wide = g.new_full((*g.shape[:-1], 2 * g.shape[-1]), 9.0)
            wide[..., ::2] = g
            return wide[..., ::2]
        return g

    upstream = [like(output) for output in forward]
    if case.upstream == "loss":
        upstream[1:3] = [None, None]
    if case.upstream == "partial":
        upstream[0] = upstream[3] = None
    return upstream


def run_reference(
    case: Case, inputs: Inputs, upstream: list[Tensor | None], dtype: torch.dtype
) -> tuple[Forward, Gradients]:
    """Values and gradients of the reference with inputs and arithmetic in `dtype`."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype in (torch.uint8, torch.int64):
            return value
        return value.detach().to(dtype).requires_grad_()

    cast_inputs = Inputs(*(cast(value) for value in inputs))
    outputs = reference.forward(cast_inputs, case.spec, case.extents)
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o is not None and g is not None]
    wanted = [name for name in FIELDS if isinstance(getattr(cast_inputs, name), Tensor)]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [getattr(cast_inputs, name) for name in wanted],
        [g.to(dtype).reshape(o.shape) for o, g in pairs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    values = Forward(*(None if o is None else o.detach() for o in outputs))
    return values, Gradients(**dict(zip(wanted, found, strict=True)))


def run_triton(
    case: Case, inputs: Inputs, generator: torch.Generator, device: str
) -> tuple[Forward, Gradients, list[Tensor | None]]:
    """Values and gradients of the launcher, and the upstream gradients they were made for."""
    forward = launcher.forward(inputs, case.spec, case.extents)
    upstream = make_upstream(case, forward, generator, device)
    return forward, run_backward(case, inputs, upstream), upstream


def run_backward(case: Case, inputs: Inputs, upstream: list[Tensor | None]) -> Gradients:
    """The launcher's gradients of every input that can have one."""
    return launcher.backward(inputs, case.spec, case.extents, Forward(*upstream), needs_of(inputs))


def needs_of(inputs: Inputs) -> Needs:
    """The gradients of every input that can have one."""
    return Needs(*(isinstance(getattr(inputs, name), Tensor) for name in FIELDS))


def assert_close(name: str, got: Tensor, truth: Tensor, eager: Tensor, slack: float = 0.0) -> None:
    """The contract's bar: at most twice the error of float32 eager, plus one rounding of the output's dtype.

    Errors are relative to the largest true value. Eager is granted one unit of float32 even where chance gave
    it less. What the dtype cannot hold must come out as the same infinity, and NaN as NaN.
    """
    truth, eager = truth.reshape(got.shape), eager.reshape(got.shape)
    held = truth.to(got.dtype)
    finite = held.isfinite()
    assert torch.equal(got.isnan(), held.isnan()), f"{name}: NaN in other places than in float64"
    assert torch.equal(got[held.isinf()], held[held.isinf()]), f"{name}: infinite in other places"
    if not finite.any():
        return
    scale = truth[finite].abs().max().item()
    eager_error = (eager.double() - truth)[finite].abs().nan_to_num(0, 0, 0).max().item()
    error = (got.double() - truth)[finite].abs().max().item()
    unit = torch.finfo(torch.float32).eps * scale
    bound = 2 * max(eager_error, unit) + torch.finfo(got.dtype).eps * scale + slack
    # below the smallest normal number a rounding is an absolute step
    bound += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    assert error <= bound, (
        f"{name}: error {error:.3e}, expected at most {bound:.3e} "
        f"(eager {eager_error:.3e}, largest value {scale:.3e})"
    )


def check(case: Case, device: str, seed: int) -> None:
    """Values and gradients of a case against float64, from inputs that are left as they were."""
    print(case)
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case, generator, device)
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    values, gradients, upstream = run_triton(case, inputs, generator, device)
    upstream_before = [None if g is None else g.clone() for g in upstream]
    truth, truth_gradients = run_reference(case, inputs, upstream, torch.float64)
    eager, eager_gradients = run_reference(case, inputs, upstream, torch.float32)
    slacks = {**_noise_slacks(case, inputs, upstream), **_variance_slack(case, inputs, upstream)}

    for name in Forward._fields:
        got, expected, plain = (getattr(r, name) for r in (values, truth, eager))
        if name in ("recon", "kl") and not case.terms:
            assert got is None
            continue
        assert (got is None) == (expected is None), name
        if got is not None:
            assert_close(name, got, expected.double(), plain, slacks.get(name, 0.0))
    for name in FIELDS:
        got, expected, plain = (getattr(r, name) for r in (gradients, truth_gradients, eager_gradients))
        assert (got is None) == (expected is None), name
        if got is not None:
            given = getattr(inputs, name)
            assert (got.shape, got.dtype) == (given.shape, given.dtype), name
            assert_close(f"d {name}", got, expected, plain, slacks.get(f"d {name}", 0.0))
    for old, new in zip([*before, *upstream_before], [*inputs, *upstream], strict=True):
        assert not isinstance(old, Tensor) or torch.equal(old, new), "an input was written to"

    if case.likelihood and not (case.sample or case.spec.per_sample):
        ones = [torch.ones((), device=device), *[None] * 4]
        together = launcher.forward_and_gradients(inputs, case.spec, case.extents, needs_of(inputs))
        for one, other in zip(together[0], values, strict=True):
            assert one is other or torch.equal(one, other), "another loss where gradients are made"
        for name, one, other in zip(FIELDS, together[1], run_backward(case, inputs, ones), strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                assert one.is_contiguous()
                torch.testing.assert_close(one, other, msg=f"d {name}, with the loss")

    again = launcher.forward(inputs, case.spec, case.extents)
    again_gradients = run_backward(case, inputs, upstream)
    for first, second in zip([*values, *gradients], [*again, *again_gradients], strict=True):
        assert first is None or torch.equal(first, second), "two runs differ"


def _variance_slack(case: Case, inputs: Inputs, upstream: list[Tensor | None]) -> dict[str, float]:
    """d log_scale sums terms of both signs: its errors are relative to the terms' magnitudes."""
    if not isinstance(inputs.log_scale, Tensor) or case.batch == 0:
        return {}
    assert inputs.x_hat is not None
    assert inputs.x is not None
    x = inputs.x.reshape(case.batch, case.features).double() / (255 if inputs.x.dtype == torch.uint8 else 1)
    d = inputs.x_hat.reshape(case.samples, case.batch, case.features).double() - x
    s = inputs.log_scale.double().reshape(case.spec.scale_shape(case.extents))
    if case.likelihood == "gaussian":
        terms = 0.5 + 0.5 * d.square() * torch.exp(-s)
    else:
        terms = 1 + d.abs() * torch.exp(-s)
    summed = {"scalar": (0, 1, 2), "features": (0, 1), "elements": (0,), "samples": ()}[case.scale_form]
    largest = (terms.sum(summed) if summed else terms).max().item()
    g = sum(u.abs().max().item() for u in upstream[:2] if u is not None and u.numel())
    magnitude = g * case.spec.recon_scale(case.extents) * largest
    return {"d log_scale": 2 * torch.finfo(torch.float32).eps * magnitude}


def _noise_slacks(case: Case, inputs: Inputs, upstream: list[Tensor | None]) -> dict[str, float]:
    """What the tolerance of the normals themselves allows in z and in what comes through it."""
    if not case.sample or case.batch == 0:
        return {}
    assert inputs.logvar is not None
    logvar = inputs.logvar.reshape(case.batch, case.latents).double()
    sigma = torch.exp(0.5 * (logvar if case.clamp is None else logvar.clamp(*case.clamp)))
    slacks = {"z": NOISE_TOLERANCE * sigma.max().item()}
    g_z = upstream[3]
    if g_z is not None:
        g_sigma = g_z.double().reshape(case.samples, case.batch, case.latents).abs().sum(0) * sigma / 2
        slacks["d logvar"] = NOISE_TOLERANCE * g_sigma.max().item()
    return slacks
