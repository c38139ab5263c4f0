"""Timing of opponents in turn: machines drift, so that only what ran side by side can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

SETTLE_SECONDS = 0.02


def interleaved(callables: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each callable in each of `rounds` rounds; a round runs them all once, in the order given.

    Every callable runs once before, untimed, so that caches, buffers and lazy things are there, and each
    begins after a pause: the OpenMP threads of the one before spin on for milliseconds after their last work.
    """
    for call in callables.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        for name, call in callables.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """The median, in seconds."""
    return float(np.median(seconds))


def spread(seconds: list[float]) -> float:
    """The interquartile range as a fraction of the median."""
    low, high = np.percentile(seconds, [25, 75])
    return float(high - low) / median(seconds)


def ratio(opponent: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the ratio of the medians."""
    return median(opponent) / median(ours)
