"""Matrices of counts in compressed sparse rows (CSR), dense only in a batch."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .. import _native
from .arrays import ArraySource, array_of, label_array, labels_of, pieces
from .mapped import in_memory, mapped_file
from .source import Array, DataError, Source

if TYPE_CHECKING:
    from .sources import SourceLike

# in each direction: what the loader reads as it is, and what holds the others' values
_VALUES = {"b1": "u1", "i1": "i4", "i2": "i4", "u4": "i8", "u8": "i8", "f2": "f4"}
_AS_THEY_ARE = ("u1", "u2", "i4", "i8", "f4", "f8")


@dataclass(frozen=True)
class SparseSource(Source):
    """The rows of a sparse matrix, each a sample [n_columns]; what is not there is 0.

    checked: the matrix, whose arrays are used in place.
    target: what the counts of each sample are brought to sum to (a sample without any stays zeros), or None.
    log1p: whether the samples are log(1 + x) of that.
    """

    checked: _native.SparseRows
    y: npt.NDArray[np.int64] | None = None
    name: str = "matrix"
    target: float | None = None
    log1p: bool = False

    @property
    def n_samples(self) -> int:
        """N."""
        return len(self.checked)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """[n_columns]."""
        return self.checked.item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32, as batches are: a count is itself, whatever its type."""
        return np.dtype(np.float32)

    def value_range(self) -> tuple[float, float]:
        """Bounds of what is in a batch."""
        low, high = self.checked.range
        high = high if self.target is None else self.target
        return (0.0, math.log1p(high)) if self.log1p else (low, high)

    def rows(self) -> _native.Rows:
        """The matrix with what is to become of its counts."""
        if self.target is None and not self.log1p:
            return self.checked
        try:
            return self.checked.normalized(self.target, self.log1p)
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error


def counts(
    x: SourceLike,
    y: Array | torch.Tensor | None = None,
    *,
    normalize: float | Literal["median"] | None = None,
    log1p: bool = False,
) -> Source:
    """A source of counts, such as those of cells x genes, which stay sparse until a batch is made.

    x: a CSR matrix [N, D], of scipy or torch, or a file of one (.npz); or anything dense [N, D] that a loader
        takes, which is made sparse. No column twice in a row, as after scipy's `sum_duplicates()`.
    y: labels, integers [N].
    normalize: the sum that the counts of each sample are brought to, in the batch; "median" is the median of
        their sums that are not 0, as in scanpy's `normalize_total`. `target` of the source is the number.
    log1p: give log(1 + x), after that.

    Batches are float32. A sample without any count stays zeros. Raises DataError for data that cannot be used
    (negative counts are, unless they are to stay as they are), ValueError for another `normalize`.
    """
    from .sources import as_source  # which opens sparse matrices too

    labels = None if y is None else label_array(y)
    if isinstance(x, np.ndarray) or (isinstance(x, torch.Tensor) and x.layout == torch.strided):
        source: Source = _from_dense(array_of(x, "x"), labels)
    else:
        source = as_source(x if y is None else (x, y))
    if isinstance(source, ArraySource):
        source = _from_dense(source.x, source.y, source.name)
    if not isinstance(source, SparseSource):
        raise DataError(
            f"{source.name}: a {type(source).__name__}, expected a CSR matrix or an array of counts"
        )
    return transformed(source, normalize, log1p)


def transformed(
    source: SparseSource, normalize: float | Literal["median"] | None, log1p: bool
) -> SparseSource:
    """`source` with what is to become of its counts, as in `counts`. Raises DataError and ValueError."""
    target = None if normalize is None else _target(source, normalize)
    source = replace(source, target=target, log1p=bool(log1p))
    source.rows()  # raises for counts of which that cannot be made
    return source


def csr_source(
    data: Array,
    indices: Array,
    indptr: Array,
    shape: tuple[int, int],
    y: Array | None = None,
    name: str = "matrix",
) -> SparseSource:
    """The source over the arrays of a CSR matrix of this shape, read once to be checked, and used in place.

    data: [nnz], integers or floats, finite in float32. indices, indptr: int32 or int64. Other types are
    converted, and mapped files copied. y: integers [N]. Raises DataError, which names the place.
    """
    data, indices, indptr = (in_memory(part, mapped_file(part)) for part in (data, indices, indptr))
    data, (indices, indptr) = _values(data, name), _places(indices, indptr, name)
    if min(shape) < 1:
        raise DataError(f"{name}: shape {list(shape)} is empty, expected at least one sample and one feature")
    if len(indptr) != shape[0] + 1:
        raise DataError(
            f"{name}: indptr has {len(indptr)} entries, expected {shape[0] + 1} for shape {list(shape)}"
        )
    try:
        checked = _native.SparseRows(data, indices, indptr, n_columns=shape[1])
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: {error}") from error
    return SparseSource(checked, None if y is None else labels_of(y, shape[0], name), name)


