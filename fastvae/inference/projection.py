"""The latent space in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TSNE_PERPLEXITY = 30.0
_SEARCHED = 16  # directions of a search for the first two


@dataclass(frozen=True)
class Projection:
    """A linear map of z to the plane, or of one latent to a line: `projection(z)`.

    mean: [Z], which becomes the origin. directions: [2, Z] or [1, Z], orthonormal. axes: what they are.
    is_plain: whether the axes are latents themselves, so that lengths are those of z.
    """

    mean: Tensor
    directions: Tensor
    axes: tuple[str, ...]
    is_plain: bool

    def __call__(self, z: Tensor) -> Tensor:
        """z [N, *latent] -> points, float32 [N, 2] or [N, 1]."""
        return ((z.flatten(1).double() - self.mean) @ self.directions.T).float()


def projection_of(z: Tensor) -> Projection:
    """That which shows z [N, *latent] best: one or two latents as they are, more by principal components."""
    n = z.flatten(1).shape[1]
    return latent_plane(n, tuple(range(n))) if n <= 2 else principal_plane(z)


def latent_plane(n_latents: int, latents: tuple[int, ...]) -> Projection:
    """One or two latents of a z of `n_latents`, as they are."""
    directions = torch.eye(n_latents, dtype=torch.float64)[list(latents)]
    axes = tuple(f"latent {latent}" for latent in latents)
    return Projection(torch.zeros(n_latents, dtype=torch.float64), directions, axes, True)


def principal_plane(z: Tensor) -> Projection:
    """The two directions in which z [N, *latent] varies most, by principal component analysis.

    The randomized one of Halko, Martinsson and Tropp 2011, with the same start each time: z may have
    thousands of latents. The largest element of each direction is positive.
    """
    flat = z.flatten(1).double()
    mean = flat.mean(0)
    centred = flat - mean
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        q = min(_SEARCHED, *centred.shape)
        _, spread, directions = torch.pca_lowrank(centred, q=q, center=False, niter=4)
    directions = directions[:, :2].T
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    total = centred.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    shares = (spread[:2].square() / total).tolist()
    axes = tuple(
        f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)
    )
    return Projection(mean, directions, axes, False)


def strips(values: Tensor, labels: npt.NDArray[np.int64] | None) -> Tensor:
    """Values of one latent [N, 1] in the plane, [N, 2]: a strip for each label, from the top down.

    Within a strip of height 1 points are apart only to be seen.
    """
    golden = (1 + 5**0.5) / 2
    height = 0.8 * (torch.arange(len(values), dtype=torch.float64) * golden % 1 - 0.5)
    strip = 0 if labels is None else torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    return torch.stack((values[:, 0], (height - strip).to(values.dtype)), 1)


def tsne(z: Tensor, *, seed: int = 0) -> Tensor:
    """z [N, *latent] in the plane, neighbours beside neighbours: float32 [N, 2].

    t-SNE (van der Maaten and Hinton 2008), by scikit-learn. Distances between groups, and their sizes, have
    no meaning. Data that are all the same lie at the origin.
    """
    from sklearn.manifold import TSNE

    flat = z.flatten(1).double().numpy()
    if (flat == flat[0]).all():  # of which scikit-learn makes NaN, and a segmentation fault
        return torch.zeros(len(flat), 2)
    perplexity = min(TSNE_PERPLEXITY, max(1.0, (len(flat) - 1) / 3))
    fitted = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return torch.from_numpy(fitted.fit_transform(flat)).float()
