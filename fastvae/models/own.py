"""Models of a user's own: found by name where the user asks for it, and built with what they take."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .model import Model, ModelError, as_model, likelihood_of, log_variance_of


def find(name: str) -> Callable[..., nn.Module]:
    """The class `name`, "package.module:Class", of the current folder or of Python's path.

    This runs the module. Raises ModelError where there is none; errors of the module itself go through.
    """
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # and it stays, for what the module imports later
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        looked = "in the current folder and on Python's path"
        raise ModelError(f"model: got {name!r}, but there is no module {error.name} {looked}") from error
    for part in class_name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ModelError(f"model: got {name!r}, but {module_name} has no {class_name}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"model: got {name!r}, which is of type {type(found).__name__}, expected a class")
    factory: Callable[..., nn.Module] = found
    return factory


def build(make: Callable[..., nn.Module], item_shape: Sequence[int], latent_dim: int) -> Model:
    """The model that `make`, a class, gives for items of that shape.

    It is called with item_shape= (a tuple) and latent_dim= where its signature names them. Raises ModelError
    where it asks for anything else, or gives no model.
    """
    name = getattr(make, "__name__", repr(make))
    known: dict[str, Any] = {"item_shape": tuple(item_shape), "latent_dim": latent_dim}
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError as error:  # what is written in C
        raise ModelError(f"model: got {name}, expected a class of nn.Module") from error
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for p in parameters:
        required = p.default is p.empty and p.kind not in several
        if required and (p.name not in known or p.kind is p.POSITIONAL_ONLY):
            expected = "item_shape and latent_dim, or others with defaults"
            raise ModelError(f"model: got {name}, which asks for {p.name}, expected arguments {expected}")
    return as_model(make(**{p.name: known[p.name] for p in parameters if p.name in known}))


def describe(model: nn.Module, item_shape: Sequence[int], latent_shape: Sequence[int]) -> dict[str, Any]:
    """What `fastvae.load` needs to know of a model without a config, for JSON."""
    likelihood, variance = likelihood_of(model), None
    if likelihood == "gaussian":
        log_variance = log_variance_of(model)
        learned = isinstance(log_variance, nn.Parameter)
        variance = "learned" if learned else torch.as_tensor(log_variance).exp().tolist()
    return {
        "architecture": f"{type(model).__module__}:{type(model).__qualname__}",
        "item_shape": list(item_shape),
        "latent_shape": list(latent_shape),
        "likelihood": likelihood,
        "variance": variance,
    }
