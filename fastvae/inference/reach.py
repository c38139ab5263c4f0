"""The squared error of a decoder that ends in a linear layer, in as many dimensions as its last hidden layer.

With W = Q R, Q of orthonormal columns and R triangular,

    |x - (W h + b)|^2 = |Q^T (x - b) - R h|^2 + |(I - Q Q^T) (x - b)|^2.

Of x only what lies in the column space of W has to do with z, and it is turned once a datum. For many draws
of z a datum that saves most of the decoder's products: of D x H, those of a triangle H x H are left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..models.model import Model
from .weigh import Weigher

_BLOCK = 64  # rows of R; fewer would skip more of its zeros, in products that are too narrow


class TurnedWeigher(Weigher):
    """By Q^T (decode(z) - b), of H elements, and Q^T (x - b) to compare with it.

    Of a model under "mse" or one variance, whose decoder is `hidden` and then `last`.
    """

    def __init__(self, model: Model, hidden: nn.Module, last: nn.Linear) -> None:
        super().__init__(model)
        self.hidden = hidden
        self.bias = last.bias.detach().double()
        self.q, r = torch.linalg.qr(last.weight.detach().double())
        self.r = r.to(last.weight.dtype)
        self.decode = self._decode
        self.one_log_variance = float(self.log_variance)

    def _decode(self, z: Tensor) -> Tensor:
        h: Tensor = self.hidden(z)
        n = h.shape[1]
        turned = h.new_empty(len(h), n)
        for i in range(0, n, _BLOCK):  # R is 0 left of its diagonal
            torch.mm(h[:, i:], self.r[i : i + _BLOCK, i:].T, out=turned[:, i : i + _BLOCK])
        return turned

    def width(self, x: Tensor) -> int:
        return len(self.r)

    def target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.flatten(1).double() - self.bias
        turned = centred @ self.q
        rest = (centred.square().sum(1) - turned.square().sum(1)).clamp(min=0)
        if self.likelihood == "gaussian":
            n, log_variance = centred.shape[1] - turned.shape[1], self.one_log_variance
            rest = 0.5 * (math.exp(-log_variance) * rest + n * (log_variance + math.log(2 * math.pi)))
        return turned.to(x.dtype), rest
