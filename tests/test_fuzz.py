"""Damaged files and wild arguments at random: errors that say what is wrong, and nothing else.

For FASTVAE_FUZZ_SECONDS each, 2 by default; FASTVAE_TEST_SEED repeats the beginning of a run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fuzzing import NUMBERS, read, some_file

from fastvae import _native

SECONDS = float(os.environ.get("FASTVAE_FUZZ_SECONDS", "2"))
DTYPES = ["u1", "i1", "u2", "i4", "i8", "u8", "f2", "f4", ">f4", "f8", "?", "O", "U3", "c8", "M8[s]", "V5"]
REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError)


def rounds() -> Iterator[int]:
    """Numbers, for the time that there is, and at least 200."""
    end, i = time.monotonic() + SECONDS, 0
    while i < 200 or time.monotonic() < end:
        yield i
        i += 1


def test_damaged_files(tmp_path: Path, seed: int) -> None:
    draw, opened = random.Random(seed), 0
    for i in rounds():
        name, content = some_file(draw)
        path = tmp_path / name
        path.write_bytes(content)
        try:
            opened += read(path)
        except BaseException:
            path.rename(kept := tmp_path / f"failed-{name}")
            print(f"round {i}: {kept}")
            raise
    assert opened > 0  # it is not refused at the door


def wild_array(draw: random.Random) -> np.ndarray:
    """Of any type and shape, in memory that may be strided, unaligned or of the other byte order."""
    dtype = np.dtype(draw.choice(DTYPES))
    shape = [draw.choice([0, 1, 2, 3, 4, 5]) for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 4]))]
    if dtype.hasobject:
        return np.empty(shape, dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = (
        np.zeros(size + 1, np.uint8)
        if draw.random() < 0.7
        else np.frombuffer(draw.randbytes(size + 1), np.uint8)
    )
    offset = draw.choice([0, 0, 0, 1])
    array = raw[offset : offset + size].view(dtype).reshape(shape)
    if dtype.kind in "iu" and array.size and raw.flags.writeable and dtype.itemsize > 1:
        array.reshape(-1)[draw.randrange(array.size)] = np.array(draw.choice(NUMBERS)).astype(dtype)
    match draw.randrange(8):
        case 0:
            return array[::-1]
        case 1:
            return array[..., ::2]
        case 2:
            return array.T
    return array


def plain_array(draw: random.Random, dtype: str, *shape: int) -> np.ndarray:
    array = np.array([draw.randrange(6) for _ in range(int(np.prod(shape)))], dtype).reshape(shape)
    if array.size and draw.random() < 0.3:
        with np.errstate(over="ignore", invalid="ignore"):
            array.reshape(-1)[draw.randrange(array.size)] = np.array(draw.choice(NUMBERS)).astype(dtype)
    return array


def test_wild_arguments_at_the_native_boundary(seed: int) -> None:
    """Those that are taken give whole batches."""
    draw, taken = random.Random(seed), 0

    def number() -> int:
        return draw.choice([draw.randrange(8), draw.choice(NUMBERS)])

    def array(dtypes: list[str], *shape: int) -> np.ndarray:
        return plain_array(draw, draw.choice(dtypes), *shape) if draw.random() < 0.8 else wild_array(draw)

    for _ in rounds():
        try:
            n, d = draw.randint(1, 5), draw.randint(1, 5)
            rows: _native.Rows
            if draw.random() < 0.5:
                shape = [d, *draw.choice([(), (2,), (2, 3), (3, 1)])]
                x = array(["u1", "f4", "f8"], n, *shape)
                item_shape = draw.choice(
                    [list(x.shape[1:]), [int(x.size // max(1, len(x)))], [number(), number()]]
                )
                rows = _native.DenseRows(x, item_shape=item_shape, channels_last=draw.random() < 0.3)
            else:
                index = draw.choice(["i4", "i8"])
                ends = sorted(draw.randrange(d + 1) for _ in range(n))
                indptr = np.array([0, *ends], index) if draw.random() < 0.8 else array([index], n + 1)
                parts = array(["u1", "i4", "f4"], d), array([index], d), indptr
                columns = draw.choice([6, 6, number()])
                sparse = _native.SparseRows(*parts, n_columns=columns)
                rows = sparse.normalized(
                    draw.choice([None, 1e4, 0.0, -1.0, np.nan, 1e300]), draw.random() < 0.5
                )
                if columns > 1000:
                    continue  # a batch of it may take all memory there is
            y = None if draw.random() < 0.5 else array(["i8"], len(rows))
            indices = None if draw.random() < 0.5 else array(["i8"], draw.randint(0, 6))
            batch_size, workers = number(), draw.choice([0, 1, 2, -1])
            loader = _native.Loader(
                rows, y, indices, batch_size=batch_size, drop_last=draw.random() < 0.5, workers=workers
            )
            batches = loader.start(
                seed=number(),
                epoch=number(),
                shuffle=draw.random() < 0.5,
                blocks=draw.choice([(0, 0), (1, 1), (2, 3), (number(), number())]),
                first_batch=draw.choice([0, number()]),
                rank=draw.choice([0, number()]),
                ranks=draw.choice([1, number()]),
            )
            for batch in batches:
                x = batch if isinstance(batch, np.ndarray) else batch[0]
                assert x.shape[1:] == rows.item_shape
                x.fill(1)
            taken += 1
        except REFUSALS:
            pass
    assert taken > 0
