"""A training ends when its validation loss no longer improves, and keeps the weights of the best epoch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvae import VAE, DataLoader
from fastvae.inference.evaluate import evaluate
from fastvae.training.config import ConfigError, TrainConfig
from fastvae.training.result import TrainResult
from fastvae.training.signals import TrainingStopped
from fastvae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("seed")

EPOCHS = 60


class Stopping(DataLoader):
    """Sends SIGTERM when the batch `at` of all is asked for."""

    at, asked = -1, 0

    def __iter__(self):
        for x in super().__iter__():
            if self.asked == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.asked += 1
            yield x


@pytest.fixture
def data() -> np.ndarray:
    """Few and noisy, so that a large model learns them by heart, and its validation loss goes up again."""
    return np.random.default_rng(7).random((80, 12), dtype=np.float32) * 3


def fit(
    data: np.ndarray, out: Path | None = None, stop_at: int = -1, resume: bool = False, **options
) -> tuple[VAE, TrainResult]:
    torch.manual_seed(1)
    train = Stopping(data[:40], 10, shuffle=True, seed=2)
    train.at = stop_at
    options = {"epochs": EPOCHS, "lr": 1e-2, "device": "cpu"} | options
    config = TrainConfig(out=None if out is None else str(out), **options)
    model = VAE.mlp((12,), (64,), 4)
    return model, Trainer(model, train, DataLoader(data[40:], 40), config=config, resume=resume).fit()


def losses(result: TrainResult) -> list[float]:
    return [row["val_loss"] for row in result.history]


@pytest.mark.parametrize("patience", [1, 3, 7])
def test_it_ends_with_the_best_weights_when_patience_does(data, patience: int, tmp_path, capsys) -> None:
    _, whole = fit(data)
    model, result = fit(data, tmp_path, patience=patience)
    found = losses(result)
    assert found == losses(whole)[: len(found)]
    best = min(range(len(found)), key=found.__getitem__) + 1
    assert len(found) == best + patience < EPOCHS
    # earlier, nothing had gone on as long without an improvement
    since = 0
    for n in range(1, len(found)):
        since = 0 if found[n - 1] == min(found[:n]) else since + 1
        assert since < patience
    assert result.best["epoch"] == best
    loss = evaluate(model, DataLoader(data[40:], 40)).loss.item()
    assert loss == pytest.approx(min(found), rel=1e-6)
    kept = load_file(tmp_path / "checkpoints" / "best.safetensors")
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())
    message = f"stopped after epoch {best + patience}: {patience} epochs without a better validation loss "
    assert f"{message}than in epoch {best}\n" in capsys.readouterr().out


def test_patience_survives_a_stop_and_a_resumption(data, tmp_path) -> None:
    whole, result = fit(data, patience=5)
    in_patience = 4 * (len(result.history) - 3) + 2
    with pytest.raises(TrainingStopped):
        fit(data, tmp_path, in_patience, patience=5)
    resumed, again = fit(data, tmp_path, resume=True, patience=5)
    assert losses(again) == losses(result)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    # a run that has ended has nothing more to do
    ended, still = fit(data, tmp_path, resume=True, patience=5)
    assert losses(still) == losses(result)
    for one, other in zip(whole.parameters(), ended.parameters(), strict=True):
        assert torch.equal(one, other)


def test_patience_without_validation_data(data) -> None:
    message = "patience: got 3 without validation data, expected these"
    with pytest.raises(ConfigError, match=message):
        Trainer(VAE.mlp((12,)), DataLoader(data, 10), config=TrainConfig(patience=3))
