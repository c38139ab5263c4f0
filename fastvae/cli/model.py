"""The model of a command: one of fastvae's, or a class of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ..training.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataLoader
    from ..models import Model

    Likelihood = Literal["mse", "gaussian", "bernoulli"]


def own_class(config: TrainConfig) -> Callable[..., nn.Module] | None:
    """The class that --model names; None where it names none of the user's. Raises ConfigError."""
    from ..models import own

    if ":" not in config.model:
        return None
    with _named():
        return own.find(config.model)


def likelihood_of_run(config: TrainConfig, data: str, own: Callable[..., nn.Module] | None) -> Likelihood:
    """What was asked for, or the class or the data are made for, else mse.

    But the variance of 1/2 that mse stands for is more than most of what digits varies.
    """
    of_class: Likelihood | None = getattr(own, "likelihood", None)
    likelihood = config.likelihood or of_class
    if likelihood is not None:
        return likelihood
    if config.binarize and config.variance is None:
        return "bernoulli"
    return "gaussian" if data == "digits" or config.variance is not None else "mse"


def build_model(
    config: TrainConfig, own: Callable[..., nn.Module] | None, val: DataLoader
) -> tuple[Model, tuple[int, ...]]:
    """The model for data like those of `val`, and the shape of one of its latents. Raises ConfigError."""
    from ..models import VAE

    if own is not None:
        return _own_model(config, own, val)
    likelihood, latent_dim = config.likelihood or "mse", config.latent_dim
    if config.model == "conv":
        model = VAE.conv(val.item_shape, latent_dim, likelihood=likelihood, variance=config.variance)
    else:
        hidden = (400,) if config.hidden is None else config.hidden
        model = VAE.mlp(val.item_shape, hidden, latent_dim, likelihood=likelihood, variance=config.variance)
    return model, (latent_dim,)


def _own_model(
    config: TrainConfig, own: Callable[..., nn.Module], val: DataLoader
) -> tuple[Model, tuple[int, ...]]:
    """A model of the user's class that has passed a batch of `val`, and does not contradict the options."""
    import torch

    from ..inference.evaluate import inputs
    from ..models.model import check_batch, check_parameters, likelihood_of, log_variance_of, set_likelihood
    from ..models.own import build

    with _named():
        model = build(own, val.item_shape, config.latent_dim)
        check_parameters(model)
        latent_shape = check_batch(model, next(inputs(val, torch.device("cpu"))))
        if hasattr(model, "likelihood"):
            its = likelihood_of(model)
            if its != config.likelihood:
                raise ConfigError("likelihood", f"got {config.likelihood}, but {config.model} has {its!r}")
        if config.variance is not None and hasattr(model, "log_variance"):
            raise ConfigError(
                "variance", f"got {config.variance}, but {config.model} has its own log_variance"
            )
        set_likelihood(model, config.likelihood or "mse", config.variance)
        log_variance_of(model)
    made = math.prod(latent_shape)
    if config.latent_dim not in (made, TrainConfig.model_fields["latent_dim"].default):
        raise ConfigError("latent_dim", f"got {config.latent_dim}, but {config.model} makes {made} latents")
    return model, latent_shape


@contextmanager
def _named() -> Iterator[None]:
    """What is wrong with a model is wrong with --model."""
    from ..models import ModelError

    try:
        yield
    except ModelError as error:
        raise ConfigError("model", str(error).removeprefix("model: ")) from error
