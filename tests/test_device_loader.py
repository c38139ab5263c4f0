"""A loader's `device` and `pin_memory`: where there is none, and who asks. See also gather_checks.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_python

from fastvae.cli import train
from fastvae.cli.runs import Run, open_data
from fastvae.data import DataLoader, Dataset, as_source
from fastvae.training.config import TrainConfig

X = np.arange(60, dtype=np.uint8).reshape(20, 3)


def test_the_cpu_is_no_device() -> None:
    for device in (None, "cpu", torch.device("cpu")):
        loader = DataLoader(X, 4, device=device)
        assert loader.note is None
        assert torch.equal(torch.cat(list(loader)), torch.from_numpy(X) / 255)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device() -> None:
    with pytest.raises(
        ValueError, match="device is cuda, but torch finds no CUDA device; expected None here"
    ):
        DataLoader(X, device="cuda")
    with pytest.warns(UserWarning, match="pin_memory is True, but torch finds no CUDA device"):
        loader = DataLoader(X, 4, pin_memory=True)
    assert len(list(loader)) == 5


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device is meta, expected a CUDA device"):
        DataLoader(X, device="meta")
    with pytest.raises(ValueError, match="the loader's device is cpu, expected a CUDA device"):
        DataLoader(X, 4).into(torch.empty(4, 3))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, int]]:
    """The devices that loaders are asked for, where any is there; each with the number of samples."""
    asked = []

    def passes_on(device: torch.device, wanted: Any) -> Any:
        asked.append((device, wanted.n_samples))
        return wanted.native(), f"kept on {device}, 1.0 MB"

    monkeypatch.setattr("fastvae.data.loader.passes_on", passes_on)
    monkeypatch.setattr("fastvae.data.arguments.device", lambda device: torch.device(device or "cpu"))
    return asked


def test_a_training_asks_for_its_device(
    asked: list[tuple[torch.device, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """For training, validation and test data, and says where the training data are."""
    source, device = as_source(np.zeros((20, 4, 4), np.uint8)), torch.device("cuda:1")
    data = Dataset("stripes", source, as_source(np.zeros((7, 4, 4), np.uint8)))
    loaders = train._loaders(TrainConfig(val=0.25), data, device)
    assert asked == [(device, 15), (device, 5), (device, 7)]
    train._print_data(data, *loaders)
    assert "data: array: kept on cuda:1, 1.0 MB" in capsys.readouterr().out


def test_what_comes_after_training_asks_for_its_device(
    asked: list[tuple[torch.device, int]], tmp_path: Path
) -> None:
    """But not for single data."""
    np.save(tmp_path / "x.npy", np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4))
    config, device = TrainConfig(data=str(tmp_path / "x.npy"), val=0.25), torch.device("cuda:1")
    run = Run(tmp_path, torch.nn.Identity(), config, device, 0, (1, 4, 4), (2,), {})
    data = open_data(run, argparse.Namespace(data=None, split="train", batch_size=8))
    some = data.some(7, seed=1)
    assert asked == [(device, 15), (device, 7)]
    assert [data.loader.device, some.loader.device] == [device, device]
    assert [x.shape for x in some.batches([3, 5])] == [(2, 1, 4, 4)]
    assert len(asked) == 2


def test_a_loader_without_a_device_does_not_import_triton() -> None:
    run_python("""
        import sys
        import numpy as np
        from fastvae import DataLoader

        list(DataLoader(np.zeros((4, 3), np.uint8), 2))
        assert "triton" not in sys.modules
    """)
