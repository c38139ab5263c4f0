"""Ways through the latent space: what to decode in order to see what latents do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def traversal(center: Tensor, latents: Sequence[int], offsets: Tensor) -> Tensor:
    """One latent after the other moved away from `center`: float32 [len(latents), S, *latent].

    center: [*latent]. latents: places in it, flattened. offsets: [S], added to the latent's value there.
    """
    moved = torch.zeros(len(latents), len(offsets), center.numel())
    for row, latent in enumerate(latents):
        moved[row, :, latent] = offsets
    return (center.flatten() + moved).reshape(len(latents), len(offsets), *center.shape)


def quantile_grid(center: Tensor, latents: tuple[int, int], steps: int) -> Tensor:
    """Two latents over the quantiles of the prior, the others as in `center`: float32 [S, S, *latent].

    Latent latents[0] grows from left to right, latents[1] from the bottom to the top, each over the inverse
    distribution function of N(0, 1) at (i + 1/2) / S: equal steps in probability (Kingma and Welling 2014,
    figure 4).
    """
    values = prior_quantiles(steps)
    z = center.float().flatten().expand(steps, steps, -1).clone()
    z[:, :, latents[0]] = values
    z[:, :, latents[1]] = values.flip(0).unsqueeze(1)
    return z.reshape(steps, steps, *center.shape)


def prior_quantiles(steps: int) -> Tensor:
    """The quantiles (i + 1/2) / S of N(0, 1), float32 [S], rising."""
    probabilities = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return math.sqrt(2) * torch.erfinv(2 * probabilities - 1).float()


def interpolation(start: Tensor, end: Tensor, steps: int, *, spherical: bool = False) -> Tensor:
    """The way from `start` to `end`, both [*latent] and included, in S steps: float32 [S, *latent].

    spherical: along the great circle between their directions (Shoemake 1985), so that the length of z, which
    in many dimensions is nearly the same for all of the prior, does not fall in between (White 2016). It is
    linear where there is no angle between them.
    """
    t = torch.linspace(0, 1, steps, dtype=torch.float64).unsqueeze(1)
    a, b = start.double().flatten(), end.double().flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).arccos()
    z: Tensor
    if spherical and angle.sin() > 1e-6:  # else no angle, any great circle, or a zero without direction
        z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()
    else:
        z = (1 - t) * a + t * b
    return z.float().reshape(steps, *start.shape)


def there_and_back(frames: Sequence[T]) -> list[T]:
    """Frames that run to the last and back, as a loop."""
    return [*frames, *frames[-2:0:-1]]
