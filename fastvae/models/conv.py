"""A convolutional encoder and decoder for C x H x W items of any size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

SMALLEST = 4  # sides are halved until they are no longer than this
FIRST_WIDTH, LAST_WIDTH = 32, 256


class ConvEncoder(nn.Module):
    """x [B, C, H, W] -> mu, logvar: [B, latent_dim] each."""

    def __init__(self, item_shape: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        sizes, widths = _stages(item_shape)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.ReLU()]
        height, width = sizes[-1]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, 2 * latent_dim)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(x).chunk(2, dim=1)
        return mu, logvar


class ConvDecoder(nn.Module):
    """z [B, latent_dim] -> the likelihood's parameters [B, C, H, W]: the encoder mirrored."""

    def __init__(self, item_shape: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        sizes, widths = _stages(item_shape)
        height, width = sizes[-1]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, widths[-1] * height * width),
            nn.Unflatten(1, (widths[-1], height, width)),
        ]
        for stage in range(len(sizes) - 1, 0, -1):
            # a transposed convolution makes 2 n - 1 of n; an even side needs one more
            height, width = sizes[stage - 1]
            one_more = (1 - height % 2, 1 - width % 2)
            layers += [
                nn.ReLU(),
                nn.ConvTranspose2d(
                    widths[stage], widths[stage - 1], 3, stride=2, padding=1, output_padding=one_more
                ),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        x_hat: Tensor = self.layers(z)
        return x_hat


def _stages(item_shape: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Height and width, and the number of channels, before the first stage and after each."""
    channels, height, width = item_shape
    sizes, widths = [(height, width)], [channels]
    while max(sizes[-1]) > SMALLEST:
        height, width = sizes[-1]
        widths.append(min(FIRST_WIDTH * 2 ** (len(sizes) - 1), LAST_WIDTH))
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes, widths
