"""What is done with a trained model: evaluation and pictures."""

from .generate import decode, draw_prior, encode, reconstruct, reconstruction_terms, sample
from .mixture import LatentMixture, fit_mixture
from .paths import interpolation, prior_quantiles, quantile_grid, traversal

__all__ = [
    "LatentMixture",
    "decode",
    "draw_prior",
    "encode",
    "fit_mixture",
    "interpolation",
    "prior_quantiles",
    "quantile_grid",
    "reconstruct",
    "reconstruction_terms",
    "sample",
    "traversal",
]
