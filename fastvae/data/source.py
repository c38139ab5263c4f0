"""What a source is: samples by number, and native code that makes batches of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import _native

Array: TypeAlias = npt.NDArray[Any]


class DataError(ValueError):
    """Data that cannot be used; the message is one line: what, what was got, what was expected."""

    def __init__(self, message: str) -> None:
        # a file's name may hold line breaks, control characters and bytes that are not text
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Source(ABC):
    """Samples by number, and native code that makes batches of them.

    y: int64 [N], or None without labels.
    name: what messages call it.
    classes: the names of the labels 0, 1, ..., where they are known.
    """

    y: npt.NDArray[np.int64] | None
    name: str
    classes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """N."""

    def __len__(self) -> int:
        """N, as of a torch Dataset."""
        return self.n_samples

    @property
    @abstractmethod
    def item_shape(self) -> tuple[int, ...]:
        """Shape of a sample in a batch, [C, H, W] for images."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of the samples as they are kept: uint8, which means x / 255, or a floating point type."""

    @property
    def has_labels(self) -> bool:
        """Whether batches are (x, y)."""
        return self.y is not None

    @property
    def in_memory(self) -> bool:
        """Whether no disk is waited for."""
        return True

    @abstractmethod
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value in a batch, or bounds of them; may read all data."""

    @abstractmethod
    def rows(self) -> _native.Rows:
        """What a native loader reads, with `n_samples` rows of `item_shape`."""

    def loader(self, indices: npt.NDArray[np.int64] | None, **options: Any) -> Any:
        """A `_native.Loader` of the samples at `indices`, or of all, with its options."""
        return _native.Loader(self.rows(), self.y, indices, **options)
