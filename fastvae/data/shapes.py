"""`shapes`: images of known factors after dSprites (Matthey et al. 2017), drawn as they are read."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401 -- brings the OpenMP runtime that _native is linked against

from .. import _native
from .memory import available_memory
from .source import DataError, Source

SHAPES = ("square", "ellipse", "heart")
FACTORS = ("shape", "scale", "orientation", "x", "y")
FACTOR_SIZES = (3, 6, 40, 32, 32)
N_IMAGES = 737_280  # one for each combination
FACTOR_VALUES: tuple[npt.NDArray[np.float64], ...] = (
    np.arange(3.0),
    np.linspace(0.5, 1, 6),
    np.linspace(0, 2 * np.pi, 40),
    np.linspace(0, 1, 32),
    np.linspace(0, 1, 32),
)
_BYTES_EACH = 64  # of memory: an image's number, its label, and its factors where they are asked for
_FIRST_EPOCH = 2**62  # no pass of a loader has it, so a draw is not the order of one


class ShapeSource(Source):
    """A white shape on black, 1 x 64 x 64, anti-aliased, for each combination of five factors, or N of them.

    The factors are dSprites': shape, scale (6 from 0.5 to 1), orientation (40 from 0 to 2 pi, clockwise, so
    that the first and the last are alike), x and y of the centre (32 each, from 1/4 to 3/4 of the side). y is
    the fastest where the images are in order. The label is the shape.

    n: how many to draw, by seed, none twice before all 737,280 have been drawn; None is all, in order.

    factors: int64 [N, 5], the index of each factor, in the order of FACTORS.
    factor_values: float64 [N, 5], what the indices mean, as dSprites has them; x and y as 0 to 1.
    """

    def __init__(self, n: int | None = None, seed: int = 0) -> None:
        if n is not None and n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        if n is not None and n * _BYTES_EACH > available_memory():
            raise DataError(
                f"shapes: the numbers of {n} images take more memory than is free; expected fewer"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
        self._numbers = None if n is None else _drawn(n, seed)
        self._rows = _native.ShapeRows(self._numbers)
        self.name = "shapes" if n is None else f"shapes:{n}" + (f":{seed}" if seed else "")
        self.classes = SHAPES
        self.y = self._indices()[:, 0].copy()

    @property
    def n_samples(self) -> int:
        """N."""
        return len(self._rows)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """(1, 64, 64)."""
        return self._rows.item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    @cached_property
    def factors(self) -> npt.NDArray[np.int64]:
        """int64 [N, 5]."""
        return self._indices()

    @property
    def factor_values(self) -> npt.NDArray[np.float64]:
        """float64 [N, 5]."""
        return np.stack([values[self.factors[:, i]] for i, values in enumerate(FACTOR_VALUES)], axis=1)

    def images(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The images of rows, integers [n], as uint8 [n, 64, 64]."""
        return self._rows.images(np.asarray(rows, np.int64))

    def value_range(self) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0

    def rows(self) -> _native.Rows:
        """They draw the images."""
        return self._rows

    def _indices(self) -> npt.NDArray[np.int64]:
        numbers = np.arange(N_IMAGES) if self._numbers is None else self._numbers
        return np.stack(np.unravel_index(numbers, FACTOR_SIZES), axis=1).astype(np.int64, copy=False)


def _drawn(n: int, seed: int) -> npt.NDArray[np.int64]:
    rounds = range(-(-n // N_IMAGES))
    orders = [_native.epoch_order(N_IMAGES, seed, _FIRST_EPOCH + i) for i in rounds]
    return np.ascontiguousarray(np.concatenate(orders)[:n])
