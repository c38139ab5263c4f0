"""`fastvae decode`: what a model makes of latents, as an array."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_draw_x, add_run_command, add_run_options
from .output import check_out, load_latents, save_batches, shape_of
from .runs import open_run, track

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.arrays import ArraySource


def add(commands: Any) -> None:
    """Add `decode` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "decode",
        run,
        "write what latents decode to",
        "Write the mean of p(x|z) for each z of a file, in float32, a batch at a time: both may be larger "
        "than the memory.",
    )
    parser.add_argument(
        "--latents", metavar="FILE.npy", required=True, help="z, [N, latents], as of fastvae encode"
    )
    parser.add_argument("--out", metavar="FILE.npy", required=True, help="what to write")
    add_draw_x(parser)
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Decode and write."""
    from ..inference import decode

    path = Path(arguments.out)
    check_out(path, ["npy"])
    opened = open_run(arguments)
    z = load_latents(arguments.latents, opened)
    batches = track(_batches(z, arguments.batch_size), "decoding", -(-z.n_samples // arguments.batch_size))
    shape = (z.n_samples, *opened.item_shape)
    decoded = decode(opened.model, batches, draw_x=arguments.draw_x, seed=opened.seed)
    save_batches(path, shape, decoded)
    what = "draws of p(x|z)" if arguments.draw_x else "means of p(x|z)"
    print(f"{path}: {what} for {arguments.latents}, {shape_of(shape)}")


def _batches(z: ArraySource, size: int) -> Iterator[Tensor]:
    """Batches of a mapped array, each read when it is asked for."""
    import torch

    for i in range(0, z.n_samples, size):
        yield torch.from_numpy(z.read(slice(i, i + size)).astype("float32"))
