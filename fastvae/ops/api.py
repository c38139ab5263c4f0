"""The operators as functions: checks of what comes in, and the choice of the implementation."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from . import library, reference
from .autograd import fused_elbo as _differentiable
from .types import LIKELIHOODS, REDUCTIONS, ELBOTerms, Extents, Impl, Likelihood, Reduction, Spec

_SAMPLE = Spec(sample=True)
_IMPLS = ("auto", "reference", "native", "triton")


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
    extents = _elbo_extents(x_hat, x, mu, logvar, kl, weight, beta)
    _check_log_variance(log_variance, spec)
    if kl is not None and spec.kl_reduction == "mean":
        raise ValueError(
            'kl_reduction: got "mean" with kl given, which does not say the number of latents to divide by; '
            "give mu and logvar instead, or another reduction"
        )
    kernels = _kernels(impl, x_hat, mu)
    if kernels is None:
        return ELBOTerms(*reference.elbo(x_hat, x, mu, logvar, kl, weight, beta, log_variance, spec, extents))
    result = _differentiable(
        x_hat, x, mu, logvar, kl, weight, beta, log_variance, None, spec, extents, kernels
    )
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
    batch, latents = _latent_extents(mu, logvar)
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples: got {n_samples}, expected at least 1")
    spec = _SAMPLE if offset == first_row == 0 else replace(_SAMPLE, offset=offset, first_row=first_row)
    extents = Extents(n_samples or 1, batch, 0, latents)
    if seed is None:
        seed = _seed(mu, generator)
    kernels = _kernels(impl, mu, mu)
    if kernels is None:
        z, kl = reference.sample_and_kl(mu, logvar, seed, spec, extents)
    else:
        result = _differentiable(None, None, mu, logvar, None, None, 1.0, 0.0, seed, spec, extents, kernels)
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
    extents = _elbo_extents(x_hat, x, mu, logvar, None, weight, beta)
    _check_log_variance(log_variance, spec)
    if seed is None:
        seed = _seed(mu, generator)
    kernels = _kernels(impl, x_hat, mu)
    if kernels is None:
        loss, _, _ = reference.elbo(x_hat, x, mu, logvar, None, weight, beta, log_variance, spec, extents)
        z, kl = reference.sample_and_kl(mu, logvar, seed, spec, extents)
    else:
        result = _differentiable(
            x_hat, x, mu, logvar, None, weight, beta, log_variance, seed, spec, extents, kernels
        )
        loss, _, _, z, kl = cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", result)
    lead = () if x_hat.shape[0] == extents.batch and extents.samples == 1 else (extents.samples,)
    return loss, z.reshape(*lead, *mu.shape), kl


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """64 random bits from torch's generator on `device`, as an int64 tensor there."""
    return torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), 2**63 - 1, generator=generator)


