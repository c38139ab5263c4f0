"""The squared error of a decoder with one hidden layer, for many draws of one posterior: few units notice.

What goes into the hidden units is affine in the noise: p = p(mu) + T eps. With the diagonal S of 1 for those
that are on at mu and 0 for the others,

    relu(p) = S p + delta,    delta_j = |p_j| where unit j has flipped: on at mu and off here, or off and on,

and delta_j = 0 for all others. For x_hat = W relu(p) + b, the residual r = x_hat(mu) - x, and J = W S T,

    |x_hat - x|^2 = |r + J eps + W delta|^2
                  = |r|^2 + eps^T J^T (2 r + J eps) + 2 delta^T W^T (r + J eps) + delta^T W^T W delta.

x is met once a datum. For a draw there remain T eps and, as the posterior of a trained model is narrow, a few
rows of W^T J and of W^T W: csrc/flips.hpp. Nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _native
from ..models.model import Model
from ..ops import elbo
from .weigh import LogWeights, Weigher

_ELEMENTS = 1 << 20  # of T, and of noise, at a time: they stay in the cache
_DRAWS = 4  # for each latent, for which it pays to compute what that does to the units


class FlipWeigher(Weigher):
    """By the units that flip, on a CPU in float32.

    Of a model under "mse" or one variance, whose decoder is `first`, ReLU and `last`.
    """

    def __init__(self, model: Model, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__(model)
        columns = _native.FLIP_COLUMNS
        unused = (0, -first.out_features % columns)  # units that are never on
        weights = (first.weight.T, first.bias, last.weight)
        self.first, self.first_bias, self.last = (F.pad(w.detach(), unused) for w in weights)
        self.last_bias = last.bias.detach()
        # of the squared error in -ln p(x|z)
        self.factor = 1.0 if self.likelihood == "mse" else 0.5 * math.exp(-float(self.log_variance))
        gram = self.factor * (self.last.double().T @ self.last.double())
        self.gram = gram.float()
        upper = (2 * gram).triu(1) + gram.diag().diag()
        self.strips = upper.float().unflatten(1, (-1, columns)).transpose(0, 1).contiguous()

    @classmethod
    def of(
        cls, model: Model, hidden: Sequence[nn.Module], last: nn.Linear, n_samples: int
    ) -> FlipWeigher | None:
        """None where it cannot do with these layers before the last, or does not pay for so many draws."""
        if len(hidden) != 2 or type(first := hidden[0]) is not nn.Linear or type(hidden[1]) is not nn.ReLU:
            return None
        native = first.weight.dtype == torch.float32 and first.weight.device.type == "cpu"
        if not native or first.bias is None or n_samples < _DRAWS * first.in_features:
            return None
        return cls(model, first, last)

    def tile(self, x: Tensor) -> tuple[int, int]:
        latents, units = self.first.shape
        return max(1, _ELEMENTS // (latents * units)), max(1, _ELEMENTS // latents)

    def near(self, x: Tensor, mu: Tensor, logvar: Tensor) -> LogWeights:
        sigma = torch.exp(0.5 * logvar).to(mu.dtype)
        p = torch.addmm(self.first_bias, mu, self.first)
        on = (p > 0).to(p.dtype)
        x_hat = torch.addmm(self.last_bias, p * on, self.last.T)
        at_mu = elbo(
            x_hat.double(),
            x.flatten(1).double(),
            kl=0.5 * (mu.double().square() - logvar.double()).sum(1),  # ln q(mu|x) - ln p(mu)
            likelihood=self.likelihood,
            log_variance=self.log_variance,
            reduction="none",
        ).loss
        # a row of constants, then one for each element of eps: of p, and of 2 W^T (r + J eps) times `factor`
        turn = sigma[:, :, None] * self.first
        layer = torch.cat((p[:, None], turn), 1)
        layer *= (1 - 2 * on)[:, None]  # below 0 at mu: what flips is above
        turn *= on[:, None]
        cross = torch.empty_like(layer)
        cross[:, 0] = (x_hat - x.flatten(1)) @ self.last * (2 * self.factor)
        cross[:, 1:] = 2 * (turn.flatten(0, 1) @ self.gram).view_as(turn)
        # J^T (2 r + J eps) times `factor`
        square = torch.bmm(turn, cross.transpose(1, 2))
        square[:, :, 1:] *= 0.5
        # and ln q(z|x) - ln p(z): (|z|^2 - |eps|^2) / 2
        square[:, :, 0] += mu * sigma
        square[:, :, 1:].diagonal(dim1=1, dim2=2).add_(0.5 * torch.expm1(logvar))

        def log_weights(eps: Tensor) -> Tensor:
            more = torch.empty(eps.shape[:2], dtype=torch.float64, device="cpu")
            _native.flips(
                (*eps.shape, p.shape[1]),
                torch.get_num_threads(),
                noise=eps.data_ptr(),
                layer=layer.data_ptr(),
                cross=cross.data_ptr(),
                square=square.data_ptr(),
                gram=self.strips.data_ptr(),
                values=more.data_ptr(),
            )
            return -(more + at_mu)

        return log_weights
