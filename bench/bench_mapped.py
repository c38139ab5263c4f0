"""A file that is mapped, read in order and in blocks shuffled, against a plain sequential read of it.

uint8 rows of 12,288 bytes, to uint8, with the file in the page cache and without, and within a control group
of a quarter of its size (cgroup v1, as root); and the time to the first batch of a file of 10 GB.
FASTVAE_BENCH_DISK is where the file is put.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.data import DataLoader, ShuffleWarning

Compare = Callable[..., None]
ROW, BATCH = 12288, 128
MIB = 1 << 20
ROUNDS = 3
CGROUP = Path("/sys/fs/cgroup/memory")


def make_file(folder: Path, mib: int) -> Path:
    """Real bytes: a hole would not be read from the disk."""
    path = folder / "rows.npy"
    n = mib * MIB // ROW
    rows = np.random.default_rng(0).integers(0, 256, (1024, ROW), dtype=np.uint8)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (n, ROW)}
        )
        for first in range(0, n, len(rows)):
            file.write(rows[: n - first].tobytes())
        file.flush()
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Takes the file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load(path: Path, **options: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShuffleWarning)
        loader = DataLoader(path, BATCH, dtype=torch.uint8, **options)
    with loader:
        for _ in loader:
            pass


def ways(path: Path, cold: bool, window: int | None) -> dict[str, Callable[[], None]]:
    """What is compared, each with the page cache in the same state."""
    done: dict[str, Callable[[], None]] = {
        "fastvae, in order": lambda: load(path),
        "fastvae, blocks shuffled": lambda: load(path, shuffle=True, window=window),
        "sequential read": lambda: read(path),
    }
    if not cold:
        return done

    def evicted(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            evict(path)
            call()

        return run

    return {name: evicted(call) for name, call in done.items()}


@contextmanager
def memory_of(mib: int) -> Iterator[None]:
    """This process within so much memory for what it takes from now on; skips where that cannot be had."""
    home, group = CGROUP / own_group(), CGROUP / f"fastvae-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(mib * MIB))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        pytest.skip(f"needs a control group of memory (cgroup v1, as root): {error}")
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


def own_group() -> str:
    """The control group of memory of this process."""
    groups = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return next((path.lstrip("/") for _, controllers, path in groups if controllers == "memory"), "")


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVAE_BENCH_DISK")) as folder:
        yield make_file(Path(folder), 1024)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_bench_mapped(compare: Compare, path: Path, cold: bool) -> None:
    n = path.stat().st_size // ROW
    title = f"mapped file of 1 GiB, page cache {'cold' if cold else 'warm'}"
    compare(title, ways(path, cold, 64 * MIB // ROW), rounds=ROUNDS, samples=n)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_bench_larger_than_memory(compare: Compare, path: Path, cold: bool) -> None:
    """Warm: others have the file in their page cache, as who has just written it."""
    n = path.stat().st_size // ROW
    read(path)
    with memory_of(256):
        title = f"mapped file of 1 GiB in 256 MiB, page cache {'cold' if cold else 'warm'}"
        compare(title, ways(path, cold, None), rounds=ROUNDS, samples=n)


def test_bench_first_batch(compare: Compare, tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    n = 10**10 // (3 * 64 * 64 * 4)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, 3, 64, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + n * 3 * 64 * 64 * 4)

    def numpy_first() -> None:
        rows = np.random.default_rng().integers(0, n, BATCH)
        torch.from_numpy(np.load(path, mmap_mode="r")[rows])

    def first(**options: object) -> None:
        with DataLoader(path, BATCH, shuffle=True, window=20000, **options) as loader:
            next(iter(loader))

    compare("first batch of 10 GB", {"fastvae": first, "np.load, x[rows]": numpy_first}, rounds=20)
