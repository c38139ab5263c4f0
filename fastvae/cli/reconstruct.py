"""`fastvae reconstruct`: data beside what a model makes of them."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_draw_x, add_run_command, add_run_options, positive
from .output import add_output_options, output_path, save_array, save_picture
from .runs import open_data, open_run, track

LISTED = 8


def add(commands: Any) -> None:
    """Add `reconstruct` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "reconstruct",
        run,
        "show data beside their reconstructions",
        "Show data, and below each the mean of p(x|z) at its posterior mean z.",
    )
    group = parser.add_argument_group("which")
    group.add_argument("--n", type=positive, default=32, metavar="N", help="how many (default: 32)")
    ends = group.add_mutually_exclusive_group()
    ends.add_argument(
        "--worst", action="store_true", help="those with the largest reconstruction term of all, worst first"
    )
    ends.add_argument("--best", action="store_true", help="those with the smallest, best first")
    add_draw_x(group)
    add_output_options(parser)
    add_run_options(parser, data=True)


def run(arguments: argparse.Namespace) -> None:
    """Choose, encode, decode and write."""
    import torch

    from ..inference import decode, encode, plots, reconstruction_terms

    opened = open_run(arguments)
    path, kind = output_path(opened, arguments, "reconstruct")
    data = open_data(opened, arguments)
    n, captions = min(arguments.n, data.loader.n_samples), []
    chosen, which = list(range(n)), "the first"
    if arguments.worst or arguments.best:
        terms = reconstruction_terms(opened.model, track(data.loader, "reconstructing"))
        order = terms.argsort(descending=arguments.worst, stable=True)
        chosen, which = order[:n].tolist(), "the worst" if arguments.worst else "the best"
        captions = [f"{terms[i]:#.4g}".rstrip(".") for i in chosen]
    batches = data.batches(chosen)
    x = torch.cat(batches)
    z = encode(opened.model, batches)
    x_hat = torch.cat(list(decode(opened.model, z, draw_x=arguments.draw_x, seed=opened.seed)))
    if kind == "npy":
        save_array(path, torch.stack((x, x_hat)))
    else:
        save_picture(path, plots.pairs(x, x_hat, captions=captions))
    print(f"{path}: {which} {n:,} of {data.name}")
    if captions:
        print("their index, and reconstruction term in nats:")
        for i, term in list(zip(chosen, captions, strict=True))[:LISTED]:
            print(f"{i}: {term}")
