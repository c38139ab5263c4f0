"""Batches of items that Python makes one by one: torch's DataLoader, used as the native loader is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import astuple
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset

from .. import _native
from .arrays import array_of, is_channels_last
from .passes import CountedPass, Meter, Place, share
from .source import DataError

if TYPE_CHECKING:
    from .torch_datasets import DatasetSource


def _leave_process_group(worker: int) -> None:
    """Let Ctrl-C and torchrun's SIGTERM, which a whole group gets, stop the training alone: it ends these."""
    os.setpgid(0, 0)


class ItemLoader:
    """Batches of a dataset's items in our order, with our shares for ranks, made by torch's DataLoader."""

    def __init__(
        self,
        source: DatasetSource,
        indices: npt.NDArray[np.int64] | None,
        *,
        batch_size: int,
        drop_last: bool,
        workers: int,
        dtype: str,
        transform: object,
    ) -> None:
        if transform is not None:
            raise ValueError(f"transform is given for {source.name}, expected it in the dataset itself")
        if source.iterable and indices is not None:
            raise ValueError(f"indices are given for {source.name}, an IterableDataset, expected none")
        n = source.n_samples
        if indices is not None and len(indices) and not 0 <= indices.min() <= indices.max() < n:
            at = int(np.argmax((indices < 0) | (indices >= n)))
            raise ValueError(
                f"indices[{at}] is {indices[at]}, expected 0 <= index < {n}, the number of samples"
            )
        self.source, self.indices, self.workers, self.dtype = source, indices, workers, dtype
        self.n = n if indices is None else len(indices)
        self.batch_size = min(batch_size, max(1, self.n))
        self.drop_last = drop_last
        self._place, self._meter = Place(0), Meter()
        self.n_batches = self.n // batch_size + (not drop_last and self.n % batch_size != 0)

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.source.item_shape

    @property
    def position(self) -> int:
        return self._place.batch

    @property
    def meter(self) -> tuple[Any, ...]:
        return astuple(self._meter)

    def release(self) -> None:
        """Nothing: no memory is kept."""

    def __len__(self) -> int:
        return self.n_batches

    def start(
        self,
        seed: int,
        epoch: int,
        shuffle: bool,
        blocks: tuple[int, int] = (0, 0),
        first_batch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> CountedPass:
        """The batches of an epoch, as those of `_native.Loader`. Raises DataError, which names the item."""
        source = self.source
        if source.iterable and shuffle:
            raise ValueError(f"shuffle is True for {source.name}, an IterableDataset, expected False")
        generator = torch.Generator().manual_seed((seed + epoch) % 2**63)  # of torch's worker processes
        options: dict[str, Any] = {
            "num_workers": self.workers,
            "generator": generator,
            "worker_init_fn": _leave_process_group,
        }
        if source.iterable:
            batches = self._iterated(first_batch, rank, ranks, options)
        else:
            order = _native.epoch_order(self.n, seed, epoch, blocks) if shuffle else np.arange(self.n)
            chosen = order if self.indices is None else self.indices[order]
            shares = [_share(self._rows(k, chosen), rank, ranks) for k in range(first_batch, self.n_batches)]
            numbered = _Numbered(source.dataset)
            batches = TorchDataLoader(numbered, batch_sampler=shares, collate_fn=list, **options)
        self._place = Place(first_batch)
        return CountedPass(map(self._batch, batches), self._meter, self._place)

    def _rows(self, k: int, chosen: npt.NDArray[np.int64]) -> list[int]:
        rows: list[int] = chosen[k * self.batch_size : (k + 1) * self.batch_size].tolist()
        return rows

    def _iterated(self, first: int, rank: int, ranks: int, options: dict[str, Any]) -> Iterable[list[Any]]:
        name = self.source.name
        # each worker has batches of its own, and so a last one that may be small
        loaded = TorchDataLoader(self.source.dataset, self.batch_size, collate_fn=list, **options)
        items = chain.from_iterable(loaded)
        for k in range(self.n_batches):
            begin, end = k * self.batch_size, min((k + 1) * self.batch_size, self.n)
            numbered = list(enumerate(islice(items, end - begin), begin))
            if len(numbered) < end - begin:
                done = begin + len(numbered)
                raise DataError(f"{name}: ended after {done} items, expected the {self.n} of its __len__")
            if k >= first:
                yield _share(numbered, rank, ranks)
        left_out = max(0, self.n - self.n_batches * self.batch_size)
        if self.workers > 1 and any(True for _ in islice(items, left_out, None)):
            raise DataError(
                f"{name}: more than the {self.n} items of its __len__ came from {self.workers} workers, as "
                "where each gives all of them; expected a part from each, by torch's get_worker_info(), or "
                "num_workers=1"
            )

    def _batch(self, items: list[tuple[int, Any]]) -> Any:
        source = self.source
        pairs = [(number, *read_item(item, number, source.name)) for number, item in items]
        for number, x, label in pairs:
            if (x.shape, x.dtype, label is not None) != (source.item_shape, source.dtype, source.has_labels):
                got = f"{x.dtype} of shape {list(x.shape)}" + ("" if label is None else " with a label")
                expected = f"{source.dtype} of shape {list(source.item_shape)}"
                expected += " with a label" if source.has_labels else ""
                raise DataError(f"{source.name}: item {number} is {got}, expected {expected}, as item 0")
        x = np.empty((len(pairs), *source.item_shape), source.dtype)  # of images [H, W, C] too
        for i, (_, item, _) in enumerate(pairs):
            x[i] = item
        if x.dtype != np.uint8 and not np.isfinite(x.sum(dtype=np.float64)):
            for number, item, _ in pairs:
                if not np.isfinite(item).all():
                    raise DataError(
                        f"{source.name}: item {number} has NaN or infinite values, expected finite ones"
                    )
        made = self._in_form(x)
        if not source.has_labels:
            return made
        return made, np.array([label for _, _, label in pairs], np.int64)

    def _in_form(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.dtype == "uint8":
            return x
        tensor = torch.from_numpy(x).float()
        if x.dtype == np.uint8:
            tensor = tensor.div_(255)
        if self.dtype == "bfloat16":
            return tensor.bfloat16().view(torch.int16).numpy()
        return tensor.to(getattr(torch, self.dtype)).numpy()


class _Numbered(Dataset[tuple[int, Any]]):
    """The items of a dataset with their numbers, for messages."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


def _share(rows: list[Any], rank: int, ranks: int) -> list[Any]:
    """Those of a rank."""
    return rows[slice(*share(len(rows), rank, ranks))]


def read_item(item: object, number: int, name: str) -> tuple[npt.NDArray[Any], int | None]:
    """x, uint8, float32 or float64 with its channels first, and the label of an item that is x or (x, y)."""
    x, label = (item[0], item[1:]) if isinstance(item, (tuple, list)) and item else (item, ())
    if len(label) > 1 or (not isinstance(x, (Tensor, np.ndarray)) and not hasattr(x, "__array_interface__")):
        got = f"a {type(item).__name__}"
        if isinstance(item, (tuple, list)):
            got += f" of {', '.join(type(part).__name__ for part in item)}"
        expected = "x or (x, y), x a tensor, an array or an image and y an integer"
        raise DataError(f"{name}: item {number} is {got}, expected {expected}")
    if isinstance(x, Tensor) and x.dtype == torch.bfloat16:
        x = x.float()
    array = array_of(x if isinstance(x, (Tensor, np.ndarray)) else np.asarray(x), f"{name}: item {number}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype not in (np.uint8, np.float32, np.float64) or array.size == 0:
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise DataError(
            f"{name}: item {number} is {got}, expected numbers of uint8 (for x / 255), bool or float"
        )
    if array.ndim == 0:
        array = array.reshape(1)
    if is_channels_last((1, *array.shape)):
        array = np.moveaxis(array, -1, 0)
    elif array.ndim == 2:
        array = array[None]
    return array, _label(label[0], number, name) if label else None


def _label(label: object, number: int, name: str) -> int:
    value = label
    if isinstance(label, (Tensor, np.ndarray)) and label.shape in ((), (1,)):
        value = label.item()
    if not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
        got = f"a {type(label).__name__}"
        raise DataError(f"{name}: the label of item {number} is {got}, expected an integer")
    return int(value)
