"""The aggregate posterior q(z) = mean of q(z|x) over the data: its moments, its KL to the prior, and I(x; z).

Source: Hoffman and Johnson 2016, "ELBO surgery": the mean KL of the posteriors to the prior is the mutual
information of x and z under q plus KL(q(z) || p(z)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import reparameterize
from ..ops.reference import kl_elements

MIXTURE = 10_000  # data of a mixture, whose cost grows with their square
LARGEST_COVARIANCE = 256  # latents
_KEPT = 1 << 27  # elements of the mixture's data
_STREAM = 1 << 62  # of the noise that chooses them, past the draws of any posterior
# A posterior that is narrower is as good as a point, and float64 would lose it in z^2 / sigma^2.
_SMALLEST_LOGVAR = -25.0
_ROWS, _COLUMNS = 256, 2048  # of densities at a time


@dataclass(frozen=True)
class Aggregate:
    """Figures of q(z); tensors are float64 on the CPU, of the latents in one row [Z].

    n_data: N, over which mean and covariance are taken.
    mean, std: of z under q(z), [Z].
    covariance: of z under q(z), [Z, Z]; None where Z > 256.
    kl: KL(q(z|x) || p(z)) averaged over all data, in nats: the sum of the next two.
    mutual_information: I(x; z) in nats, at most ln of n_mixture.
    kl_to_prior: KL(q(z) || p(z)) in nats.
    error: the standard error of these two, that the choice of data and the draws of z make; NaN for one.
    n_mixture: M. Both are of the mixture of the posteriors of M data, each of which also gives one z. For the
        aggregate posterior of these M data that is unbiased. As an estimate for more data it has a bias:
        since the posterior that has made z is part of the mixture, I(x; z) comes out too small, certainly
        where it is near ln M, and KL(q(z) || p(z)) too large by as much.
    """

    n_data: int
    mean: Tensor
    std: Tensor
    covariance: Tensor | None
    kl: float
    mutual_information: float
    kl_to_prior: float
    error: float
    n_mixture: int


class AggregatePosterior:
    """Gathers q(z) from the posteriors of all data, batch by batch, on their device, without a sync.

    The result does not depend on batches.

    n_mixture: the data, drawn by `seed`, whose posteriors make the mixture; None is all, but at most 10,000,
        and fewer where there are very many latents.
    """

    def __init__(self, n_mixture: int | None = None, seed: int = 0) -> None:
        if n_mixture is not None and n_mixture < 1:
            raise ValueError(f"n_mixture: got {n_mixture}, expected at least 1")
        self.n_mixture, self.seed = n_mixture, seed
        self.count = 0
        self._kl = self._mean = self._scatter = self._noise = torch.zeros((), dtype=torch.float64)
        self._kept: list[Tensor] | None = None  # priority, place, mu, logvar, eps

    def update(self, mu: Tensor, logvar: Tensor, first_row: int | None = None) -> None:
        """Take in the posteriors of a batch: [B, *latents] each; first_row: their place among the data."""
        if len(mu) == 0:
            return
        place = self.count if first_row is None else first_row
        mu, logvar = mu.detach().flatten(1), logvar.detach().flatten(1)
        self._kl = self._kl.to(mu.device) + kl_elements(mu, logvar).sum(dtype=torch.float64)
        self._keep(mu, logvar, place)
        self._merge(mu.double(), logvar.double())

    def result(self) -> Aggregate:
        """The figures of all that was taken in. Raises ValueError for no data."""
        if self._kept is None:
            raise ValueError("AggregatePosterior: got no posteriors, expected those of at least one datum")
        latents = self._mean.shape[0]
        within, between = self._noise / self.count, self._scatter / self.count
        full = between.ndim == 2
        covariance = between + torch.diag(within) if full else None
        variance = between.diagonal() + within if full else between + within
        _, place, mu, logvar, eps = self._kept
        order = place.argsort()
        mu, logvar, eps = (t[order].double() for t in (mu, logvar, eps))
        logvar = logvar.clamp(min=_SMALLEST_LOGVAR)
        z = mu + torch.exp(0.5 * logvar) * eps
        constant = 0.5 * latents * math.log(2 * math.pi)
        own = -0.5 * (eps.square() + logvar).sum(1) - constant
        information = own - log_mixture(z, mu, logvar)
        # ln q(z|x) - ln p(z) less its expectation, which takes the noise out where q(z) is near p(z)
        prior = -0.5 * z.square().sum(1) - constant
        information = _controlled(information, own - prior - kl_elements(mu, logvar).sum(1))
        n = len(information)
        mutual = information.mean().item()
        kl = self._kl.item() / self.count
        return Aggregate(
            n_data=self.count,
            mean=self._mean.cpu(),
            std=variance.sqrt().cpu(),
            covariance=None if covariance is None else covariance.cpu(),
            kl=kl,
            mutual_information=mutual,
            kl_to_prior=kl - mutual,
            error=information.std().item() / math.sqrt(n) if n > 1 else math.nan,
            n_mixture=n,
        )

    def _keep(self, mu: Tensor, logvar: Tensor, place: int) -> None:
        """Keep those of all data so far that come first in an order drawn by the seed."""
        one, zeros = mu.new_zeros(len(mu), 1), torch.zeros_like(mu)
        priority = reparameterize(one, one, seed=self.seed, offset=_STREAM, first_row=place)[:, 0]
        places = torch.arange(place, place + len(mu), device=mu.device)
        eps = reparameterize(zeros, zeros, seed=self.seed, first_row=place)
        kept = [priority, places, mu, logvar, eps]
        if self._kept is not None:
            kept = [torch.cat(pair) for pair in zip(self._kept, kept, strict=True)]
        limit = self.n_mixture or max(2, min(MIXTURE, _KEPT // (3 * mu.shape[1])))
        if len(priority := kept[0]) > limit:
            chosen = priority.topk(limit, largest=False).indices
            kept = [t[chosen] for t in kept]
        self._kept = kept

    def _merge(self, mu: Tensor, logvar: Tensor) -> None:
        """Add to mean and scatter as Chan, Golub and LeVeque 1979 do."""
        n, before = len(mu), self.count
        self.count = before + n
        mean = mu.mean(0)
        centred = mu - mean
        delta = mean - self._mean.to(mu.device)
        weight = before * n / self.count
        if mu.shape[1] <= LARGEST_COVARIANCE:
            scatter = (
                centred.T @ centred + weight * torch.outer(delta, delta) if before else centred.T @ centred
            )
        else:
            scatter = centred.square().sum(0) + (weight * delta.square() if before else 0.0)
        self._mean = self._mean.to(mu.device) + delta * (n / self.count)
        self._scatter = self._scatter.to(mu.device) + scatter
        self._noise = self._noise.to(mu.device) + logvar.exp().sum(0)


def _controlled(values: Tensor, control: Tensor) -> Tensor:
    """`values` less the multiple of `control`, of expectation 0, that makes them vary least."""
    spread = control.square().sum()
    slope = ((values - values.mean()) * control).sum() / spread if spread > 0 else 0.0
    return values - slope * control


def log_mixture(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """ln of the mean over m of N(z; mu_m, exp(logvar_m)): z [N, Z], mu and logvar [M, Z] -> [N], float64.

    The density of each pair is one matrix product, in blocks: memory does not grow with N x M.
    """
    z, mu, logvar = z.double(), mu.double(), logvar.double()
    precision = torch.exp(-logvar)
    points = torch.cat((z.square(), z), 1)
    factors = torch.cat((-0.5 * precision, mu * precision), 1)
    constants = -0.5 * (mu.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    rows = []
    for some in points.split(_ROWS):
        total = torch.full((len(some),), -math.inf, dtype=torch.float64, device=z.device)
        for factor, constant in zip(factors.split(_COLUMNS), constants.split(_COLUMNS), strict=True):
            total = torch.logaddexp(total, torch.addmm(constant, some, factor.T).logsumexp(1))
        rows.append(total)
    return torch.cat(rows) - math.log(len(mu))
