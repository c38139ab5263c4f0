"""One image: measured and decoded by Pillow.

It becomes uint8, [H, W] where it is to be grey, else [H, W, 3]. It is turned as its EXIF orientation says and
laid on white where it is transparent; of an animation it is the first frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .source import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
KINDS = "PNG, JPEG or WebP"
Pixels: TypeAlias = npt.NDArray[np.uint8]

_GREY_MODES = {"1", "L", "LA", "La"}
_ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height change places
_DRAFT = 3  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves so many times the size asked for


class ImageError(DataError):
    """An image that cannot be used; the message says why, without its name."""


def measure(path: Path) -> tuple[int, int, bool]:
    """Height and width of an image as shown, and whether it is grey, by its header. Raises ImageError."""
    with _opened(path) as image:
        width, height = image.size
        # a PNG without EXIF before its pixels would be decoded whole
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) >= 5
        grey = image.mode in _GREY_MODES
    return (width, height, grey) if turned else (height, width, grey)


def decode(path: Path, channels: int, size: int | None = None) -> Pixels:
    """An image as uint8, [H, W] for 1 channel, [H, W, 3] for 3.

    With size, its centre square is cut out and resized to [size, size] by Lanczos' filter. Raises ImageError.
    """
    mode = "L" if channels == 1 else "RGB"
    with _opened(path) as opened:
        image: Image.Image = opened
        if size is not None and image.format == "JPEG":
            image.draft(None, (_DRAFT * size, _DRAFT * size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image.convert("RGBA"))
        if image.mode != mode:
            image = image.convert(mode)
        return np.array(image if size is None else squared(image, size))


def squared(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, resized to [size, size] by Lanczos' filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings; that of a decompression bomb is an error here anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            yield image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not a {KINDS} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ImageError(f"{limit}, refused as a decompression bomb") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:  # Pillow reads bytes of any kind, and fails in many ways
        raise ImageError(f"corrupt ({str(error) or type(error).__name__})") from error


def _check(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError
    tiles = getattr(image, "tile", None)  # how its pixels are kept
    bits = str(tiles[0][3]) if tiles else ""
    if image.mode.startswith(("I", "F")) or ";16" in bits:
        raise ImageError("more than 8 bits a channel; convert it to 8, or save floating point in .npy")
