from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_View = tuple[int, int, int, int, int] | None
_PerRow = tuple[int, int] | None
_AdamPlace = tuple[int, int, int, int, int, int, int, float, float]

def elbo(
    real64: bool,
    extents: Sequence[int],
    threads: int,
    likelihood: int,
    half: bool,
    per_sample: bool,
    clamp: tuple[float, float] | None,
    free_bits: float | None,
    factors: Sequence[float],
    x_hat: _View,
    x: _View,
    mu: _View,
    logvar: _View,
    kl: int,
    weight: int,
    beta_latents: int,
    noise: Sequence[int] | None,
    values: Sequence[int],
    upstream: tuple[_PerRow, _PerRow, _PerRow, _View, _PerRow] | None,
    gradients: Sequence[int],
    instruction_set: str | None = None,
) -> None: ...

FLIP_COLUMNS: int

def flips(
    extents: Sequence[int],
    threads: int,
    noise: int,
    layer: int,
    cross: int,
    square: int,
    gram: int,
    values: int,
    instruction_set: str | None = None,
) -> None: ...

class ELBOCall:
    def __init__(
        self,
        real64: bool,
        extents: Sequence[int],
        threads: int,
        likelihood: int,
        half: bool,
        per_sample: bool,
        clamp: tuple[float, float] | None,
        free_bits: float | None,
        factors: Sequence[float],
        x_hat: _View,
        x: _View,
        mu: _View,
        logvar: _View,
        kl: int,
        weight: int,
        beta_latents: int,
        noise: Sequence[int] | None,
        values: Sequence[int],
        upstream: tuple[_PerRow, _PerRow, _PerRow, _View, _PerRow] | None,
        gradients: Sequence[int],
        instruction_set: str | None = None,
    ) -> None: ...
    def run_again(
        self, addresses: Sequence[int], seed: int | None, beta: float, log_variance: float
    ) -> None: ...

class MemoryPool:
    def __init__(self) -> None: ...
    def lend(self, shape: Sequence[int], code: int, bits: int) -> object: ...

class AdamParts:
    def __init__(self, places: Sequence[_AdamPlace]) -> None: ...
    def step(
        self,
        gradients: Sequence[tuple[int, int]],
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        gradient_factor: float,
        average_new: float,
        check: bool,
        threads: int,
    ) -> int: ...
    def clip_factor(self, gradients: Sequence[tuple[int, int]], max_norm: float, threads: int) -> float: ...

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def box_muller(
    radius_words: npt.NDArray[np.uint32], angle_words: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Two standard normals, (r cos, r sin), from each pair of words; 1-D, of one length."""

def instruction_sets() -> list[str]: ...

class ProductMemory:
    def __init__(self) -> None: ...

class ProductCall:
    def __init__(
        self,
        bf16: bool,
        extents: Sequence[int],
        a_strides: Sequence[int],
        b_strides: Sequence[int],
        relu: bool,
        threads: int,
        memory: ProductMemory,
    ) -> None: ...
    def run(self, a: int, b: int, bias: int, where: int, c: int) -> None: ...

def products_supported(bf16: bool) -> bool: ...
def prefers_bf16() -> bool: ...
def epoch_order(
    n: int,
    seed: int,
    epoch: int,
    blocks: tuple[int, int] = (0, 0),
    first: int = 0,
    count: int | None = None,
) -> npt.NDArray[np.int64]: ...

class Batches(Iterator[Any]):
    def close(self) -> None: ...
    def __iter__(self) -> Batches: ...
    def __next__(self) -> Any: ...  # x, or (x, y); bfloat16 as int16

class Transform:
    def __init__(
        self,
        *,
        padding: int,
        crop: tuple[int, int] | None,
        center: bool,
        hflip: bool,
        binarize: bool,
        affine: tuple[float, float] | None,
        fixed: bool,
    ) -> None: ...

def transform_key(seed: int, epoch: int, fixed: bool) -> int: ...

class Rows:
    @property
    def item_shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...

class DenseRows(Rows):
    def __init__(self, x: npt.NDArray[Any], *, item_shape: Sequence[int], channels_last: bool) -> None: ...

class ShapeRows(Rows):
    def __init__(self, numbers: npt.NDArray[np.int64] | None) -> None: ...
    def images(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]: ...

class WatchedFile:
    def __init__(self, path: bytes, name: str, changes_are_ours: bool) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def copy(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]: ...

class MappedRows(Rows):
    def __init__(
        self,
        rows: DenseRows,
        file: WatchedFile,
        *,
        offset: int,
        row_shape: Sequence[int],
        shared: bool,
        room: int,
    ) -> None: ...

class SparseRows(Rows):
    def __init__(
        self,
        data: npt.NDArray[Any],
        indices: npt.NDArray[Any],
        indptr: npt.NDArray[Any],
        *,
        n_columns: int,
    ) -> None: ...
    def normalized(self, target: float | None, log1p: bool) -> SparseRows: ...
    @property
    def sums(self) -> npt.NDArray[np.float64]: ...
    @property
    def range(self) -> tuple[float, float]: ...

class Loader:
    def __init__(
        self,
        rows: Rows,
        y: npt.NDArray[np.int64] | None,
        indices: npt.NDArray[np.int64] | None,
        *,
        batch_size: int,
        drop_last: bool,
        workers: int,
        dtype: str = "float32",
        transform: Transform | None = None,
        instruction_set: str | None = None,
    ) -> None: ...
    @property
    def item_shape(self) -> tuple[int, ...]: ...
    @property
    def indices(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def batch_bytes(self) -> int: ...
    def use(self, memory: npt.NDArray[np.uint8]) -> None: ...
    def release(self) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def meter(self) -> tuple[int, int, int, float, float]: ...
    def __len__(self) -> int: ...
    def start(
        self,
        seed: int,
        epoch: int,
        shuffle: bool,
        blocks: tuple[int, int],
        first_batch: int,
        rank: int,
        ranks: int,
    ) -> Batches: ...
