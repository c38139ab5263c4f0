"""Data in mapped files: their order in blocks, what is read and kept of them, files that change meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from orders import block_order, numbered, rows_of
from processes import TESTS, TIME_LIMIT, n_threads, run_python

from fastvae import _native
from fastvae.data import DataError, DataLoader, ShuffleWarning, Transform, mapped, open_source
from fastvae.data.mapped import shuffled_blocks

CGROUP = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(params=[False, True], ids=["mapped", "staged"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether blocks are read past the page cache, as if the file were more than the memory."""
    if request.param:
        monkeypatch.setattr(mapped, "room_for", lambda n_bytes: 1 << 28)
    return bool(request.param)


def saved(folder: Path, x: np.ndarray) -> Path:
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


@pytest.mark.parametrize("n", [1, 2, 10, 97, 100, 1003])
@pytest.mark.parametrize("blocks", [(1, 1), (3, 2), (10, 4), (7, 50), (50, 1), (2000, 1)])
def test_block_order_is_the_specified_one(n: int, blocks: tuple[int, int], rng: np.random.Generator) -> None:
    seed, epoch = int(rng.integers(2**63)), int(rng.integers(100))
    order = _native.epoch_order(n, seed, epoch, blocks).tolist()
    assert sorted(order) == list(range(n))
    assert order == block_order(n, seed, epoch, *blocks)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.usefixtures("staged")
def test_block_order_starts_anywhere(tmp_path: Path, num_workers: int, seed: int) -> None:
    data = saved(tmp_path, numbered(1003))
    loader = DataLoader(data, 16, shuffle=True, seed=seed, window=300, num_workers=num_workers)
    assert len(loader) == 63
    for epoch in range(2):
        order = _native.epoch_order(1003, seed, epoch, shuffled_blocks(300, 12))
        for first in (0, 1, 17, 40, 62):
            loader.set_epoch(epoch, first)
            assert np.array_equal(rows_of(loader), order[first * 16 :])
        loader.set_epoch(epoch, 63)
        assert list(loader) == []


def test_blocks_are_cut_at_another_place_in_each_epoch() -> None:
    n, block = 1003, 5
    orders = [_native.epoch_order(n, 5, epoch, (block, 1)) for epoch in range(200)]
    assert len({frozenset(order[-(n % block) :]) for order in orders}) > 150  # the short block
    apart = np.zeros(n - 1, bool)
    for order in orders:
        apart |= np.abs(np.diff(np.argsort(order))) > 2 * block
    assert apart.all()


def test_samples_of_a_window_are_mixed() -> None:
    """A window's samples come from all over the data, and neighbours part."""
    order = _native.epoch_order(2**20, 3, 0, shuffled_blocks(2**16, 2048))
    first = np.sort(order[: 2**16])
    assert np.abs(first.mean() / 2**20 - 0.5) < 5 * np.sqrt(1 / 12 / 128)  # 128 blocks of 512
    assert abs(np.corrcoef(order[: 2**16 - 1], order[1 : 2**16])[0, 1]) < 5 / 2**8
    assert np.sum(np.abs(np.diff(order)) == 1) < 400  # 2 in a window of 65536, by chance, and so about 32


