"""A term of the user's own beside the ELBO's."""

from __future__ import annotations

import itertools
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvae import VAE, DataLoader, ELBOLoss
from fastvae.training.config import TrainConfig
from fastvae.training.extra import ExtraLossError
from fastvae.training.result import TrainingError
from fastvae.training.signals import TrainingStopped
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(seed):
    return np.random.default_rng(seed).random((200, 12), dtype=np.float32)


def _fit(data, extra_loss=None, *, resume=False, train=None, **options):
    torch.manual_seed(1)
    model = VAE.mlp((12,), (16,), 3)
    config = TrainConfig(**{"epochs": 4, "device": "cpu", "lr": 1e-2, **options})
    train = DataLoader(data[:150], 16, shuffle=True, seed=1) if train is None else train
    val = DataLoader(data[150:], 50)
    trainer = Trainer(model, train, val, extra_loss=extra_loss, config=config, resume=resume)
    return trainer, trainer.fit()


def kl(x_hat, x, *, logvar, mu):
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()


def weighed_kl(x_hat, x, *, logvar, mu):
    return 500 * kl(x_hat, x, logvar=logvar, mu=mu)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kl_once_more_is_a_beta_of_2(data, dtype, accumulate):
    x, weights, averages = torch.from_numpy(data), [], []
    options = {"amp_dtype": dtype, "accumulate": accumulate}
    for beta, extra in ((2.0, None), (1.0, kl)):
        torch.manual_seed(1)
        step = TrainStep(VAE.mlp((12,), (16,), 3), ELBOLoss(beta=beta), extra_loss=extra, **options)
        for _ in range(20):
            step(x)
        weights.append(step.weights.flat.detach())
        averages.append(step.averages())
    low = dtype != torch.float32
    torch.testing.assert_close(weights[0], weights[1], rtol=2e-2 if low else 1e-4, atol=2e-3 if low else 1e-5)
    assert averages[0] == pytest.approx(averages[1], rel=2e-2 if low else 1e-4)
    loss, recon, once = averages[1]
    extra = step.extra_average()["train_extra"]
    assert extra == pytest.approx(once, rel=2e-2 if low else 1e-5)
    assert loss == pytest.approx(recon + once + extra, rel=1e-5)


def test_the_value_of_a_batch_is_that_of_its_parts_under_a_sum(data):
    """It is a mean over the data, so that each part counts by its size, though the loss adds up."""
    x, weights, averages = torch.from_numpy(data), [], []
    for accumulate in (1, 3):
        torch.manual_seed(1)
        loss = ELBOLoss(reduction="sum")
        step = TrainStep(VAE.mlp((12,), (16,), 3), loss, extra_loss=weighed_kl, accumulate=accumulate)
        for _ in range(20):
            step(x)
        weights.append(step.weights.flat.detach())
        averages.append((*step.averages(), step.extra_average()["train_extra"]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert averages[0] == pytest.approx(averages[1], rel=1e-4)


def test_metrics(data):
    row = _fit(data, F.l1_loss)[1].history[-1]
    assert 0 < row["train_extra"] < 1
    assert row["train_loss"] == pytest.approx(
        row["train_recon"] + row["train_kl"] + row["train_extra"], rel=1e-5
    )
    assert row["val_loss"] == pytest.approx(row["val_recon"] + row["val_kl"], rel=1e-5)
    assert "train_extra" not in _fit(data)[1].history[-1]


def test_it_is_called_with_what_it_names(data):
    """x_hat and x of each batch, in any names; the last one is smaller."""
    seen = []

    class Module(nn.Module):
        def forward(self, reconstruction, original, z, *, logvar=None, other=7):
            assert (reconstruction.shape, z.shape, logvar.shape) == (
                original.shape,
                logvar.shape,
                (len(z), 3),
            )
            assert (z.requires_grad, reconstruction.requires_grad, other) == (True, True, 7)
            seen.append(len(original))
            return 0 * z.sum()

    _fit(data, Module(), epochs=2, amp=True)
    assert seen == ([16] * 9 + [6]) * 2


@pytest.mark.parametrize(
    ("extra", "got"),
    [
        (lambda x_hat, x: (x_hat - x).square(), r"a tensor \(16, 12\)"),
        (lambda x_hat, x: 3.0, "a float"),
    ],
)
def test_what_is_not_a_scalar(extra, got, data):
    with pytest.raises(ExtraLossError, match=f"extra_loss: got {got} of it, expected a tensor without dim"):
        _fit(data, extra)


def test_a_term_that_is_not_finite_stops_the_training(data):
    message = r"step 3, .*, was not applied: the loss with its extra term is inf; "
    calls = itertools.count(1)
    with pytest.raises(TrainingError, match=message):
        _fit(data, lambda x_hat, x: x_hat.square().sum() / torch.tensor(3.0 - next(calls)).relu())


class Adversary(nn.Module):
    """A discriminator that learns while it judges, with an optimizer of its own; and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.optimizer = torch.optim.SGD(self.judge.parameters(), 0.1)

    def forward(self, x_hat, x):
        self.calls += 1
        self.optimizer.zero_grad()
        real, made = self.judge(x), self.judge(x_hat.detach())
        (F.softplus(-real) + F.softplus(made)).mean().backward()
        self.optimizer.step()
        return F.softplus(-self.judge(x_hat)).mean() + self.frozen(x_hat).mean() / (1 + self.calls)


def test_an_adversary_learns_by_itself_and_the_trainer_leaves_its_weights_alone(data):
    torch.manual_seed(2)
    adversary = Adversary()
    before = adversary.judge[0].weight.detach().clone()
    _fit(data, adversary)
    assert adversary.calls == 40
    assert not torch.equal(adversary.judge[0].weight, before)
    for parameter in adversary.parameters():
        parameter.requires_grad_()
    still = {name: p.detach().clone() for name, p in adversary.named_parameters()}
    adversary.optimizer = torch.optim.SGD(adversary.judge.parameters(), 0.0)
    _fit(data, adversary)
    assert all(torch.equal(p, still[name]) for name, p in adversary.named_parameters())


def test_stopped_and_resumed_is_bit_equal(data, tmp_path):
    class Stopping(DataLoader):
        asked = 0

        def __iter__(self):
            for x in super().__iter__():
                self.asked += 1
                if self.asked == 17:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield x

    def adversary():
        torch.manual_seed(2)
        made = Adversary()
        made.frozen.weight.zero_()
        return made

    whole, result = _fit(data, adversary(), out=str(tmp_path / "whole"))
    with pytest.raises(TrainingStopped):
        _fit(
            data, adversary(), train=Stopping(data[:150], 16, shuffle=True, seed=1), out=str(tmp_path / "cut")
        )
    resumed, after = _fit(data, adversary(), resume=True, out=str(tmp_path / "cut"))
    for trainer in (whole, resumed):
        assert trainer.extra_loss.calls == 40
    for a, b in ((whole.model, resumed.model), (whole.extra_loss, resumed.extra_loss)):
        assert all(torch.equal(w, b.state_dict()[name]) for name, w in a.state_dict().items())
    extras = [[row["train_extra"] for row in history] for history in (result.history, after.history)]
    assert extras[0] == extras[1]


def test_a_term_that_is_added_to_a_run(data, tmp_path):
    _fit(data, out=str(tmp_path))
    _, result = _fit(data, kl, resume=True, epochs=5, out=str(tmp_path))
    assert ["train_extra" in row for row in result.history] == [False] * 4 + [True]