def _seed(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None and torch.compiler.is_compiling():
        return library.draw_seed(like)
    return draw_seed(like.device, generator)


def make_spec(
    likelihood: Likelihood,
    reduction: Reduction,
    recon_reduction: Reduction | None,
    kl_reduction: Reduction | None,
    half: bool,
    logvar_clamp: tuple[float, float] | None,
) -> Spec:
    """Check the choices of `elbo`."""
    _check_choice("likelihood", likelihood, LIKELIHOODS)
    recon_reduction = reduction if recon_reduction is None else recon_reduction
    kl_reduction = reduction if kl_reduction is None else kl_reduction
    for name, value in (("recon_reduction", recon_reduction), ("kl_reduction", kl_reduction)):
        _check_choice(name, value, REDUCTIONS)
    if (recon_reduction == "none") != (kl_reduction == "none"):
        raise ValueError(
            f'recon_reduction and kl_reduction: got "{recon_reduction}" and "{kl_reduction}", expected '
            '"none" for both or for neither, since a [B] and a scalar term have no common sum'
        )
    if half and likelihood != "mse":
        raise ValueError(f'half: got True with likelihood "{likelihood}", expected it with "mse" only')
    if logvar_clamp is not None:
        low, high = (float(bound) for bound in logvar_clamp)
        if not low <= high:
            raise ValueError(f"logvar_clamp: got ({low}, {high}), expected (low, high) with low <= high")
        logvar_clamp = (low, high)
    return Spec(likelihood, recon_reduction, kl_reduction, half, logvar_clamp)


def resolve_impl(impl: Impl, device: torch.device) -> tuple[str, str]:
    """The implementation that `impl` means for tensors on `device`, and why, in a few words.

    Raises:
        ValueError: an unknown name. RuntimeError: a named implementation that cannot run there.
    """
    _check_choice("impl", impl, _IMPLS)
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


def _kernels(impl: Impl, x_hat: Tensor, mu: Tensor | None) -> ModuleType | None:
    """The module that runs on these tensors; None is the reference."""
    device = x_hat.device
    if device.type == "cpu" and (impl == "auto" or impl == "native"):
        from . import native

        return native
    name, _ = resolve_impl(impl, device)
    if name == "reference":
        if impl == "auto" and device.type == "cuda":
            _warn_without_triton()
        return None
    from . import triton

    if x_hat.dtype == torch.float64 or (mu is not None and mu.dtype == torch.float64):
        if impl == "triton":
            raise TypeError('impl: got "triton" with float64 tensors, expected float32, bfloat16 or float16')
        return None
    return triton


def _triton_available() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


_warned_without_triton = False


def _warn_without_triton() -> None:
    global _warned_without_triton
    if not _warned_without_triton:
        _warned_without_triton = True
        warnings.warn(
            "fastvae: triton is not installed, so CUDA tensors use the slower reference; pip install triton",
            stacklevel=4,
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def _check_log_variance(log_variance: float | Tensor, spec: Spec) -> None:
    if isinstance(log_variance, Tensor) and log_variance.numel() != 1:
        raise ValueError(
            f"log_variance: got shape {tuple(log_variance.shape)}, expected a float or one element"
        )
    if spec.likelihood != "gaussian" and (isinstance(log_variance, Tensor) or log_variance != 0):
        raise ValueError(
            f'log_variance: given with likelihood "{spec.likelihood}", expected it with "gaussian" only'
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected a floating-point tensor")


def _latent_extents(mu: Tensor, logvar: Tensor) -> tuple[int, int]:
    """(B, Z) of mu and logvar."""
    _check_floating("mu", mu)
    _check_floating("logvar", logvar)
    if mu.ndim == 0 or (
        mu.shape != logvar.shape
        and (logvar.ndim == 0 or mu.shape[0] != logvar.shape[0] or _row(mu) != _row(logvar))
    ):
        raise ValueError(
            f"mu, logvar: got shapes {tuple(mu.shape)} and {tuple(logvar.shape)}, expected [B, *latents] "
            "with the same number of latents"
        )
    if mu.device != logvar.device:
        raise ValueError(f"mu, logvar: got devices {mu.device} and {logvar.device}, expected the same")
    return mu.shape[0], _row(mu)


def _row(tensor: Tensor) -> int:
    """Elements of one row of the leading dimension."""
    return math.prod(tensor.shape[1:])


def _elbo_extents(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    weight: Tensor | None,
    beta: float | Tensor,
) -> Extents:
    """The sizes of a call, after checking that its arguments agree."""
    _check_floating("x_hat", x_hat)
    if x.ndim == 0 or x_hat.ndim == 0:
        raise ValueError(
            f"x_hat, x: got shapes {tuple(x_hat.shape)} and {tuple(x.shape)}, expected [B, *features]"
        )
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"x: got dtype {x.dtype}, expected a floating-point tensor, or uint8 meaning x / 255")
    batch, features, samples = x.shape[0], _row(x), 1
    if x_hat.shape != x.shape and not (x_hat.shape[0] == batch and _row(x_hat) == features):
        if x_hat.ndim < 2 or x_hat.shape[1] != batch or math.prod(x_hat.shape[2:]) != features:
            raise ValueError(
                f"x_hat: got shape {tuple(x_hat.shape)} for x of shape {tuple(x.shape)}, expected "
                f"[{batch}, ...] or [K, {batch}, ...] with {features} features each"
            )
        samples = x_hat.shape[0]
        if samples == 0:
            raise ValueError("x_hat: got 0 samples (K = 0), expected at least 1")
    latents = 0
    if kl is not None:
        if mu is not None or logvar is not None:
            raise ValueError("kl: given beside mu or logvar, expected either kl or both of mu and logvar")
        if kl.shape != (batch,):
            raise ValueError(f"kl: got shape {tuple(kl.shape)}, expected ({batch},), the KL of each datum")
        latents = 1
    elif mu is None or logvar is None:
        raise ValueError("mu, logvar: expected both, or kl instead of them")
    else:
        rows, latents = _latent_extents(mu, logvar)
        if rows != batch:
            raise ValueError(f"mu: got batch size {rows}, expected {batch} as in x")
    for name, tensor in (("x", x), ("mu", mu), ("kl", kl), ("weight", weight)):
        if tensor is not None and tensor.device != x_hat.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x_hat.device} as for x_hat")
    if weight is not None and weight.shape != (batch,):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected ({batch},), one factor a datum")
    if isinstance(beta, Tensor) and beta.numel() != 1 and (kl is not None or beta.numel() != latents):
        expected = (
            "one value, since kl is given" if kl is not None else f"one value, or {latents}, one a latent"
        )
        raise ValueError(f"beta: got shape {tuple(beta.shape)}, expected {expected}")
    return Extents(samples, batch, features, latents)
