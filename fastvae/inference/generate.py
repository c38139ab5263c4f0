"""Data made by a model: draws from the prior, and reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import VAE


@torch.no_grad()
def sample(model: VAE, n: int, *, seed: int = 0) -> Tensor:
    """The means of p(x|z) for n draws z of the prior N(0, I): float32 [n, *item] on the CPU.

    Raises ValueError for a model without a config, whose latent dimension is not known.
    """
    if model.config is None:
        raise ValueError("model: has an encoder and a decoder of its own, expected VAE.mlp or VAE.conv")
    device = next(model.parameters()).device
    z = torch.randn(n, model.config["latent_dim"], generator=torch.Generator().manual_seed(seed))
    return model.decode_mean(z.to(device)).cpu()


@torch.no_grad()
def reconstruct(model: VAE, x: Tensor) -> Tensor:
    """The means of p(x|z) at the posterior means z of x [B, *item]: float32 [B, *item] on the CPU."""
    device = next(model.parameters()).device
    mu, _ = model.encode(x.to(device))
    return model.decode_mean(mu).cpu()
