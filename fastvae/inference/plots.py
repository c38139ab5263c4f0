"""Pictures of data: grids of tiles, as PNG."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE = 84  # pixels; smaller images are enlarged to about this
LARGEST_TILE = 256
GAP = 3
ROW_GAP = 18  # between rows of pairs, so that the eye pairs within a row
BACKGROUND = 255


def grid(x: Tensor, *, columns: int = 8) -> Tensor:
    """A grid of x [N, *item], values in [0, 1], row by row: uint8 [C, H, W]."""
    tiles = as_tiles(x)
    rows = [_row(tiles[i : i + columns], columns) for i in range(0, len(tiles), columns)]
    return _stack(rows, [GAP] * len(rows))


def pairs(x: Tensor, x_hat: Tensor, *, columns: int = 8) -> Tensor:
    """Each datum of x [N, *item] above its x_hat [N, *item], values in [0, 1]: uint8 [C, H, W]."""
    originals, reconstructions = as_tiles(x), as_tiles(x_hat)
    rows, gaps = [], []
    for i in range(0, len(originals), columns):
        rows += [_row(tiles[i : i + columns], columns) for tiles in (originals, reconstructions)]
        gaps += [GAP, ROW_GAP]
    return _stack(rows, gaps)


def save(path: str | os.PathLike[str], picture: Tensor) -> None:
    """Write uint8 [C, H, W], C = 1 (grey) or 3 (RGB), as PNG."""
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)


def as_tiles(x: Tensor) -> Tensor:
    """Items as pictures of a legible size: uint8 [N, C, height, width], C = 1 (grey) or 3 (RGB).

    x: [N, *item]. Values are clipped to [0, 1], NaN is 0. An item C x H x W of other than 1 or 3 channels is
    shown as their mean; one that is neither C x H x W nor H x W as a heat map, in rows of about the square
    root of its length.
    """
    x = x.detach().cpu().float().nan_to_num(0.0)
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim != 4:
        x = x.flatten(1)
        width = math.ceil(math.sqrt(x.shape[1]))
        height = math.ceil(x.shape[1] / width)
        x = F.pad(x, (0, width * height - x.shape[1])).reshape(-1, 1, height, width)
    if x.shape[1] not in (1, 3):
        x = x.mean(1, keepdim=True)
    largest = max(x.shape[2:])
    if largest > LARGEST_TILE:
        height, width = (max(1, side * LARGEST_TILE // largest) for side in x.shape[2:])
        x = F.interpolate(x, (height, width), mode="area")
    enlarge = max(1, TILE // largest)
    x = x.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _row(tiles: Tensor, columns: int) -> Tensor:
    """At most `columns` tiles [N, C, H, W] side by side: [C, H, width of all columns]."""
    n, channels, height, width = tiles.shape
    row = torch.full((channels, height, columns * (width + GAP) - GAP), BACKGROUND, dtype=torch.uint8)
    for i in range(n):
        row[:, :, i * (width + GAP) : i * (width + GAP) + width] = tiles[i]
    return row


def _stack(rows: list[Tensor], gaps: list[int]) -> Tensor:
    """Rows [C, H, W] under each other, each followed by its gap, with a margin around all."""
    parts = [part for row, gap in zip(rows, gaps, strict=True) for part in (row, _blank(row, gap))]
    return F.pad(torch.cat(parts[:-1], dim=1), (GAP, GAP, GAP, GAP), value=BACKGROUND)


def _blank(row: Tensor, height: int) -> Tensor:
    return row.new_full((row.shape[0], height, row.shape[2]), BACKGROUND)
