"""What a training reports of the machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastvae import VAE, DataLoader
from fastvae.training.config import TrainConfig
from fastvae.training.signals import TrainingStopped
from fastvae.training.telemetry import Telemetry
from fastvae.training.trainer import Trainer
from fastvae.training.usage import GPU_NAMES, GPUMeter, WaitClock, overall

NOTHING = dict.fromkeys(GPU_NAMES)
WAIT = 0.02  # seconds


class Slow(DataLoader):
    """Lets each batch be waited for, and sends SIGTERM before batch `stop_at`."""

    stop_at: int | None = None

    def __iter__(self):
        for i, x in enumerate(super().__iter__()):
            time.sleep(WAIT)
            if i == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield x


def trainer(train: DataLoader, **options) -> Trainer:
    resume = options.pop("resume", False)
    config = TrainConfig(epochs=2, device="cpu", **options)
    return Trainer(VAE.mlp((6,), (8,), 2), train, config=config, resume=resume)


@pytest.fixture
def x(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((80, 6), dtype=np.float32)


def test_only_the_wait_is_counted(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("fastvae.training.usage.time", SimpleNamespace(perf_counter=lambda: now))

    def items():
        nonlocal now
        for i in range(4):
            now += 3
            yield i
        now += 7

    clock = WaitClock(items())
    for i, item in enumerate(clock):
        assert item == i
        assert clock.seconds == 3 * (i + 1)
        now += 100
    assert clock.seconds == 3 * 4 + 7


def test_the_share_of_waiting_is_in_rows_and_result(x, tmp_path) -> None:
    result = trainer(Slow(x, 16), out=str(tmp_path)).fit()
    for row in result.history:
        assert 0 < row["data_wait_share"] < 1
        assert {name: row[name] for name in GPU_NAMES} == NOTHING
    assert result.usage["data_wait_share"] * result.seconds >= 2 * 5 * WAIT
    assert result.usage["data_wait_share"] <= 1
    assert {name: result.usage[name] for name in GPU_NAMES} == NOTHING
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == result.history


def test_the_wait_before_a_stop_counts(x, tmp_path: Path) -> None:
    slow = Slow(x, 16)
    slow.stop_at = 3
    with pytest.raises(TrainingStopped):
        trainer(slow, out=str(tmp_path)).fit()
    resumed = trainer(DataLoader(x, 16), out=str(tmp_path), resume=True).fit()
    assert resumed.usage["data_wait_share"] * resumed.seconds >= 4 * WAIT


class Refused(Exception):
    """In the place of pynvml.NVMLError."""


class FakeNVML:
    """A GPU at 75 %, then at 25 %, with 300 W; methods named in `refused` raise."""

    NVMLError = Refused

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.utilizations = [75, 25]
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        def answer(*arguments):
            self.asked.append(name)
            if name in self.refused:
                raise Refused
            if name == "nvmlDeviceGetHandleByUUID":
                return arguments[0]
            if name != "nvmlInit":
                assert arguments == ("GPU-1234-56",)
            if name == "nvmlDeviceGetUtilizationRates":
                return SimpleNamespace(gpu=self.utilizations.pop(0), memory=99)
            return 300_000

        return answer


@pytest.fixture
def cuda(monkeypatch) -> torch.device:
    """A CUDA device that torch seems to have."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-56"))
    return torch.device("cuda", 0)


def test_nvml_is_asked_rarely_and_averaged(cuda, monkeypatch) -> None:
    now, fake = 10.0, FakeNVML()
    monkeypatch.setattr("fastvae.training.usage.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = GPUMeter(cuda)
    for _ in range(3):
        assert list(meter.read().values()) == [5 * 2**30, 0.75, 300]
    now += 1
    assert list(meter.read().values()) == [5 * 2**30, 0.25, 300]
    assert list(meter.average().values()) == [5 * 2**30, 0.5, 300]
    assert list(meter.average().values()) == [5 * 2**30, 0.25, 300]  # the last answer
    assert fake.asked.count("nvmlDeviceGetPowerUsage") == 2


@pytest.mark.parametrize(
    ("refused", "known"),
    [
        ("nvmlInit", []),
        ("nvmlDeviceGetHandleByUUID", []),
        ("nvmlDeviceGetUtilizationRates", ["gpu_power_watts"]),
        ("nvmlDeviceGetPowerUsage", ["gpu_utilization"]),
        (None, []),
    ],
)
def test_what_nvml_refuses_is_none(cuda, monkeypatch, refused: str | None, known: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(refused) if refused else None)
    figures = GPUMeter(cuda).average()
    assert [name for name, value in figures.items() if value is not None] == ["gpu_memory_bytes", *known]


def test_a_cpu_has_no_figures() -> None:
    meter = GPUMeter(torch.device("cpu"))
    assert meter.read() == meter.average() == NOTHING


def test_figures_of_a_whole_training() -> None:
    rows = [
        {"gpu_memory_bytes": 3, "gpu_utilization": 0.5, "gpu_power_watts": None},
        {"gpu_memory_bytes": 2, "gpu_utilization": None, "gpu_power_watts": None},
        {"gpu_memory_bytes": 1, "gpu_utilization": 1.0, "gpu_power_watts": None},
        {},
    ]
    assert overall(rows, 1.0, 4.0) == {
        "data_wait_share": 0.25,
        "gpu_memory_bytes": 3,
        "gpu_utilization": 0.75,
        "gpu_power_watts": None,
    }
    assert overall([], 0.0, 0.0) == {"data_wait_share": 0.0, **NOTHING}


def test_the_progress_shows_what_is_known(capsys) -> None:
    row = {"epoch": 1, "val_loss": None, "samples_per_second": 1234.5, "data_wait_share": 0.126}
    row |= dict.fromkeys(("train_loss", "train_recon", "train_kl"), 1.0)
    for gpu in ((None, None, None), (3 * 2**29, None, 99.6), (2**30, 0.5, 300), (5 << 20, None, None)):
        Telemetry(1, 1).epoch({**row, **dict(zip(GPU_NAMES, gpu, strict=True))})
    shown = [line.partition("samples/s  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        "13% data wait",
        "13% data wait  GPU 100 W 1.5 GiB",
        "13% data wait  GPU 50% 300 W 1.0 GiB",
        "13% data wait  GPU 5 MiB",
    ]


@pytest.mark.gpu
def test_a_gpu_has_figures() -> None:
    meter = GPUMeter(torch.device("cuda", 0))
    held = torch.ones(2**20, device="cuda")
    figures = meter.average()
    assert figures["gpu_memory_bytes"] >= held.nbytes
    assert figures["gpu_utilization"] is None or 0 <= figures["gpu_utilization"] <= 1
    assert figures["gpu_power_watts"] is None or 0 < figures["gpu_power_watts"] < 5000
