"""The exponential moving average of the weights: by hand, on each optimizer, and in a training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastvae import VAE, DataLoader, ELBOLoss
from fastvae.inference.evaluate import evaluate, negative_elbo
from fastvae.training.checkpoint import load_newest_checkpoint, without_prefix
from fastvae.training.config import TrainConfig
from fastvae.training.fused_adam import FusedAdam
from fastvae.training.native_adam import NativeAdam
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer
from fastvae.training.weights import FlatWeights

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(3).random((150, 12), dtype=np.float32)


@pytest.mark.parametrize("make", [NativeAdam, FusedAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_recurrence_over_the_steps_that_were_applied(make, dtype, decay) -> None:
    weights = FlatWeights(nn.Sequential(nn.Linear(70, 9), nn.Linear(9, 3, bias=False)), dtype)
    variance = nn.Parameter(torch.zeros(()))
    optimizer = make(weights, [variance], 1e-1, 0.1, None, decay)
    optimizer.backward(torch.zeros((), requires_grad=True))  # from where a scaler has its scale
    tensors = [weights.flat, variance]
    expected = [t.detach().double() for t in tensors]
    applied = 0
    for step in range(30):
        for leaf in (*weights.leaves, variance):
            leaf.grad = torch.randn(leaf.shape).to(leaf.dtype)
        if step in (0, 7):
            weights.leaves[1].grad[0] = math.nan
        if step > 20:
            weights.leaves[0].grad = None  # frozen: the average comes nearer
        optimizer.step()
        if step in (0, 7):
            continue
        applied += 1
        d = min(decay, (1 + applied) / (10 + applied))
        expected = [d * e + (1 - d) * t.detach().double() for e, t in zip(expected, tensors, strict=True)]
    for (own, average), tensor, e in zip(optimizer.averages, tensors, expected, strict=True):
        assert own.data_ptr() == tensor.data_ptr()
        torch.testing.assert_close(average.double(), e, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, tensor)


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights_are_lent(data, amp_dtype) -> None:
    model = VAE.mlp((12,), (8,), 2, likelihood="gaussian")
    step = TrainStep(model, negative_elbo(model), lr=1e-2, amp_dtype=amp_dtype, ema_decay=0.9)
    x = torch.from_numpy(data[:50])
    for _ in range(5):
        step(x)
    own = [p.detach().clone() for p in model.parameters()]
    flat, variance = (average for _, average in step.optimizer.averages)

    def look() -> None:
        with step.averaged_weights():
            assert torch.equal(step.weights.flat, flat)
            assert torch.equal(model.log_variance, variance)
            assert not any(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))


@pytest.mark.parametrize("val", [False, True])
def test_a_training_ends_with_averages_and_is_not_changed_by_them(data, tmp_path, val) -> None:
    results = {}
    for name, decay in (("plain", None), ("ema", 0.95)):
        torch.manual_seed(1)
        validation = DataLoader(data[100:], 50) if val else None
        config = TrainConfig(epochs=4, device="cpu", ema_decay=decay, lr=1e-2, out=str(tmp_path / name))
        trainer = Trainer(VAE.mlp((12,), (8,), 2), DataLoader(data[:100], 10), validation, config=config)
        results[name] = trainer.model, trainer.fit()
    checkpoint = load_newest_checkpoint(tmp_path / "ema")[0].tensors
    model, result = results["ema"]
    raw = without_prefix("model", checkpoint)
    for name, tensor in without_prefix(
        "model", load_newest_checkpoint(tmp_path / "plain")[0].tensors
    ).items():
        assert torch.equal(raw[name], tensor)
    assert [row["train_loss"] for row in result.history] == [
        row["train_loss"] for row in results["plain"][1].history
    ]
    if val:
        assert result.history[-1]["val_loss"] != results["plain"][1].history[-1]["val_loss"]
        loss = evaluate(model, DataLoader(data[100:], 50), loss=ELBOLoss()).loss.item()
        assert loss == pytest.approx(result.best["val_loss"], rel=1e-6)
    else:
        average = checkpoint["step/optimizer.average.0"]
        model.load_state_dict(without_prefix("best", checkpoint))
        assert torch.equal(FlatWeights(model).flat, average)
