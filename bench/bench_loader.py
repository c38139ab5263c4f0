"""The loader against torch's DataLoader and plain tensor indexing: uint8 [60000, 784], shuffled, to float32.

Every opponent delivers the same thing, float32 batches of 128 scaled to 0..1, and is set up as well as it can
be; of the variants of plain indexing, and of DataLoader, the fastest is the one that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from fastvae.data import DataLoader

Compare = Callable[..., None]
N, D, BATCH = 60000, 784, 128
FAST_ROUNDS, SLOW_ROUNDS = 15, 3


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, D), dtype=np.uint8))


def exhaust(batches: Callable[[], Iterator[object]]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def fastvae(data: torch.Tensor, num_workers: int | None) -> Callable[[], None]:
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=num_workers)
    return exhaust(lambda: iter(loader))


def torch_loader(data: torch.Tensor, num_workers: int) -> Callable[[], None]:
    loader = TorchDataLoader(TensorDataset(data), BATCH, shuffle=True, num_workers=num_workers)
    return exhaust(lambda: (x.float() / 255 for (x,) in loader))


def indexing(data: torch.Tensor) -> Iterator[object]:
    order = torch.randperm(N)
    for start in range(0, N, BATCH):
        yield data[order[start : start + BATCH]].to(torch.float32).div_(255)


def index_select(data: torch.Tensor) -> Iterator[object]:
    order = torch.randperm(N)
    for rows in order.split(BATCH):
        yield torch.index_select(data, 0, rows).to(torch.float32).mul_(1 / 255)


def index_select_out(data: torch.Tensor) -> Iterator[object]:
    order = torch.randperm(N)
    gathered = torch.empty(BATCH, D, dtype=torch.uint8)
    for rows in order.split(BATCH):
        narrow = gathered[: len(rows)]
        torch.index_select(data, 0, rows, out=narrow)
        yield narrow.to(torch.float32).mul_(1 / 255)


def test_bench_against_indexing(compare: Compare, data: torch.Tensor) -> None:
    callables = {
        "fastvae": fastvae(data, None),
        "x[rows]": exhaust(lambda: indexing(data)),
        "index_select": exhaust(lambda: index_select(data)),
        "index_select(out=)": exhaust(lambda: index_select_out(data)),
    }
    compare("loader against plain tensor indexing", callables, rounds=FAST_ROUNDS, samples=N)


# From Python 3.12 on, DataLoader's fork of a process with threads warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bench_against_torch_loader(compare: Compare, data: torch.Tensor) -> None:
    callables = {"fastvae": fastvae(data, None)}
    callables |= {f"DataLoader({n} workers)": torch_loader(data, n) for n in (0, 2)}
    compare("loader against torch's DataLoader", callables, rounds=SLOW_ROUNDS, samples=N)