@pytest.mark.parametrize("window", [100, 10**9])
def test_a_window_of_all_is_the_exact_shuffle(tmp_path: Path, window: int) -> None:
    loader = DataLoader(saved(tmp_path, numbered(100)), 8, shuffle=True, seed=3, window=window)
    assert loader.window is None
    assert np.array_equal(rows_of(loader), _native.epoch_order(100, 3, 0))


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize(("width", "window", "share"), [(3, 128, 0.7), (700, 300, 0.9), (700, 300, 0.1)])
def test_indices_are_shuffled_in_windows(
    tmp_path: Path, width: int, window: int, share: float, rng: np.random.Generator
) -> None:
    size = int(5000 * share)
    chosen = rng.permutation(5000)[:size]
    given = chosen.copy()
    data = saved(tmp_path, numbered(5000, width))
    loader = DataLoader(data, 16, shuffle=True, seed=4, window=window, indices=chosen)
    order = _native.epoch_order(size, 4, 0, shuffled_blocks(window, 4 * width))
    assert np.array_equal(rows_of(loader), np.sort(chosen)[order])
    assert np.array_equal(chosen, given)


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("within", [2, 8, 5000], ids=["pairs", "eights", "all"])
def test_indices_in_any_order_are_read_in_it(tmp_path: Path, within: int, rng: np.random.Generator) -> None:
    """Also where what lies from the first to the last row of a block is not all of it."""
    x = rng.integers(0, 256, (5000, 1000), dtype=np.uint8)
    chosen = np.concatenate([rng.permutation(within) + i for i in range(0, 5000, within)])
    data = saved(tmp_path, x)
    with data.open("rb") as stream:  # out of the page cache, for what is there is not read
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    got = torch.cat(list(DataLoader(data, 16, indices=chosen, dtype=torch.uint8)))
    assert np.array_equal(got, x[chosen])


def test_large_files_are_shuffled_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbered(1000, 256)
    data = saved(tmp_path, x)
    monkeypatch.setattr(mapped, "memory_limit", lambda: 2 * x.nbytes)
    assert DataLoader(data, 8, shuffle=True).window is None
    monkeypatch.setattr(mapped, "memory_limit", lambda: 2 * x.nbytes - 1)
    message = r"x\.npy: 0\.0 GB, too much for the memory at once; shuffled in windows of 124 samples"
    with pytest.warns(ShuffleWarning, match=message):
        loader = DataLoader(data, 8, shuffle=True)
    assert (loader.window, loader.note is not None) == (124, True)
    assert np.array_equal(rows_of(loader), _native.epoch_order(1000, 0, 0, shuffled_blocks(124, 1024)))
    assert DataLoader(x, 8, shuffle=True).window is None  # it is in memory as it is
    assert DataLoader(data, 8).window is None
    assert DataLoader(data, 8, shuffle=True, window=1000).window is None


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.usefixtures("staged")
def test_mapped_data_come_as_from_memory(
    tmp_path: Path, dtype: type, num_workers: int, rng: np.random.Generator
) -> None:
    x = (rng.random((500, 9, 5, 3)) * 200).astype(dtype)
    path = saved(tmp_path, x)
    expected = torch.cat(list(DataLoader(x, 16)))
    for options in ({}, {"window": 100, "shuffle": True}, {"shuffle": True}):
        loader = DataLoader(path, 16, num_workers=num_workers, seed=1, **options)
        for epoch in range(2):
            got = torch.cat(list(loader))
            order = np.arange(500)
            if "shuffle" in options:
                blocks = shuffled_blocks(100, x[0].nbytes) if "window" in options else (0, 0)
                order = _native.epoch_order(500, 1, epoch, blocks)
            assert torch.equal(got, expected[torch.from_numpy(order)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.usefixtures("staged")
def test_a_value_that_is_not_finite_is_named_when_it_is_met(
    tmp_path: Path, dtype: type, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 1000)  # what is larger is not looked at before
    x = np.zeros((50, 4, 3, 2), dtype)
    with np.errstate(over="ignore"):
        x[30, 2, 1, 0] = value
    loader = DataLoader(saved(tmp_path, x), 8)
    batches = iter(loader)
    for _ in range(3):
        assert not next(batches).any()
    with pytest.raises(DataError, match=r"x\.npy: NaN or infinite at \[30, 2, 1, 0\]; expected finite"):
        next(batches)
    assert list(batches) == []
    assert len(list(DataLoader(tmp_path / "x.npy", 8, indices=range(30)))) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nextafter(np.float32(1), np.float32(2)), -1e-30, np.nan])
