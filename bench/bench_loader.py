"""The loader against torch's DataLoader and plain tensor indexing: uint8 [60000, 784], shuffled, to float32.

Every opponent delivers the same thing, float32 batches of 128 scaled to 0..1, and is set up as well as it can
be; of the variants of plain indexing, and of DataLoader, the fastest is the one that counts. Then rows of
several kinds and sizes against the bandwidth of a plain copy of the same data by all threads: of the bytes
that have to be moved, each element read once and written once. The same on a GPU, where there is one, for
data that are kept there; and what streaming to it adds to the time of a reader that computes.

An epoch may take no longer than processors need to wake: all have turns of the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from fastvae._native import epoch_order
from fastvae.data import DataLoader, Transform

Compare = Callable[..., None]
N, D, BATCH = 60000, 784, 128
FAST_ROUNDS, SLOW_ROUNDS = 15, 3
TURN_SECONDS = 0.1
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


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
    compare(
        "loader against plain tensor indexing",
        callables,
        rounds=FAST_ROUNDS,
        turn_seconds=TURN_SECONDS,
        samples=N,
    )


# From Python 3.12 on, DataLoader's fork of a process with threads warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bench_against_torch_loader(compare: Compare, data: torch.Tensor) -> None:
    callables = {"fastvae": fastvae(data, None)}
    callables |= {f"DataLoader({n} workers)": torch_loader(data, n) for n in (0, 2)}
    compare(
        "loader against torch's DataLoader",
        callables,
        rounds=SLOW_ROUNDS,
        turn_seconds=TURN_SECONDS,
        samples=N,
    )


def rows(n: int, bytes_of_row: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of bytes, or of floats in [0, 1)."""
    rng = np.random.default_rng(0)
    if dtype == torch.uint8:
        return torch.from_numpy(rng.integers(0, 256, (n, bytes_of_row), dtype=np.uint8))
    return torch.from_numpy(rng.random((n, bytes_of_row // 4), dtype=np.float32))


def converted(data: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What plain indexing does for the same batches."""
    scale = 1 / 255 if data.dtype == torch.uint8 and dtype != torch.uint8 else None
    for chosen in torch.randperm(len(data), device=data.device).split(BATCH):
        batch = torch.index_select(data, 0, chosen)
        yield batch.to(dtype) if scale is None else batch.to(dtype).mul_(scale)


@pytest.mark.parametrize(
    ("n", "bytes_of_row", "source", "dtype"),
    [
        (N, D, torch.uint8, torch.uint8),
        (8192, 12288, torch.uint8, torch.uint8),
        (8192, 12288, torch.uint8, torch.float32),
        (8192, 12288, torch.float32, torch.bfloat16),
    ],
)
def test_bench_against_copy(
    compare: Compare, n: int, bytes_of_row: int, source: torch.dtype, dtype: torch.dtype
) -> None:
    data = rows(n, bytes_of_row, source)
    copy = torch.empty_like(data)
    loader = DataLoader(data, BATCH, shuffle=True, dtype=dtype)
    order = torch.from_numpy(epoch_order(n, 0, 0))[:BATCH]
    truth = data[order].to(dtype) if source != torch.uint8 or dtype == source else data[order].to(dtype) / 255
    assert torch.equal(next(iter(loader)), truth)
    moved = data.numel() * (data.element_size() + dtype.itemsize)
    callables = {
        "fastvae": exhaust(lambda: iter(loader)),
        "index_select": exhaust(lambda: converted(data, dtype)),
        "copy": lambda: copy.copy_(data),
    }
    names = [str(kind).removeprefix("torch.") for kind in (source, dtype)]
    compare(
        f"loader, rows of {bytes_of_row:,} bytes, {names[0]} to {names[1]}",
        callables,
        rounds=FAST_ROUNDS,
        turn_seconds=TURN_SECONDS,
        traffic={"fastvae": moved, "index_select": moved, "copy": 2 * data.nbytes},
    )


TRANSFORMS = {
    "binarized": Transform(binarize=True),
    "flipped and shifted": Transform(hflip=True, padding=2),
    "scaled to -1..1": Transform(scale=1 / 127.5, shift=-1.0),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_bench_transforms(compare: Compare, data: torch.Tensor, name: str) -> None:
    loader = DataLoader(data.view(N, 28, 28), BATCH, shuffle=True, transform=TRANSFORMS[name])

    def in_torch() -> Iterator[torch.Tensor]:
        for x in converted(data, torch.float32):
            match name:
                case "binarized":
                    yield torch.bernoulli(x)
                case "scaled to -1..1":
                    yield x.mul_(2).sub_(1)
                case _:  # one place for the whole batch: less than is asked for
                    top, left = torch.randint(0, 5, (2,)).tolist()
                    padded = torch.nn.functional.pad(x.view(-1, 28, 28), (2, 2, 2, 2))
                    yield padded[:, top : top + 28, left : left + 28].flip(2).contiguous()

    callables = {"fastvae": exhaust(lambda: iter(loader)), "index_select and torch": exhaust(in_torch)}
    compare(
        f"loader, {name}, uint8 [{N}, 28, 28] to float32",
        callables,
        rounds=SLOW_ROUNDS,
        turn_seconds=TURN_SECONDS,
        samples=N,
    )


def on_gpu(data: torch.Tensor, dtype: torch.dtype) -> DataLoader:
    loader = DataLoader(data, BATCH, shuffle=True, dtype=dtype, device="cuda")
    order = torch.from_numpy(epoch_order(len(data), 0, 0))[:BATCH]
    truth = data[order].to(dtype) if dtype == data.dtype else (data[order].float() / 255).to(dtype)
    assert torch.equal(next(iter(loader)).cpu(), truth)
    return loader


@needs_gpu
@pytest.mark.parametrize("bytes_of_row", [D, 12288, 196608])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_bench_kept_on_cuda(compare: Compare, bytes_of_row: int, dtype: torch.dtype) -> None:
    """Whole passes; a copy on the GPU moves the same bytes as one of them."""
    data = rows(max(4096, 2**28 // bytes_of_row), bytes_of_row, torch.uint8)
    loader, there = on_gpu(data, dtype), data.cuda()
    assert "kept on" in str(loader.note)
    moved = data.numel() * (1 + dtype.itemsize)
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    compare(
        f"loader on a GPU, rows of {bytes_of_row:,} bytes, uint8 to {str(dtype).removeprefix('torch.')}",
        {
            "fastvae": exhaust(lambda: iter(loader)),
            "index_select": exhaust(lambda: converted(there, dtype)),
            "copy": lambda: copy.copy_(source),
        },
        rounds=FAST_ROUNDS,
        synchronize=torch.cuda.synchronize,
        traffic={"fastvae": moved, "index_select": moved, "copy": moved},
    )


@needs_gpu
@pytest.mark.parametrize("bytes_of_row", [D, 12288])
def test_bench_streamed_to_cuda(compare: Compare, bytes_of_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of batches that something longer than their copies is computed with, against that alone."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))  # keeps nothing
    data = rows(16384, bytes_of_row, torch.uint8)
    loader = on_gpu(data, torch.float32)
    assert "streamed to" in str(loader.note)
    batch, matrix = torch.rand(BATCH, bytes_of_row, device="cuda"), torch.rand(4096, 4096, device="cuda")

    def step(x: torch.Tensor) -> torch.Tensor:
        return (matrix @ matrix) + x.sum()

    def loop(batches: Iterator[torch.Tensor]) -> None:
        for x in batches:
            step(x)

    compare(
        f"a step of a product of matrices, batches of rows of {bytes_of_row:,} bytes streamed to the GPU",
        {
            "fastvae": lambda: loop(iter(loader)),
            "the same batch again": lambda: loop(iter([batch] * len(loader))),
            "DataLoader(pin_memory)": lambda: loop(torch_batches(data)),
        },
        rounds=SLOW_ROUNDS,
        synchronize=torch.cuda.synchronize,
        samples=len(data),
    )


def torch_batches(data: torch.Tensor) -> Iterator[torch.Tensor]:
    loader = TorchDataLoader(TensorDataset(data), BATCH, shuffle=True, num_workers=2, pin_memory=True)
    for (x,) in loader:
        yield x.to("cuda", non_blocking=True).float() / 255
