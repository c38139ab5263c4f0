"""Time and memory of opponents. They run in turn: machines drift, and only neighbours can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

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


def memory_peak(call: Callable[[], object], device: str) -> int:
    """Bytes that torch's allocator holds at the most during one warm call, beyond what it held before."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in changes)]).max())
