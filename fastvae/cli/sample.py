"""`fastvae sample`: data that a model makes up."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError
from .arguments import add_draw_x, add_run_command, add_run_options, positive
from .output import add_output_options, load_latents, number_of, output_path, save_batches, save_picture
from .runs import Run, open_data, open_run, track

if TYPE_CHECKING:
    from torch import Tensor

N = 64
IN_A_PICTURE = 10_000
FITTED = 50_000  # draws of the aggregate posterior that the mixture is fitted to
WIDE = 8 * 84  # pixels of the tiles of a row


def add(commands: Any) -> None:
    """Add `sample` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "sample",
        run,
        "draw new data",
        "Draw latents z, and show the mean of p(x|z) for each.",
    )
    group = parser.add_argument_group("latents")
    group.add_argument("--n", type=positive, metavar="N", help=f"how many (default: {N})")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="factor of the standard deviation of z (default: 1)"
    )
    group.add_argument(
        "--from",
        dest="source",
        choices=("prior", "posterior"),
        help="what z is drawn from: the prior N(0, I), or a Gaussian mixture fitted to the posteriors of the "
        "data (default: prior)",
    )
    group.add_argument(
        "--components", type=positive, metavar="K", help="Gaussians of that mixture (default: 10)"
    )
    group.add_argument("--latents", metavar="FILE.npy", help="z given instead of drawn, [N, latents]")
    add_draw_x(group)
    add_output_options(parser)
    add_run_options(parser, data="with --from posterior", part="train")


def run(arguments: argparse.Namespace) -> None:
    """Draw, decode and write."""
    _check(arguments)

    import torch

    from ..inference import decode, plots

    opened = open_run(arguments)
    path, kind = output_path(opened, arguments, "sample")
    z, what = _latents(opened, arguments)
    if kind == "png" and len(z) > IN_A_PICTURE:
        expected = f"at most {IN_A_PICTURE:,}; --format npy takes any number"
        raise ConfigError("n", f"got {len(z):,} for a picture, expected {expected}")
    batches = decode(
        opened.model,
        track(z.split(arguments.batch_size), "decoding"),
        draw_x=arguments.draw_x,
        seed=opened.seed,
    )
    if kind == "npy":
        save_batches(path, (len(z), *opened.item_shape), batches)
    else:
        columns = max(8, math.ceil(math.sqrt(len(z))))
        tile = WIDE // columns
        save_picture(path, plots.grid(torch.cat(list(batches)), columns=columns, tile=tile))
    drawn = ", x drawn too" if arguments.draw_x else ""
    print(f"{path}: {what}{drawn}")


def _check(arguments: argparse.Namespace) -> None:
    temperature, from_data = arguments.temperature, arguments.source == "posterior"
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError("temperature", f"got {temperature}, expected a number of at least 0")
    given = {"n": arguments.n, "temperature": temperature, "from": arguments.source}
    for name, value in given.items():
        if value is not None and arguments.latents is not None:
            raise ConfigError(name, f"got {value} with --latents, expected one of the two")
    of_data = {"components": arguments.components, "data": arguments.data, "split": arguments.split}
    for name, value in of_data.items():
        if value is not None and not from_data:
            raise ConfigError(name, f"got {value}, expected it with --from posterior only")


def _latents(opened: Run, arguments: argparse.Namespace) -> tuple[Tensor, str]:
    """z, and what it is."""
    import torch

    from ..inference import draw_prior, encode, fit_mixture

    if arguments.latents is not None:
        _, batches = load_latents(arguments.latents, opened, arguments.batch_size)
        z = torch.cat(list(batches))
        return z, f"{len(z):,} decoded from {arguments.latents}"
    n = N if arguments.n is None else arguments.n
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    hot = "" if temperature == 1 else f" at temperature {temperature:g}"
    if arguments.source != "posterior":
        z = draw_prior(n, opened.latent_shape, temperature=temperature, seed=opened.seed)
        return z, f"{number_of(n, 'draw')} of the prior{hot}"
    data = open_data(opened, arguments, part="train").some(FITTED, opened.seed)
    batches = encode(
        opened.model,
        track(data.loader, "encoding"),
        draw=True,
        logvar_clamp=opened.config.logvar_clamp,
        seed=opened.seed,
    )
    z = torch.cat(list(batches))
    components = arguments.components or min(10, len(z))
    if components > len(z):
        raise ConfigError("components", f"got {components}, expected at most {len(z)}, the data")
    mixture = fit_mixture(z, components=components, seed=opened.seed)
    fitted = f"{number_of(components, 'Gaussian')} fitted to the posteriors of {data.name}"
    what = f"{number_of(n, 'draw')} of {fitted}{hot}"
    return mixture.draw(n, temperature=temperature, seed=opened.seed), what
