"""Counts in compressed sparse rows to dense float32 batches of 128, shuffled: [10000, 1000], 6.9 % nonzero.

The opponents are what one would write with scipy or NumPy; the fastest counts. They deliver the same: float32
batches of raw counts, or of log1p of the counts brought to one sum. The counts are those of FASTVAE_COUNTS, a
.npz with data, indices, indptr and shape, or synthetic ones of such statistics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from fastvae.data import DataLoader, counts

Compare = Callable[..., None]
N, D, DENSITY, BATCH = 10000, 1000, 0.069, 128
TURNS = {"rounds": 15, "turn_seconds": 0.1}


@pytest.fixture(scope="module")
def matrix() -> sp.csr_array:
    path = os.environ.get("FASTVAE_COUNTS")
    if path:
        with np.load(path) as parts:
            return sp.csr_array(
                (parts["data"], parts["indices"], parts["indptr"]), shape=tuple(parts["shape"])
            )
    rng = np.random.default_rng(0)
    genes = rng.lognormal(0, 1.5, D)
    chance = np.minimum(genes / genes.mean() * DENSITY * rng.lognormal(0, 0.5, (N, 1)), 0.95)
    dense = np.where(rng.random((N, D)) < chance, rng.geometric(0.5, (N, D)), 0)
    return sp.csr_array(dense.astype(np.int32))


def exhaust(batches: Callable[[], Iterator[object]]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def rows_of_batches(n: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(0).permutation(n)
    for start in range(0, n, BATCH):
        yield order[start : start + BATCH]


def toarray(x: sp.csr_array) -> Iterator[torch.Tensor]:
    for rows in rows_of_batches(x.shape[0]):
        yield torch.from_numpy(x[rows].toarray().astype(np.float32))


def toarray_out(x: sp.csr_array) -> Iterator[torch.Tensor]:
    """Of a matrix that is float32 already, into memory that was touched before."""
    out = np.empty((BATCH, x.shape[1]), np.float32)
    for rows in rows_of_batches(x.shape[0]):
        yield torch.from_numpy(x[rows].toarray(out=out[: len(rows)]))


def todense(x: sp.csr_array) -> Iterator[torch.Tensor]:
    for rows in rows_of_batches(x.shape[0]):
        yield torch.from_numpy(np.asarray(x[rows].todense()))


def by_hand(x: sp.csr_array) -> Iterator[torch.Tensor]:
    """With NumPy's indexing alone: torch's sparse_csr cannot select rows."""
    for rows in rows_of_batches(x.shape[0]):
        lengths = x.indptr[rows + 1] - x.indptr[rows]
        begins = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(x.indptr[rows] - begins, lengths)
        out = np.zeros((len(rows), x.shape[1]), np.float32)
        out[np.repeat(np.arange(len(rows)), lengths), x.indices[places]] = x.data[places]
        yield torch.from_numpy(out)


def normalized(batches: Iterator[torch.Tensor], target: float) -> Iterator[torch.Tensor]:
    for x in batches:
        sums = x.sum(1, keepdim=True)
        yield x.mul_(target / torch.where(sums > 0, sums, 1)).log1p_()


def scipy_normalized(x: sp.csr_array, target: float) -> Iterator[torch.Tensor]:
    """On the values that are there alone."""
    out = np.empty((BATCH, x.shape[1]), np.float32)
    for rows in rows_of_batches(x.shape[0]):
        batch = x[rows]
        sums = np.asarray(batch.sum(axis=1)).ravel()
        factors = (target / np.where(sums > 0, sums, 1)).astype(np.float32)
        batch.data *= np.repeat(factors, np.diff(batch.indptr))
        np.log1p(batch.data, out=batch.data)
        yield torch.from_numpy(batch.toarray(out=out[: len(rows)]))


def fastvae(x: sp.csr_array, num_workers: int | None, **options: Any) -> Callable[[], None]:
    loader = DataLoader(counts(x, **options), BATCH, shuffle=True, num_workers=num_workers)
    return exhaust(lambda: iter(loader))


def test_bench_counts(compare: Compare, matrix: sp.csr_array) -> None:
    floats = matrix.astype(np.float32)
    whole = np.sort(matrix.toarray().sum(1))
    for batches in (toarray(matrix), toarray_out(floats), todense(floats), by_hand(matrix)):
        assert np.array_equal(np.sort(torch.cat([x.sum(1) for x in batches]).numpy()), whole)
    callables = {
        "fastvae": fastvae(matrix, None),
        "fastvae (0 workers)": fastvae(matrix, 0),
        "scipy x[rows].toarray().astype": exhaust(lambda: toarray(matrix)),
        "scipy float32, toarray(out=)": exhaust(lambda: toarray_out(floats)),
        "scipy float32, todense()": exhaust(lambda: todense(floats)),
        "numpy, by hand": exhaust(lambda: by_hand(matrix)),
    }
    compare("CSR counts to dense batches", callables, **TURNS, samples=matrix.shape[0])


def test_bench_normalized_log1p(compare: Compare, matrix: sp.csr_array) -> None:
    floats = matrix.astype(np.float32)
    ours = counts(matrix, normalize=1e4, log1p=True)
    whole = np.sort(torch.cat([x.sum(1) for x in DataLoader(ours, BATCH)]).numpy())
    for batches in (normalized(toarray_out(floats), 1e4), scipy_normalized(floats, 1e4)):
        assert np.allclose(np.sort(torch.cat([x.sum(1) for x in batches]).numpy()), whole, rtol=1e-5)
    callables = {
        "fastvae": fastvae(matrix, None, normalize=1e4, log1p=True),
        "fastvae (0 workers)": fastvae(matrix, 0, normalize=1e4, log1p=True),
        "scipy, on the values, toarray(out=)": exhaust(lambda: scipy_normalized(floats, 1e4)),
        "scipy toarray(out=), then torch": exhaust(lambda: normalized(toarray_out(floats), 1e4)),
    }
    compare("CSR counts, normalized, log1p", callables, **TURNS, samples=matrix.shape[0])