@pytest.mark.usefixtures("staged")
def test_what_is_no_probability_is_not_binarized(
    tmp_path: Path, dtype: type, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 1000)  # what is larger is not looked at before
    x = np.ones((50, 4, 3, 2), dtype)
    x[30, 2, 1, 0] = value
    batches = iter(DataLoader(saved(tmp_path, x), 8, transform=Transform(binarize=True)))
    for _ in range(3):
        assert next(batches).all()
    with pytest.raises(DataError, match=r"x\.npy: no probability at \[30, 2, 1, 0\]; expected values in"):
        next(batches)


def test_opening_reads_little(tmp_path: Path) -> None:
    """The first batch of 10 GB, without memory for them."""
    path = tmp_path / "large.npy"
    size = 10**10 // (3 * 64 * 64 * 4)
    with path.open("wb") as file:
        shape = (size, 3, 64, 64)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + size * 3 * 64 * 64 * 4)
    run_python(f"""
        import resource
        from fastvae.data import DataLoader

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        next(iter(DataLoader({str(path)!r}, 128, indices=range(256))))
        before = resident()
        for shuffle in (False, True):
            loader = DataLoader({str(path)!r}, 128, shuffle=shuffle, window=20000)
            assert loader.n_samples == {size}
            batches = iter(loader)
            assert next(batches).shape == (128, 3, 64, 64)
            assert not next(batches).any()
            assert resident() - before < 200 << 20, (before, resident())
            del batches
    """)


def test_watched_is_what_lies_in_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, numbered(100))
    x = np.load(path, mmap_mode="r")
    for mapped_array in (x, x[10:], x[5:, 1:][3:], np.asarray(np.load(path, mmap_mode="c"))):
        file = mapped.mapped_file(mapped_array)
        assert file is not None
        assert path.read_bytes()[file.offset :].startswith(mapped_array[0].tobytes())
    for mode, expected in {"r": (True, True), "r+": (True, False), "c": (False, False)}.items():
        file = mapped.mapped_file(np.load(path, mmap_mode=mode))
        assert file is not None
        assert (file.shared, file.read_only) == expected
    for in_memory in (
        np.array(x),
        x + 1,
        torch.zeros(9, 9).numpy(),
        torch.zeros(9, 9).share_memory_().numpy(),
    ):
        assert mapped.mapped_file(in_memory) is None


@pytest.mark.parametrize("name", ["a\nb", "a\rb", " a ", "a\\b", "a (deleted)", "a\x1b\u2028", "a\udcff"])
def test_a_file_is_watched_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, numbered(10)).rename(tmp_path / name)
    kept = np.memmap(path, np.uint8, "r")  # whose name is met when another is looked for
    file = mapped.mapped_file(kept)
    assert file is not None
    assert file.watch.name == f"{tmp_path}/{name}".encode(errors="backslashreplace").decode()
    assert len(list(DataLoader(saved(tmp_path, numbered(10)), 5))) == 2


def test_files_in_shared_memory_are_watched_too() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = saved(Path(folder), numbered(3000, 50))
        batches = iter(DataLoader(path, 4))
        cut(path)
        with pytest.raises(DataError, match="changed while in use"):
            list(batches)


def test_a_private_mapping_keeps_its_changes(tmp_path: Path) -> None:
    x = np.load(saved(tmp_path, numbered(5000, 1000)), mmap_mode="c")
    x[:] += 1
    for _ in range(2):
        loader = DataLoader(x, 64, shuffle=True, window=500)
        assert np.array_equal(np.sort(rows_of(loader)), np.arange(1, 5001))
    assert x[0, 0] == 1


