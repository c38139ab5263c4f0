"""What is done with a trained model: evaluation and pictures."""

from .aggregate import Aggregate, AggregatePosterior
from .generate import decode, draw_prior, encode, reconstruct, reconstruction_terms, sample
from .importance import EvaluationError, LogLikelihood, log_likelihood
from .judge import Judgement, judge
from .mixture import LatentMixture, fit_mixture
from .paths import interpolation, prior_quantiles, quantile_grid, traversal

__all__ = [
    "Aggregate",
    "AggregatePosterior",
    "EvaluationError",
    "Judgement",
    "LatentMixture",
    "LogLikelihood",
    "decode",
    "draw_prior",
    "encode",
    "fit_mixture",
    "interpolation",
    "judge",
    "log_likelihood",
    "prior_quantiles",
    "quantile_grid",
    "reconstruct",
    "reconstruction_terms",
    "sample",
    "traversal",
]
