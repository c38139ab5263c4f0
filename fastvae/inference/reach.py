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

from ..models import VAE
from ..models.mlp import MLPDecoder
from ..models.model import Model, likelihood_of, log_variance_of

_BLOCK = 64  # rows of R; fewer would skip more of its zeros, in products that are too narrow


class Decoder:
    """`decode` of a model, and x as it is to be compared with what that gives."""

    def __init__(self, model: Model) -> None:
        self.decode = model.decode

    def target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to compare with decode(z), [B, ...], and what -ln p(x|z) has beyond that comparison, [B]."""
        return x, x.new_zeros(len(x), dtype=torch.float64)


class TurnedDecoder(Decoder):
    """Q^T (decode(z) - b), of H elements, and Q^T (x - b) to compare with it."""

    def __init__(self, model: VAE, hidden: nn.Module, last: nn.Linear) -> None:
        self.log_variance = float(log_variance_of(model)) if likelihood_of(model) == "gaussian" else None
        self.hidden = hidden
        self.bias = last.bias.detach().double()
        self.q, r = torch.linalg.qr(last.weight.detach().double())
        self.r = r.to(last.weight.dtype)
        self.decode = self._decode

    def _decode(self, z: Tensor) -> Tensor:
        h: Tensor = self.hidden(z)
        n = h.shape[1]
        turned = h.new_empty(len(h), n)
        for i in range(0, n, _BLOCK):  # R is 0 left of its diagonal
            torch.mm(h[:, i:], self.r[i : i + _BLOCK, i:].T, out=turned[:, i : i + _BLOCK])
        return turned

    def target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.flatten(1).double() - self.bias
        turned = centred @ self.q
        rest = (centred.square().sum(1) - turned.square().sum(1)).clamp(min=0)
        if self.log_variance is not None:
            n = centred.shape[1] - turned.shape[1]
            constant = 0.5 * n * (self.log_variance + math.log(2 * math.pi))
            rest = 0.5 * math.exp(-self.log_variance) * rest + constant
        return turned.to(x.dtype), rest


def decoder_of(model: Model) -> Decoder:
    """The turned decoder of a `VAE.mlp` under squared error or one variance, if it is as it was made; of any
    other model what it says itself.
    """
    if type(model) is not VAE or type(model.decoder) is not MLPDecoder or "decode" in vars(model):
        return Decoder(model)
    *_, last = layers = model.decoder.layers
    single = torch.as_tensor(log_variance_of(model)).numel() == 1
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.decoder.modules())
    if type(last) is not nn.Linear or model.likelihood == "bernoulli" or not single or hooked:
        return Decoder(model)
    if last.in_features >= last.out_features or last.bias is None:
        return Decoder(model)
    return TurnedDecoder(model, layers[:-1], last)
