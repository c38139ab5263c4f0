"""The pictures of a report: samples, reconstructions, traversals and latents of a model."""

from __future__ import annotations

import base64
import io
import itertools
import time
from collections.abc import Iterable, Sequence

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from ...models import as_model
from ...models.model import decode_mean, evaluating
from .. import generate, paths, plots
from ..evaluate import Batch
from ..projection import projection_of
from . import charts
from .record import Pictures, Traversal

RECONSTRUCTED = 16  # data
SAMPLED = 40  # draws
TRAVERSED = 8  # latents
REACH = 3.0  # standard deviations of the prior, to both sides
USED = 0.01  # nats; a latent of less does nothing to be seen
STEPS = 9  # of a traversal
SCATTERED = 2000  # data, at most
SCATTER_SECONDS = 0.5  # that encoding them may take, at most
WIDEST = 1000  # pixels
LARGE = 150_000  # bytes of a PNG; a larger one becomes a WebP


@torch.no_grad()
def draw(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    kl_by_latent: Sequence[float] = (),
    classes: Sequence[str] | None = None,
) -> Pictures:
    """Pictures of `model` and the first of some data, in eval mode.

    batches: x [B, *item], values in [0, 1] to be legible, or (x, y) with labels y [B]; at least one.
    seed: of the draws from the prior. kl_by_latent: in nats; the traversals are of the largest, and of the
    first latents where it is empty. classes: the names of the labels 0, 1, ...
    """
    device = next(model.parameters()).device
    iterator = iter(batches)
    first = next(iterator)
    x = first if isinstance(first, Tensor) else first[0]
    reconstructed = x[:RECONSTRUCTED]
    with evaluating(model):
        means, labels = _posterior_means(model, first, iterator, device)
        latent_shape = means.shape[1:]
        samples = generate.sample(model, SAMPLED, latent_shape=latent_shape, seed=seed)
        traversals = _traversals(model, means[0], kl_by_latent)
    latents, names = _scatter(means.flatten(1), labels, classes)
    return Pictures(
        samples=_uri(samples),
        reconstructions=_uri(reconstructed, generate.reconstruct(model, reconstructed)),
        traversals=traversals,
        latents=latents,
        labels=names,
    )


def _posterior_means(
    model: nn.Module, first: Batch, others: Iterable[Batch], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The posterior means of the data [N, *latent], and their labels [N] where they have some, on the CPU."""
    means: list[Tensor] = []
    labels: list[Tensor] = []
    n, until = 0, time.monotonic() + SCATTER_SECONDS
    for batch in itertools.chain([first], others):
        x, y = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[-1])
        means.append(as_model(model).encode(x.to(device))[0].float().cpu())
        if isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point():
            labels.append(y.cpu())
        n += len(x)
        if n >= SCATTERED or time.monotonic() > until:
            break
    labelled = len(labels) == len(means)
    return torch.cat(means)[:SCATTERED], torch.cat(labels)[:SCATTERED] if labelled else None


def _traversals(model: nn.Module, z: Tensor, kl_by_latent: Sequence[float]) -> tuple[Traversal, ...]:
    """The latents of most KL, each varied around z [*latent]."""
    device = next(model.parameters()).device
    flat = z.flatten()
    known = len(kl_by_latent) == len(flat)
    order = sorted(range(len(flat)), key=lambda j: -kl_by_latent[j]) if known else range(len(flat))
    used = [j for j in order if not known or kl_by_latent[j] >= USED]
    rows = []
    for j in (used or list(order))[:TRAVERSED]:
        center = flat.clone()
        center[j] = 0
        (varied,) = paths.traversal(center.view_as(z), [j], torch.linspace(-REACH, REACH, STEPS))
        tiles = decode_mean(model, varied.to(device)).cpu()
        rows.append(Traversal(f"z{j}", kl_by_latent[j] if known else None, _uri(tiles, columns=STEPS)))
    return tuple(rows)


def _scatter(
    means: Tensor, labels: Tensor | None, classes: Sequence[str] | None
) -> tuple[Markup | None, tuple[tuple[str, str], ...]]:
    """Posterior means [N, Z] in the plane, as SVG, and the labels: the colour and the name of each."""
    finite = means.isfinite().all(1)
    means, labels = means[finite], None if labels is None else labels[finite]
    if len(means) == 0:
        return None, ()
    projection = projection_of(means)
    y = None if labels is None else labels.numpy()
    svg = Markup(charts.scatter(projection(means), y, projection.axes))
    if y is None:
        return svg, ()
    colors = charts.CLASS_COLORS
    found = sorted(set(y.tolist()))[: len(colors)]
    return svg, tuple(
        (colors[label % len(colors)], classes[label] if classes and 0 <= label < len(classes) else str(label))
        for label in found
    )


def _uri(x: Tensor, x_hat: Tensor | None = None, *, columns: int = 8) -> str:
    """Items as a grid, or pairs of them, as a data URI; the page shows between the tiles."""
    if x_hat is None:
        picture, ground = (plots.grid(t, columns=columns) for t in (x, torch.zeros_like(x)))
    else:
        zeros = torch.zeros_like(x)
        picture = plots.pairs(x, x_hat, columns=columns)
        ground = plots.pairs(zeros, zeros, columns=columns)
    alpha = 255 - ground[:1]  # what is white there is between the tiles
    pixels = torch.cat((picture, alpha)).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((WIDEST, WIDEST * 4), Image.Resampling.BOX)
    content, kind = _encoded(image, "PNG", optimize=False), "png"
    if len(content) > LARGE:
        content, kind = _encoded(image.convert("RGBA"), "WEBP", quality=85, method=2), "webp"
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
