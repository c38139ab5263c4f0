"""Posterior collapse is seen where it happens, once, and nowhere else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastvae import VAE, DataLoader
from fastvae.cli import main
from fastvae.inference.evaluate import evaluate
from fastvae.inference.latents import LatentStatistics
from fastvae.training.collapse import CollapseWatch
from fastvae.training.config import TrainConfig
from fastvae.training.trainer import Trainer

WARNING = "warning: posterior collapse: "

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sizes", [[1000], [1, 0, 400, 599], [7] * 142 + [6]])
def test_statistics_are_those_of_all_data_at_once(seed, sizes):
    """Of means far from 0, where a sum of squares has lost the variance."""
    spread = torch.logspace(-3, 1, 12).view(3, 2, 2)
    mu = (1e3 * torch.randn(3, 2, 2) + spread.sqrt() * torch.randn(1000, 3, 2, 2)).float()
    logvar = torch.randn(1000, 3, 2, 2)
    latents = LatentStatistics()
    for m, v in zip(mu.split(sizes), logvar.split(sizes), strict=True):
        latents.update(m, v)
    m, v = (x.double().numpy().reshape(1000, 12) for x in (mu, logvar))
    assert latents.count == 1000
    np.testing.assert_allclose(latents.kl, (0.5 * (m**2 + np.exp(v) - 1 - v)).mean(0), rtol=1e-6)
    np.testing.assert_allclose(latents.mean_variance, m.var(0), rtol=1e-9)
    assert latents.active_units == (m.var(0) > 0.01).sum() > 0


def test_ranks_have_the_statistics_of_all(seed, monkeypatch):
    """Of which one had no data."""
    mu, logvar = torch.randn(2, 300, 5)
    whole, ranks = LatentStatistics(), [LatentStatistics() for _ in range(3)]
    whole.update(mu, logvar)
    for rank, rows in zip(ranks[:2], (slice(100), slice(100, None)), strict=True):
        rank.update(mu[rows], logvar[rows])
    sent = []  # what each rank sends, when it is asked for it the first time
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda _, own, group: sent.append(own))
    for rank in ranks:
        rank.gather(SimpleNamespace(size=lambda: 0))
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda to, _, group: to.__setitem__(slice(3), sent)
    )
    for rank in ranks:
        rank.gather(SimpleNamespace(size=lambda: 3))
        assert rank.count == 300
        torch.testing.assert_close(rank.kl, whole.kl)
        torch.testing.assert_close(rank.mean_variance, whole.mean_variance)


def test_evaluate_gathers_the_clamped_posteriors_of_all_data(seed):
    model = VAE.mlp((16,), (32,), 3)
    data = torch.randn(150, 16)
    latents = LatentStatistics()
    terms = evaluate(model, DataLoader(data.numpy(), 64), latents=latents)
    assert latents.count == 150
    assert latents.kl.sum().item() == pytest.approx(terms.kl.item(), rel=1e-5)
    with torch.no_grad():
        expected = model.encode(data)[0].double().var(0, correction=0)
    torch.testing.assert_close(latents.mean_variance, expected, rtol=1e-5, atol=0)


class Deaf(torch.nn.Module):
    """A decoder that ignores z."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(16))

    def forward(self, z):
        return self.mean.expand(len(z), 16) + 0 * z.sum()


@pytest.fixture
def data(seed):
    """[600, 16]: a plane in 16 dimensions, and noise."""
    rng = np.random.default_rng(seed)
    plane = rng.standard_normal((600, 2)) @ rng.standard_normal((2, 16))
    return (plane + 0.3 * rng.standard_normal((600, 16))).astype(np.float32)


def _fit(data, capsys, decoder=None, resume=False, val=True, **options):
    """The rows, and the warnings that were printed."""
    torch.manual_seed(0)
    model = VAE.mlp((16,), (32,), 4)
    if decoder is not None:
        model = VAE(model.encoder, decoder)
    config = TrainConfig(**{"epochs": 80, "lr": 5e-3, "device": "cpu"} | options)
    validation = DataLoader(data[500:], 64) if val else None
    train = DataLoader(data[:500], 64, shuffle=True)  # 8 steps an epoch
    result = Trainer(model, train, validation, config=config, resume=resume).fit()
    lines = capsys.readouterr().out.splitlines()
    return result.history, [line for line in lines if line.startswith(WARNING)]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"beta": 100}, "try a lower --beta than 100"),
        ({"decoder": Deaf()}, "--likelihood gaussian learns one"),
        ({"beta": 100, "kl_warmup": "linear"}, "try a lower --beta than 100"),
    ],
    ids=["beta", "deaf", "after a warm-up"],
)
def test_one_line_where_it_happens(data, capsys, options, advice):
    history, (warning,) = _fit(data, capsys, **options)
    assert advice in warning
    assert "0 of 4 active" in warning
    assert history[-1]["active_units"] == 0
    assert sum(history[-1]["kl_by_latent"]) < 0.05


