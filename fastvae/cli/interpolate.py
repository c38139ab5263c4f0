"""`fastvae interpolate`: the way from one datum to another through the latent space."""

from __future__ import annotations

import argparse
from typing import Any

from ..training.config import ConfigError
from .arguments import add_draw_x, add_run_command, add_run_options, index, positive
from .output import add_output_options, number_of, output_path, save_array, save_moving, save_picture
from .runs import decoded, open_data, open_run

STEPS = {"png": 10, "npy": 10, "gif": 30}


def add(commands: Any) -> None:
    """Add `interpolate` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "interpolate",
        run,
        "show a path between data",
        "Show the means of p(x|z) on the way from the posterior mean of one datum to that of another, "
        "between the two data themselves: a row for each pair.",
    )
    parser.usage = "%(prog)s RUN --from I [I ...] --to I [I ...] [options]"
    group = parser.add_argument_group("which")
    for flag, name, what in (("--from", "start", "first"), ("--to", "end", "last")):
        group.add_argument(
            flag,
            dest=name,
            type=index,
            nargs="+",
            required=True,
            metavar="I",
            help=f"{what} datum of each way, by its place in --data, from 0",
        )
    group.add_argument(
        "--spherical",
        action="store_true",
        help="along a great circle, on which z keeps its length, instead of a straight line",
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"of a way, with its ends (default: {STEPS['png']}; {STEPS['gif']} of a GIF)",
    )
    add_draw_x(group)
    add_output_options(parser, ("png", "gif", "npy"))
    add_run_options(parser, data=True)


def run(arguments: argparse.Namespace) -> None:
    """Encode, go, decode and write."""
    import torch

    from ..inference import encode, interpolation, plots
    from ..inference.paths import there_and_back

    if len(arguments.start) != len(arguments.end):
        got = f"got {len(arguments.end)} data for {len(arguments.start)} of --from"
        raise ConfigError("to", f"{got}, expected as many")
    opened = open_run(arguments)
    path, kind = output_path(opened, arguments, "interpolate")
    steps = arguments.steps or STEPS[kind]
    if steps < 2:
        raise ConfigError("steps", f"got {steps}, expected at least 2, the ends")
    data = open_data(opened, arguments)
    starts = data.batches(arguments.start, "from")
    ends = data.batches(arguments.end, "to")
    z = [torch.cat(list(encode(opened.model, batches))) for batches in (starts, ends)]
    ways = [interpolation(a, b, steps, spherical=arguments.spherical) for a, b in zip(*z, strict=True)]
    x = decoded(opened, torch.stack(ways), arguments)
    first, last = torch.cat(starts), torch.cat(ends)
    if kind == "npy":
        save_array(path, x)
    elif kind == "gif":
        frames = [plots.table(torch.stack((first, x[:, i], last), 1)) for i in range(steps)]
        save_moving(path, there_and_back(frames))
    else:
        between = torch.cat((first.unsqueeze(1), x, last.unsqueeze(1)), 1)
        columns = ["x", *(f"{i / (steps - 1):.3g}" for i in range(steps)), "x"]
        save_picture(path, plots.table(between, columns=columns))
    how = "spherical" if arguments.spherical else "linear"
    print(f"{path}: {number_of(len(ways), f'{how} way')} between {data.name}")
