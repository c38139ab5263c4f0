"""ln w of draws of the posterior, w = p(x, z) / q(z|x), as a function of the noise in z = mu + sigma eps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..models.model import Model, likelihood_of, log_variance_of
from ..ops import elbo

# Elements of x_hat that are decoded at a time, and rows: on a CPU they stay in the cache; a GPU wants enough
# to fill it.
_ELEMENTS = {"cpu": 400_000, "cuda": 1 << 25}
_ROWS = {"cpu": 1024, "cuda": 1 << 16}

LogWeights = Callable[[Tensor], Tensor]  # of eps [n, B, *latents]: ln w, float64 [n, B]


class Weigher:
    """By decoding every z, of any model. ln p(x|z) under "mse" is here without its constant."""

    def __init__(self, model: Model) -> None:
        self.decode = model.decode
        self.likelihood, self.log_variance = likelihood_of(model), log_variance_of(model)

    def tile(self, x: Tensor) -> tuple[int, int]:
        """How many data of x [B, *item] to take at a time, and how many draws of all of these together."""
        kind = x.device.type if x.device.type in _ROWS else "cuda"
        rows = max(1, min(_ROWS[kind], _ELEMENTS[kind] // max(self.width(x), 1)))
        return rows, rows

    def near(self, x: Tensor, mu: Tensor, logvar: Tensor) -> LogWeights:
        """ln w of any draws of these data, x [B, *item] with posteriors [B, *latents]."""
        target, rest = self.target(x)
        sigma = torch.exp(0.5 * logvar)
        repeated = target

        def log_weights(eps: Tensor) -> Tensor:
            nonlocal repeated
            n = len(eps)
            if len(repeated) < n * len(mu):
                repeated = target.repeat(n, *[1] * (target.ndim - 1))
            z = torch.addcmul(mu, sigma, eps)
            # ln q(z|x) - ln p(z), where the constants cancel
            ratio = 0.5 * (((z - eps) * (z + eps)).flatten(2).sum(2) - logvar.flatten(1).sum(1))
            negative = elbo(
                self.decode(z.flatten(0, 1)),
                repeated[: n * len(mu)],
                kl=ratio.flatten(),
                likelihood=self.likelihood,
                log_variance=self.log_variance,
                reduction="none",
            ).loss
            return -(negative.double().view(n, len(mu)) + rest)

        return log_weights

    def width(self, x: Tensor) -> int:
        """Elements of what `decode` gives for a datum."""
        return math.prod(x.shape[1:])

    def target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to compare with decode(z), [B, ...], and what -ln p(x|z) has beyond that comparison, [B]."""
        return x, x.new_zeros(len(x), dtype=torch.float64)