@pytest.mark.parametrize("options", [{}, {"kl_warmup": "linear"}, {"kl_warmup": "cyclical"}, {"beta": 4}])
def test_silence_where_the_latents_are_used(data, capsys, options):
    history, warnings = _fit(data, capsys, **options)
    assert warnings == []
    assert history[-1]["active_units"] >= 2
    for row in history:
        assert sum(row["kl_by_latent"]) == pytest.approx(row["val_kl"], rel=1e-5)


def test_silence_before_it_can_be_known(data, capsys):
    history, warnings = _fit(data, capsys, beta=100, epochs=62)  # 496 steps
    assert history[-1]["active_units"] == 0
    assert warnings == []


def test_a_resumed_run_warns_no_second_time(data, capsys, tmp_path):
    options = {"beta": 100, "out": str(tmp_path)}
    assert len(_fit(data, capsys, epochs=80, **options)[1]) == 1
    assert _fit(data, capsys, epochs=82, resume=True, **options)[1] == []


def test_nothing_without_validation(data, capsys):
    history, warnings = _fit(data, capsys, val=False, beta=100)
    assert warnings == []
    assert not {"kl_by_latent", "active_units"} & history[-1].keys()


def _row(step, kl, active):
    return {"step": step, "kl_by_latent": kl, "active_units": active}


@pytest.mark.parametrize(
    ("kl", "active", "collapsed"),
    [
        ([0.0] * 20, 0, True),
        ([0.2] * 20, 0, True),  # narrow or wide, but the same for all data
        ([0.02] * 20, 5, True),
        ([0.98] + [0.0] * 19, 1, True),
        ([1.02] + [0.0] * 19, 1, False),
        ([0.3, 0.0], 1, False),  # two latents of small data may have little to say
        ([0.04, 0.03], 1, True),
    ],
)
def test_the_criterion(kl, active, collapsed):
    watch = CollapseWatch(TrainConfig(), 4000, "mse")
    assert (watch.update(_row(500, kl, active)) is not None) == collapsed
    assert watch.update(_row(1000, [0.0] * 20, 0)) is None or not collapsed


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 600),
        ({"lr_warmup_steps": 1000}, 1600),
        ({"kl_warmup": "linear"}, 1200),  # a tenth
        ({"kl_warmup": "cosine", "kl_warmup_steps": 250}, 1000),
        ({"kl_warmup": "cyclical", "kl_warmup_steps": 2000}, 1600),
        ({"capacity": 25, "capacity_steps": 1100}, 1800),
    ],
)
def test_steps_are_counted_after_the_warm_ups(options, first):
    """600 steps of 6,000."""
    watch = CollapseWatch(TrainConfig(**options), 6000, "mse")
    warned = [step for step in range(200, 3000, 200) if watch.update(_row(step, [0.0], 0))]
    assert warned == [first]


def test_latents_that_wake_up_begin_anew():
    watch = CollapseWatch(TrainConfig(), 1000, "mse")
    kls = [0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    warned = [i for i, kl in enumerate(kls) if watch.update(_row(100 * (i + 1), [kl], 1))]
    assert warned == [9]


def test_digits(tmp_path, capsys):
    """By default in silence; but the variance of mse, 1/2, is more than most of what digits varies."""
    options = ["train", "--data", "digits", "--device", "cpu", "--overwrite", "--out", str(tmp_path)]
    options += ["--no-report"]
    assert main(options) == 0
    assert WARNING not in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["active_units"] == 20
    assert len(summary["kl_by_latent"]) == 20
    assert main([*options, "--likelihood", "mse"]) == 0
    assert capsys.readouterr().out.count(WARNING) == 1
