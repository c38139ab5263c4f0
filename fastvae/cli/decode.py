"""`fastvae decode`: what a model makes of latents, as an array."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_draw_x, add_run_command, add_run_options
from .output import check_not_read, check_out, load_latents, save_batches, shape_of
from .runs import open_run, track


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
    parser.usage = "%(prog)s RUN --latents FILE.npy --out FILE.npy [options]"
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
    check_not_read(path, opened, arguments)
    n, z = load_latents(arguments.latents, opened, arguments.batch_size)
    shape, batches = (n, *opened.item_shape), track(z, "decoding", -(-n // arguments.batch_size))
    decoded = decode(opened.model, batches, draw_x=arguments.draw_x, seed=opened.seed)
    save_batches(path, shape, decoded)
    what = "draws of p(x|z)" if arguments.draw_x else "means of p(x|z)"
    print(f"{path}: {what} for {arguments.latents}, {shape_of(shape)}")
