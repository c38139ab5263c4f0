"""`fastvae encode`: the latents of data, as an array."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_run_command, add_run_options
from .output import check_not_read, check_out, save_batches, shape_of
from .runs import open_data, open_run, track

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.latents import Moments


def add(commands: Any) -> None:
    """Add `encode` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "encode",
        run,
        "write the latents of data",
        "Write the posterior means of data, [N, latents] in float32, a batch at a time: data and latents may "
        "be larger than the memory. Their standard deviation is what latent diffusion scales by.",
    )
    parser.usage = "%(prog)s RUN --out FILE.npy [options]"
    parser.add_argument("--out", metavar="FILE.npy", required=True, help="what to write")
    parser.add_argument("--sample", action="store_true", help="a draw of each posterior, not its mean")
    add_run_options(parser, data=True)


def run(arguments: argparse.Namespace) -> None:
    """Encode and write."""
    from ..inference import encode
    from ..inference.latents import Moments

    path = Path(arguments.out)
    check_out(path, ["npy"])
    opened = open_run(arguments)
    check_not_read(path, opened, arguments)
    data = open_data(opened, arguments)
    batches = encode(
        opened.model,
        track(data.loader, "encoding"),
        draw=arguments.sample,
        logvar_clamp=opened.config.logvar_clamp,
        seed=opened.seed,
    )
    moments = Moments()
    shape = (data.loader.n_samples, *opened.latent_shape)
    save_batches(path, shape, _measured(batches, moments))
    what = "draws of the posteriors" if arguments.sample else "posterior means"
    print(f"{path}: {what} of {data.name}, {shape_of(shape)}")
    std = moments.std
    scale = f"; times {1 / std:.5g}, it is 1" if std > 0 else ""
    print(f"mean {moments.mean:.5g}, standard deviation {std:.5g}{scale}")


def _measured(batches: Iterable[Tensor], moments: Moments) -> Iterator[Tensor]:
    for z in batches:
        moments.update(z)
        yield z
