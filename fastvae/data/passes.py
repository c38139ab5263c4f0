"""What a pass that is not made natively has in common with one that is: its rank's rows, and its counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Meter:
    """What was delivered in all passes of a loader."""

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Place:
    """How many batches of its epoch a pass has delivered, with those before its first."""

    batch: int


class CountedPass:
    """An iterator over batches that counts them, in `meter` and in `place`. row_bytes: read for a sample."""

    def __init__(self, batches: Iterator[Any], meter: Meter, place: Place, row_bytes: int = 0) -> None:
        self._batches, self._meter, self._place, self._row_bytes = batches, meter, place, row_bytes
        self._metered = time.monotonic()
        self._closed = False

    def __iter__(self) -> CountedPass:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise RuntimeError("the loader of this iterator is closed, expected no more batches")
        began = time.monotonic()
        batch = next(self._batches)
        now, meter = time.monotonic(), self._meter
        size = len(batch[0] if isinstance(batch, tuple) else batch)
        self._place.batch += 1
        meter.batches += 1
        meter.samples += size
        meter.bytes_read += size * self._row_bytes
        meter.wait_seconds += now - began
        meter.seconds += now - self._metered
        self._metered = now
        return batch

    def close(self) -> None:
        """Ends what makes the batches; no batch comes any more."""
        self._closed, self._batches = True, iter(())


def share(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The first of a rank's rows of a batch, and the one after its last, as in the native loader."""
    begin, end = (-(-r * rows // ranks) for r in (rank, rank + 1))
    return begin, end