def sparse_arrays(x: object, name: str) -> tuple[Array, Array, Array, tuple[int, int]] | None:
    """data, indices, indptr and shape of a CSR matrix of scipy or torch; None for what is not sparse.

    Raises DataError for another sparse layout.
    """
    if isinstance(x, torch.Tensor):
        if x.layout == torch.strided:
            return None
        if x.layout != torch.sparse_csr or x.ndim != 2 or x.device.type != "cpu":
            got = f"{str(x.layout).removeprefix('torch.')} of shape {list(x.shape)} on {x.device}"
            raise DataError(
                f"{name}: {got}, expected sparse_csr [N, D] on the CPU; use {name}.to_sparse_csr()"
            )
        parts = (x.values(), x.col_indices(), x.crow_indices())
        data, indices, indptr = (array_of(part, name) for part in parts)
        return data, indices, indptr, (x.shape[0], x.shape[1])
    scipy_sparse = sys.modules.get("scipy.sparse")
    if scipy_sparse is None or not scipy_sparse.issparse(x):
        return None
    matrix: Any = x
    if matrix.format != "csr" or matrix.ndim != 2:
        got = f"a {matrix.format} matrix of shape {list(matrix.shape)}"
        raise DataError(f"{name}: {got}, expected csr [N, D]; convert it with {name}.tocsr()")
    return matrix.data, matrix.indices, matrix.indptr, matrix.shape


def _from_dense(x: Array, y: Array | None, name: str = "array") -> SparseSource:
    from scipy.sparse import csr_array, vstack

    if x.ndim != 2 or x.dtype.kind not in "biuf":
        raise DataError(f"{name}: {x.dtype} of shape {list(x.shape)}, expected counts [N, D]")
    dtype, file = np.float32 if x.dtype == np.float16 else x.dtype, mapped_file(x)
    if not x.flags.c_contiguous:  # whose rows are all over the file
        x, file = in_memory(x, file), None
    made = [csr_array(in_memory(x[rows], file).astype(dtype, copy=False)) for rows in pieces(x)]
    matrix = made[0] if len(made) == 1 else vstack(made, format="csr")
    return csr_source(matrix.data, matrix.indices, matrix.indptr, matrix.shape, y, name)


def _target(source: SparseSource, normalize: float | Literal["median"]) -> float:
    if normalize == "median":
        sums = source.checked.sums
        return float(np.median(sums[sums > 0])) if (sums > 0).any() else 1.0
    try:
        target = float(normalize)
    except (TypeError, ValueError):
        target = math.nan
    if not 0 < target < math.inf:
        raise ValueError(f"normalize is {normalize!r}, expected a number above 0 or 'median'")
    return target


def _values(data: Array, name: str) -> Array:
    kind = data.dtype.str[1:]
    wanted = _VALUES.get(kind, kind)
    if wanted not in _AS_THEY_ARE or data.ndim != 1:
        got = f"data is {data.dtype} of shape {list(data.shape)}"
        raise DataError(f"{name}: {got}, expected a vector of integers or floats")
    if kind == "u8" and data.size and data.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name}: a count of {data.max()}, expected one that fits into int64")
    return np.require(data, np.dtype(wanted), ["C", "A"])


def _places(indices: Array, indptr: Array, name: str) -> tuple[Array, Array]:
    """Both of them int32 or int64, in place where they are already."""
    for part, called in ((indices, "indices"), (indptr, "indptr")):
        if part.dtype.kind not in "iu" or part.ndim != 1:
            got = f"{called} is {part.dtype} of shape {list(part.shape)}"
            raise DataError(f"{name}: {got}, expected a vector of int32 or int64")
        if part.dtype == np.uint64 and part.size and part.max() > np.iinfo(np.int64).max:
            raise DataError(f"{name}: {called} holds {part.max()}, expected int32 or int64")
    dtype = np.int32 if indices.dtype == indptr.dtype == np.int32 else np.int64
    return np.require(indices, dtype, ["C", "A"]), np.require(indptr, dtype, ["C", "A"])
