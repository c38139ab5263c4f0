"""A model on disk: config.json says what to build, model.safetensors holds the weights."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

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


def load(run: str | os.PathLike[str]) -> VAE:
    """The model of a run folder, in eval mode, on the CPU. Nothing is unpickled.

    Raises ModelFilesError, which names the file, if the folder or a file is missing or is not what `save`
    writes.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ModelFilesError(f"{folder}: no such folder, expected a run of fastvae train")
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ModelFilesError(f"{path}: no such file, expected a folder that a finished run has left")
    try:
        model = VAE.from_config(json.loads(config_path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ModelFilesError(f"{config_path}: expected a model's config as JSON: {error}") from error
    try:
        weights = safetensors.torch.load_file(weights_path)
    except safetensors.SafetensorError as error:
        raise ModelFilesError(f"{weights_path}: expected a safetensors file: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_line, *details = str(error).splitlines()
        detail = details[0].strip() if details else first_line
        raise ModelFilesError(f"{weights_path}: does not fit {config_path.name}: {detail}") from error
    return model.eval()


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, all or nothing. Raises OSError where writing fails."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(on_cpu, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, f"could not be written: {error}", str(path)) from error


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
