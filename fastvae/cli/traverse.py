"""`fastvae traverse`: what each latent does to the picture."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError
from .arguments import add_draw_x, add_run_command, add_run_options, index, positive
from .output import add_output_options, number_of, output_path, save_array, save_moving, save_picture
from .runs import Run, decoded, latents_of, open_data, open_run, track

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10  # latents by default
STEPS = {"png": 11, "npy": 11, "gif": 31}
GRID_STEPS = 20
GRID_TILE = 42
FRAME_COLUMNS = 5


def add(commands: Any) -> None:
    """Add `traverse` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "traverse",
        run,
        "vary the latents one by one, or two as a grid",
        "Vary one latent after the other, and show the mean of p(x|z): a row for each latent, the most used "
        "(with the largest KL) first. With --grid, vary two over the quantiles of the prior.",
    )
    group = parser.add_argument_group("which")
    group.add_argument(
        "--dims",
        type=index,
        nargs="+",
        metavar="D",
        help=f"latents, from 0 (default: the {SHOWN} most used; two with --grid)",
    )
    group.add_argument(
        "--index",
        type=index,
        metavar="I",
        help="around the posterior mean of this datum of --data (default: around 0, the mean of the prior)",
    )
    group.add_argument(
        "--range", type=float, default=3.0, metavar="R", help="from -R to R around it (default: 3)"
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"values of a latent (default: {STEPS['png']}; {STEPS['gif']} of a GIF, {GRID_STEPS} of a grid)",
    )
    group.add_argument(
        "--grid",
        action="store_true",
        help="two latents, the first from left to right and the second upwards, over the quantiles of the "
        "prior; --range has no say",
    )
    add_draw_x(group)
    add_output_options(parser, ("png", "gif", "npy"))
    add_run_options(parser, data="for --index, and for the KL of a run that has no summary.json")


def run(arguments: argparse.Namespace) -> None:
    """Vary, decode and write."""
    import torch

    from ..inference import plots, quantile_grid, traversal
    from ..inference.paths import there_and_back

    if not 0 < arguments.range < math.inf:
        raise ConfigError("range", f"got {arguments.range:g}, expected a number above 0")
    opened = open_run(arguments)
    path, kind = output_path(opened, arguments, "grid" if arguments.grid else "traverse")
    if arguments.grid and kind == "gif":
        raise ConfigError("grid", "got it with GIF, expected png or npy")
    kl = _kl(opened, arguments)
    latents = _latents(opened, arguments, kl)
    center, around = _center(opened, arguments)
    steps = arguments.steps or (GRID_STEPS if arguments.grid else STEPS[kind])
    places = torch.arange(1 - steps, steps, 2, dtype=torch.float64) / max(1, steps - 1)  # from -1 to 1, by 0
    offsets = (arguments.range * places).float()
    if arguments.grid:
        first, second = latents
        z = quantile_grid(center, (first, second), steps)
        what = (
            f"latent {first} from left to right, latent {second} upwards, over {steps} quantiles of the prior"
        )
    else:
        z = traversal(center, latents, offsets)
        what = f"{number_of(len(latents), 'latent')} from {-arguments.range:g} to {arguments.range:g}"
    x = decoded(opened, z, arguments)
    names = [f"z{latent}" if kl is None else f"z{latent} {kl[latent]:.2f} nats" for latent in latents]
    if kind == "npy":
        save_array(path, x)
    elif arguments.grid:
        save_picture(path, plots.table(x, gap=0, tile=GRID_TILE))
    elif kind == "gif":
        columns = min(FRAME_COLUMNS, len(latents))
        frames = [plots.grid(x[:, i], columns=columns, captions=names) for i in range(steps)]
        save_moving(path, there_and_back(frames))
    else:
        shown = [f"{offset:+.3g}" if offset else "0" for offset in offsets]
        save_picture(path, plots.table(x, rows=names, columns=shown))
    print(f"{path}: {what}, around {around}")


def _kl(opened: Run, arguments: argparse.Namespace) -> list[float] | None:
    """The KL of each latent in nats, [Z]: of summary.json, else of the data; None where there are neither."""
    found = _kl_of_summary(opened)
    if found is not None:
        return found
    if arguments.data is None and opened.config.data is None:
        return None
    import torch

    from ..inference.evaluate import inputs
    from ..inference.latents import LatentStatistics

    statistics = LatentStatistics()
    with torch.no_grad():
        for x in inputs(track(open_data(opened, arguments).loader, "encoding"), opened.device):
            statistics.update(*opened.model.encode(x))
    return [float(kl) for kl in statistics.kl]


def _kl_of_summary(opened: Run) -> list[float] | None:
    """What summary.json says of it; None where that is not a number for each latent."""
    found, n = opened.summary.get("kl_by_latent"), math.prod(opened.latent_shape)
    if not isinstance(found, list) or len(found) != n:
        return None
    return found if all(isinstance(kl, float) and math.isfinite(kl) for kl in found) else None


def _latents(opened: Run, arguments: argparse.Namespace, kl: list[float] | None) -> list[int]:
    """The latents that are shown, the most used first."""
    n = math.prod(opened.latent_shape)
    given = range(n) if arguments.dims is None else latents_of(arguments.dims, opened, "dims")
    latents = list(dict.fromkeys(given))
    if not (arguments.grid and arguments.dims is not None):
        latents.sort(key=lambda latent: 0.0 if kl is None else -kl[latent])
    if arguments.grid:
        if len(latents) < 2 or (arguments.dims is not None and len(latents) > 2):
            got = f"{n} latent" if arguments.dims is None else " ".join(map(str, arguments.dims))
            raise ConfigError("dims" if arguments.dims else "grid", f"got {got}, expected two")
        return latents[:2] if arguments.dims is not None else sorted(latents[:2])
    return latents if arguments.dims is not None else latents[:SHOWN]


def _center(opened: Run, arguments: argparse.Namespace) -> tuple[Tensor, str]:
    """The z that the others are around, [*latent], and what it is."""
    import torch

    from ..inference import encode

    if arguments.index is None:
        if arguments.split is not None and _kl_of_summary(opened) is not None:
            raise ConfigError("split", f"got {arguments.split}, expected it with --index only")
        return torch.zeros(opened.latent_shape), "the mean of the prior"
    data = open_data(opened, arguments)
    (z,) = encode(opened.model, data.batches([arguments.index]))
    return z[0], f"datum {arguments.index} of {data.name}"
