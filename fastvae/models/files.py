"""A model on disk: config.json says what to build, model.safetensors holds the weights."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .model import Model, as_model, set_likelihood
from .own import build
from .vae import VAE

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class ModelFilesError(ValueError):
    """A folder that does not hold a model as `save` writes it."""


def save(model: VAE, folder: str | os.PathLike[str]) -> None:
    """Write `model` into an existing folder as config.json and model.safetensors, for `load`.

    Raises ValueError for a model without a config (see `VAE.config`), OSError where writing fails.
    """
    if model.config is None:
        raise ValueError("model: has an encoder and a decoder of its own, expected VAE.mlp or VAE.conv")
    write_json(Path(folder, CONFIG_NAME), model.config)
    save_weights(Path(folder, WEIGHTS_NAME), model.state_dict())


@overload
def load(run: str | os.PathLike[str], model: None = None) -> VAE: ...


@overload
def load(run: str | os.PathLike[str], model: nn.Module | Callable[..., nn.Module]) -> Model: ...


def load(run: str | os.PathLike[str], model: nn.Module | Callable[..., nn.Module] | None = None) -> Model:
    """The model of a run folder, in eval mode, on the CPU. Nothing is unpickled, and no code is imported.

    model: of a run with a model of the user's own: one to fill with the run's weights, or its class, to be
        called with item_shape= and latent_dim= where its signature names them.

    Raises ModelFilesError, which names the file, if the folder or a file is missing or is not what a training
    writes, and where the model must be given.
    """
    folder = Path(run)
    loaded = read(folder / CONFIG_NAME, folder / WEIGHTS_NAME, model)
    if isinstance(loaded, VAE):
        loaded._run = folder
    return loaded


def read_config(path: Path) -> dict[str, Any]:
    """What config.json says of a model. Raises ModelFilesError."""
    if not path.parent.is_dir():
        raise ModelFilesError(f"{path.parent}: no such folder, expected a run of fastvae train")
    if not path.is_file():
        raise ModelFilesError(f"{path}: no such file, expected a folder that a finished run has left")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ModelFilesError(f"{path}: expected a model's config as JSON: {error}") from error


def read(
    config_path: Path, weights_path: Path, model: nn.Module | Callable[..., nn.Module] | None = None
) -> Model:
    """As `load`, with the weights in any file that fits."""
    config = read_config(config_path)
    if not weights_path.is_file():
        raise ModelFilesError(f"{weights_path}: no such file, expected a folder that a finished run has left")
    try:
        own = model is not None or ":" in str(config.get("architecture"))
        loaded: Model | None = None if own else VAE.from_config(config)
    except (ValueError, TypeError) as error:
        raise ModelFilesError(f"{config_path}: expected a model's config as JSON: {error}") from error
    if loaded is None:
        loaded = _own(model, config, config_path)
    load_weights(loaded, weights_path)
    return loaded.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` with the weights of a safetensors file. Raises ModelFilesError, OSError."""
    try:
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelFilesError(f"{path}: expected a safetensors file: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_line, *details = str(error).splitlines()
        detail = details[0].strip() if details else first_line
        raise ModelFilesError(f"{path}: does not fit {CONFIG_NAME}: {detail}") from error


def _own(
    model: nn.Module | Callable[..., nn.Module] | None, config: Mapping[str, Any], config_path: Path
) -> Model:
    """The model that the user has given, or one of the class, with the likelihood that the run gave it."""
    if model is None:
        architecture = str(config["architecture"])
        name = architecture.rpartition(":")[2]
        raise ModelFilesError(
            f"{config_path}: the model is {architecture}, and fastvae imports no code that a file names; "
            f"expected that class, or a model of it: fastvae.load({str(config_path.parent)!r}, model={name})"
        )
    if isinstance(model, nn.Module):
        own = as_model(model)
    else:
        latent_dim = config.get("latent_dim") or math.prod(config.get("latent_shape", ()))
        own = build(model, config.get("item_shape", ()), latent_dim)
    if not hasattr(own, "likelihood") and "likelihood" in config:
        set_likelihood(own, config["likelihood"], config.get("variance"))
    return own


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, all or nothing. Raises OSError where writing fails."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    begun: set[int] = set()
    for name, tensor in on_cpu.items():
        if tensor.data_ptr() in begun:  # a weight of two names, which the file holds twice
            on_cpu[name] = tensor.clone()
        begun.add(tensor.data_ptr())
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(on_cpu, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise _os_error(error, path) from error
        if temporary.stat().st_mode != mode:  # from 0.8 on its files are for their owner alone
            temporary.chmod(mode)


def _os_error(error: safetensors.SafetensorError, path: Path) -> OSError:
    """What the system said, which safetensors tells in its words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(errno.EIO, f"could not be written: {error}", str(path))
    return OSError(int(number[1]), f"could not be written: {os.strerror(int(number[1]))}", str(path))


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; empty where it is absent or no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, all or nothing. Raises ValueError for NaN and inf, which JSON does not have."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then replaces `path`: that holds all of the old or all of the new, always."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
