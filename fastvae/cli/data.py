"""`fastvae data`: what data there are, fetching them, and packing them into one file."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.signals import StopSignal
from .arguments import add_command, positive
from .output import number_of

if TYPE_CHECKING:
    from ..data.folders import Report


_SHOW_SECONDS = 0.1


class _Stopped(Exception):
    """A signal, noticed between two images."""


def add(commands: Any) -> None:
    """Add `data` and its own commands to argparse's subcommands."""
    parser = commands.add_parser(
        "data",
        help="list, fetch, pack and verify data",
        description="List, fetch, pack and verify data.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda _: parser.print_help(), options=parser._option_string_actions)
    actions = parser.add_subparsers(metavar="command")
    _add_list(actions)
    _add_fetch(actions)
    _add_pack(actions)
    _add_verify(actions)


def _add_list(actions: Any) -> None:
    text = "List the data that have a name: samples, shape, where they lie, or how to get them."
    add_command(actions, "list", _list, "list the data that have a name", text)


def _add_fetch(actions: Any) -> None:
    text = "Download data that have a name and check their checksums. What is here is not fetched again."
    parser = add_command(actions, "fetch", _fetch, "download data that have a name", text)
    parser.add_argument("name", metavar="NAME", help="as fastvae data list shows it")


def _add_pack(actions: Any) -> None:
    text = (
        "Pack a folder of images (PNG, JPEG, WebP; subfolders are labels) or any other data into one .npy of "
        "uint8, which fastvae and NumPy read without loading it, and a JSON beside it with labels and "
        "checksum. A pack that was stopped goes on where it was when the same command is given again."
    )
    parser = add_command(actions, "pack", _pack, "make one .npy of a folder of images or of other data", text)
    parser.add_argument(
        "source", metavar="SRC", help="a folder, a file, or a name, as of fastvae train --data"
    )
    parser.add_argument("destination", metavar="DST", help="the .npy to make")
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="make images N x N: the centre square, resized by Lanczos' filter (default: as they are)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="grey or colour, for a folder of images (default: 1 if all are grey, else 3)",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that decode (default: one a core)"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip", "list"),
        default="stop",
        help="at a corrupt image: stop; skip it; or list all of them and make nothing (default: stop)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST")


def _add_verify(actions: Any) -> None:
    text = "Compare a packed .npy with the checksum, the shape and the labels in the JSON beside it."
    parser = add_command(actions, "verify", _verify, "check a packed file against its checksum", text)
    parser.add_argument("file", metavar="FILE", help="a .npy that fastvae data pack has made")


def _list(arguments: argparse.Namespace) -> None:
    from ..data.datasets import known

    rows = [("NAME", "TRAINING", "TEST", "ITEM", "WHERE")]
    for entry in known():
        train, test = (f"{n:,}" if n else "-" for n in entry.n_samples)
        rows.append((entry.name, train, test, _by(entry.item_shape), entry.where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, train, test, item, where in rows:
        numbers = f"{train:>{widths[1]}}  {test:>{widths[2]}}"
        print(f"{name:{widths[0]}}  {numbers}  {item:{widths[3]}}  {where}")


def _fetch(arguments: argparse.Namespace) -> None:
    from ..data.datasets import ensure

    with _progress("what was fetched whole stays") as report:
        print(f"{arguments.name}: {ensure(arguments.name, report)}")


def _pack(arguments: argparse.Namespace) -> None:
    from ..data import DataError, resolve
    from ..data.feeds import CorruptImages
    from ..data.pack import pack
    from ..data.sources import is_image_folder

    source: Any = Path(arguments.source)
    if not arguments.source or not is_image_folder(source):
        source = resolve(arguments.source).train
    partial = f"{arguments.destination}.partial"
    try:
        with _progress(f"{partial} keeps what was packed, and the same command goes on from there") as report:
            packed = pack(
                source,
                arguments.destination,
                size=arguments.size,
                channels=arguments.channels,
                workers=arguments.workers,
                on_error=arguments.on_error,
                overwrite=arguments.overwrite,
                report=report,
            )
    except CorruptImages as corrupt:
        if arguments.on_error == "list":
            _print_problems(corrupt.problems)
        raise
    except DataError as error:
        raise DataError(_of_the_command_line(str(error))) from error
    if packed.skipped:
        _print_problems(packed.skipped)
        n = len(packed.skipped)
        print(f"{number_of(n, 'image')} {'was' if n == 1 else 'were'} left out")
    n, item = packed.shape[0], packed.shape[1:]
    what = f"{number_of(n, 'sample')} of {_by(item)}, {packed.bytes / 1e6:,.1f} MB"
    labels = "without labels"
    if packed.labels is not None:
        n_classes = len(packed.classes) or len(set(packed.labels))
        labels = f"labels of {n_classes:,} {'class' if n_classes == 1 else 'classes'} in its JSON"
    print(f"{arguments.destination}: {what}, {labels}")


def _of_the_command_line(message: str) -> str:
    """What `pack` says of an argument, with the name that it has here."""
    argument, _, rest = message.partition(" is ")
    names = {"dst": "DST", "size": "--size", "channels": "--channels", "workers": "--workers"}
    return f"{names[argument]}: got {rest}" if argument in names else message


def _verify(arguments: argparse.Namespace) -> None:
    from ..data.packed import verify

    with _progress() as report:
        packed = verify(Path(arguments.file), report)
    n, item = packed.shape[0], packed.shape[1:]
    as_packed = f"as {'it was' if n == 1 else 'they were'} packed"
    print(f"{arguments.file}: {number_of(n, 'sample')} of {_by(item)}, {as_packed}")


def _print_problems(problems: dict[str, str]) -> None:
    for name, problem in problems.items():
        line = f"{name}: {problem}"
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))  # a name may hold a line break


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def _progress(hint: str = "") -> Iterator[Report]:
    """A progress bar for each thing that is done, on standard error while it is a terminal.

    The first signal is noticed at a report, and ends the command with its status; the hint is for then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % of {task.fields[of]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    shown = 0.0
    with (
        StopSignal() as stop,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):

        def report(what: str, done: int, total: int) -> None:
            nonlocal shown
            if stop.signal is not None:
                raise _Stopped(f"stopped by {signal.Signals(stop.signal).name}")
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None, of=f"{total:,}")
            elif time.monotonic() < shown and done < total:  # a report an image is too many to draw
                return
            bar.update(tasks[what], completed=done)
            shown = time.monotonic() + _SHOW_SECONDS

        try:
            yield report
        except _Stopped as stopped:
            bar.stop()
            assert stop.signal is not None
            print(f"fastvae: {stopped}" + (f"; {hint}" if hint else ""), file=sys.stderr)
            raise SystemExit(128 + stop.signal) from None
