"""The contract's accuracy bar, and the loss as people write it by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def by_hand(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    likelihood: str = "mse",
    beta: float | Tensor = 1.0,
    log_variance: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """(recon, kl) for each datum, [B], from the textbook formulas; x_hat is [B, D] or [K, B, D]."""
    if likelihood == "mse":
        elements = (x_hat - x) ** 2
    elif likelihood == "gaussian":
        s = torch.as_tensor(log_variance, dtype=x_hat.dtype)
        elements = 0.5 * ((x_hat - x) ** 2 / s.exp() + s + math.log(2 * math.pi))
    else:
        elements = F.binary_cross_entropy_with_logits(x_hat, x.expand_as(x_hat), reduction="none")
    recon = elements.sum(-1)
    recon = recon.mean(0) if x_hat.ndim > x.ndim else recon
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    return recon, (beta * kl).sum(-1)


def assert_accurate(name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """max|error| / max|truth| at most twice float32 eager's, plus one rounding of actual's dtype."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    got = actual.double()
    assert torch.isfinite(got).all(), f"{name}: not finite"
    size = truth.abs().max().clamp_min(1e-300)
    error = ((got - truth).abs().max() / size).item()
    reached = ((eager.double() - truth).abs().max() / size).item() if torch.isfinite(eager).all() else 0.0
    # eager may hit a few numbers exactly, by luck
    bar = 2 * max(reached, 2 * torch.finfo(torch.float32).eps)
    rounding = torch.finfo(actual.dtype).eps
    assert error <= bar + rounding, f"{name}: error {error:.3e}, eager allows {bar:.3e} + {rounding:.3e}"