def cut(path: Path) -> None:
    os.truncate(path, 3000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def cut_within_a_page(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(path: Path) -> None:
    time.sleep(0.02)  # more than a tick of the file system's clock
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


CHANGES = [cut, empty, cut_within_a_page, overwrite, append]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("mode", ["path", "memmap", "tensor"])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.usefixtures("staged")
def test_a_file_that_changes_is_an_error(
    tmp_path: Path, change: Callable[[Path], None], num_workers: int, mode: str
) -> None:
    path = saved(tmp_path, numbered(3000, 50))
    data: object = path if mode == "path" else np.load(path, mmap_mode="r")
    if isinstance(data, np.ndarray) and mode == "tensor":
        data = torch.from_numpy(data)
    options = {"batch_size": 4, "shuffle": True, "num_workers": num_workers}
    loaders = [DataLoader(data, **options, window=window) for window in (None, 500)]
    passes = [iter(loader) for loader in loaders]
    for batches in passes:
        next(batches)
    change(path)
    for batches, loader in zip(passes, loaders, strict=True):
        with pytest.raises(DataError, match=r"x\.npy: changed while in use: .*rows? .*; open it again"):
            list(batches)
        assert list(batches) == []
        with pytest.raises(DataError, match="changed while in use"):
            iter(loader)


@pytest.mark.usefixtures("staged")
def test_a_file_that_is_replaced_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, numbered(300))
    loader = DataLoader(path, 4)
    np.save(tmp_path / "other.npy", numbered(300) + 1)
    batches = iter(loader)
    os.replace(tmp_path / "other.npy", path)
    assert len(list(batches)) == 75  # of the old file, which is still there for those who have it open
    with pytest.raises(DataError, match="not the file that was opened: another file now; open it again"):
        iter(loader)
    path.unlink()
    with pytest.raises(DataError, match="not the file that was opened: No such file"):
        iter(loader)


def test_a_change_between_opening_and_reading_is_an_error(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, numbered(300)))
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(
        DataError, match="changed while in use: 1000 bytes, was opened with 3728; rows from 72 on"
    ):
        iter(DataLoader(source, 4))


def test_whatever_reads_a_file_that_is_cut_says_so(tmp_path: Path) -> None:
    """It is cut right before or right after it begins to be watched."""
    run_python(f"""
        import os
        from itertools import product
        from pathlib import Path
        import numpy as np
        import pytest
        import torch
        from scipy.sparse import csr_array
        from fastvae import _native
        from fastvae.data import DataError, DataLoader, as_source, counts
        from fastvae.data.pack import pack

        os.chdir({str(tmp_path)!r})
        WatchedFile = _native.WatchedFile

        class CutBefore(WatchedFile):
            def __init__(self, path, *options):
                os.truncate(path, 5000)
                super().__init__(path, *options)

        class CutAfter(WatchedFile):
            @property
            def size(self):
                size = super().size
                os.truncate("x.npy", 5000)
                return size

        def mapped(x):
            np.save("x.npy", x)
            return np.load("x.npy", mmap_mode="r")

        x = np.random.default_rng().random((300, 50))
        counted = csr_array(x)
        for read, made in {{
            as_source: [
                lambda: mapped(x.astype(np.float32)),
                lambda: mapped(x.astype(np.float16)),
                lambda: mapped(x.astype(">f4")),
                lambda: mapped(x > 0.5),
                lambda: mapped(np.asfortranarray(x)),
                lambda: mapped(x)[::-2, ::-1],
                lambda: torch.from_numpy(mapped(x.astype(np.float16))).view(torch.bfloat16),
                lambda: (x, mapped(np.arange(900))[::3]),
                lambda: csr_array((mapped(counted.data), counted.indices, counted.indptr)),
                lambda: csr_array((counted.data, mapped(counted.indices), counted.indptr)),
            ],
            counts: [lambda: mapped(np.arange(60000).reshape(6, 10000)), lambda: mapped(x.T.copy()).T],
            lambda data: pack(data, "y.npy"): [lambda: mapped((x * 255).astype(np.uint8))],
            lambda data: DataLoader(x, indices=data): [lambda: mapped(np.arange(10000) % 300)],
        }}.items():
            for make, watch in product(made, (CutBefore, CutAfter)):
                data = make()
                _native.WatchedFile = watch
                with pytest.raises(DataError, match="x.npy: changed while in use") as caught:
                    read(data)
                assert str(caught.value).isprintable()
                _native.WatchedFile = WatchedFile
        assert not Path("y.npy").exists()
    """)


