"""A loader's `device` and `pin_memory`: where there is none, and who asks. See also gather_checks.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from processes import run_python

from fastvae.cli import train
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


def test_a_training_asks_for_its_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For training, validation and test data, and says where the training data are."""
    asked = []

    def passes_on(device: torch.device, wanted: Any) -> Any:
        asked.append((device, wanted.n_samples))
        return wanted.native(), f"kept on {device}, 1.0 MB"

    monkeypatch.setattr("fastvae.data.loader.passes_on", passes_on)
    monkeypatch.setattr("fastvae.data.arguments.device", torch.device)
    source, device = as_source(np.zeros((20, 4, 4), np.uint8)), torch.device("cuda:1")
    data = Dataset("stripes", source, as_source(np.zeros((7, 4, 4), np.uint8)))
    loaders = train._loaders(TrainConfig(val=0.25), data, device)
    assert asked == [(device, 15), (device, 5), (device, 7)]
    train._print_data(data, *loaders)
    assert "data: array: kept on cuda:1, 1.0 MB" in capsys.readouterr().out


def test_a_loader_without_a_device_does_not_import_triton() -> None:
    run_python("""
        import sys
        import numpy as np
        from fastvae import DataLoader

        list(DataLoader(np.zeros((4, 3), np.uint8), 2))
        assert "triton" not in sys.modules
    """)
