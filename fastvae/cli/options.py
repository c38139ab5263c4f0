"""Command line options made of TrainConfig's fields, so that each is stated once."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from ..training.config import ConfigError, ConfigFileError, TrainConfig

METAVARS: dict[str, str | tuple[str, ...]] = {
    "data": "NAME|PATH",
    "val": "FILE|FRACTION",
    "normalize_counts": "F|median",
    "model": "mlp|conv|MODULE:CLASS",
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
# the groups of the help, each from this field on
GROUPS = {
    "data": "data",
    "model": "model",
    "beta": "loss",
    "epochs": "length, batches and memory",
    "lr": "optimizer",
    "amp": "machine",
    "out": "run",
}
NUMBERS_OF_VALUES: dict[str, str | int] = {"hidden": "+", "logvar_clamp": 2}


def add_train_options(parser: argparse.ArgumentParser) -> list[str]:
    """Add --config, and an option for each field without a type: TrainConfig reads the strings.

    A field that is None or a boolean by default has a --no-NAME too. Returns the flags.
    """
    group: argparse._ActionsContainer = parser
    group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="options in TOML, such as the train.toml of a run; those on the command line go before it, and "
        "--no-NAME takes back what it says of NAME",
    )
    flags = ["--config"]
    for name, field in TrainConfig.model_fields.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        flag, text = _flag(name), (field.description or "").replace("%", "%%")
        flags.append(flag)
        off = _off_flag(name)
        if off is not None:
            flags.append(off)
        if field.annotation is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        if off is not None:  # not in the help, which would double
            group.add_argument(
                off,
                dest=name,
                action="store_const",
                const=None,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        choices = _choices(field.annotation)
        group.add_argument(
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _off_flag(name: str) -> str | None:
    """The flag that takes an option back; None where it has a value by default, which can be given again."""
    field = TrainConfig.model_fields[name]
    return "--no-" + _flag(name)[2:] if field.default is None or field.annotation is bool else None


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line names, unread."""
    return {name: value for name, value in vars(arguments).items() if name in TrainConfig.model_fields}


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The options: those given go before those of --config, and these before the defaults.

    Raises ConfigError for a wrong value on the command line, ConfigFileError for what is wrong in the file.
    """
    given, path = given_options(arguments), getattr(arguments, "config", None)
    if path is None:
        return TrainConfig(**given)
    config = TrainConfig.from_toml(path)
    try:
        return config.replace(**given)
    except ConfigError as error:
        if error.option in given:
            raise
        off = _off_flag(error.option)
        hint = "" if off is None else f", or {off}"
        raise ConfigFileError(f"{path}: {error}{hint}") from error
