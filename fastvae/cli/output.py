"""Where a command writes what it has made, and in which format."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError

if TYPE_CHECKING:
    from .runs import Run


def add_output_options(parser: argparse.ArgumentParser, formats: Sequence[str] = ("png", "npy")) -> None:
    """Add --format, one of `formats`, and --out."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=tuple(formats),
        help=f"npy holds the numbers (default: that of --out's name, else {formats[0]})",
    )
    group.add_argument("--out", metavar="FILE", help="default: the run folder, under the name of the command")
    parser.set_defaults(formats=tuple(formats))


def output_path(run: Run, arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """Where to write, and the format: --out, or `name` in the run folder. Raises ConfigError."""
    formats, out = arguments.formats, None if arguments.out is None else Path(arguments.out)
    kind = arguments.format
    if out is not None:
        check_out(out)
        of_name = out.suffix.removeprefix(".").lower()
        if kind is None and of_name not in formats:
            raise ConfigError("out", f"got '{out}', expected a name that ends with .{' or .'.join(formats)}")
        if kind is not None and of_name in ("png", "gif", "npy") and of_name != kind:
            raise ConfigError("format", f"got {kind} with --out {out}, expected one of the two")
        return out, kind or of_name
    kind = kind or formats[0]
    return run.folder / f"{name}.{kind}", kind


def check_out(out: Path) -> None:
    """Raise ConfigError unless a file may be written to `out`; before the work, not after it."""
    folder = out.parent
    if not folder.is_dir():
        raise ConfigError("out", f"got '{out}', but there is no folder {folder}")
    if out.is_dir():
        raise ConfigError("out", f"got '{out}', which is a folder, expected a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("out", f"got '{out}', but {folder} is not writable")


def save_array(path: Path, array: Any) -> None:
    """Write an array or tensor as .npy, all or nothing."""
    import numpy as np

    from ..models.files import replacing

    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(array), allow_pickle=False)
