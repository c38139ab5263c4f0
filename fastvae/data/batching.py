"""What a loader makes of which samples, and the native loader that does it in the host's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .source import Source
from .transform import Transform

Tensors: TypeAlias = tuple[Tensor, ...]  # of a batch: x, or x and y

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
}


@dataclass(frozen=True)
class Batching:
    """The arguments of a `DataLoader` that say what its batches are like."""

    source: Source
    indices: npt.NDArray[np.int64] | None
    batch_size: int
    drop_last: bool
    workers: int
    dtype: torch.dtype
    transform: Transform | None

    @property
    def is_uint8(self) -> bool:
        """Whether the samples are uint8."""
        return self.source.dtype == np.uint8

    @property
    def n_samples(self) -> int:
        """Those at `indices`, or all."""
        return self.source.n_samples if self.indices is None else len(self.indices)

    @property
    def features(self) -> int:
        """Numbers of a sample of the source."""
        return math.prod(self.source.item_shape)

    def native(self) -> Any:
        """The native loader of such batches."""
        return self.source.loader(
            self.indices,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            workers=self.workers,
            dtype=DTYPES[self.dtype],
            transform=None if self.transform is None else self.transform.native(self.is_uint8),
        )


def tensors_of(batch: Any, dtype: torch.dtype) -> Tensors:
    """The tensors over a native loader's batch, x or (x, y); its bfloat16 come as int16."""
    arrays = batch if isinstance(batch, tuple) else (batch,)
    x, *y = map(torch.from_numpy, arrays)
    return (x.view(dtype) if dtype == torch.bfloat16 else x, *y)
