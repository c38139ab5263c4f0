"""The operators as functions."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .checks import check_log_variance, elbo_extents, latent_extents, make_spec
from .dispatch import run, seed_for
from .types import ELBOTerms, Extents, Impl, Inputs, Likelihood, Reduction, Spec

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
    log_variance: float | Tensor = 0.0,
    reduction: Reduction = "batchmean",
    recon_reduction: Reduction | None = None,
    kl_reduction: Reduction | None = None,
    half: bool = False,
    logvar_clamp: tuple[float, float] | None = None,
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
        likelihood: "mse", the sum of squared errors; "gaussian", -log N(x; x_hat, exp(log_variance)) with
            its constants; "bernoulli", the cross entropy of x in [0, 1] from logits.
        beta: factor of the KL term: a float, a 0-d tensor, or one value for each latent.
        log_variance: the log of the Gaussian likelihood's variance, a float or a 0-d tensor.
        reduction: "batchmean" divides by B, "mean" by the number of elements (B * D, B * Z), "sum" by
            nothing; "none" gives [B], summed over features. An empty batch gives 0.
        recon_reduction, kl_reduction: the same for one term alone.
        half: "mse" with the factor 1/2.
        logvar_clamp: (low, high) bounds of logvar, with a zero gradient outside.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        ELBOTerms(loss, recon, kl), float32 (float64 for float64 inputs), scalars or [B]. Each term is
        differentiable with respect to every tensor that is given.

    Raises:
        ValueError, TypeError: an argument has another shape, dtype or value than stated here.
        RuntimeError: the named implementation cannot run on these tensors.
    """
    spec = make_spec(likelihood, reduction, recon_reduction, kl_reduction, half, logvar_clamp)
    return elbo_from_spec(x_hat, x, mu, logvar, kl, weight, beta, log_variance, spec, impl)


def elbo_from_spec(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    weight: Tensor | None,
    beta: float | Tensor,
    log_variance: float | Tensor,
    spec: Spec,
    impl: Impl,
) -> ELBOTerms:
    """`elbo` with its choices already checked."""
    extents = elbo_extents(x_hat, x, mu, logvar, kl, weight, beta)
    check_log_variance(log_variance, spec)
    if kl is not None and spec.kl_reduction == "mean":
        raise ValueError(
            'kl_reduction: got "mean" with kl given, which does not say the number of latents to divide by; '
            "give mu and logvar instead, or another reduction"
        )
    inputs = Inputs(x_hat, x, mu, logvar, kl, weight, beta, log_variance)
    result = run(inputs, spec, extents, impl)
    return ELBOTerms(*cast("tuple[Tensor, Tensor, Tensor]", result[:3]))


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
        seed: 64 bits, an int or an int64 tensor; the same seed gives the same noise everywhere.
        offset: which stream of that seed.
        first_row: the place of mu[0] in the global batch, so that a batch split over ranks draws the
            noise of the whole.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        z, [B, *latents] or [K, B, *latents] in mu's dtype, and the KL in nats, [B], float32 (float64 for
        float64 inputs).

    Raises:
        ValueError, TypeError: as for `elbo`.
    """
    batch, latents = latent_extents(mu, logvar)
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples: got {n_samples}, expected at least 1")
    spec = _SAMPLE if offset == first_row == 0 else replace(_SAMPLE, offset=offset, first_row=first_row)
    extents = Extents(n_samples or 1, batch, 0, latents)
    if seed is None:
        seed = seed_for(mu, generator)
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
    log_variance: float | Tensor = 0.0,
    reduction: Reduction = "batchmean",
    recon_reduction: Reduction | None = None,
    kl_reduction: Reduction | None = None,
    half: bool = False,
    logvar_clamp: tuple[float, float] | None = None,
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
    choices = make_spec(likelihood, reduction, recon_reduction, kl_reduction, half, logvar_clamp)
    spec = replace(choices, sample=True, offset=offset, first_row=first_row)
    extents = elbo_extents(x_hat, x, mu, logvar, None, weight, beta)
    check_log_variance(log_variance, spec)
    if seed is None:
        seed = seed_for(mu, generator)
    inputs = Inputs(x_hat, x, mu, logvar, None, weight, beta, log_variance, seed)
    result = run(inputs, spec, extents, impl)
    loss, _, _, z, kl = cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", result)
    lead = () if x_hat.shape[0] == extents.batch and extents.samples == 1 else (extents.samples,)
    return loss, z.reshape(*lead, *mu.shape), kl