def is_cached(path: Path) -> list[bool]:
    """Whether the page cache has the pages of a file, of every MiB the first."""
    found = []
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # this asks for no more than the page
        for offset in range(0, path.stat().st_size, MIB):
            try:
                os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                found.append(False)
            else:
                found.append(True)
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_is_more_than_the_memory_is_read_past_the_page_cache(
    tmp_path: Path, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what is in the cache is not read again, and ranks share what they read there."""
    path, n = saved(tmp_path, numbered(640, MIB // 64)), 640  # rows of 64 KiB
    with path.open("rb") as file:
        os.fsync(file.fileno())

    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 1000)  # what is larger is not looked at before

    def cached_by_a_pass(**options: int) -> int:
        evict(path)
        loader = DataLoader(path, 8, shuffle=shuffle, window=64 if shuffle else None, **options)
        assert len(np.unique(rows_of(loader))) == n // options.get("world_size", 1)
        return sum(is_cached(path)[1:])  # the header is read by others

    evict(path)
    if all(is_cached(path)):
        pytest.skip(f"{tmp_path} is in a file system that is in memory")
    assert cached_by_a_pass() > 35
    monkeypatch.setattr(mapped, "memory_limit", lambda: 16 * MIB)
    assert cached_by_a_pass() > 35  # a quarter is not enough
    monkeypatch.setattr(mapped, "memory_limit", lambda: 39 * MIB)
    monkeypatch.setattr(mapped, "_OWN_SHARE", 1)
    assert cached_by_a_pass() == 0
    assert cached_by_a_pass(rank=1, world_size=2) > 35


def test_single_rows_of_more_than_the_memory_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, np.zeros((64 * 256, MIB // 256), np.uint8))  # rows of 4 KiB
    other = tmp_path / "other"  # as to look is to ask for what is not there
    other.write_bytes(b"x")
    for each in (path, other):
        with each.open("rb") as file:
            os.fsync(file.fileno())
        evict(each)
    if all(is_cached(other)):
        pytest.skip(f"{tmp_path} is in a file system that is in memory")
    monkeypatch.setattr(mapped, "memory_limit", lambda: 48 * MIB)
    next(iter(DataLoader(path, 8, shuffle=True, window=10**6, num_workers=0)))
    assert sum(is_cached(path)[1:]) <= 8  # the header is read by others


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.usefixtures("staged")
def test_threads_end_however_the_pass_ends(tmp_path: Path, num_workers: int) -> None:
    loader = DataLoader(saved(tmp_path, numbered(1000)), 4, shuffle=True, window=100, num_workers=num_workers)
    list(loader)
    before = n_threads()
    for _ in range(30):
        for _ in loader:
            break
        iter(loader)
        batches = iter(loader)
        next(batches)
        del batches
    assert n_threads() == before
    batches = iter(loader)
    loader.close()
    assert n_threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_the_range_of_values_is_that_of_all(tmp_path: Path, dtype: type, rng: np.random.Generator) -> None:
    x = (rng.random((5000, 100)) * 200).astype(dtype)
    expected = (0, 1) if dtype == np.uint8 else (float(np.float32(x.min())), float(np.float32(x.max())))
    assert open_source(saved(tmp_path, x)).value_range() == expected


def test_the_range_of_values_of_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, numbered(3000, 300)))
    os.truncate(tmp_path / "x.npy", 300_000)
    with pytest.raises(DataError, match=r"changed while in use: .*; rows from 249 on are gone"):
        source.value_range()


def test_own_changes_are_no_error(tmp_path: Path) -> None:
    x = np.load(saved(tmp_path, numbered(300)), mmap_mode="r+")
    loader = DataLoader(x, 4)
    list(loader)
    x[:] += 1
    x.flush()
    assert np.array_equal(rows_of(loader), np.arange(1, 301))


@pytest.mark.usefixtures("staged")
def test_truncated_again_and_again_while_threads_gather(tmp_path: Path, rng: np.random.Generator) -> None:
    x = numbered(3000, 300)
    errors = 0
    for _ in range(int(os.environ.get("FASTVAE_TRUNCATIONS", "20"))):
        path = saved(tmp_path, x)
        loader = DataLoader(path, 16, shuffle=True, window=int(rng.choice([100, 3000])), num_workers=3)
        size = int(rng.integers(0, path.stat().st_size))
        cutter = threading.Timer(float(rng.random() * 2e-3), os.truncate, (path, size))
        cutter.start()
        try:
            while True:
                for batch in loader:
                    assert torch.equal(batch, batch[:, :1].expand_as(batch))
        except DataError as error:
            assert "changed while in use" in str(error)  # noqa: PT017
            errors += 1
        cutter.join()
    assert errors > 0


def test_other_bus_errors_stay_what_they_are(tmp_path: Path) -> None:
    """Python's faulthandler, before or after ours, still tells of a fault of somebody else."""
    for first in (True, False):
        code = f"""
            import faulthandler, mmap, os, signal
            import numpy as np
            from fastvae.data import DataLoader

            if {first}:
                faulthandler.enable()
            np.save("x.npy", np.zeros((100, 1000), np.uint8))
            loader = DataLoader("x.npy", 10)
            if not {first}:
                faulthandler.enable()
            list(loader)
            with open("other", "w+b") as file:
                file.truncate(1 << 20)
                other = mmap.mmap(file.fileno(), 0)
                file.truncate(0)
            other[5]
        """
        result = subprocess.run(
            [sys.executable, "-c", "import textwrap; exec(textwrap.dedent('''" + code + "'''))"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == -7, result.stderr
        assert "Fatal Python error: Bus error" in result.stderr


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group with a limit of memory; skips the test where it cannot be had."""
    group = CGROUP / f"fastvae-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"needs a control group of memory (cgroup v1, as root): {error}")
    try:
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


def test_a_file_of_several_times_the_memory(tmp_path: Path) -> None:
    """All samples, within the limit, and with little of the file in the process at a time."""
    row, n, limit = 1 << 16, 15000, 192 * MIB  # a file of 1 GB, nearly all of it a hole
    path = tmp_path / "large.npy"
    x = np.lib.format.open_memmap(path, "w+", np.float32, (n, row // 4))
    x[::16, 0] = numbers = np.arange(1, n // 16 + 2)
    del x
    with path.open("rb") as file:
        os.fsync(file.fileno())
    evict(path)  # where what this process wrote counts as its own
    code = f"""
import os
import sys
import warnings
from pathlib import Path
import numpy as np
from fastvae.data import DataLoader, ShuffleWarning

# not before: some builds of torch take more than this to be imported
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))

def resident():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0]) >> 10

before = resident()  # torch's libraries
for shuffle in (True, False):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loader = DataLoader({str(path)!r}, 16, shuffle=shuffle, num_workers=2)
    assert [w.category for w in told] == [ShuffleWarning] * shuffle, told
    assert loader.window == ({limit // 16 // row} if shuffle else None), loader.window
    rows, most = [], 0
    for i, batch in enumerate(loader):
        rows.append(batch[:, 0].numpy().copy())
        if i % 64 == 0:
            most = max(most, resident() - before)
    rows = np.concatenate(rows)
    assert len(rows) == {n}
    found = rows[rows > 0]
    assert np.array_equal(np.sort(found), np.arange(1, {len(numbers)} + 1))
    assert np.array_equal(found, np.sort(found)) != shuffle
    print(most)
"""
    with memory_group(limit) as group:
        process = subprocess.run(
            [sys.executable, "-c", code, str(group)],
            cwd=TESTS,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
        used = int((group / "memory.max_usage_in_bytes").read_text())
    assert process.returncode == 0, process.stderr
    assert used <= limit
    assert max(map(int, process.stdout.split())) < 150, process.stdout  # MiB of the file
