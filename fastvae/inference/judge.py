"""How good a model is, in one pass over data: its bounds on ln p(x), its latents, its reconstructions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.model import as_model, decode_mean, likelihood_of, log_variance_of
from ..ops import reparameterize
from .aggregate import Aggregate, AggregatePosterior
from .evaluate import Batch
from .importance import EvaluationError, ImportanceSampler, LogLikelihood, posteriors
from .latents import LatentStatistics

_STREAM = (1 << 62) + 1  # of the uniform noise, past the draws of any posterior


@dataclass(frozen=True)
class Judgement:
    """All figures of a model on some data.

    likelihood: p(x|z), "mse" being N(x_hat, I / 2). variance: of a gaussian one, where it is one number.
    log_likelihood: L_K and the ELBO with their errors. latents: KL and activity of each. aggregate: of q(z).
    squared_error: |x - E[x|z]|^2 at the posterior mean z, averaged over the data.
    levels: s of data made x = (k + u) / s; None where no noise was added.
    """

    likelihood: str
    variance: float | None
    log_likelihood: LogLikelihood
    latents: LatentStatistics
    aggregate: Aggregate
    squared_error: float
    levels: int | None

    @property
    def bits_per_dimension(self) -> float | None:
        """See `LogLikelihood.bits_per_dimension`; None where p(x) is a density of data without noise.

        These are the data of continuous likelihoods without `levels`: a density at points of a grid may be
        as large as one likes, and says nothing of bits.
        """
        if self.levels is None and self.likelihood != "bernoulli":
            return None
        return self.log_likelihood.bits_per_dimension(self.levels)

    def figures(self) -> dict[str, Any]:
        """Everything but what is of single data, for JSON: numbers in nats, None for what is not defined."""
        bound, aggregate = self.log_likelihood, self.aggregate
        n, kl = len(bound.log_px), bound.kl.mean().item()
        elbo = bound.elbo.mean().item()
        bits = self.bits_per_dimension
        covariance = aggregate.covariance
        per_bit = bound.features * math.log(2)
        return {
            "n_data": n,
            "features": bound.features,
            "likelihood": self.likelihood,
            "variance": self.variance,
            "elbo": elbo,
            "elbo_monte_carlo_error": _number(bound.elbo_error),
            "elbo_data_error": _number(bound.elbo_data_error),
            "reconstruction": elbo + kl,
            "kl": kl,
            "importance_samples": bound.n_samples,
            "log_likelihood": bound.estimate,
            "log_likelihood_monte_carlo_error": _number(bound.monte_carlo_error),
            "log_likelihood_data_error": _number(bound.data_error),
            "log_likelihood_bias": _number(bound.bias),
            "effective_samples": bound.effective_samples.mean().item(),
            "inference_gap": bound.gap,
            "levels": self.levels,
            "bits_per_dimension": bits,
            "bits_per_dimension_data_error": None if bits is None else _number(bound.data_error / per_bit),
            "active_units": self.latents.active_units,
            "kl_by_latent": self.latents.kl.tolist(),
            "mean_variance_by_latent": self.latents.mean_variance.tolist(),
            "aggregate_mean": aggregate.mean.tolist(),
            "aggregate_std": aggregate.std.tolist(),
            "aggregate_covariance": None if covariance is None else covariance.tolist(),
            "aggregate_kl_to_prior": aggregate.kl_to_prior,
            "mutual_information": aggregate.mutual_information,
            "mutual_information_monte_carlo_error": _number(aggregate.error),
            "mutual_information_limit": math.log(aggregate.n_mixture),
            "aggregate_n_mixture": aggregate.n_mixture,
            "squared_error": self.squared_error,
            "mean_squared_error": self.squared_error / bound.features,
        }


@torch.no_grad()
def judge(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    n_samples: int = 100,
    seed: int = 0,
    logvar_clamp: tuple[float, float] | None = None,
    levels: int | None = None,
    n_mixture: int | None = None,
) -> Judgement:
    """Evaluate `model` on all data, in eval mode and in the precision of the data.

    model: one with `encode` and `decode`, as VAE.
    batches: x [B, *item] or (x, y) each; binary under "bernoulli", as by a DataLoader with
        transform=Transform(binarize=True, fixed=True). All noise of a datum depends on `seed` and on the
        datum's place among the data, not on the batch size.
    n_samples: K of the importance-weighted bound.
    logvar_clamp: bounds of the posterior's log variance, as in training.
    levels: s of data x = k / s with integers k, such as 255 for pixels: evaluate x + u / s instead, u uniform
        on [0, 1), which makes bits per dimension of a density (Theis et al. 2016, section 3.1).
    n_mixture: how many of the data make the mixture that estimates q(z); see `AggregatePosterior`.

    Raises ValueError for no data, ModelError for a model without encode and decode, EvaluationError where the
    data do not go with the likelihood or with `levels`, or the model's numbers are not finite.
    """
    likelihood = likelihood_of(as_model(model))
    if levels is not None and (levels < 1 or likelihood == "bernoulli"):
        expected = "at least 1, for a likelihood with a density"
        raise EvaluationError(f"levels: got {levels} with likelihood {likelihood}, expected {expected}")

    def prepare(x: Tensor, first_row: int) -> Tensor:
        if likelihood == "bernoulli":
            _check_binary(x, first_row)
        return x if levels is None else dequantized(x, levels, seed, first_row)

    sampler = ImportanceSampler(model, n_samples, seed)
    latents, aggregate = LatentStatistics(), AggregatePosterior(n_mixture, seed)
    squares = torch.zeros((), dtype=torch.float64)
    for first_row, x, mu, logvar in posteriors(model, batches, logvar_clamp, prepare):
        sampler.update(x, mu, logvar, first_row)
        latents.update(mu, logvar)
        aggregate.update(mu, logvar, first_row)
        error = (x - decode_mean(model, mu).view_as(x)).double()
        squares = squares.to(x.device) + error.square().sum()
    bounds = sampler.result()
    log_variance = log_variance_of(model)
    one = likelihood == "gaussian" and torch.as_tensor(log_variance).numel() == 1
    return Judgement(
        likelihood,
        math.exp(float(log_variance)) if one else None,
        bounds,
        latents,
        aggregate.result(),
        squares.item() / len(bounds.log_px),
        levels,
    )


def dequantized(x: Tensor, levels: int, seed: int, first_row: int = 0) -> Tensor:
    """x + u / levels for x [B, *item] that are integers / levels, u uniform on [0, 1) by seed and place.

    Raises EvaluationError for other x.
    """
    k = x * levels
    near = k.round()
    off = ((k - near).abs() > 1e-6 * near.abs().clamp(min=1)).flatten(1).any(1)
    if off.any():
        place = int(off.nonzero()[0])
        got = x[place].flatten()[int((k - near).abs()[place].argmax())].item()
        raise EvaluationError(
            f"levels: got {got:g} in datum {first_row + place}, expected an integer / {levels}"
        )
    zeros = torch.zeros_like(x)
    normal = reparameterize(zeros, zeros, seed=seed, offset=_STREAM, first_row=first_row)
    uniform: Tensor = torch.special.ndtr(normal)
    uniform = uniform.clamp(max=1 - torch.finfo(x.dtype).eps)  # of which rounding would make a 1
    return (near + uniform) / levels


def _check_binary(x: Tensor, first_row: int) -> None:
    other = (x != 0) & (x != 1)
    if other.any():
        place = int(other.flatten(1).any(1).nonzero()[0])
        got = f"got {x[other][0].item():g} in datum {first_row + place} under the bernoulli likelihood"
        raise EvaluationError(
            f"data: {got}, which gives probabilities to 0 and 1 alone; expected binary data, as of a "
            "DataLoader with transform=Transform(binarize=True, fixed=True)"
        )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
