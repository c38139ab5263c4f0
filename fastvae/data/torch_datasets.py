"""torch's Datasets as sources: tensors gathered natively, all else item by item, as torch does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from .. import _native
from .items import ItemLoader, read_item
from .source import DataError, Source
from .sources import as_source


def dataset_source(dataset: Dataset[Any]) -> Source:
    """A dataset as a source, with the meaning that its numbers have everywhere here: uint8 is x / 255.

    A TensorDataset (x) or (x, y) is read where it lies, a Subset of it too. Items of any other are x or
    (x, y), x [*item] an array, a tensor or an image, y an integer. Raises DataError for other items.
    """
    if isinstance(dataset, TensorDataset):
        return _tensor_source(dataset)
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, (TensorDataset, Subset)):
        source = dataset_source(dataset.dataset)
        if not isinstance(source, DatasetSource):
            return SubsetSource(source, _indices(dataset.indices, source))
    return DatasetSource(dataset)


def _tensor_source(dataset: TensorDataset) -> Source:
    tensors = dataset.tensors
    if len(tensors) == 1:
        return as_source(tensors[0])
    if len(tensors) == 2 and tensors[1].ndim == 1 and not tensors[1].is_floating_point():
        return as_source((tensors[0], tensors[1]))
    got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
    raise DataError(f"source: a TensorDataset of {got}, expected x, or x and integer labels [N]")


@dataclass(frozen=True)
class SubsetSource(Source):
    """Some samples of another source; `rows` says which, int64 [M]."""

    whole: Source
    chosen: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64] | None = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        labels = None if self.whole.y is None else self.whole.y[self.chosen]
        object.__setattr__(self, "y", labels)
        object.__setattr__(self, "name", self.whole.name)

    @property
    def n_samples(self) -> int:
        """M."""
        return len(self.chosen)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """That of the whole."""
        return self.whole.item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the whole."""
        return self.whole.dtype

    @property
    def in_memory(self) -> bool:
        """As the whole."""
        return self.whole.in_memory

    def value_range(self) -> tuple[float, float]:
        """Of the whole, which bounds it."""
        return self.whole.value_range()

    def rows(self) -> _native.Rows:
        """All rows of the whole, of which a loader reads the chosen ones."""
        return self.whole.rows()

    def loader(self, indices: npt.NDArray[np.int64] | None, **options: Any) -> Any:
        """Of the whole, with the rows that the indices mean there."""
        if indices is None:
            return self.whole.loader(self.chosen, **options)
        for i, index in enumerate(indices):
            if not 0 <= index < len(self.chosen):
                expected = f"0 <= index < {len(self.chosen)}, the number of samples"
                raise ValueError(f"indices[{i}] is {index}, expected {expected}")
        return self.whole.loader(self.chosen[indices], **options)


class DatasetSource(Source):
    """The items of a torch Dataset, map-style or iterable, as they come.

    The first item says what all are like. Those of an IterableDataset come in its own order.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.name = type(dataset).__name__
        self.y = None
        self.iterable = isinstance(dataset, IterableDataset)
        try:
            self._n_samples = len(cast(Any, dataset))
        except (TypeError, NotImplementedError) as error:
            expected = "a __len__, as a pass has a known number of batches"
            raise DataError(f"{self.name}: a dataset without length, expected {expected}") from error
        if self._n_samples < 1:
            raise DataError(f"{self.name}: empty, expected at least one item")
        first = next(iter(cast(Any, dataset)), self) if self.iterable else cast(Any, dataset)[0]
        if first is self:
            expected = f"expected the {self._n_samples} of its __len__"
            raise DataError(f"{self.name}: ended after 0 items, {expected}")
        x, label = read_item(first, 0, self.name)
        self._item_shape, self._dtype, self._labelled = x.shape, x.dtype, label is not None

    @property
    def n_samples(self) -> int:
        """What the dataset says that it has."""
        return self._n_samples

    @property
    def item_shape(self) -> tuple[int, ...]:
        """That of the first item."""
        return self._item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the first item."""
        return self._dtype

    @property
    def has_labels(self) -> bool:
        """Whether the first item has one."""
        return self._labelled

    @property
    def in_memory(self) -> bool:
        """Nothing is known of that."""
        return True

    def value_range(self) -> tuple[float, float]:
        """[0, 1] for uint8; else the smallest and the largest value, for which all items are read."""
        if self._dtype == np.uint8:
            return 0.0, 1.0
        batches = self.loader(
            None, batch_size=256, drop_last=False, workers=0, dtype="float32", transform=None
        )
        ranges = [
            (batch.min(), batch.max())
            for batch in (b[0] if isinstance(b, tuple) else b for b in batches.start(0, 0, False))
        ]
        return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))

    def rows(self) -> _native.Rows:
        """None: Python makes the items. Raises TypeError."""
        raise TypeError(f"{self.name}: a dataset of items made by Python, which have no native rows")

    def loader(self, indices: npt.NDArray[np.int64] | None, **options: Any) -> Any:
        """One that is used as `_native.Loader` is."""
        return ItemLoader(self, indices, **options)


def _indices(indices: Sequence[int], source: Source) -> npt.NDArray[np.int64]:
    given, n = np.asarray(indices).reshape(-1), source.n_samples
    if given.size == 0:
        raise DataError(f"{source.name}: an empty Subset, expected at least one sample")
    if given.dtype.kind not in "iu":
        raise DataError(f"{source.name}: a Subset with indices of {given.dtype}, expected integers")
    outside = (given < -n) | (given >= n)
    if outside.any():
        raise DataError(f"{source.name}: a Subset with index {given[outside][0]} of {n} samples")
    chosen = given.astype(np.int64)
    return np.where(chosen < 0, chosen + n, chosen)  # as Python's, which Subset uses
