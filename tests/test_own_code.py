"""What the code of a model's owner does to weights, gradients and buffers while the model is trained."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae import VAE, Callback, DataLoader, ELBOLoss
from fastvae.models import ModelError
from fastvae.models.model import check_batch
from fastvae.training.config import TrainConfig
from fastvae.training.fused_adam import FusedAdam
from fastvae.training.signals import TrainingStopped
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(12, 6)
        self.decoder = nn.Linear(3, 12)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


@pytest.fixture
def data(seed: int) -> Tensor:
    return torch.rand(100, 12, generator=torch.Generator().manual_seed(seed))


class Stopping(DataLoader):
    """Sends SIGTERM when batch `stop_at` is asked for."""

    stop_at: int | None = None

    def __iter__(self) -> Any:
        for i, x in enumerate(super().__iter__()):
            if i == self.stop_at:
                self.stop_at = None
                os.kill(os.getpid(), signal.SIGTERM)
            yield x


def trainer(
    model: nn.Module,
    data: Tensor,
    *,
    bf16: bool = False,
    stop_at: int | None = None,
    resume: bool = False,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> Trainer:
    train = Stopping(data, 16, shuffle=True, seed=1)
    train.stop_at = stop_at
    config = TrainConfig(**{"epochs": 2, "device": "cpu", "lr": 1e-2, **options})
    made = Trainer(model, train, config=config, resume=resume, callbacks=callbacks or [])
    made.amp_dtype = torch.bfloat16 if bf16 else torch.float32
    return made


def fit(model: nn.Module, data: Tensor, **options: Any) -> dict[str, Tensor]:
    """The weights and buffers after training."""
    trainer(model, data, **options).fit()
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def leave_gradients(model: nn.Module, data: Tensor) -> None:
    mu, logvar = model.encode(data)
    (1000 * ELBOLoss()(model.decode(mu), data, mu, logvar)).backward()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [Net, lambda: VAE.mlp((12,), (16,), 3)], ids=["own", "VAE"])
def test_gradients_that_are_there_are_not_the_steps(
    data: Tensor, make: Any, accumulate: int, bf16: bool
) -> None:
    class Looks(Callback):
        def on_epoch(self, row: Any) -> None:
            leave_gradients(model, data)

    found = []
    for looks in (False, True):
        torch.manual_seed(1)
        model = make()
        if looks:
            leave_gradients(model, data)
        callbacks = [Looks()] if looks else []
        found.append(fit(model, data, accumulate=accumulate, bf16=bf16, callbacks=callbacks))
    assert_same(*found)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_on_start_freezes_stays_in_a_resumed_epoch(data: Tensor, tmp_path: Path, bf16: bool) -> None:
    class Freezes(Callback):
        def on_start(self, trainer: Trainer, step: int) -> None:
            trainer.model.encoder.requires_grad_(False)

    torch.manual_seed(1)
    begun = VAE.mlp((12,), (16,), 3)
    before = begun.encoder.layers[0].weight.detach().clone()
    options = {"out": str(tmp_path), "bf16": bf16, "callbacks": [Freezes()]}
    with pytest.raises(TrainingStopped):
        fit(begun, data, stop_at=3, **options)
    resumed = VAE.mlp((12,), (16,), 3)
    fit(resumed, data, resume=True, **options)
    assert torch.equal(resumed.encoder.layers[0].weight, before)
    assert not torch.equal(resumed.decoder.layers[0].weight, begun.decoder.layers[0].weight)


class Mean(Net):
    """A running mean, replaced or written at each batch."""

    def __init__(self, replaces: bool, persistent: bool = True) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(()), persistent)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            mean = 0.9 * self.mean + 0.1 * x.mean()
            if self.replaces:
                self.mean = mean
            else:
                self.mean.copy_(mean)
        mu, logvar = super().encode(x)
        return mu - self.mean, logvar


def test_a_part_that_on_start_puts_into_eval_mode_stays_there(data: Tensor) -> None:
    """As does batch normalisation by the statistics of earlier data; and `fit` gives each its mode back."""

    class Fixes(Callback):
        def on_start(self, trainer: Trainer, step: int) -> None:
            trainer.model.encoder[0].eval()

    model = Net()
    model.encoder = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 6), nn.BatchNorm1d(6))
    model.decoder.eval()
    train, val = DataLoader(data, 16), DataLoader(data, 50)
    Trainer(model, train, val, config=TrainConfig(epochs=3, device="cpu"), callbacks=[Fixes()]).fit()
    assert model.encoder[0].num_batches_tracked == 0
    assert model.encoder[2].num_batches_tracked > 0
    assert {name for name, module in model.named_modules() if not module.training} == {"decoder"}


def test_buffers_that_are_replaced_are_put_back_too(data: Tensor) -> None:
    data[17, 3] = 1e30
    options = {"non_finite": "skip", "max_skipped_steps": 2}
    written, replaced = (fit(Mean(replaces), data, **options) for replaces in (False, True))
    assert written["mean"].isfinite()
    assert_same(written, replaced)


def test_buffers_that_are_replaced_elsewhere_than_on_a_cpu(data: Tensor) -> None:
    """Where whether a step was applied is known on the device alone."""
    found = []
    for replaces in (False, True):
        model = Mean(replaces)
        step = TrainStep(model, ELBOLoss(), amp_dtype=torch.float32, max_skipped=10)
        step.optimizer = FusedAdam(step.weights, [], 1e-3, 0.0)
        torch.manual_seed(1)
        for scale in (1, 2, float("inf"), 3, float("nan")):
            step(data * scale)
        found.append({"mean": model.mean, "weight": model.encoder.weight.detach()})
    assert found[0]["mean"].isfinite()
    assert found[0]["mean"] > 0
    assert_same(*found)


class Normalized(Net):
    """Weights that are normalised at each batch."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.encoder.weight
        unit = nn.functional.normalize(weight.detach(), dim=1)
        if self.by == "data":
            weight.data = unit
        elif self.by == "copy into data":
            weight.data.copy_(unit)
        else:
            with torch.no_grad():
                weight.copy_(unit)
        return super().encode(x)


