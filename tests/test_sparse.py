"""CSR counts: dense batches that are scipy's, what is done to counts on the way, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from processes import run_python

from fastvae import _native, load
from fastvae.cli import main
from fastvae.data import DataError, DataLoader, SparseSource, Transform, as_source, counts, open_source
from fastvae.inference.evaluate import evaluate
from fastvae.training.config import TrainConfig

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float32", "float64"]
LEAST = np.finfo(np.float32).eps


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def matrix(rng: np.random.Generator, rows: int = 57, columns: int = 83, dtype: str = "int32") -> sp.csr_array:
    """Counts with empty rows, full rows and rows of all lengths between."""
    dense = rng.geometric(0.3, (rows, columns)) * (rng.random((rows, columns)) < rng.random((rows, 1)))
    dense[rng.integers(rows)] = 0
    dense[rng.integers(rows)] += 1
    return sp.csr_array(dense.astype(dtype))


def batch_of(source: object, **options: object) -> np.ndarray:
    """All rows in order, in batches of an odd size."""
    return np.concatenate([batch.numpy() for batch in DataLoader(source, 7, **options)])  # type: ignore[arg-type]


def ulps(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, in units of float32's last place."""
    assert got.dtype == np.float32
    assert np.array_equal(got == 0, expected == 0)
    return float(np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30))) / LEAST


@pytest.mark.parametrize("dtype", [*DTYPES, *FLOATS])
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_scipy_s(rng: np.random.Generator, dtype: str, index: type, num_workers: int) -> None:
    x = matrix(rng, dtype=dtype)
    x.indices, x.indptr = x.indices.astype(index), x.indptr.astype(index)
    y = rng.integers(0, 5, x.shape[0])
    loader = DataLoader((x, y), 16, shuffle=True, seed=3, num_workers=num_workers)
    order = _native.epoch_order(x.shape[0], 3, 0)
    got_x, got_y = (torch.cat(parts).numpy() for parts in zip(*loader, strict=True))
    assert got_x.dtype == np.float32
    assert np.array_equal(got_x, x[order].toarray().astype(np.float32))
    assert np.array_equal(got_y, y[order])
    assert loader.item_shape == (83,)
    assert len(loader) == 4


def test_arrays_are_used_in_place(rng: np.random.Generator) -> None:
    for dtype in ("uint8", "uint16", "int32", "int64", "float32", "float64"):
        for index in (np.int32, np.int64):
            x = matrix(rng, dtype=dtype)
            x.indices, x.indptr = x.indices.astype(index), x.indptr.astype(index)
            loader = DataLoader(x, x.shape[0])
            x.data[:] = 7
            (batch,) = loader
            assert set(batch.unique().tolist()) <= {0.0, 7.0}


def test_columns_may_be_in_any_order(rng: np.random.Generator) -> None:
    x = matrix(rng)
    for begin, end in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        order = rng.permutation(end - begin)
        x.indices[begin:end], x.data[begin:end] = x.indices[begin:end][order], x.data[begin:end][order]
    assert np.array_equal(batch_of(x), x.toarray())


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array, "torch", "bfloat16", "dense", "dense tensor"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_counts_takes(rng: np.random.Generator, kind: object, labelled: bool) -> None:
    dense = matrix(rng).toarray()
    kinds = {
        "torch": lambda a: torch.from_numpy(a).to_sparse_csr(),
        "bfloat16": lambda a: torch.from_numpy(a).bfloat16().to_sparse_csr(),
        "dense": lambda a: a,
        "dense tensor": torch.from_numpy,
    }
    y = np.arange(len(dense)) if labelled else None
    x = kinds[kind](dense) if isinstance(kind, str) else kind(dense)  # type: ignore[operator]
    source = counts(x, y, log1p=True)
    assert isinstance(source, SparseSource)
    assert source.has_labels == labelled
    batches = list(DataLoader(source, 10))
    x = torch.cat([batch[0] if labelled else batch for batch in batches]).numpy()
    assert ulps(x, np.log1p(dense)) < 2


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64", "uint8"])
@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("normalize", [None, "median", 1e4, 1])
def test_normalization_and_log1p(
    rng: np.random.Generator, dtype: str, log1p: bool, normalize: float | str | None
) -> None:
    x = matrix(rng, dtype=dtype)
    dense = x.toarray().astype(np.float64)
    sums = dense.sum(axis=1, keepdims=True)
    target = np.median(sums[sums > 0]) if normalize == "median" else normalize
    if target is not None:
        dense *= target / np.where(sums > 0, sums, 1)
    expected = np.log1p(dense) if log1p else dense
    source = counts(x, normalize=normalize, log1p=log1p)  # type: ignore[arg-type]
    assert isinstance(source, SparseSource)
    assert source.target == target
    got = batch_of(source)
    assert ulps(got, expected) < 4
    low, high = source.value_range()
    assert low <= got.min()
    assert got.max() <= high * (1 + 4 * LEAST)
    assert np.array_equal(got[sums[:, 0] == 0], np.zeros((np.sum(sums == 0), 83)))
    assert source.n_samples == len(dense)


