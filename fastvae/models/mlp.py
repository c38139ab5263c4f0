"""A fully connected encoder and decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLPEncoder(nn.Module):
    """x [B, *item_shape] (or any shape of as many features) -> mu, logvar: [B, latent_dim] each."""

    def __init__(self, item_shape: Sequence[int], hidden: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        # one Linear for both heads: mu and logvar are the two halves of its rows
        self.layers = _layers([math.prod(item_shape), *hidden, 2 * latent_dim])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(x.flatten(1)).chunk(2, dim=1)
        return mu, logvar


class MLPDecoder(nn.Module):
    """z [B, latent_dim] -> the likelihood's parameters [B, *item_shape]."""

    def __init__(self, item_shape: Sequence[int], hidden: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.item_shape = tuple(item_shape)
        self.layers = _layers([latent_dim, *reversed(hidden), math.prod(item_shape)])

    def forward(self, z: Tensor) -> Tensor:
        x_hat: Tensor = self.layers(z)
        return x_hat.view(-1, *self.item_shape)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers through the given widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
