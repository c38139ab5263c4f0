"""The loader: its order, its values, its buffers, its threads."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from orders import feistel_order, numbered, rows_of
from processes import n_threads, run_python

from fastvae import _native
from fastvae.data import ArraySource
from fastvae.data.loader import DataLoader


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 97, 127, 128, 129, 1000, 1021, 65537])
def test_order_is_a_permutation(n: int, rng: np.random.Generator) -> None:
    for epoch in range(3):
        order = _native.epoch_order(n, int(rng.integers(2**63)), epoch)
        assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 13, 64, 100, 257, 3000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**63 - 1)])
def test_order_is_the_specified_one(n: int, seed: int, epoch: int) -> None:
    assert _native.epoch_order(n, seed, epoch).tolist() == feistel_order(n, seed, epoch)


def test_order_differs_by_seed_and_epoch() -> None:
    orders = {tuple(_native.epoch_order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("n", [5, 10, 16, 60])
def test_each_position_gets_every_sample_equally_often(n: int) -> None:
    epochs = 4000
    orders = np.stack([_native.epoch_order(n, 7, epoch) for epoch in range(epochs)])
    for position in (0, n // 2, n - 1):
        counts = np.bincount(orders[:, position], minlength=n)
        chi_square = float(np.sum((counts - epochs / n) ** 2) / (epochs / n))
        degrees = n - 1
        assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_each_order_of_few_samples_comes_equally_often(n: int) -> None:
    epochs, orders = 12000, math.factorial(n)
    counts = Counter(tuple(_native.epoch_order(n, 7, epoch)) for epoch in range(epochs))
    assert len(counts) == orders
    chi_square = sum((count - epochs / orders) ** 2 for count in counts.values()) / (epochs / orders)
    assert chi_square < orders - 1 + 5 * np.sqrt(2 * (orders - 1))


def test_order_is_uncorrelated() -> None:
    n = 60000
    for epoch in range(5):
        order = _native.epoch_order(n, 3, epoch)
        bound = 5 / np.sqrt(n)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < bound
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < bound
        assert abs(np.corrcoef(order, _native.epoch_order(n, 3, epoch + 1))[0, 1]) < bound
        # Neighbours stay neighbours about twice in n positions, by chance.
        assert np.sum(np.abs(np.diff(order)) == 1) < 20


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
def test_order_does_not_depend_on_threads(num_workers: int) -> None:
    loader = DataLoader(numbered(1003), 16, shuffle=True, seed=11, num_workers=num_workers)
    for epoch in range(3):
        assert np.array_equal(rows_of(loader), _native.epoch_order(1003, 11, epoch))


def test_unshuffled_order_is_the_sources() -> None:
    assert np.array_equal(rows_of(DataLoader(numbered(100), 7)), np.arange(100))


def test_epochs_advance_and_can_be_set() -> None:
    loader = DataLoader(numbered(40), 8, shuffle=True, seed=5)
    assert loader.epoch == 0
    first, second = rows_of(loader), rows_of(loader)
    assert loader.epoch == 2
    assert not np.array_equal(first, second)
    loader.set_epoch(0)
    assert np.array_equal(rows_of(loader), first)
    assert np.array_equal(rows_of(loader), second)


def test_passes_run_side_by_side() -> None:
    loader = DataLoader(numbered(200), 8, shuffle=True, num_workers=2)
    pairs = list(zip(loader, loader, strict=True))
    for epoch in (0, 1):
        rows = np.concatenate([pair[epoch].numpy()[:, 0] for pair in pairs])
        assert np.array_equal(rows, _native.epoch_order(200, 0, epoch))


@pytest.mark.parametrize("width", [1, 3, 16, 63, 64, 65, 100, 784, 5000])
def test_uint8_becomes_exactly_x_over_255(width: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (300, width), dtype=np.uint8)
    got = torch.cat(list(DataLoader(x, 32)))
    assert torch.equal(got, torch.from_numpy(x).to(torch.float32) / 255)


def test_every_uint8_value_is_exact() -> None:
    x = np.arange(256, dtype=np.uint8).repeat(2).reshape(2, 256)
    x[1] = x[1, ::-1]
    assert torch.equal(next(iter(DataLoader(x, 2))), torch.from_numpy(x).to(torch.float32) / 255)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "bool"])
def test_other_dtypes(dtype: str, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((50, 17)) * 3).astype(dtype)
    got = torch.cat(list(DataLoader(x, 16)))
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(9, 13), (31, 37)], ids=["in one piece", "in several"])
def test_channels_last_images_come_out_channels_first(
    dtype: type, channels: int, size: tuple[int, int], rng: np.random.Generator
) -> None:
    x = rng.integers(0, 256, (40, *size, channels)).astype(dtype)
    loader = DataLoader(x, 16, shuffle=True, seed=1)
    got = torch.cat(list(loader))
    scale = 255 if dtype is np.uint8 else 1
    order = torch.from_numpy(_native.epoch_order(40, 1, 0))
    expected = torch.from_numpy(x).permute(0, 3, 1, 2)[order].to(torch.float32) / scale
    assert loader.item_shape == (channels, *size)
    assert torch.equal(got, expected)


def test_sources_of_every_kind_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (30, 5, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    path = tmp_path / "x.npy"
    for kind in (x, torch.from_numpy(x), np.asfortranarray(x), ArraySource(x), path, str(path)):
        got = torch.cat(list(DataLoader(kind, 7)))
        assert got.shape == (30, 1, 5, 6)
        assert torch.equal(got, torch.from_numpy(x)[:, None].float() / 255)


@pytest.mark.parametrize("labelled", [False, True])
def test_threads_share_a_pass(labelled: bool) -> None:
    """Each batch comes to one of them."""
    x, y = numbered(6000), np.arange(6000)
    batches = iter(DataLoader((x, y) if labelled else x, 2, shuffle=True, num_workers=2))
    with ThreadPoolExecutor(4) as pool:
        read = [pool.submit(list, batches) for _ in range(4)]
        got = [batch[0] if labelled else batch for part in read for batch in part.result()]
    assert sorted(torch.cat(got)[:, 0].tolist()) == list(range(6000))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_follow_their_rows(num_workers: int, rng: np.random.Generator) -> None:
    x, y = numbered(101), rng.integers(0, 10, 101)
    loader = DataLoader((x, y), 10, shuffle=True, num_workers=num_workers)
    batches = list(loader)
    assert loader.has_labels
    assert all(labels.dtype == torch.int64 for _, labels in batches)
    rows = torch.cat([batch[:, 0] for batch, _ in batches]).long()
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.from_numpy(y)[rows])


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1])]
)
def test_length_and_last_batch(n: int, batch_size: int, sizes: list[int]) -> None:
    loader = DataLoader(numbered(n), batch_size)
    assert len(loader) == len(sizes)
    assert [len(batch) for batch in loader] == sizes
    dropping = DataLoader(numbered(n), batch_size, drop_last=True)
    whole = [size for size in sizes if size == batch_size]
    assert len(dropping) == len(whole)
    assert [len(batch) for batch in dropping] == whole


def test_huge_batch_size_is_the_whole_set() -> None:
    assert [len(batch) for batch in DataLoader(numbered(5), 2**40)] == [5]
    assert len(DataLoader(numbered(5), 2**40, drop_last=True)) == 0


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, list])
def test_indices_restrict_the_samples(make: type) -> None:
    chosen = [5, 3, 90, 41, 7]
    loader = DataLoader(numbered(100), 2, indices=make(chosen))
    assert (loader.n_samples, len(loader)) == (5, 3)
    assert rows_of(loader).tolist() == chosen
    shuffled = DataLoader(numbered(100), 2, shuffle=True, seed=4, indices=make(chosen))
    assert rows_of(shuffled).tolist() == [chosen[i] for i in _native.epoch_order(5, 4, 0)]
    assert list(DataLoader(numbered(9), 2, indices=np.empty(0, np.int64))) == []


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_kept_batches_stay_intact(num_workers: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (2000, 50), dtype=np.uint8)
    loader = DataLoader(x, 16, shuffle=True, num_workers=num_workers)
    truth = torch.from_numpy(x).float() / 255
    for epoch in range(2):
        kept = list(loader)
        for _ in loader:
            pass
        loader.set_epoch(epoch + 1)
        assert torch.equal(torch.cat(kept), truth[torch.from_numpy(_native.epoch_order(2000, 0, epoch))])


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_loader_is_not_copied(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="a DataLoader has threads and is not pickled or copied"):
        copied(DataLoader(numbered(10)))


def test_a_view_keeps_its_batch() -> None:
    loader = DataLoader((numbered(400), np.arange(400)), 4, num_workers=2)
    batches = iter(loader)
    x, y = next(batches)
    row, labels = x[1:2, :2], y[2:]
    del x, y
    for _ in batches:
        pass
    for _ in loader:
        pass
    del loader, batches
    gc.collect()
    assert row.tolist() == [[1.0, 1.0]]
    assert labels.tolist() == [2, 3]


def test_memory_is_recycled() -> None:
    loader = DataLoader(numbered(4000), 4, num_workers=1)
    assert len({batch.data_ptr() for batch in loader}) <= 8


def test_batches_are_aligned_and_writable() -> None:
    for batch in DataLoader(numbered(100), 8):
        assert batch.data_ptr() % 64 == 0
        batch.zero_()


def fail_in_a_pass(loader: DataLoader) -> None:
    for _ in loader:
        raise ZeroDivisionError


def test_threads_end_however_the_pass_ends() -> None:
    loader = DataLoader(numbered(1000), 4, num_workers=3)
    list(loader)
    before = n_threads()
    for _ in range(50):
        for _ in loader:
            break
        with pytest.raises(ZeroDivisionError):
            fail_in_a_pass(loader)
        next(iter(loader))
        iter(loader)
    gc.collect()
    assert n_threads() == before


def test_no_workers_means_no_threads() -> None:
    before = n_threads()
    batches = iter(DataLoader(numbered(100), 4, num_workers=0))
    next(batches)
    assert n_threads() == before


def test_an_exhausted_pass_stays_exhausted() -> None:
    batches = iter(DataLoader(numbered(10), 4))
    assert len(list(batches)) == 3
    assert list(batches) == []


def test_a_process_may_end_while_daemon_threads_read() -> None:
    """Of native batches: torch.from_numpy's tensors ask for the interpreter's lock themselves."""
    code = """
        import threading, time
        import numpy as np
        from fastvae.data.sources import as_source

        loader = as_source(np.zeros((20000, 784), np.float32)).loader(
            None, batch_size=128, drop_last=False, workers=1
        )

        def read():
            while True:
                for _ in loader.start(
                    seed=0, epoch=0, shuffle=True, blocks=(0, 0), first_batch=0, rank=0, ranks=1
                ):
                    pass

        for _ in range(3):
            threading.Thread(target=read, daemon=True).start()
        time.sleep(0.05)
        """
    for _ in range(3):
        run_python(code)


@pytest.mark.parametrize("data", ["x", "path"])
def test_a_forked_child_says_so_and_can_begin_again(tmp_path: Path, data: str) -> None:
    run_python(f"""
        import os
        import numpy as np
        from fastvae.data import mapped
        from fastvae.data.loader import DataLoader

        x, path = np.arange(4000, dtype=np.float32).reshape(1000, 4), {str(tmp_path / "x.npy")!r}
        np.save(path, x)
        mapped.room_for = lambda n_bytes: 1 << 28  # reads the file past the page cache, by threads
        loader = DataLoader({data}, 2, num_workers=2 if {data} is x else 0)
        ended, running = iter(loader), iter(loader)
        list(ended)
        kept = next(running)
        child = os.fork()
        if child == 0:
            try:
                next(running)
            except RuntimeError as error:
                assert "fork" in str(error)
            else:
                os._exit(2)
            assert len(list(loader)) == 500
            del running, ended, kept
            for _ in loader:
                break
            del loader
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(list(running)) == 499
    """)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_each_batch(ranks: int, num_workers: int) -> None:
    """Their rows, one rank after another, are the batch; the last batch of 103 rows has 7."""
    options = {"batch_size": 16, "shuffle": True, "seed": 5, "num_workers": num_workers}
    data = numbered(103), np.arange(103)
    loaders = [DataLoader(data, **options, rank=rank, world_size=ranks) for rank in range(ranks)]
    whole = DataLoader(data, **options)
    for loader in (whole, *loaders):
        loader.set_epoch(1, 2)
    for x, y, *parts in zip(*zip(*whole, strict=True), *loaders, strict=True):
        sizes = [len(part) for part, _ in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)
        assert torch.equal(torch.cat([part for part, _ in parts]), x)
        assert torch.equal(torch.cat([part for _, part in parts]), y)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_s_failure_reaches_the_consumer(num_workers: int) -> None:
    run_python(f"""
        import resource
        from pathlib import Path
        import numpy as np
        from fastvae.data.loader import DataLoader

        loader = DataLoader(np.zeros((100000, 2000), np.uint8), 100000, num_workers={num_workers})
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
        batches = iter(loader)
        try:
            next(batches)
        except MemoryError as error:
            assert "use a smaller batch_size" in str(error), error
        else:
            raise SystemExit("no error")
        assert list(batches) == []
    """)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 <= batch_size"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5, expected an integer"),
        ({"batch_size": True}, TypeError, "batch_size is True, expected an integer"),
        ({"seed": -1}, ValueError, "seed is -1, expected 0 <= seed"),
        ({"num_workers": -1}, ValueError, "num_workers is -1, expected 0 <= num_workers"),
        ({"indices": [0, 10]}, ValueError, r"indices\[1\] is 10, expected 0 <= index < 10"),
        ({"indices": [-1]}, ValueError, r"indices\[0\] is -1, expected 0 <= index < 10"),
        (
            {"indices": np.array([1, 2**63], np.uint64)},
            ValueError,
            r"indices\[1\] is 9223372036854775808, expected 0 <= index < 10",
        ),
        ({"indices": [0.5]}, ValueError, "indices is float64 of shape"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank is 2, expected 0 <= rank <= 1"),
        ({"world_size": 0}, ValueError, "world_size is 0, expected 1 <= world_size"),
        (
            {"transform": abs},
            TypeError,
            "transform is a builtin_function_or_method, expected a fastvae.data.Tr",
        ),
        ({"indices": [[0]]}, ValueError, "indices is int64 of shape"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DataLoader(numbered(10), **{"batch_size": 2, **arguments})


def test_bad_epoch_and_source() -> None:
    loader = DataLoader(numbered(10), 2)
    with pytest.raises(ValueError, match="epoch is -1, expected 0 <= epoch"):
        loader.set_epoch(-1)
    with pytest.raises(TypeError, match="source is a dict, expected a Source"):
        DataLoader({"x": 1}, 2)
    with pytest.raises(TypeError, match="x has dtype int32, expected uint8, float32 or float64"):
        DataLoader(ArraySource(np.zeros((3, 2), np.int32)), 2)


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 0), (2, 1, 2), (6, 1, 3), (16, 1, 4), (4, 4, 0)]
)
def test_threads_by_default(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert DataLoader(np.zeros((4, 2), np.uint8)).num_workers == threads