def test_log1p_of_all_sizes(rng: np.random.Generator) -> None:
    values = np.exp(rng.uniform(np.log(1e-37), np.log(3e38), (40, 50))).astype(np.float32)
    assert ulps(batch_of(counts(values, log1p=True)), np.log1p(values.astype(np.float64))) < 4


def test_batches_do_not_depend_on_place_threads_or_ranks(rng: np.random.Generator) -> None:
    source = counts(matrix(rng), normalize="median", log1p=True)
    whole = batch_of(source)
    assert np.array_equal(batch_of(source, num_workers=3), whole)
    for rows in ([3, 3, 0, 56], rng.permutation(57)):
        assert np.array_equal(batch_of(source, indices=rows), whole[rows])
    parts = [list(DataLoader(source, 10, rank=rank, world_size=3)) for rank in range(3)]
    again = [torch.cat([part[k] for part in parts]) for k in range(len(parts[0]))]
    assert np.array_equal(torch.cat(again).numpy(), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_forms_of_a_batch(rng: np.random.Generator, dtype: torch.dtype) -> None:
    source = counts(matrix(rng), log1p=True)
    options = {"batch_size": 57, "shuffle": True, "seed": 4}
    (x,) = DataLoader(source, **options)  # type: ignore[arg-type]
    (narrow,) = DataLoader(source, **options, dtype=dtype)  # type: ignore[arg-type]
    assert torch.equal(narrow, x.to(dtype))
    (scaled,) = DataLoader(source, **options, transform=Transform(scale=2, shift=1))  # type: ignore[arg-type]
    assert torch.allclose(scaled, 2 * x + 1, rtol=1e-6)


def test_a_matrix_of_zeros_and_one_of_one_row() -> None:
    zeros = counts(sp.csr_array((3, 4), dtype=np.int32), normalize="median", log1p=True)
    assert np.array_equal(batch_of(zeros), np.zeros((3, 4)))
    assert batch_of(sp.csr_array(np.array([[0, 2]]))).tolist() == [[0.0, 2.0]]
    assert batch_of(counts(np.array([[0, 2]], np.float16))).tolist() == [[0.0, 2.0]]
    assert batch_of(counts(np.array([[False, True]]))).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_scipy(tmp_path: Path, rng: np.random.Generator, kind: type, compressed: bool) -> None:
    x = kind(matrix(rng))
    sp.save_npz(tmp_path / "x.npz", x, compressed=compressed)
    assert np.array_equal(batch_of(tmp_path / "x.npz"), x.toarray())
    sp.save_npz(tmp_path / "zeros.npz", kind((3, 4), dtype=np.float32))
    assert np.array_equal(batch_of(str(tmp_path / "zeros.npz")), np.zeros((3, 4)))


@pytest.mark.parametrize("labels", [{}, {"labels": np.arange(57)}])
def test_plain_files(tmp_path: Path, rng: np.random.Generator, labels: dict[str, np.ndarray]) -> None:
    x = matrix(rng)
    np.savez(tmp_path / "x.npz", **parts_of(x), **labels)
    source = counts(tmp_path / "x.npz", normalize=100)
    assert source.has_labels == bool(labels)
    assert source.item_shape == (83,)
    if not labels:
        assert batch_of(source).sum() == pytest.approx(100 * np.sum(x.sum(axis=1) > 0), rel=1e-5)


def parts_of(x: sp.csr_array) -> dict[str, np.ndarray]:
    return {"data": x.data, "indices": x.indices, "indptr": x.indptr, "shape": np.array(x.shape)}


GOOD = {
    "data": np.array([1, 2, 3], np.int32),
    "indices": np.array([0, 4, 2], np.int32),
    "indptr": np.array([0, 2, 2, 3], np.int32),
    "shape": np.array([3, 5]),
}


def with_part(part: str, value: object, dtype: object = np.int32) -> dict[str, np.ndarray]:
    return {**GOOD, part: np.array(value, dtype)}


BAD = [
    (with_part("indices", [0, 5, 2]), r"a column of row 0 is 5, expected 0 <= column < 5"),
    (with_part("indices", [0, -1, 2]), r"a column of row 0 is -1, expected 0 <= column < 5"),
    (with_part("indices", [0, 4, 2**62], np.int64), "a column of row 2 is 4611686018427387904"),
    (with_part("indices", [4, 4, 2]), "row 0 has column 4 twice; .*sum_duplicates"),
    (with_part("indices", [0, 4]), "indices has 2 entries, expected the 3 of data"),
    (with_part("indices", [[0, 4, 2]]), r"indices is int32 of shape \[1, 3\]"),
    (with_part("indices", [0.0, 4, 2], np.float64), "indices is float64"),
    (with_part("indices", [0, 2**64 - 1, 2], np.uint64), "indices holds 18446744073709551615"),
    (with_part("indptr", [0, 2, 1, 3]), r"indptr\[2\] is 1, expected at least the 2 before it"),
    (with_part("indptr", [-1, 2, 2, 3]), r"indptr\[0\] is -1, expected 0"),
    (with_part("indptr", [1, 2, 2, 3]), r"indptr\[0\] is 1, expected 0"),
    (with_part("indptr", [0, 2, 2, 4]), "indptr ends with 4, expected at most 3"),
    (with_part("indptr", [0, 2, 2, 2**62], np.int64), "indptr ends with 4611686018427387904"),
    (with_part("indptr", [0, -(2**63), 2, 3], np.int64), r"indptr\[1\] is -9223372036854775808"),
    (with_part("indptr", [0, 3]), r"indptr has 2 entries, expected 4 for shape \[3, 5\]"),
    (with_part("indptr", [0, 1, 2, 3], np.float32), "indptr is float32"),
    (with_part("data", [1, np.nan, 3], np.float32), "the value in row 0, column 4 is nan"),
    (with_part("data", [1, 2, -np.inf], np.float64), "the value in row 2, column 2 is -inf"),
    (
        with_part("data", [1, 1e300, 3], np.float64),
        "the value in row 0, column 4 is 1.*expected a finite float32",
    ),
    (with_part("data", [1, 2j, 3], np.complex64), "data is complex64"),
    (with_part("data", ["1", "2", "3"], "U1"), "data is <U1"),
    (with_part("data", [1, 2, 2**64 - 1], np.uint64), "a count of 18446744073709551615"),
    (with_part("shape", [2, 5]), r"indptr has 4 entries, expected 3 for shape \[2, 5\]"),
    (with_part("shape", [3, 0]), r"shape \[3, 0\] is empty"),
    (with_part("shape", [3, -5]), r"shape \[3, -5\] is empty"),
    (with_part("shape", [2**40, 5], np.int64), r"indptr has 4 entries, expected 1099511627777"),
    (with_part("shape", [3, 2**40], np.int64), "n_columns is 1099511627776, expected 1 to 2147483647"),
    (with_part("shape", [3, 2**64 - 1], np.uint64), "shape|n_columns"),
    (with_part("shape", [3]), r"\[shape\]: int32 of shape \[1\], expected 2 integers"),
    (with_part("shape", [3.0, 5], np.float64), r"\[shape\]: float64 of shape \[2\], expected 2 integers"),
    (with_part("format", b"csc", None), "a sparse matrix of format .*csc.*, expected csr; save x.tocsr"),
    (with_part("format", "coo", None), "a sparse matrix of format coo, expected csr"),
    (with_part("format", 7), "a sparse matrix of format 7, expected csr"),
    ({k: GOOD[k] for k in ("data", "indices", "indptr")}, "a sparse matrix without shape"),
    ({k: GOOD[k] for k in ("indices", "shape")}, "a sparse matrix without data, indptr"),
    ({**GOOD, "y": np.arange(4)}, r"labels of shape \[4\], expected \[3\]"),
    (with_part("data", [{}, 2, 3], object), "dtype object, .* never loaded"),
]


@pytest.mark.parametrize(("parts", "message"), BAD)
def test_bad_files(tmp_path: Path, parts: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, allow_pickle=True, **parts)
    with pytest.raises(DataError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["csc", "coo", "bsr", "lil", "dok", "dia"])
def test_other_layouts_are_refused(tmp_path: Path, layout: str) -> None:
    x = sp.coo_array(np.eye(3, 4)).asformat(layout)
    with pytest.raises(
        DataError, match=rf"a {layout} matrix of shape \[3, 4\], .* convert it with .*tocsr\(\)"
    ):
        as_source(x)
    if layout in ("csc", "coo", "bsr", "dia"):
        sp.save_npz(tmp_path / "x.npz", x)
        with pytest.raises(DataError, match=f"format .*{layout}.*, expected csr"):
            open_source(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"sparse_coo of shape .*to_sparse_csr\(\)"):
        as_source(torch.eye(3).to_sparse_coo())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": 0}, "normalize is 0, expected a number above 0 or 'median'"),
        ({"normalize": -1.0}, "normalize is -1.0"),
        ({"normalize": math.nan}, "normalize is nan"),
        ({"normalize": math.inf}, "normalize is inf"),
        ({"normalize": "mean"}, "normalize is 'mean'"),
        ({"normalize": [1]}, r"normalize is \[1\]"),
        ({"normalize": 1e39}, r"the sum to normalize to is 1e\+39, expected a finite number"),
        ({"log1p": True}, "the smallest count is -2, expected none below 0"),
        ({"normalize": "median"}, "the smallest count is -2, expected none below 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    x = sp.csr_array(np.array([[1, -2.0], [0, 3]]))
    if "smallest" not in message:
        x = abs(x)
    with pytest.raises(ValueError, match=message):
        counts(x, **options)  # type: ignore[arg-type]
    assert counts(x).n_samples == 2
    tiny = sp.csr_array(np.array([[1e-40, 0], [1, 2]]))
    with pytest.raises(DataError, match="row 0 sums to 1e-40, which cannot be brought to 10000"):
        counts(tiny, normalize=1e4)


def test_a_matrix_that_changes_under_the_loader_is_no_danger(rng: np.random.Generator) -> None:
    """Its arrays are the caller's: whatever is in them, nothing outside the batch is written."""
    for part in ("indices", "indptr"):
        for value in (-1, 2**31 - 1, 83):
            x = matrix(rng)
            loader, source = DataLoader(x, 57, num_workers=1), counts(x, normalize=10.0)
            getattr(x, part)[-1] = value
            with pytest.raises(RuntimeError, match="has changed since it was handed over"):
                list(loader)
            with pytest.raises(RuntimeError, match="has changed since it was handed over"):
                list(DataLoader(source, 57))  # which sums its rows


def test_memory_is_that_of_the_counts() -> None:
    """A matrix of a gigabyte, if it were dense, within a limit of a third of that."""
    run_python("""
        import resource
        from pathlib import Path
        import numpy as np
        import scipy.sparse as sp
        from fastvae.data import DataError, DataLoader, counts

        columns = np.arange(50) * 1000 + np.random.default_rng(0).integers(0, 1000, (5000, 50))
        parts = np.ones(250000, np.float32), columns.ravel(), np.arange(0, 250001, 50)
        x = sp.csr_array(parts, shape=(5000, 50000))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
        source = counts(x, normalize="median", log1p=True)
        total = sum(float(batch.sum()) for batch in DataLoader(source, 64, shuffle=True, num_workers=1))
        assert total > 0
        wide = sp.csr_array((np.ones(2), np.array([0, 7]), np.array([0, 1, 2])), shape=(2, 2**31 - 1))
        try:
            next(iter(DataLoader(wide, 2)))
        except (MemoryError, DataError) as error:  # by the limit, or by what is free
            assert "use a smaller batch_size" in str(error), error
        else:
            raise SystemExit("no error")
    """)


def test_training_on_counts(
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sum that a median is holds for all data of the run, and for whatever is done with it later."""
    monkeypatch.chdir(tmp_path)
    x = matrix(rng)
    sp.save_npz("train.npz", x)
    sp.save_npz("val.npz", 9 * x[:5])
    data = ["--data", "train.npz", "--val", "val.npz", "--normalize-counts", "median", "--log1p"]
    main(["train", *data, "--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--out", "run"])
    config = TrainConfig.from_toml("run/train.toml")
    sums = x.sum(axis=1)
    assert (config.normalize_counts, config.log1p) == (np.median(sums[sums > 0]), True)
    assert f"counts: brought to a sum of {config.normalize_counts:g}, log1p\n" in capsys.readouterr().out
    main(["train", "--resume", "run", "--epochs", "2"])
    assert TrainConfig.from_toml("run/train.toml").normalize_counts == config.normalize_counts
    val = counts("val.npz", normalize=config.normalize_counts, log1p=True)
    model = load("run")
    (row,) = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][-1:]
    terms = evaluate(model, DataLoader(val, 256))
    best = json.loads(Path("run/summary.json").read_text())["val_loss"]
    assert float(terms.loss) == pytest.approx(best, rel=1e-5)
    assert row["epoch"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--normalize-counts", "0"], "--normalize-counts: got '0', expected a number above 0, or 'median'"),
        (["--normalize-counts", "mean"], "--normalize-counts: got 'mean', expected a number above 0"),
        (["--data", "digits", "--log1p"], r"digits: float32 of shape \[1797, 8, 8\], expected counts"),
    ],
)
def test_bad_training_options(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options]) != 0
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
