"""Where a command writes what it has made, and in which format."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

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
    if out is None:
        kind = kind or formats[0]
        out = run.folder / f"{name}.{kind}"
    check_out(out, formats if kind is None else ())
    check_not_read(out, run, arguments)
    of_name = out.suffix.removeprefix(".").lower()
    if kind is not None and of_name in ("png", "gif", "npy") and of_name != kind:
        raise ConfigError("format", f"got {kind} with --out {out}, expected one of the two")
    return out, kind or of_name


def check_out(out: Path, formats: Sequence[str] = ()) -> None:
    """Raise ConfigError unless a file may be written to `out`; before the work, not after it.

    formats: how its name may end; anyhow without.
    """
    folder = out.parent
    if formats and out.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError("out", f"got '{out}', expected a name that ends with .{' or .'.join(formats)}")
    if not folder.is_dir():
        raise ConfigError("out", f"got '{out}', but there is no folder {folder}")
    if out.is_dir():
        raise ConfigError("out", f"got '{out}', which is a folder, expected a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("out", f"got '{out}', but {folder} is not writable")


def check_not_read(out: Path, run: Run, arguments: argparse.Namespace) -> None:
    """Raise ConfigError if `out` is a file that a command reads: the latents, the data, or one of the run."""
    given = (getattr(arguments, "latents", None), getattr(arguments, "data", None))
    files = (*given, run.config.data, run.config.val)
    check_none_of(out, [run.folder], [Path(file) for file in files if isinstance(file, str)])


def check_none_of(out: Path, runs: Iterable[Path], others: Iterable[Path] = ()) -> None:
    """Raise ConfigError if `out` is one of the files that make the runs, or one of the others."""
    from ..models.files import CONFIG_NAME, WEIGHTS_NAME
    from ..training.run_folder import EVALUATION_NAME, METRICS_NAME, OPTIONS_NAME, SUMMARY_NAME

    names = (CONFIG_NAME, WEIGHTS_NAME, OPTIONS_NAME, METRICS_NAME, SUMMARY_NAME, EVALUATION_NAME)
    for file in (*(run / name for run in runs for name in names), *others):
        if out.exists() and file.exists() and out.samefile(file):
            raise ConfigError("out", f"got '{out}', which the command reads, expected another file")


def save_picture(path: Path, picture: Tensor) -> None:
    """Write uint8 [C, H, W] as PNG, all or nothing."""
    from ..inference import plots
    from ..models.files import replacing

    with replacing(path) as temporary, open(temporary, "wb") as file:
        plots.save(file, picture)


def save_moving(path: Path, frames: Sequence[Tensor], seconds: float | Sequence[float] = 0.08) -> None:
    """Write frames, uint8 [C, H, W] each, as GIF, all or nothing."""
    from ..inference import plots
    from ..models.files import replacing

    with replacing(path) as temporary, open(temporary, "wb") as file:
        plots.save_gif(file, frames, seconds=seconds)


def save_array(path: Path, array: Any) -> None:
    """Write an array or tensor as .npy, all or nothing."""
    save_batches(path, array.shape, [array])


def shape_of(shape: Sequence[int]) -> str:
    """That of an array, for a message: 1,797 x 1 x 8 x 8."""
    return " x ".join(f"{size:,}" for size in shape)


def number_of(n: int, what: str) -> str:
    """So many of a thing, for a message: 1 latent, 1,797 latents."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def save_batches(path: Path, shape: Sequence[int], batches: Iterable[Any]) -> None:
    """Write batches [B, ...] as one .npy of float32 and `shape`, all or nothing, one batch in memory."""
    import numpy as np

    from ..models.files import replacing

    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:  # not a map, where a full disk would end the process
            np.lib.format.write_array_header_1_0(file, header)
            rows = 0
            for batch in batches:
                file.write(np.ascontiguousarray(batch, np.dtype("<f4")).data)
                rows += len(batch)
        if rows != shape[0]:
            raise ValueError(f"batches: got {rows} rows, expected {shape[0]}")


def load_latents(path: str, run: Run, batch_size: int) -> tuple[int, Iterator[Tensor]]:
    """How many latents are in a .npy, and batches of them, float32 [B, *latent], each read when asked for.

    Raises ConfigError, and the batches DataError for what is not finite or has changed.
    """
    from ..data import DataError, DataLoader, source_from_arrays
    from ..data.formats import map_npy
    from ..inference.evaluate import x_of

    if not os.path.exists(path) or os.path.isdir(path):
        what = "a folder" if os.path.isdir(path) else "not there"
        raise ConfigError("latents", f"got '{path}', which is {what}, expected a .npy of fastvae encode")
    try:
        z = map_npy(Path(path))
        expected = f"N x {shape_of(run.latent_shape)}"
        if z.shape[1:] != run.latent_shape:
            got = shape_of(z.shape)
            raise ConfigError("latents", f"got {path} of {got}, expected {expected}, as {run.folder}")
        if z.dtype.kind != "f":
            raise ConfigError("latents", f"got {path} of {z.dtype}, expected floating point")
        source = source_from_arrays(z, name=path, channels_last=False)
    except DataError as error:
        raise ConfigError("latents", f"got {error}") from error
    batches = DataLoader(source, batch_size, num_workers=0)
    return len(z), (x_of(batch).view(-1, *run.latent_shape) for batch in batches)
