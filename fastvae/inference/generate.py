"""Data made by a model: draws from the prior, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models import VAE, as_model
from ..models.model import decode_mean, evaluating


@torch.no_grad()
def sample(model: nn.Module, n: int, *, latent_shape: Sequence[int] | None = None, seed: int = 0) -> Tensor:
    """The means of p(x|z) for n draws z of the prior N(0, I): float32 [n, *item] on the CPU, in eval mode.

    latent_shape: that of one z; None for VAE.mlp and VAE.conv, which know it. Raises ValueError for None and
    another model.
    """
    if latent_shape is None:
        if not isinstance(model, VAE) or model.config is None:
            got = "None for a model other than VAE.mlp and VAE.conv"
            raise ValueError(f"latent_shape: got {got}, expected the shape of one z")
        latent_shape = (model.config["latent_dim"],)
    device = next(model.parameters()).device
    z = torch.randn(n, *latent_shape, generator=torch.Generator().manual_seed(seed))
    with evaluating(model):
        return decode_mean(model, z.to(device)).cpu()


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor) -> Tensor:
    """The means of p(x|z) at the posterior means z of x [B, *item], in eval mode: as x, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        mu, _ = as_model(model).encode(x.to(device))
        return decode_mean(model, mu).cpu()
