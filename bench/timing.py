"""Time and memory of opponents. They run in turn: machines drift, and only neighbours can be compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch

from fastvae.ops import native

SETTLE_SECONDS = 0.02


def interleaved(
    callables: dict[str, Callable[[], object]],
    rounds: int,
    *,
    turn_seconds: float = 0.0,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of each callable in each of `rounds` rounds, in which all have a turn, in this order.

    A turn is one call, or as many as take `turn_seconds`: all have the same time to find the caches as they
    leave them. Every callable runs before, untimed, so that buffers and lazy things are there, and each turn
    begins after a pause: the OpenMP threads of the one before spin on for milliseconds after their last work.
    A turn of many calls has one more before, untimed too, which wakes the processors that slept in the pause.
    """

    def calls_within(call: Callable[[], object]) -> int:
        call()
        synchronize()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < turn_seconds:
            call()
            synchronize()
            calls += 1
        return calls

    def turn(call: Callable[[], object], calls: int) -> float:
        time.sleep(SETTLE_SECONDS)
        if calls > 1:
            call()
            synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = {name: calls_within(call) for name, call in callables.items()}
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        for name, call in callables.items():
            seconds[name].append(turn(call, calls[name]))
    return seconds


def median(seconds: list[float]) -> float:
    """The median, in seconds."""
    return float(np.median(seconds))


def spread(seconds: list[float]) -> float:
    """The interquartile range as a fraction of the median."""
    low, high = np.percentile(seconds, [25, 75])
    return float(high - low) / median(seconds)


def ratio(opponent: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median of the ratios of neighbours, whose machine was the same."""
    return float(np.median(np.divide(opponent, ours)))


def memory_peak(call: Callable[[], object], device: str) -> int:
    """Bytes that torch's allocator holds at the most during one warm call, beyond what it held before.

    Memory that fastvae keeps in a pool of its own is asked of torch for this call, so that it is counted.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        mock.patch.object(native, "_POOLED", sys.maxsize),
        torch.autograd.profiler.profile(profile_memory=True) as profile,
    ):
        call()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in changes)]).max())
