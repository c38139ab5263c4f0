"""The latent space in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TSNE_PERPLEXITY = 30.0


@dataclass(frozen=True)
class Projection:
    """A linear map of z to the plane: `projection(z)`.

    mean: [Z], which becomes the origin. directions: [2, Z], orthonormal. axes: what the two axes are.
    is_plain: whether the axes are two latents themselves, so that lengths are those of z.
    """

    mean: Tensor
    directions: Tensor
    axes: tuple[str, str]
    is_plain: bool

    def __call__(self, z: Tensor) -> Tensor:
        """z [N, *latent] -> points, float32 [N, 2]."""
        return ((z.flatten(1).double() - self.mean) @ self.directions.T).float()


def latent_plane(n_latents: int, latents: tuple[int, int] = (0, 1)) -> Projection:
    """Two latents of a z of `n_latents`, as they are."""
    directions = torch.zeros(2, n_latents, dtype=torch.float64)
    directions[0, latents[0]] = directions[1, latents[1]] = 1
    first, second = (f"latent {latent}" for latent in latents)
    return Projection(torch.zeros(n_latents, dtype=torch.float64), directions, (first, second), True)


def principal_plane(z: Tensor) -> Projection:
    """The two directions in which z [N, *latent] varies most, by principal component analysis."""
    from sklearn.decomposition import PCA

    fitted = PCA(2, svd_solver="full").fit(z.flatten(1).double().numpy())
    shares = [float(share) for share in fitted.explained_variance_ratio_]
    first, second = (
        f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)
    )
    return Projection(
        torch.from_numpy(fitted.mean_), torch.from_numpy(fitted.components_), (first, second), False
    )


def tsne(z: Tensor, *, seed: int = 0) -> Tensor:
    """z [N, *latent] in the plane, neighbours beside neighbours: float32 [N, 2].

    t-SNE (van der Maaten and Hinton 2008), by scikit-learn. Distances between groups, and their sizes, have
    no meaning.
    """
    from sklearn.manifold import TSNE

    flat = z.flatten(1).double().numpy()
    perplexity = min(TSNE_PERPLEXITY, max(1.0, (len(flat) - 1) / 3))
    fitted = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return torch.from_numpy(fitted.fit_transform(flat)).float()
