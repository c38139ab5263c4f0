"""`fastvae latents`: where data lie in the latent space."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError
from .arguments import add_run_command, add_run_options, index, positive
from .output import add_output_options, output_path, save_array, save_moving, save_picture
from .runs import Run, RunData, latents_of, open_data, open_run, track

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.projection import Projection

SHOWN, SHOWN_BY_TSNE = 5000, 2000
FRAME_SECONDS = 0.3
LAST_SECONDS = 2.0  # of the last frame


def add(commands: Any) -> None:
    """Add `latents` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "latents",
        run,
        "show where data lie in the latent space",
        "Show the posterior means of data as points, coloured by label: one latent or two as they are, more "
        "by their principal components.",
    )
    group = parser.add_argument_group("which")
    group.add_argument(
        "--n",
        type=positive,
        metavar="N",
        help=f"data, drawn at random (default: {SHOWN}; {SHOWN_BY_TSNE} with --tsne)",
    )
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--dims",
        type=index,
        nargs=2,
        metavar="D",
        help="two latents, from 0, instead of principal components",
    )
    how.add_argument(
        "--tsne", action="store_true", help="neighbours beside neighbours, by t-SNE; distances mean little"
    )
    group.add_argument(
        "--animate",
        action="store_true",
        help="a GIF over the epochs of a run that was trained with --weights-epochs; the projection is that "
        "of the last of them",
    )
    add_output_options(parser, ("png", "gif", "npy"))
    add_run_options(parser, data=True)


def run(arguments: argparse.Namespace) -> None:
    """Encode, project and draw."""
    if arguments.animate:
        if arguments.tsne:
            raise ConfigError(
                "tsne", "got it with --animate, expected one of the two: it has no fixed projection"
            )
        if arguments.format is None and arguments.out is None:
            arguments.format = "gif"

    opened = open_run(arguments)
    if arguments.tsne and math.prod(opened.latent_shape) == 1:
        raise ConfigError("tsne", f"{opened.folder} has one latent, which is shown as it is without")
    path, kind = output_path(opened, arguments, "latents")
    if kind == "gif" and not arguments.animate:
        raise ConfigError("format", "got gif, expected it with --animate only")
    if kind == "png" and arguments.animate:
        raise ConfigError("format", "got png with --animate, expected gif or npy")
    n = arguments.n or (SHOWN_BY_TSNE if arguments.tsne else SHOWN)
    data = open_data(opened, arguments).some(n, opened.seed)
    if arguments.animate:
        shown = _animate(opened, arguments, path, kind, data)
    else:
        shown = _draw(opened, arguments, path, kind, data)
    print(f"{path}: the posterior means of {data.name}, {shown}")


def _draw(opened: Run, arguments: argparse.Namespace, path: Any, kind: str, data: RunData) -> str:
    from ..inference.projection import tsne
    from ..inference.scatter import picture, scatter

    z = _means(opened, data, "encoding")
    axes: tuple[str, ...] = ("t-SNE, dimension 1", "t-SNE, dimension 2")
    if arguments.tsne:
        if len(z) < 2:
            raise ConfigError("tsne", "got 1 datum, expected at least 2")
        is_plain, points = False, tsne(z, seed=opened.seed)
    else:
        projection = _projection(opened, arguments, z)
        is_plain, points, axes = projection.is_plain, projection(z), projection.axes
    if kind == "npy":
        save_array(path, points)
    else:
        figure = scatter(
            points,
            data.labels,
            classes=data.classes,
            axes=axes,
            title=f"posterior means of {data.name}",
            prior=is_plain,
            ticks=not arguments.tsne,
        )
        save_picture(path, picture(figure))
    return " and ".join(axes)


def _animate(opened: Run, arguments: argparse.Namespace, path: Any, kind: str, data: RunData) -> str:
    """One frame for each kept copy of the weights; the model is left with the last of them."""
    import torch

    from ..inference.scatter import limits_of, picture, scatter
    from ..models.files import load_weights
    from ..training.checkpoint import weights_of_epochs

    kept = weights_of_epochs(opened.folder)
    if not kept:
        raise ConfigError(
            "animate", f"{opened.folder} has no weights of its epochs; train it with --weights-epochs 1"
        )
    means = []
    for epoch, weights in kept:
        load_weights(opened.model, weights)
        means.append(_means(opened, data, f"encoding, epoch {epoch}"))
    projection = _projection(opened, arguments, means[-1])
    points = torch.stack([projection(z) for z in means])
    if kind == "npy":
        save_array(path, points)
    else:
        frames = [
            picture(
                scatter(
                    frame,
                    data.labels,
                    classes=data.classes,
                    axes=projection.axes,
                    title=f"posterior means of {data.name}, epoch {epoch}",
                    limits=limits_of(points.flatten(0, 1)),
                    prior=projection.is_plain,
                )
            )
            for (epoch, _), frame in zip(track(kept, "drawing"), points, strict=True)
        ]
        save_moving(path, frames, [FRAME_SECONDS] * (len(frames) - 1) + [LAST_SECONDS])
    first, last = kept[0][0], kept[-1][0]
    return f"{' and '.join(projection.axes)}, epochs {first} to {last}"


def _projection(opened: Run, arguments: argparse.Namespace, z: Tensor) -> Projection:
    from ..inference.projection import latent_plane, projection_of

    if arguments.dims is None:
        return projection_of(z)
    dims = latents_of(arguments.dims, opened, "dims")
    return latent_plane(math.prod(opened.latent_shape), tuple(dims))


def _means(opened: Run, data: RunData, what: str) -> Tensor:
    """The posterior means of all data, [N, *latent]."""
    import torch

    from ..inference import encode

    return torch.cat(list(encode(opened.model, track(data.loader, what))))
