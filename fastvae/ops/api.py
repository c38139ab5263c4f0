"""The operators as functions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from . import autograd, totals
from .checks import (
    check_capacity,
    check_integer,
    check_noise,
    check_scale,
    elbo_extents,
    latent_extents,
    make_spec,
    scale_form,
)
from .dispatch import run, run_with_gradients, seed_for
from .repeat import find, kind_of, learn
from .types import ELBOTerms, Extents, Forward, FreeBitsForm, Impl, Inputs, Likelihood, Reduction, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SAMPLE = Spec(sample=True)


def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    weight: Tensor | None = None,
    likelihood: Likelihood = "mse",
    beta: float | Tensor = 1.0,
    log_variance: float | Tensor | Literal["batch"] = 0.0,
    log_scale: float | Tensor = 0.0,
    reduction: Reduction = "batchmean",
    recon_reduction: Reduction | None = None,
    kl_reduction: Reduction | None = None,
    half: bool = False,
    full: bool = True,
    from_logits: bool = True,
    logvar_clamp: tuple[float, float] | None = None,
    free_bits: float | None = None,
    free_bits_form: FreeBitsForm = "batch",
    capacity: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> ELBOTerms:
    """The negative ELBO of a VAE with prior N(0, I) and posterior N(mu, diag(exp(logvar))), in nats.

    loss = recon + beta * kl (Kingma and Welling 2014, equation 10; Higgins et al. 2017 for beta).

    Args:
        x_hat: the decoder's output, [B, *features] or [K, B, *features] for K samples of z, which are
            averaged: the mean of p(x|z), or its logits for "bernoulli".
        x: the data, [B, *features]; the trailing shape may differ if the number of features agrees. uint8
            means x / 255.
        mu, logvar: mean and log-variance of the posterior, [B, *latents].
        kl: the KL of each datum, [B], as `sample_and_kl` returns it, instead of mu and logvar.
        weight: a factor for each datum, [B]. The divisor of a mean stays B.
        likelihood: -log p(x|z) of each element, summed over features. "mse": (x - x_hat)^2. "gaussian":
            (x - x_hat)^2 / (2 exp(s)) + s / 2 + ln(2 pi) / 2 with s = log_variance. "laplace":
            |x - x_hat| / exp(s) + s + ln 2 with s = log_scale. "bernoulli": the cross entropy of x in [0, 1]
            from logits.
        beta: factor of the KL term: a float, a 0-d tensor, or one value for each latent.
        log_variance: ln of the Gaussian's variance: a float, a 0-d tensor, or a tensor [*features],
            [B, *features] or [K, B, *features]; "batch" is its optimum for this batch, ln of the mean squared
            error (Rybkin et al. 2021, sigma-VAE), at least that of the smallest normal number.
        log_scale: ln of the Laplace's scale, likewise a float or a tensor.
        reduction: "batchmean" divides by B, "mean" by the number of elements (B * D, B * Z), "sum" by
            nothing; "none" gives [B], summed over features. An empty batch gives 0.
        recon_reduction, kl_reduction: the same for one term alone.
        half: "mse" with the factor 1/2.
        full: False leaves out ln(2 pi) / 2 of "gaussian" and ln 2 of "laplace" (named as in
            torch.nn.GaussianNLLLoss).
        from_logits: False takes x_hat of "bernoulli" as probabilities, with the value and the gradient of
            F.binary_cross_entropy (which bounds a logarithm at -100); logits are more exact. As there, values
            outside [0, 1] are refused on a CPU; from logits, nobody looks whether x is in [0, 1].
        logvar_clamp: (low, high) bounds of logvar, with a zero gradient outside.
        free_bits: nats a latent below which its KL is counted as this much and has no gradient (Kingma et al.
            2016, appendix C8). `kl` of the result is the KL itself.
        free_bits_form: "batch" floors each latent's mean over the batch, "element" each datum's KL by latent.
        capacity: C in nats, a float or a 0-d tensor: the KL term of the loss becomes beta * |KL - C| with the
            batch's mean KL (Burgess et al. 2018, equation 8); beta is one value then. `kl` of the result is
            the KL itself.
        process_group: ranks over which log_variance="batch", batch-form free bits and capacity take their
            means, as with data-parallel training; each rank's loss is still that of its own data.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        ELBOTerms(loss, recon, kl), float32 (float64 for float64 inputs), scalars or [B]. Each term is
        differentiable with respect to every tensor that is given.

    On CPU tensors "mse", "gaussian" with one variance and "bernoulli" from logits run in C++, the others in
    plain torch; on CUDA tensors all run in Triton.

    Raises:
        ValueError, TypeError: an argument has another shape, dtype or value than stated here.
        RuntimeError: the named implementation cannot run on these tensors, or with this likelihood.
    """
    spec = make_spec(
        likelihood, reduction, recon_reduction, kl_reduction, half, full, from_logits, logvar_clamp,
        free_bits, free_bits_form,
    )  # fmt: skip
    given = Inputs(x_hat, x, mu, logvar, kl, weight, beta)
    check_capacity(capacity, spec)
    return elbo_from_spec(given, log_variance, log_scale, capacity, spec, process_group, impl)


def elbo_from_spec(
    inputs: Inputs,
    log_variance: float | Tensor | str,
    log_scale: float | Tensor,
    capacity: float | Tensor | None,
    spec: Spec,
    process_group: ProcessGroup | None,
    impl: Impl,
) -> ELBOTerms:
    """`elbo` with its choices already checked."""
    kind = kind_of(inputs, log_variance, log_scale, spec, impl) if capacity is None else None
    known = find(kind)
    if known is not None:
        inputs = inputs._replace(log_scale=log_variance) if log_variance else inputs  # type: ignore[arg-type]
        return _terms(autograd.fused_elbo(inputs, *known), None)
    call = _prepare_loss(inputs, log_variance, log_scale, capacity, spec, process_group, impl)
    result = run(*call[:3], impl)
    if kind is not None and call.spec is spec:  # which it is not where the batch's totals are part of it
        learn(kind, *call[:3], impl)
    return _terms(result, call.added)


def elbo_with_gradients(
    inputs: Inputs,
    log_variance: float | Tensor | str,
    log_scale: float | Tensor,
    capacity: float | Tensor | None,
    spec: Spec,
    process_group: ProcessGroup | None,
    impl: Impl,
) -> tuple[ELBOTerms, list[tuple[Tensor, Tensor]]]:
    """`elbo_from_spec` of a scalar loss, and where its backward begins: tensors, each with its gradient."""
    call = _prepare_loss(inputs, log_variance, log_scale, capacity, spec, process_group, impl)
    result, roots = run_with_gradients(*call[:3], impl)
    if call.added is not None and call.added.requires_grad:  # of a beta or a capacity that is learned
        roots = [(t, g) for t, g in roots if t.requires_grad] + [(call.added, torch.ones_like(call.added))]
    return _terms(result, call.added), roots


def _terms(result: Forward, added: Tensor | None) -> ELBOTerms:
    loss, recon, kl = cast("tuple[Tensor, Tensor, Tensor]", result[:3])
    return ELBOTerms(loss if added is None else loss + added, recon, kl)


class _Call(NamedTuple):
    """A call as the implementations take it; `added` is what is to be added to the loss."""

    inputs: Inputs
    spec: Spec
    extents: Extents
    added: Tensor | None


def _prepare_loss(
    inputs: Inputs,
    log_variance: float | Tensor | str,
    log_scale: float | Tensor,
    capacity: float | Tensor | None,
    spec: Spec,
    process_group: ProcessGroup | None,
    impl: Impl,
) -> _Call:
    """`_prepare` for a loss that may have its KL given."""
    if inputs.kl is not None and spec.kl_reduction == "mean":
        raise ValueError(
            'kl_reduction: got "mean" with kl given, which does not say the number of latents to divide by; '
            "give mu and logvar instead, or another reduction"
        )
    return _prepare(inputs, log_variance, log_scale, capacity, spec, process_group, impl)


def _prepare(
    inputs: Inputs,
    log_variance: float | Tensor | str,
    log_scale: float | Tensor,
    capacity: float | Tensor | None,
    spec: Spec,
    process_group: ProcessGroup | None,
    impl: Impl,
) -> _Call:
    """Check the tensors of a call; put numbers in the place of what depends on the batch's totals."""
    extents = elbo_extents(inputs)
    scale = check_scale(log_variance, log_scale, spec)
    if isinstance(scale, str):
        scale = totals.best_log_variance(inputs, extents, process_group, impl)
        # of other ranks' data there is nothing here to differentiate through
        spec = replace(spec, best_variance=process_group is None)
    form = scale_form(scale, "log_scale" if spec.likelihood == "laplace" else "log_variance", inputs, extents)
    if form != spec.scale_form:
        spec = replace(spec, scale_form=form)
    added = None
    if spec.free_bits is not None:
        if inputs.kl is not None:
            raise ValueError("free_bits: given with kl, expected mu and logvar, whose KL is by latent")
        if spec.free_bits_form == "batch":
            beta, added = totals.floored_beta(inputs, spec, extents, process_group, impl)
            inputs, spec = inputs._replace(beta=beta), replace(spec, free_bits=None)
    if capacity is not None:
        if isinstance(inputs.beta, Tensor) and inputs.beta.numel() != 1:
            shape = tuple(inputs.beta.shape)
            raise ValueError(f"beta: got shape {shape} with capacity, expected one value")
        beta, added = totals.signed_beta(inputs, spec, extents, capacity, process_group, impl)
        inputs = inputs._replace(beta=beta)
    return _Call(Inputs(*inputs[:7], scale), spec, extents, added)


def sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    first_row: int = 0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw z from the posterior N(mu, diag(exp(logvar))) and compute its KL to N(0, I).

    z = mu + exp(logvar / 2) * eps (Kingma and Welling 2014, section 2.4). eps is a pure function of (seed,
    offset, place in the batch), from Philox4x32-10.

    Args:
        mu, logvar: [B, *latents].
        n_samples: K samples a datum lead the shape of z; None draws one without that dimension. Sample k
            uses offset + k.
        generator: where the seed is drawn from, if none is given; None is torch's own on mu's device.
        seed: 64 bits, an int (from -2**63 to 2**64 - 1, where s and s - 2**64 are one) or an int64 tensor of
            one element; the same seed gives the same noise everywhere.
        offset: which stream of that seed, 64 bits likewise.
        first_row: the place of mu[0] in the global batch, at least 0, so that a batch split over ranks draws
            the noise of the whole.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        z, [B, *latents] or [K, B, *latents] in mu's dtype, and the KL in nats, [B], float32 (float64 for
        float64 inputs).

    Raises:
        ValueError, TypeError: as for `elbo`.
    """
    batch, latents = latent_extents(mu, logvar)
    if n_samples is not None and (n_samples := check_integer("n_samples", n_samples)) < 1:
        raise ValueError(f"n_samples: got {n_samples}, expected at least 1")
    drawn = seed_for(mu, generator) if seed is None else seed
    seed, offset, first_row = check_noise(drawn, offset, first_row)
    spec = _SAMPLE if offset == first_row == 0 else replace(_SAMPLE, offset=offset, first_row=first_row)
    extents = Extents(n_samples or 1, batch, 0, latents)
    result = run(Inputs(mu=mu, logvar=logvar, seed=seed), spec, extents, impl)
    z, kl = cast("tuple[Tensor, Tensor]", result[3:])
    lead = () if n_samples is None else (n_samples,)
    shape = (*lead, *mu.shape)
    return (z if z.shape == shape else z.reshape(shape)), kl


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    first_row: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """`sample_and_kl` without the KL: z = mu + exp(logvar / 2) * eps."""
    return sample_and_kl(
        mu,
        logvar,
        n_samples=n_samples,
        generator=generator,
        seed=seed,
        offset=offset,
        first_row=first_row,
        impl=impl,
    )[0]


def fused_elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    weight: Tensor | None = None,
    likelihood: Likelihood = "mse",
    beta: float | Tensor = 1.0,
    log_variance: float | Tensor | Literal["batch"] = 0.0,
    log_scale: float | Tensor = 0.0,
    reduction: Reduction = "batchmean",
    recon_reduction: Reduction | None = None,
    kl_reduction: Reduction | None = None,
    half: bool = False,
    full: bool = True,
    from_logits: bool = True,
    logvar_clamp: tuple[float, float] | None = None,
    free_bits: float | None = None,
    free_bits_form: FreeBitsForm = "batch",
    capacity: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    first_row: int = 0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sampling, KL and reconstruction in one launch, where x_hat is already at hand.

    Arguments are those of `elbo` and `sample_and_kl`. K samples of x_hat, [K, B, *features], give K samples
    of z.

    Returns:
        (loss, z, kl): the loss as in `elbo`; z and the KL of each datum, [B], as in `sample_and_kl`.
    """
    spec = make_spec(
        likelihood, reduction, recon_reduction, kl_reduction, half, full, from_logits, logvar_clamp,
        free_bits, free_bits_form,
    )  # fmt: skip
    given = Inputs(x_hat, x, mu, logvar, None, weight, beta)
    check_capacity(capacity, spec)
    inputs, spec, extents, added = _prepare(
        given, log_variance, log_scale, capacity, spec, process_group, impl
    )
    drawn = seed_for(mu, generator) if seed is None else seed
    seed, offset, first_row = check_noise(drawn, offset, first_row)
    inputs = inputs._replace(seed=seed)
    result = run(inputs, replace(spec, sample=True, offset=offset, first_row=first_row), extents, impl)
    loss, _, _, z, kl = cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", result)
    # one sample of one datum is told from one datum by the dimension that x does not have
    is_single = extents.samples == 1 and x_hat.shape[0] == extents.batch and x_hat.shape != (1, *x.shape)
    lead = () if is_single else (extents.samples,)
    return loss if added is None else loss + added, z.reshape(*lead, *mu.shape), kl
