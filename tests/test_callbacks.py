"""What a training tells, when, and what becomes of an error in the answer."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

import fastvae
from fastvae import VAE, DataLoader
from fastvae.training import trainer as trainer_module
from fastvae.training.config import TrainConfig
from fastvae.training.result import TrainResult
from fastvae.training.signals import TrainingStopped
from fastvae.training.trainer import Trainer


class Diary(fastvae.Callback):
    """Writes down what it hears; stops the run with SIGTERM at the report after step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.heard: list[tuple] = []
        self.stop_at = stop_at

    def on_start(self, trainer, step):
        self.heard.append(("start", trainer, step))

    def on_report(self, step, metrics):
        self.heard.append(("report", step, metrics))
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch(self, row):
        self.heard.append(("epoch", row))

    def on_end(self, result):
        self.heard.append(("end", result))


@pytest.fixture(autouse=True)
def _report_after_each_step(monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "REPORT_SECONDS", 0.0)


@pytest.fixture
def make(seed: int):
    x = np.random.default_rng(seed).random((90, 6), dtype=np.float32)

    def make(*callbacks: fastvae.Callback, resume: bool = False, **options) -> Trainer:
        torch.manual_seed(0)
        config = TrainConfig(**{"epochs": 2, "device": "cpu"} | options)
        train, val = DataLoader(x[:60], 20, shuffle=True), DataLoader(x[60:], 20)
        return Trainer(VAE.mlp((6,), (8,), 2), train, val, config=config, resume=resume, callbacks=callbacks)

    return make


def test_all_is_told_in_its_order(make) -> None:
    diary = Diary()
    trainer = make(fastvae.Callback(), diary)
    result = trainer.fit()
    assert [heard[:2] if heard[0] == "report" else heard for heard in diary.heard] == [
        ("start", trainer, 0),
        *[("report", step) for step in (1, 2, 3)],
        ("epoch", result.history[0]),
        *[("report", step) for step in (4, 5, 6)],
        ("epoch", result.history[1]),
        ("end", result),
    ]
    assert isinstance(result, TrainResult)
    last = diary.heard[-3][2]
    assert last["train_loss"] == pytest.approx(result.history[1]["train_loss"])
    assert last.keys() < result.history[1].keys()


def test_nobody_hears_nothing_different(make) -> None:
    quiet, told = make(), make(Diary())
    quiet.fit()
    told.fit()
    for one, other in zip(quiet.model.parameters(), told.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_stopped_run_ends_without_a_result_and_begins_where_it_stood(make, tmp_path) -> None:
    stopped, resumed = Diary(stop_at=3), Diary()
    with pytest.raises(TrainingStopped):
        make(stopped, out=str(tmp_path)).fit()
    assert stopped.heard[-1] == ("end", None)
    result = make(resumed, out=str(tmp_path), resume=True).fit()
    assert resumed.heard[0][2] == 4
    assert [heard[1] for heard in resumed.heard if heard[0] == "report"] == [5, 6]
    assert resumed.heard[-1] == ("end", result)


@pytest.mark.parametrize("where", ["on_start", "on_report", "on_epoch", "on_end"])
def test_an_error_in_one_is_raised_and_those_that_began_end(make, where: str) -> None:
    class Broken(fastvae.Callback):
        pass

    def broken(self, *arguments):
        raise LookupError(f"broken in {where}")

    setattr(Broken, where, broken)
    before, after = Diary(), Diary()
    with pytest.raises(LookupError, match=f"broken in {where}"):
        make(before, Broken(), after).fit()
    ends = [heard for heard in before.heard if heard[0] == "end"]
    assert len(ends) == 1
    assert (ends[0][1] is None) == (where != "on_end")
    assert [heard[0] for heard in after.heard][-1:] == ([] if where == "on_start" else ["end"])
