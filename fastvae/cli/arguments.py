"""What several commands ask for on the command line, and the numbers that they read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

SPLITS = ("train", "val", "test", "all")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str
) -> argparse.ArgumentParser:
    """Add a command to argparse's subcommands, with --debug, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, options=parser._option_string_actions)
    return parser


def add_run_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str
) -> argparse.ArgumentParser:
    """Add a command on a run to argparse's subcommands, and return its parser."""
    parser = add_command(commands, name, run, help, description)
    parser.usage = "%(prog)s RUN [options]"  # after --dims D [D ...] it would be another D
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    return parser


def add_run_options(
    parser: argparse.ArgumentParser, *, data: bool | str = False, part: str | None = None
) -> None:
    """Add the options that `open_run` reads, and with `data` those of `open_data`.

    data: a text says in the help what the command needs data for. part: what it takes of them by default.
    """
    if data:
        group = parser.add_argument_group("data")
        what = "" if data is True else f"{data}: "
        group.add_argument(
            "--data",
            metavar="NAME|PATH",
            help=f"{what}a name or a path, as of fastvae train (default: the run's own)",
        )
        group.add_argument(
            "--split",
            choices=SPLITS,
            help="which part: test, what the run has validated on (val) or trained on (train), or both (all) "
            "(default: "
            + (part or "test data where there are any, else val; of a file given with --data, all")
            + ")",
        )
    group = parser.add_argument_group("machine")
    add_model(group)
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="data at a time; no result depends on it (default: 256)",
    )
    group.add_argument("--seed", type=index, metavar="N", help="of all draws (default: the run's)")


def add_model(group: Any) -> None:
    """Add --model, for runs with a model of the user's own."""
    group.add_argument(
        "--model",
        metavar="MODULE:CLASS",
        help="the class of a run with a model of your own, as for fastvae train",
    )


def add_draw_x(group: Any) -> None:
    """Add --draw-x."""
    group.add_argument(
        "--draw-x",
        action="store_true",
        help="draw x from p(x|z), with its noise, instead of showing its mean",
    )


def positive(value: str) -> int:
    """An option's number of at least 1."""
    return _integer(value, 1)


def index(value: str) -> int:
    """An option's number of at least 0: a place, or a seed."""
    return _integer(value, 0)


def _integer(value: str, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number < 2**63:
        hint = "; a RUN goes before the options" if os.path.isdir(value) else ""
        raise argparse.ArgumentTypeError(f"got {value!r}, expected an integer of at least {least}{hint}")
    return number
