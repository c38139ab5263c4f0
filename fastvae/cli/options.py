"""Command line options made of TrainConfig's fields, so that each is stated once."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from ..training.config import TrainConfig

METAVARS: dict[str, str | tuple[str, ...]] = {
    "data": "NAME|PATH",
    "val": "FILE|FRACTION",
    "variance": "F|learned",
    "beta": "F",
    "free_bits": "F",
    "capacity": "F",
    "logvar_clamp": ("LOW", "HIGH"),
    "lr": "F",
    "weight_decay": "F",
    "clip_norm": "F",
    "ema_decay": "F",
    "out": "DIR",
}
NUMBERS_OF_VALUES: dict[str, str | int] = {"hidden": "+", "logvar_clamp": 2}


def add_train_options(parser: argparse.ArgumentParser) -> list[str]:
    """Add an option for each field, without a type: TrainConfig reads the strings. Returns the flags."""
    flags = []
    for name, field in TrainConfig.model_fields.items():
        flag, text = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        flags.append(flag)
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        choices = _choices(field.annotation)
        parser.add_argument(
            flag,
            metavar=METAVARS.get(name) or "|".join(choices) or "N",
            nargs=NUMBERS_OF_VALUES.get(name),
            default=argparse.SUPPRESS,
            help=text if field.default is None else f"{text} (default: {field.default})",
        )
    return flags


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal, or of one that may be absent."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The options that were given, validated. Raises ConfigError for a wrong value."""
    given: dict[str, Any] = vars(arguments)
    return TrainConfig(**{name: given[name] for name in TrainConfig.model_fields if name in given})
