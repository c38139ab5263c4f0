"""The command line: `fastvae`, and `python -m fastvae`. torch is imported only by a command that runs."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..training.config import ConfigError
from ..training.signals import TrainingStopped
from . import (
    data,
    decode,
    encode,
    evaluate,
    export,
    interpolate,
    latents,
    reconstruct,
    report,
    sample,
    train,
    traverse,
)

COMMANDS = (  # in the order of the help
    train,
    sample,
    reconstruct,
    traverse,
    interpolate,
    latents,
    evaluate,
    report,
    encode,
    decode,
    export,
    data,
)

RANK = int(os.environ.get("RANK", 0))  # of the processes that torchrun starts
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
SAID_SECONDS = 5.0  # for another rank to say what is wrong


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-3 for an option

    def error(self, message: str) -> NoReturn:
        if LOCAL_RANK > 0:
            _leave_it_to_be_said()
            self.exit(2)
        message = message.replace("argument -", "-").replace(
            "argument command: invalid choice", "no such command"
        )
        self.exit(2, f"fastvae: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for bad input, 1 for a failed training, 128 + the signal that ended one."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            parser.error(f"got {unknown[0]!r}, which belongs to no option")
        begun = [option for option in arguments.options if option.startswith(name)]
        known = {option.lstrip("-"): option for option in arguments.options}  # "--" would make --n of --index
        near = begun or [known[match] for match in difflib.get_close_matches(name.lstrip("-"), known, n=1)]
        parser.error(f"{name}: no such option" + (f"; did you mean {near[0]}?" if near else ""))
    if WORLD_SIZE > 1 and arguments.run is not train.run:  # each would do all of it, and write the same files
        parser.error(
            f"got WORLD_SIZE={WORLD_SIZE}, as of torchrun, expected one process: only train runs on several"
        )
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        if RANK == 0:
            print(f"fastvae: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except TrainingStopped as stopped:
        run = stopped.checkpoint.parent.parent
        if RANK == 0:
            print(f"fastvae: {stopped}; go on with: fastvae train --resume {run}", file=sys.stderr)
        return stopped.exit_status
    except Exception as error:
        is_said = _is_said_elsewhere(error)
        if is_said or LOCAL_RANK > 0:  # which else says it if no other has ended by then
            _leave_it_to_be_said()
        # what fastvae raises on purpose has a class of its own; all else is a bug, and shows its traceback
        if not isinstance(error, OSError) and not type(error).__module__.startswith("fastvae."):
            raise
        if getattr(arguments, "debug", False):
            traceback.print_exc()
        if not is_said:
            which = "" if RANK == 0 else f"rank {RANK}: "
            print(f"fastvae: error: {which}{_one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="fastvae", description="Train and use variational autoencoders.", allow_abbrev=False
    )
    version = importlib.metadata.version("fastvae")
    parser.add_argument("-V", "--version", action="version", version=f"fastvae {version}")
    parser.set_defaults(run=lambda _: parser.print_help(), options=parser._option_string_actions)
    commands = parser.add_subparsers(metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _is_said_elsewhere(error: Exception) -> bool:
    """Whether another rank has the same to say: the first of this node, or of all."""
    if isinstance(error, ConfigError):
        return LOCAL_RANK > 0
    if RANK == 0:
        return False

    from ..training.checkpoint import CheckpointError
    from ..training.launch import RankError
    from ..training.result import TrainingError

    return isinstance(error, (CheckpointError, RankError, TrainingError))


def _leave_it_to_be_said() -> None:
    """Wait for the rank that says it to end: torchrun ends all others, said or not, when one has ended."""
    time.sleep(SAID_SECONDS)


def _one_line(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return f"--{error.option.replace('_', '-')}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
