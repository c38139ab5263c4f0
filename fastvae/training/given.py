"""What a training is given, refused before anything is written where its parts do not go together."""

from __future__ import annotations

import inspect
import math
from operator import length_hint
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from ..data import DataLoader
from ..inference.evaluate import moved, x_of
from ..loss import ELBOLoss
from ..models import VAE, Model
from ..models.model import ModelError, check_batch, likelihood_of
from .config import ConfigError, TrainConfig
from .shares import Batches


def check_batches(train: Batches, val: Batches | None) -> None:
    """Raise ValueError for none, for batches whose number is not known, and for those of one rank alone.

    And for validation data that can be read only once.
    """
    if _length(train) == 0:
        raise ValueError("train: got no batches, expected at least one")
    if val is not None and length_hint(val, 1) == 0:
        raise ValueError("val: got no batches, expected at least one")
    if inspect.isgenerator(cast(object, val)):
        got = "a generator, which gives its batches once"
        raise ValueError(f"val: got {got}, expected a loader or a list, to be read after each epoch")
    for name, batches, part in (("train", train, "rows"), ("val", val, "part")):
        if isinstance(getattr(batches, "sampler", None), DistributedSampler):
            expected = f"expected the same batches on all ranks; each takes its {part}"
            raise ValueError(f"{name}: got a DistributedSampler, {expected}")


def _length(train: Batches) -> int:
    try:
        return len(train)
    except TypeError as error:
        got = f"a {type(train).__name__} without a length ({error})"
        raise ValueError(f"train: got {got}, expected batches whose number is known") from error


def check_items(model: nn.Module, **loaders: Batches | None) -> None:
    """Raise ModelError for a model that is made for other items than a loader has, where both say which."""
    for name, loader in loaders.items():
        if isinstance(loader, DataLoader):
            check_item_shape(model, loader.item_shape, name)


def check_item_shape(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """Raise ModelError for a model that says that it is made for others than the items of `name`."""
    config = model.config if isinstance(model, VAE) else None
    if config is None:
        return
    expected = tuple(config["item_shape"])
    is_conv = config["architecture"] == "conv"  # an mlp takes any shape
    if math.prod(shape) != math.prod(expected) or (is_conv and shape != expected):
        got = f"a VAE for items of {_by(expected)}"
        raise ModelError(f"model: got {got}, expected {_by(shape)}, the items of {name}")


def check_val_items(model: Model, val: Batches | None, item_shape: tuple[int, ...]) -> None:
    """Raise ModelError for a model that takes the items of train, of `item_shape`, but not those of val.

    Raise ValueError where the first batch of val holds none.
    """
    if val is None or hasattr(val, "__next__"):  # which may not give that batch again
        return
    x = _first_of(val).to(next(model.parameters()).device)
    shape = tuple(x.shape[1:])
    if shape == item_shape:
        return
    check_item_shape(model, shape, "val")
    try:
        check_batch(model, x)
    except Exception as error:  # of the model's own code
        name, what = type(model).__name__, str(error).partition("\n")[0]
        expected = f"items that {name} takes, such as those of train, {_by(item_shape)}"
        raise ModelError(f"val: got items of {_by(shape)}, expected {expected} ({what})") from error


def _first_of(val: Batches) -> Tensor:
    """One datum of val, or zeros of its shape: float32 [1, *item]. Raises ValueError where it has none."""
    if isinstance(val, DataLoader):
        return torch.zeros(1, *val.item_shape, device="cpu")
    with torch.random.fork_rng(devices=()):  # from which torch's DataLoader draws
        batch = next(iter(val), None)
    try:
        return moved(x_of(batch)[:1], torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"val: {str(error).removeprefix('batches: ')}") from error


def ends_with_one_datum(train: Batches) -> bool:
    """Whether that is known of the last batch of an epoch."""
    if not isinstance(train, DataLoader) or train.drop_last:
        return False
    return train.batch_size == 1 or train.n_samples % train.batch_size == 1


def check_loss(loss: object, config: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError for what is no scalar ELBOLoss.

    ConfigError for an option that this loss does not have, ModelError where it takes the model's x_hat for
    something else.
    """
    if not isinstance(loss, ELBOLoss):
        raise ValueError(f"loss: got a {type(loss).__name__}, expected a fastvae.ELBOLoss")
    if "none" in (loss.spec.recon_reduction, loss.spec.kl_reduction):
        raise ValueError('loss: got reduction "none", expected one that gives a scalar')
    _check_options(config, loss)
    _check_logits(model, loss)


def _check_options(config: TrainConfig, loss: ELBOLoss) -> None:
    """Raise ConfigError for an option of the loss that does not go with a given one, or would do nothing."""
    spec, defaults = loss.spec, TrainConfig()
    own = {
        "beta": loss.beta,
        "free_bits": spec.free_bits,
        "free_bits_form": spec.free_bits_form,
        "capacity": loss.capacity,
        "logvar_clamp": spec.logvar_clamp,
    }
    for option, value in own.items():
        wanted = getattr(config, option)
        if wanted != getattr(defaults, option) and _plain(wanted) != _plain(value):
            raise ConfigError(option, f"got {wanted} beside a loss with {value}, expected it in the loss")
    if config.kl_warmup != "none" and isinstance(loss.beta, nn.Parameter):
        got = f"got {config.kl_warmup} beside a loss whose beta is learned"
        raise ConfigError("kl_warmup", f"{got}, expected one of the two")


def _check_logits(model: nn.Module, loss: ELBOLoss) -> None:
    """Raise ModelError for a loss that takes x_hat as logits where the model has a mean there, or conversely.

    Pictures, the run's config and whoever loads it go by the model.
    """
    likelihoods = likelihood_of(model), loss.spec.likelihood
    if likelihoods.count("bernoulli") == 1:
        name, (own, given) = type(model).__name__, likelihoods
        raise ModelError(
            f'model: got {name} of likelihood "{own}" with a loss of "{given}", expected "bernoulli" of both '
            "or of neither, as it says what decode gives, logits or a mean; a model says it by an attribute "
            "likelihood"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _plain(value: object) -> object:
    """Numbers and tensors as lists of float32, to be compared; all else as it is."""
    if value is None or isinstance(value, str):
        return value
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").detach().reshape(-1).tolist()
