"""How much each latent says of the data: its KL, and the spread of its posterior mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.reference import kl_elements

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ACTIVE = 0.01  # variance of a posterior mean over the data; Burda et al. 2016, section 5.2


class LatentStatistics:
    """Gathered from the posteriors of all data, batch by batch, in float64 on their device, without a sync.

    Variances are merged as by Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances", without the cancellation of a sum of squares.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kl = self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, mu: Tensor, logvar: Tensor) -> None:
        """Take in the posteriors of a batch: [B, *latents] each."""
        if len(mu) == 0:
            return
        mu, logvar = mu.detach().flatten(1), logvar.detach().flatten(1)
        kl = kl_elements(mu, logvar).sum(0, dtype=torch.float64)
        variance, mean = torch.var_mean(mu.double(), 0, correction=0)
        self._merge(len(mu), kl, mean, variance * len(mu))

    def gather(self, process_group: ProcessGroup) -> None:
        """Make these the statistics of the data of all ranks; each calls it."""
        own = (self.count, *(part.cpu() for part in (self._kl, self._mean, self._squares)))
        parts: list[Any] = [None] * process_group.size()
        dist.all_gather_object(parts, own, group=process_group)
        self.count = 0
        for part in parts:
            if part[0] > 0:
                self._merge(*part)

    def _merge(self, count: int, kl: Tensor, mean: Tensor, squares: Tensor) -> None:
        """Add `count` data: their sum of KL, their mean of mu, and their sum of squares around it."""
        if self.count == 0:
            self.count, self._kl, self._mean, self._squares = count, kl, mean, squares
            return
        total = self.count + count
        delta = mean - self._mean
        self._kl = self._kl + kl
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + delta**2 * (self.count * count / total)
        self.count = total

    @property
    def kl(self) -> Tensor:
        """The KL of each latent to its prior N(0, 1), averaged over the data: float64 [Z], in nats."""
        return self._kl / self.count

    @property
    def mean_variance(self) -> Tensor:
        """The variance of each latent's posterior mean over the data, Var_x E_q[z_j|x]: float64 [Z]."""
        return self._squares / self.count

    @property
    def active_units(self) -> int:
        """The latents whose posterior mean varies by more than 0.01 (Burda et al. 2016, section 5.2)."""
        return int((self.mean_variance > ACTIVE).sum())


class Moments:
    """Mean and standard deviation of all numbers of many batches, in float64, merged as above."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def update(self, values: Tensor) -> None:
        """Take in the numbers of a tensor."""
        n, mean_and_variance = values.numel(), torch.var_mean(values.double(), correction=0)
        if n == 0:
            return
        variance, mean = (float(moment) for moment in mean_and_variance)
        total, delta = self.count + n, mean - self.mean
        self.mean += delta * n / total
        self._squares += variance * n + delta**2 * (self.count * n / total)
        self.count = total

    @property
    def std(self) -> float:
        """The square root of the mean squared distance from the mean; NaN of no numbers."""
        return math.sqrt(self._squares / self.count) if self.count else math.nan
