"""What a loader has done, and where it stands, so that another one can go on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .source import Source
from .torch_datasets import DatasetSource

_LOOKED_AT = 16  # samples


@dataclass(frozen=True)
class LoaderStats:
    """What a loader has delivered since it was made, in all its passes.

    batches, samples: how many; bytes_read: of the source, for these.
    wait_seconds: the time that `next()` took: in which its caller waited for the threads, or, where they are
        slower than their caller or there are none, gathered itself.
    seconds: the time from the beginning of each pass to its last batch so far.
    """

    batches: int
    samples: int
    bytes_read: int
    wait_seconds: float
    seconds: float

    @property
    def wait_share(self) -> float:
        """The part of the time that went into waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


def fingerprint(source: Source, indices: npt.NDArray[np.int64] | None) -> str:
    """A hash of the labels and the indices, and of a few samples from the first to the last.

    Of a torch Dataset that makes its items, which may be others each time, it is of its name and size.
    """
    found = hashlib.sha256()
    if isinstance(source, DatasetSource):
        found.update(f"{source.name} {source.n_samples}".encode())
        found.update(b"none" if indices is None else np.ascontiguousarray(indices).data)
        return found.hexdigest()[:16]
    chosen = np.unique(np.linspace(0, source.n_samples - 1, _LOOKED_AT).astype(np.int64))
    loader = source.loader(chosen, batch_size=len(chosen), drop_last=False, workers=0)
    batches = loader.start(seed=0, epoch=0, shuffle=False, blocks=(0, 0), first_batch=0, rank=0, ranks=1)
    samples = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    for array in (*samples, source.y, indices):
        found.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]


def check_same(state: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError, which names what differs, unless `state` has what `here` has."""
    if not isinstance(state, Mapping) or not {*here, "epoch", "batch"} <= state.keys():
        raise ValueError("state is not one of a fastvae.DataLoader, expected what state_dict() gave")
    names = {"data": "other data"}
    for name, expected in here.items():
        if state[name] != expected:
            what = names.get(name, name)
            raise ValueError(
                f"state: {what}: it is of {state[name]!r}, this loader of {expected!r}; "
                "expected a loader of the same data and options"
            )
