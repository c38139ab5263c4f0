"""The batches of an epoch as a rank gets them: its rows of each, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..data import DataLoader
from ..inference.evaluate import Batch, inputs, moved, x_of
from .distributed import Ranks, Share


class Batches(Protocol):
    """What a training iterates over once an epoch: `fastvae.DataLoader`, or torch's."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


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
