"""The loader on a real GPU: what Triton's interpreter and a model of the copies cannot see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from gpu import nothing_waits, profiled
from torch import Tensor

from fastvae.data import DataLoader, ShapeSource, Transform
from fastvae.inference.evaluate import moved

pytestmark = pytest.mark.gpu
TRANSFORMS = [None, Transform(hflip=True, padding=2, binarize=True), Transform(scale=1 / 127.5, shift=-1.0)]


@pytest.fixture
def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (5000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 5000)


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept on it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))


def make(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, 128, shuffle=True, seed=7, **options)


def assert_same(batches: Iterator[Any] | DataLoader, truth: Iterator[Any] | DataLoader) -> None:
    for (x, y), (true_x, true_y) in zip(batches, truth, strict=True):
        assert x.is_cuda
        assert torch.equal(x.cpu(), true_x)
        assert torch.equal(y.cpu(), true_y)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_data_are_those_of_the_host(data: Any, transform: Transform | None, dtype: torch.dtype) -> None:
    options = {"transform": transform, "dtype": dtype}
    loader, host = make(data, device="cuda", **options), make(data, **options)
    assert loader.note == "array: kept on cuda:0, 4.0 MB"
    for _ in range(2):
        assert_same(loader, host)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("source", ["uint8", "float32"])
@pytest.mark.usefixtures("full_gpu")
def test_streamed_batches_survive_a_slow_and_a_fast_reader(data: Any, num_workers: int, source: str) -> None:
    """They are kept and compared at the end, when every buffer has been used many times."""
    x, y = data
    data = (x, y) if source == "uint8" else ((x / 255).astype(np.float32), y)
    loader, host = make(data, device="cuda", num_workers=num_workers), make(data)
    assert "streamed to cuda:0" in str(loader.note)
    busy = torch.randn(2048, 2048, device="cuda")
    for cycles in (0, 2_000_000):
        kept = []
        for batch in loader:
            torch.cuda._sleep(cycles)
            if cycles == 0:
                busy = (busy @ busy).tanh()
            kept.append(batch)
        assert_same(iter(kept), host)


@pytest.mark.parametrize("kept", [True, False])
def test_a_stream_that_waits_for_the_other_may_go_on(
    data: Any, kept: bool, request: pytest.FixtureRequest
) -> None:
    if not kept:
        request.getfixturevalue("full_gpu")
    loader, streams = make(data, device="cuda"), [torch.cuda.Stream() for _ in range(2)]
    batches, got = iter(loader), []
    for i in range(len(loader)):
        stream = streams[i % 2]
        stream.wait_stream(streams[1 - i % 2])
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000)
            x, y = next(batches)
            got.append((x.clone(), y.clone()))
    torch.cuda.synchronize()
    assert_same(iter(got), make(data))


def test_one_launch_a_batch_and_nothing_waits(data: Any) -> None:
    batches = iter(make(data, device="cuda"))
    next(batches)
    torch.cuda.synchronize()
    with nothing_waits():
        assert profiled(lambda: next(batches))[1] == ["gather_kernel"]


def test_a_graph_reads_the_batches(data: Any) -> None:
    loader, host = make(data, device="cuda", drop_last=True), make(data, drop_last=True)
    x = torch.zeros(128, 1, 28, 28, device="cuda")
    y = torch.zeros(128, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.sum((1, 2, 3)) + y  # what is lazy is there before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        doubled, shifted = x * 2, y + 1
    got = []
    for _ in loader.into(x, y):
        graph.replay()
        got.append((doubled.clone() / 2, shifted.clone() - 1))
    assert_same(iter(got), host)


@pytest.mark.parametrize("kept", [True, False])
def test_memory_comes_back(data: Any, kept: bool, request: pytest.FixtureRequest) -> None:
    if not kept:
        request.getfixturevalue("full_gpu")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with make(data, device="cuda", num_workers=2) as loader:
            for _ in range(2):
                next(iter(loader))
        del loader
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before


def test_data_of_more_than_2_to_the_31_bytes() -> None:
    shapes = ShapeSource()  # 3 GB
    if torch.cuda.mem_get_info()[0] < 7e9:
        pytest.skip("needs 7 GB of free GPU memory")
    loader, host = make(shapes, device="cuda"), make(shapes)
    for one in (loader, host):
        one.set_epoch(1, 3000)
    assert "kept on" in str(loader.note)
    assert_same(islice(loader, 20), islice(host, 20))


def test_pinned_batches_are_not_overwritten_while_they_are_copied(data: Any) -> None:
    got: list[tuple[Tensor, ...]] = []
    for batch in make(data, pin_memory=True, num_workers=3):
        assert all(tensor.is_pinned() for tensor in batch)
        torch.cuda._sleep(100_000)
        got.append(tuple(tensor.to("cuda", non_blocking=True) for tensor in batch))
    assert_same(iter(got), make(data))  # type: ignore[arg-type]


def test_what_is_brought_back_is_there(data: Any) -> None:
    (x, _), (truth, _) = next(iter(make(data, device="cuda"))), next(iter(make(data)))
    assert torch.equal(moved(x, torch.device("cpu")), truth)
