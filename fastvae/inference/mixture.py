"""A Gaussian mixture in the place of the prior: near the aggregate posterior, which the decoder knows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

FULL_COVARIANCE = 256  # latents up to which a component has all covariances, not only variances


@dataclass(frozen=True)
class LatentMixture:
    """A mixture of K Gaussians over z.

    weights: [K]; means: [K, Z]; scales: [K, Z, Z], lower triangular, or [K, Z]; latent_shape: that of one z.
    """

    weights: Tensor
    means: Tensor
    scales: Tensor
    latent_shape: tuple[int, ...]

    def draw(self, n: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """n draws: float32 [n, *latent]. temperature: a factor of each component's standard deviation."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        scales = self.scales[component]
        spread = scales * noise if scales.ndim == 2 else (scales @ noise.unsqueeze(2)).squeeze(2)
        return (self.means[component] + temperature * spread).float().reshape(n, *self.latent_shape)


def fit_mixture(z: Tensor, *, components: int = 10, seed: int = 0) -> LatentMixture:
    """Fit a mixture to draws z [N, *latent] of the aggregate posterior, by expectation-maximisation.

    It is what Ghosh et al. 2020, "From variational to deterministic autoencoders", section 4, sample from.
    Raises ValueError for less draws than components.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if len(z) < components:
        raise ValueError(f"components: got {components}, expected at most {len(z)}, the number of draws")
    flat = z.flatten(1).double().numpy()
    kind = "full" if flat.shape[1] <= FULL_COVARIANCE else "diag"
    fitted = GaussianMixture(components, covariance_type=kind, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nothing hangs on the last digits
        fitted.fit(flat)
    covariances = torch.from_numpy(fitted.covariances_)
    return LatentMixture(
        torch.from_numpy(fitted.weights_),
        torch.from_numpy(fitted.means_),
        torch.linalg.cholesky(covariances) if kind == "full" else covariances.sqrt(),
        tuple(z.shape[1:]),
    )
