"""The batches of an epoch as a rank gets them: its rows of each, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data import DataLoader
from ..inference.evaluate import Batch, inputs, moved, x_of
from .config import ConfigError
from .distributed import Ranks, Share


class Batches(Protocol):
    """What a training iterates over once an epoch: `fastvae.DataLoader`, or torch's."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


def check_same_batches(ranks: Ranks, name: str, batches: Batches | None) -> None:
    """Raise ConfigError where this rank has others than rank 0, as far as one can tell; `name`: theirs."""
    if ranks.size == 1:
        return
    got, expected = _identity(batches), ranks.from_first(partial(_identity, batches))
    differing = [key for key in got.keys() | expected.keys() if got.get(key) != expected.get(key)]
    if differing:
        what = "data" if "data" in differing else min(differing)
        raise ConfigError(
            name, f"got other {what} on rank {ranks.rank} than on rank 0, expected the same batches on all"
        )


def _identity(batches: Batches | None) -> dict[str, Any]:
    if not isinstance(batches, DataLoader):
        return {"batches": None if batches is None else length_hint(batches)}
    places = ("epoch", "batch", "window")
    return {key: value for key, value in batches.state_dict().items() if key not in places}


def shares_of_epoch(
    train: Batches, ranks: Ranks, device: torch.device, epoch: int, first: int
) -> Iterator[tuple[Tensor, Share]]:
    """This rank's rows of the batches of `epoch`, from 1, from the batch with index `first` on."""
    if ranks.size == 1:
        for x in inputs(_batches(train, epoch, first), device):
            yield x, Share(0, len(x), len(x))
    elif isinstance(train, DataLoader):  # which reads the rows of a rank alone
        before = train.rank, train.world_size
        train.set_rank(ranks.rank, ranks.size)
        try:
            for i, x in enumerate(inputs(_batches(train, epoch, first), device), first):
                yield x, ranks.share(min(train.batch_size, train.n_samples - i * train.batch_size))
        finally:
            train.set_rank(*before)
    else:
        for batch in _batches(train, epoch, first):
            x = x_of(batch)
            share = ranks.share(len(x))
            yield moved(x[share.first : share.first + share.rows], device), share


def _batches(train: Batches, epoch: int, first: int) -> Iterator[Batch]:
    if isinstance(train, DataLoader):
        train.set_epoch(epoch - 1, first)
        return iter(train)
    set_epoch = getattr(train, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch - 1)
    return islice(iter(train), first, None)
