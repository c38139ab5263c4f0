"""What a training makes of the machine: waiting for data, and the GPU's memory, utilisation and power."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
NVML_SECONDS = 0.5  # between two questions to NVML, which may take milliseconds
GPU_NAMES = ("gpu_memory_bytes", "gpu_utilization", "gpu_power_watts")

Figures = dict[str, float | None]


class WaitClock(Generic[T]):
    """Iterates over `items`; `seconds` is the time that it has waited for them."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - began


class GPUMeter:
    """Reads the figures of a CUDA device, without waiting for it; on another device all are None.

    gpu_memory_bytes: the most that torch's allocator has given out since this meter was made.
    gpu_utilization, gpu_power_watts: the share of time with a kernel running, and the power, by NVML; None
        where nvidia-ml-py is not installed or the GPU does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml: Any = None
        self._next = 0.0
        self._last: tuple[float | None, float | None] = (None, None)
        self._readings: list[tuple[float | None, float | None]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._nvml, self._handle = _nvml(device)

    def read(self) -> Figures:
        """The figures of now; NVML is asked twice a second at most, and its last answer repeated."""
        if self._nvml is not None and time.perf_counter() >= self._next:
            self._last = (self._ask("UtilizationRates", _utilization), self._ask("PowerUsage", _watts))
            self._readings.append(self._last)
            self._next = time.perf_counter() + NVML_SECONDS
        return self._figures(self._last)

    def average(self) -> Figures:
        """As `read`, with NVML's figures averaged over the answers since the last average."""
        self.read()
        readings, self._readings = self._readings or [self._last], []
        utilization, power = (_mean(values) for values in zip(*readings, strict=True))
        return self._figures((utilization, power))

    def _figures(self, nvml: tuple[float | None, float | None]) -> Figures:
        memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return dict(zip(GPU_NAMES, (memory, *nvml), strict=True))

    def _ask(self, name: str, convert: Any) -> float | None:
        try:
            return float(convert(getattr(self._nvml, f"nvmlDeviceGet{name}")(self._handle)))
        except self._nvml.NVMLError:
            return None


def overall(rows: Sequence[Mapping[str, Any]], wait_seconds: float, seconds: float) -> Figures:
    """The figures of a whole training from its epochs' rows: the most memory, the mean of the others."""
    memory, *others = ([row.get(name) for row in rows] for name in GPU_NAMES)
    values = (max((m for m in memory if m is not None), default=None), *map(_mean, others))
    return {
        "data_wait_share": wait_seconds / seconds if seconds else 0.0,
        **dict(zip(GPU_NAMES, values, strict=True)),
    }


def _nvml(device: torch.device) -> tuple[Any, Any]:
    """The module and its handle of `device`, or None twice."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # not by number: CUDA_VISIBLE_DEVICES changes torch's
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None


def _utilization(rates: Any) -> float:
    return rates.gpu / 100  # type: ignore[no-any-return]


def _watts(milliwatts: int) -> float:
    return milliwatts / 1000


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
