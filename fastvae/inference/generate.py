"""Data made by a model: draws, reconstructions, and what encoder and decoder make of batches.

But for the rounding of float32 nothing depends on the batch size: noise is a function of the seed and of a
datum's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models import VAE, as_model
from ..models.model import decode_mean, evaluating, likelihood_of, log_variance_of
from ..ops import elbo, reparameterize
from .evaluate import inputs

if TYPE_CHECKING:
    from .evaluate import Batch

BATCH_SIZE = 256
X_STREAM = 1  # of the seed's noise; 0 is that of z


def sample(
    model: nn.Module,
    n: int,
    *,
    latent_shape: Sequence[int] | None = None,
    temperature: float = 1.0,
    draw_x: bool = False,
    seed: int = 0,
) -> Tensor:
    """The means of p(x|z), or draws of it, for n draws z of the prior N(0, I): float32 [n, *item] on the CPU.

    latent_shape: that of one z; None for VAE.mlp and VAE.conv, which know it. Raises ValueError for None and
    another model. temperature: a factor of the prior's standard deviation. draw_x: as in `decode`.
    """
    if latent_shape is None:
        if not isinstance(model, VAE) or model.config is None:
            got = "None for a model other than VAE.mlp and VAE.conv"
            raise ValueError(f"latent_shape: got {got}, expected the shape of one z")
        latent_shape = (model.config["latent_dim"],)
    z = draw_prior(n, latent_shape, temperature=temperature, seed=seed)
    return torch.cat(list(decode(model, z.split(BATCH_SIZE), draw_x=draw_x, seed=seed)))


def draw_prior(n: int, latent_shape: Sequence[int], *, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """n draws z of the prior, its standard deviation times `temperature`: float32 [n, *latent_shape]."""
    generator = torch.Generator().manual_seed(seed)
    return temperature * torch.randn(n, *latent_shape, generator=generator, device="cpu")


def encode(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    draw: bool = False,
    logvar_clamp: tuple[float, float] | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """The latents of each batch x [B, *item] or (x, y), in eval mode: float32 [B, *latent] on the CPU.

    draw: a draw of the posterior q(z|x) for each datum, with its log variance within `logvar_clamp`, in the
        place of its mean.
    """
    model, device, first_row = as_model(model), _device(model), 0
    for x in inputs(batches, device):
        with torch.no_grad(), evaluating(model):
            z, logvar = model.encode(x)
            if draw:
                logvar = logvar if logvar_clamp is None else logvar.clamp(*logvar_clamp)
                z = reparameterize(z, logvar, seed=seed, first_row=first_row)
        first_row += len(x)
        yield z.float().cpu()


def decode(
    model: nn.Module, batches: Iterable[Tensor], *, draw_x: bool = False, seed: int = 0
) -> Iterator[Tensor]:
    """The mean of p(x|z) for each batch z [B, *latent], in eval mode: float32 [B, *item] on the CPU.

    draw_x: a draw of p(x|z) in its place, under the model's likelihood: a gaussian with its variance, mse as
        the gaussian of variance 1/2 that it is, bernoulli as 0 and 1.
    """
    device, first_row = _device(model), 0
    for z in batches:
        with torch.no_grad(), evaluating(model):
            x = decode_mean(model, z.to(device))
            if draw_x:
                x = _draw_x(model, x, seed, first_row)
        first_row += len(z)
        yield x.float().cpu()


def reconstruct(model: nn.Module, x: Tensor) -> Tensor:
    """The means of p(x|z) at the posterior means z of x [B, *item], in eval mode: as x, on the CPU."""
    (x_hat,) = decode(model, encode(model, [x]))
    return x_hat


def reconstruction_terms(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """-ln p(x|z) of each datum at its posterior mean z, in nats, under mse the squared error: float32 [N].

    batches: x [B, *item] or (x, y) each.
    """
    model, terms = as_model(model), [torch.empty(0)]
    likelihood, log_variance = likelihood_of(model), log_variance_of(model)
    for x in inputs(batches, _device(model)):
        with torch.no_grad(), evaluating(model):
            mu, logvar = model.encode(x)
            x_hat = model.decode(mu)
            all_terms = elbo(
                x_hat, x, mu, logvar, likelihood=likelihood, log_variance=log_variance, reduction="none"
            )
        terms.append(all_terms.recon.cpu())
    return torch.cat(terms)


def _draw_x(model: nn.Module, mean: Tensor, seed: int, first_row: int) -> Tensor:
    """A draw of p(x|z) with that mean, [B, *item]."""
    likelihood = likelihood_of(model)
    if likelihood == "bernoulli":
        zero = torch.zeros_like(mean)
        noise = reparameterize(zero, zero, seed=seed, offset=X_STREAM, first_row=first_row)
        return torch.where(torch.special.ndtr(noise) < mean, 1.0, 0.0)
    half = mean.new_tensor(0.5).log()
    log_variance = half if likelihood == "mse" else torch.as_tensor(log_variance_of(model)).to(mean)
    log_variance = log_variance.expand_as(mean)
    return reparameterize(mean, log_variance, seed=seed, offset=X_STREAM, first_row=first_row)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