def test_weights_whose_data_are_set_in_each_step_are_trained(data: Tensor) -> None:
    assert_same(*(fit(Normalized(by), data) for by in ("copy", "data")))
    assert_same(*(fit(Normalized(by), data) for by in ("copy", "copy into data")))


@pytest.mark.parametrize("by", ["copy", "data", "copy into data"])
def test_weights_that_are_written_in_each_step_are_refused_with_amp(data: Tensor, by: str) -> None:
    with pytest.raises(
        ModelError, match="writes into weights in encode or decode with amp, expected them to"
    ):
        fit(Normalized(by), data, bf16=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("make", [Net, lambda: VAE.mlp((12,), (16,), 3)], ids=["own", "VAE"])
def test_hooks_of_parameters_are_called_in_each_step(data: Tensor, make: Any, kind: str, bf16: bool) -> None:
    """A mask of the gradient, say, which keeps half of a layer as it is."""
    model = make()
    weight = next(model.parameters())
    before, mask = weight.detach().clone(), torch.ones_like(weight)
    mask[:, 6:] = 0
    seen = []

    def hook(given: Tensor) -> Tensor | None:
        seen.append(given)
        if kind == "register_hook":
            return given * mask
        assert given.grad is not None
        given.grad *= mask
        return None

    getattr(weight, kind)(hook)
    fit(model, data, bf16=bf16)
    assert len(seen) == 14
    assert torch.equal(weight[:, 6:], before[:, 6:])
    assert not torch.equal(weight[:, :6], before[:, :6])


def test_a_hook_that_comes_too_late_for_amp_is_refused(data: Tensor) -> None:
    class Hooks(Callback):
        def on_start(self, trainer: Trainer, step: int) -> None:
            trainer.model.encoder.weight.register_hook(torch.zeros_like)

    with pytest.raises(ModelError, match="got a hook of the weight of a Linear in the training, expected it"):
        fit(Net(), data, bf16=True, callbacks=[Hooks()])


class Counting(Net):
    """Forward passes change a buffer in eval mode, too."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()), persistent)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.n += 1
        mu, logvar = super().encode(x)
        return mu * (1 + 0.01 * self.n), logvar


@pytest.mark.parametrize("make", [Counting, lambda: Mean(replaces=True)], ids=["written", "replaced"])
def test_looking_at_a_batch_puts_buffers_back(data: Tensor, make: Any) -> None:
    model = make()
    (own,) = model.buffers()
    check_batch(model, data)
    assert next(model.buffers()) is own
    assert own == 0


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("stop_at", [3, 6])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_has_the_buffers_of_an_uninterrupted_one(
    data: Tensor, tmp_path: Path, persistent: bool, stop_at: int, bf16: bool
) -> None:
    for make in (lambda: Counting(persistent), lambda: Mean(replaces=True, persistent=persistent)):
        whole = fit(make(), data, bf16=bf16)
        options = {"out": str(tmp_path), "bf16": bf16}
        with pytest.raises(TrainingStopped):
            fit(make(), data, stop_at=stop_at, overwrite=True, **options)
        assert_same(whole, fit(make(), data, resume=True, **options))
