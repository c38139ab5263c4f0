"""What tests ask of a real GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nothing_waits() -> Iterator[None]:
    """While it lasts, what waits for the GPU is an error, as far as torch knows of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # it says so once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def profiled(run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names of what `run` asks of the host and of CUDA's interface, and of what that puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # torch 2.10 to 2.12 warn of lost events without acc_events, though there is one cycle alone
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    names: tuple[list[str], list[str]] = [], []
    for event in profile.events():
        names[event.device_type == torch.autograd.DeviceType.CUDA].append(event.name)
    return names
