"""Checks of what comes into the operators: an error names the argument, what was got, what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import LIKELIHOODS, REDUCTIONS, Extents, Likelihood, Reduction, Spec


def make_spec(
    likelihood: Likelihood,
    reduction: Reduction,
    recon_reduction: Reduction | None,
    kl_reduction: Reduction | None,
    half: bool,
    logvar_clamp: tuple[float, float] | None,
) -> Spec:
    """Check the choices of `elbo`."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    recon_reduction = reduction if recon_reduction is None else recon_reduction
    kl_reduction = reduction if kl_reduction is None else kl_reduction
    for name, value in (("recon_reduction", recon_reduction), ("kl_reduction", kl_reduction)):
        check_choice(name, value, REDUCTIONS)
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


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_log_variance(log_variance: float | Tensor, spec: Spec) -> None:
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


def latent_extents(mu: Tensor, logvar: Tensor) -> tuple[int, int]:
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


def elbo_extents(
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
        rows, latents = latent_extents(mu, logvar)
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
