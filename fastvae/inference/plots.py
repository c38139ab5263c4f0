"""Pictures of data: grids of tiles with their captions, as PNG, and moving ones as GIF."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 84  # pixels; smaller images are enlarged to about this
LARGEST_TILE = 256
GAP = 3
ROW_GAP = 18  # between rows of pairs, so that the eye pairs within a row
BACKGROUND = 255
FONT_SIZE = 14
CAPTION = 20  # pixels of a line of text above a row of tiles
ROW_LABEL = 96  # pixels of the text beside a row of a table
FRAME_SECONDS = 0.08


def grid(x: Tensor, *, columns: int = 8, captions: Sequence[str] = (), tile: int = TILE) -> Tensor:
    """A grid of x [N, *item], values in [0, 1], row by row: uint8 [C, H, W].

    captions: a line of text above each of them. tile: pixels to which smaller images are enlarged.
    """
    tiles = as_tiles(x, tile)
    rows, gaps = [], []
    for i in range(0, len(tiles), columns):
        row = _row(tiles[i : i + columns], columns)
        if captions:
            rows.append(_captions(row, captions[i : i + columns], tiles.shape[3]))
            gaps.append(0)
        rows.append(row)
        gaps.append(GAP)
    return _stack(rows, gaps)


def pairs(x: Tensor, x_hat: Tensor, *, columns: int = 8, captions: Sequence[str] = ()) -> Tensor:
    """Each datum of x [N, *item] above its x_hat [N, *item], values in [0, 1]: uint8 [C, H, W].

    captions: a line of text above each pair.
    """
    originals, reconstructions = as_tiles(x), as_tiles(x_hat)
    rows, gaps = [], []
    for i in range(0, len(originals), columns):
        pair = [_row(tiles[i : i + columns], columns) for tiles in (originals, reconstructions)]
        if captions:
            rows.append(_captions(pair[0], captions[i : i + columns], originals.shape[3]))
            gaps.append(0)
        rows += pair
        gaps += [GAP, ROW_GAP]
    return _stack(rows, gaps)


def table(
    x: Tensor,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    gap: int = GAP,
    tile: int = TILE,
) -> Tensor:
    """A table of x [R, S, *item], values in [0, 1], with a text beside each row and above each column.

    Tiles are `gap` pixels apart, and from the margin, which is ROW_LABEL more on the left where there are
    texts for rows, and CAPTION more at the top where there are some for columns. Returns uint8 [C, H, W].
    """
    n_rows, n_columns = x.shape[:2]
    tiles = as_tiles(x.flatten(0, 1), tile)
    _, channels, height, width = tiles.shape
    left, top = gap + ROW_LABEL * bool(rows), gap + CAPTION * bool(columns)
    size = (channels, top + n_rows * (height + gap), left + n_columns * (width + gap))
    picture = torch.full(size, BACKGROUND, dtype=torch.uint8)
    for i, cell in enumerate(tiles):
        y, x_ = top + i // n_columns * (height + gap), left + i % n_columns * (width + gap)
        picture[:, y : y + height, x_ : x_ + width] = cell
    texts = [(left - 8.0, top + (i + 0.5) * (height + gap), "rm", text) for i, text in enumerate(rows)]
    texts += [(left + (j + 0.5) * (width + gap), top - 3.0, "mb", text) for j, text in enumerate(columns)]
    return _written(picture, texts)


def save(path: str | os.PathLike[str] | IO[bytes], picture: Tensor) -> None:
    """Write uint8 [C, H, W], C = 1 (grey) or 3 (RGB), as PNG."""
    _image(picture).save(path, "PNG")


def save_gif(
    path: str | os.PathLike[str] | IO[bytes],
    frames: Sequence[Tensor],
    *,
    seconds: float | Sequence[float] = FRAME_SECONDS,
) -> None:
    """Write frames, each uint8 [C, H, W], as a GIF that goes on for ever; grey ones keep their values.

    seconds: of each frame, to a hundredth, or of one after the other.
    """
    first, *others = (_image(frame) for frame in frames)
    each = [seconds] * len(frames) if isinstance(seconds, float) else seconds
    duration = [round(1000 * time) for time in each]
    first.save(path, "GIF", save_all=True, append_images=others, duration=duration, loop=0, optimize=False)


def as_tiles(x: Tensor, tile: int = TILE) -> Tensor:
    """Items as pictures of a legible size: uint8 [N, C, height, width], C = 1 (grey) or 3 (RGB).

    x: [N, *item]. Values are clipped to [0, 1], NaN is 0. An item C x H x W of other than 1 or 3 channels is
    shown as their mean; one that is neither C x H x W nor H x W as a heat map, in rows of about the square
    root of its length. Smaller pictures are enlarged to at most `tile` pixels.
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
    enlarge = max(1, tile // largest)
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


def _image(picture: Tensor) -> Image.Image:
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _captions(row: Tensor, captions: Sequence[str], width: int) -> Tensor:
    """A strip [C, CAPTION, W] with a text over the middle of each tile of a row."""
    texts = [(i * (width + GAP) + width / 2, CAPTION - 3, "mb", text) for i, text in enumerate(captions)]
    return _written(_blank(row, CAPTION), texts)


def _written(picture: Tensor, texts: Sequence[tuple[float, float, str, str]]) -> Tensor:
    """The picture [C, H, W] with texts in black, each at x, y by its anchor, as Pillow has them."""
    if not texts:
        return picture
    image = _image(picture)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    for x, y, anchor, text in texts:
        draw.text((x, y), text, fill="black" if len(picture) == 3 else 0, font=font, anchor=anchor)
    written = torch.from_numpy(np.array(image))
    return written.unsqueeze(0) if len(picture) == 1 else written.permute(2, 0, 1)
