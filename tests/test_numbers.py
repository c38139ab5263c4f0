"""Steps whose loss or gradients are not finite are not applied; the run stops, or goes on without them."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvae import VAE, DataLoader, ELBOLoss, _native
from fastvae.cli import main
from fastvae.models.model import ModelError
from fastvae.ops import ELBOTerms
from fastvae.training.checkpoint import checkpoints
from fastvae.training.config import TrainConfig
from fastvae.training.fused_adam import FusedAdam
from fastvae.training.native_adam import NativeAdam
from fastvae.training.numbers import NonFiniteError
from fastvae.training.result import TrainingError
from fastvae.training.signals import TrainingStopped
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer
from fastvae.training.weights import FlatWeights

NOT_FINITE = [math.inf, -math.inf, math.nan]

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_gradient_that_is_not_finite_is_found(dtype, threads) -> None:
    big = torch.finfo(dtype).max
    gradients = [(torch.rand(n) * 2 - 1).mul(big).to(dtype) for n in (1, 5, 0, 4096, 100_003)]
    gradients[3][7], gradients[4][9] = big, torch.finfo(dtype).smallest_normal / 2
    code = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}[dtype]
    updated = [[torch.zeros(len(g)) for _ in range(3)] for g in gradients]
    places = [
        (len(g), *(t.data_ptr() for t in u), 0, 0, 0, 1.0, 0.0)
        for g, u in zip(gradients, updated, strict=True)
    ]
    parts = _native.AdamParts(places)

    def first() -> int:
        for tensor in itertools.chain(*updated):
            tensor.zero_()
        at = [(g.data_ptr(), code) for g in gradients]
        found = parts.step(at, 1, 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.0, True, threads)
        changed = any(tensor.any() for tensor in itertools.chain(*updated))
        assert changed == (found == len(gradients))
        return found

    assert first() == len(gradients)
    for which in (4, 3, 1):  # an earlier one each time
        gradients[which][random.randrange(len(gradients[which]))] = random.choice(NOT_FINITE)
        assert first() == which


def _made(kind: str, dtype: torch.dtype, clip_norm: float | None) -> tuple[FlatWeights, Tensor, NativeAdam]:
    torch.manual_seed(0)
    weights = FlatWeights(nn.Sequential(nn.Linear(30, 9), nn.Linear(9, 3)), dtype)
    variance = nn.Parameter(torch.zeros(()))
    make = NativeAdam if kind == "native" else FusedAdam
    return weights, variance, make(weights, [variance], 1e-2, 0.1, clip_norm)


@pytest.mark.parametrize("kind", ["native", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_step_that_is_not_finite_changes_nothing(kind, dtype, clip_norm, value, seed) -> None:
    """Bit for bit: weights, moments and bias correction are those of steps among which it never was."""
    bad_at = {2: 3, 5: 4}  # steps: a parameter, or the loss's own
    finite = ELBOTerms(*torch.ones(3))
    results = []
    for with_bad in (False, True):
        weights, variance, optimizer = _made(kind, dtype, clip_norm)
        leaves = [*weights.leaves, variance]
        torch.manual_seed(seed)
        findings, rows = [], []
        for step in range(9):
            for leaf in leaves:
                leaf.grad = torch.randn(leaf.shape).to(leaf.dtype)
            terms = finite
            if step == 7:
                terms = ELBOTerms(torch.tensor(value), torch.tensor(value), torch.tensor(1.0))
            elif step in bad_at:
                leaves[bad_at[step]].grad.view(-1)[0] = value
            if not with_bad and (step in bad_at or step == 7):
                continue
            rows.append(torch.stack(list(optimizer.step(terms))).flatten())
            if step % 2:
                findings += optimizer.findings(torch.stack(rows))
                rows = []
        findings += optimizer.findings(torch.stack(rows) if rows else None)
        results.append({"flat": weights.flat.detach(), "variance": variance.detach(), **optimizer.tensors()})
    assert [i for i, f in enumerate(findings) if f is not None] == [2, 5, 7]
    assert [findings[i].parameter for i in (2, 5, 7)] == [3, 4, None]
    assert str(findings[7].terms[1]) == str(value)
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


class Root(nn.Module):
    """Adds 0, with an infinite gradient where `bad` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))
        self.bad = False

    def forward(self, z: Tensor) -> Tensor:
        return z + ((self.p - self.p.detach()).sqrt() if self.bad else 0 * self.p)


def _rooted() -> tuple[VAE, Root]:
    torch.manual_seed(0)
    model, root = VAE.mlp((12,), (8,), 2), Root()
    model.decoder = nn.Sequential(root, model.decoder)
    return model, root


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_named_and_skipped(amp_dtype) -> None:
    model, root = _rooted()
    x = torch.rand(20, 12)
    step = TrainStep(model, ELBOLoss(), amp_dtype=amp_dtype, max_skipped=2)
    step(x)
    terms = step.averages()
    before = {name: t.clone() for name, t in step.tensors().items() if name.startswith("optimizer")}
    root.bad = True
    step(x)
    step(x)
    assert (step.skipped.total, step.skipped.in_a_row) == (2, 2)
    for name, tensor in before.items():
        assert torch.equal(step.tensors()[name], tensor), name
    assert all(map(math.isfinite, step.averages()))
    assert step.averages() != terms  # their losses were finite
    root.bad = False
    step(x)
    assert (step.skipped.total, step.skipped.in_a_row) == (2, 0)
    root.bad = True
    step(x)
    step(x)
    message = r"step 7: the gradient of decoder\.0\.p is not finite; skipped in a row before it: 2"
    with pytest.raises(NonFiniteError, match=message):
        step(x)


def test_averages_are_of_the_steps_with_a_finite_loss() -> None:
    step = TrainStep(VAE.mlp((12,), (8,), 2), ELBOLoss(), max_skipped=1)
    x, other = torch.rand(2, 20, 12)
    step(x)
    only = step.averages()
    step(torch.full((50, 12), math.nan))
    assert step.averages() == pytest.approx(only)
    step(other)
    assert step.averages()[0] != pytest.approx(only[0])
    assert step.count == 90


def test_an_epoch_without_a_finite_loss_has_none(tmp_path, capsys) -> None:
    class Second(list):
        """Nothing but NaN in the second epoch."""

        def set_epoch(self, epoch: int) -> None:
            self[:] = [torch.full((20, 12), math.nan if epoch == 1 else 0.5)]

    config = TrainConfig(epochs=3, non_finite="skip", out=str(tmp_path), device="cpu")
    train, extra = Second([torch.rand(20, 12)]), lambda x_hat, x: (x_hat - x).mean()
    Trainer(VAE.mlp((12,), (8,), 2), train, config=config, extra_loss=extra).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("train_loss", "train_recon", "train_kl", "train_extra"):
        assert [row[name] is None for row in rows] == [False, True, False]
    assert "epoch 2/3  loss nan  recon nan  KL nan" in capsys.readouterr().out


def test_elsewhere_than_on_a_cpu_it_is_found_when_the_averages_are_read() -> None:
    """As on a GPU, where looking at each step would wait for it."""
    model = VAE.mlp((12,), (8,), 2)
    step = TrainStep(model, ELBOLoss())
    step.optimizer = FusedAdam(step.weights, [], 1e-3, 0.0)
    step._checks_each_step, step.backward.tapes = False, None
    x = torch.rand(20, 12)
    step(x)
    weights = step.weights.flat.detach().clone()
    step(torch.full((20, 12), math.inf))
    assert torch.equal(step.weights.flat, weights)
    step(x)
    with pytest.raises(NonFiniteError, match=r"step 2: the reconstruction term is (inf|nan)"):
        step.averages()


@pytest.mark.parametrize("kind", ["native", "fused", "scaled"])
@pytest.mark.parametrize("tape", [True, False])
def test_running_statistics_are_those_of_steps_that_were_applied(kind, tape, seed) -> None:
    torch.manual_seed(seed)
    model = VAE.mlp((12,), (8,), 2)
    model.decoder = nn.Sequential(model.decoder, nn.BatchNorm1d(12))
    amp_dtype = torch.float16 if kind == "scaled" else torch.bfloat16
    step = TrainStep(model, ELBOLoss(), amp_dtype=amp_dtype, max_skipped=1000)
    if kind == "fused":
        step.optimizer = FusedAdam(step.weights, [], 1e-3, 0.0)
    if kind != "native" or not tape:
        step.backward.tapes = None
    x = torch.rand(20, 12)
    for _ in range(20):  # of which some overflow in float16
        step(x)
    norm = model.decoder[1]
    before = [buffer.clone() for buffer in norm.buffers()]
    assert 0 < norm.num_batches_tracked <= 20
    bad = x.clone()
    bad[3, 4] = random.choice(NOT_FINITE)
    step(bad)
    for buffer, expected in zip(norm.buffers(), before, strict=True):
        assert torch.equal(buffer, expected)
    for _ in range(2):  # float16 may overflow once more, as gradients grow
        step(x)
    assert before[2] + (1 if kind == "scaled" else 2) <= norm.num_batches_tracked <= before[2] + 2
    assert norm.running_mean.isfinite().all()
    assert not torch.equal(norm.running_mean, before[0])


def test_float16_retries_with_a_smaller_scale_until_there_is_none() -> None:
    model, root = _rooted()
    x = torch.rand(20, 12)
    step = TrainStep(model, ELBOLoss(), amp_dtype=torch.float16)
    root.bad = True
    for _ in range(20):
        step(x)
    step.averages()
    assert (step.skipped.total, step.skipped.in_a_row) == (20, 0)
    for _ in range(30):
        step(x)
    with pytest.raises(NonFiniteError, match=r"the gradient of decoder\.0\.p is not finite"):
        step.averages()


def test_float16_with_a_loss_that_is_not_finite() -> None:
    model, _ = _rooted()
    step = TrainStep(model, ELBOLoss(), amp_dtype=torch.float16, max_skipped=1)
    x = torch.rand(20, 12)
    for _ in range(5):  # in the first, gradients overflow
        step(x)
    step.averages()
    weights = step.weights.flat.detach().clone()
    x[0, 0] = 1e30
    step(x)
    assert torch.equal(step.weights.flat, weights)
    step.averages()
    assert step.skipped.in_a_row == 1
    step(x)
    with pytest.raises(NonFiniteError, match=r"the reconstruction term is (inf|nan)"):
        step.averages()


def test_float16_with_a_loss_that_is_not_finite_and_gradients_that_are() -> None:
    weights, variance, optimizer = _made("fused", torch.float16, None)
    optimizer.backward(torch.zeros((), requires_grad=True))  # from where the scaler has its scale
    before = weights.flat.detach().clone()
    rows = []
    for value, same in ((math.inf, True), (1.0, False)):
        for leaf in (*weights.leaves, variance):
            leaf.grad = torch.randn(leaf.shape).to(leaf.dtype)
        rows += optimizer.step(ELBOTerms(*torch.tensor([value, value, 1.0])))
        assert torch.equal(weights.flat, before) == same
    found, none = optimizer.findings(torch.stack(rows))
    assert found == ((math.inf, math.inf, 1.0), None, False)
    assert none is None


def _data(*bad: int) -> np.ndarray:
    """[150, 12] for 10 steps an epoch; the squares of the steps `bad`, from 1, are not finite."""
    data = np.random.default_rng(3).random((150, 12), dtype=np.float32)
    for step in bad:
        data[15 * (step - 1) + random.randrange(15), random.randrange(12)] = 1e30
    return data


def _batches(data: np.ndarray, batch_size: int) -> list[torch.Tensor]:
    """[batch_size, 12] each, in order; unlike a DataLoader's, they may be others after a resumption."""
    return list(torch.from_numpy(data).split(batch_size))


def _fit(data: np.ndarray, loader=DataLoader, resume: bool = False, **options) -> tuple[Trainer, list[dict]]:
    torch.manual_seed(1)
    config = TrainConfig(**{"epochs": 3, "device": "cpu"} | options)
    trainer = Trainer(VAE.mlp((12,), (8,), 2), loader(data, 15), config=config, resume=resume)
    return trainer, trainer.fit().history


def test_a_run_stops_with_step_term_and_checkpoint(tmp_path) -> None:
    message = (
        r"step 7, in epoch 1, was not applied: the reconstruction term is (inf|nan).*; the last good "
        r"checkpoint is .*step-0000000006\.safetensors; scale x, whose largest absolute value is 1e\+30, "
        r"or --non-finite skip"
    )
    with pytest.raises(TrainingError, match=message):
        _fit(_data(7), _batches, out=str(tmp_path), checkpoint_steps=3)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-0000000006.safetensors",
        "step-0000000003.safetensors",
    ]
    whole, _ = _fit(_data(), _batches)
    resumed, _ = _fit(_data(), _batches, out=str(tmp_path), checkpoint_steps=3, resume=True)
    assert torch.equal(whole.model.decoder.layers[0].weight, resumed.model.decoder.layers[0].weight)


@pytest.mark.parametrize("amp", [False, True])
def test_weights_that_explode_are_never_kept(amp, tmp_path) -> None:
    message = r"step \d, in epoch 1, .*no checkpoint yet; try a lower --lr than 1e\+30, or --non-finite skip$"
    with pytest.raises(TrainingError, match=message):
        _fit(_data(), lr=1e30, amp=amp, out=str(tmp_path), checkpoint_steps=10)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "log_variance", [torch.zeros(12).bfloat16(), torch.zeros(24)[::2]], ids=["bf16", "gaps"]
)
def test_a_loss_learns_contiguous_float32_only(log_variance: torch.Tensor) -> None:
    """Which the optimizer writes to where it lies."""
    loss = ELBOLoss("gaussian", log_variance=nn.Parameter(log_variance))
    with pytest.raises(ModelError, match=r"loss: got log_variance of .*, expected contiguous torch\.float32"):
        TrainStep(VAE.mlp((12,), (8,), 2), loss)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (np.nan, "look at x, which itself is not finite"),
        (1e30, r"scale x, whose largest absolute value is 1e\+30"),
    ],
)
def test_what_no_lower_learning_rate_would_help_is_not_to_be_met_by_one(value, remedy) -> None:
    """As of a loader that is not ours, which refuses a NaN."""
    data = _data()
    data[100, 3] = value
    bad, good = _batches(data, 15), _batches(_data(), 15)
    config = TrainConfig(epochs=1, device="cpu")
    with pytest.raises(TrainingError, match=rf"step 7, .*; {remedy}, or --non-finite skip$"):
        Trainer(VAE.mlp((12,), (8,), 2), bad, config=config).fit()
    with pytest.raises(TrainingError, match=rf"after epoch 1: .*; {remedy}, in batch 6$"):
        Trainer(VAE.mlp((12,), (8,), 2), good, bad, config=config).fit()


def test_a_loss_of_the_first_weights_is_not_for_the_learning_rate() -> None:
    with pytest.raises(TrainingError, match=r"step 1, .*; scale x, .*, or begin with other weights, or"):
        _fit(_data() * 1e5)


def test_a_validation_loss_that_is_not_finite() -> None:
    trainer = Trainer(
        VAE.mlp((12,), (8,), 2), DataLoader(_data(), 15), DataLoader(_data(2), 15),
        config=TrainConfig(epochs=2, device="cpu"),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"validation loss is not finite after epoch 1: loss (inf|nan)"):
        trainer.fit()


def test_a_run_skips_and_counts(tmp_path, capsys) -> None:
    trainer, rows = _fit(_data(2, 3, 10), non_finite="skip", max_skipped_steps=2, out=str(tmp_path))
    assert [row["skipped_steps"] for row in rows] == [3, 6, 9]
    assert rows == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert capsys.readouterr().out.count("step 2 is skipped: the reconstruction term is ") == 1


class Stopping(list):
    """Batches; sends SIGTERM when the twelfth of all is asked for."""

    asked = 0

    def __init__(self, data: np.ndarray, batch_size: int) -> None:
        super().__init__(_batches(data, batch_size))

    def __iter__(self):
        for x in super().__iter__():
            self.asked += 1
            if self.asked == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            yield x


def test_the_steps_that_are_skipped_survive_a_resumption(tmp_path) -> None:
    """The twelfth step is the first of two of which one more would be too many."""
    options = {"non_finite": "skip", "max_skipped_steps": 2}
    data = _data(2, 3)
    whole, rows = _fit(data, _batches, **options)
    with pytest.raises(TrainingStopped):
        _fit(data, Stopping, out=str(tmp_path), **options)
    resumed, again = _fit(data, _batches, out=str(tmp_path), resume=True, **options)
    assert [row["skipped_steps"] for row in again] == [row["skipped_steps"] for row in rows] == [2, 4, 6]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TrainingStopped):
        _fit(data, Stopping, out=str(tmp_path), overwrite=True, **options)
    with pytest.raises(TrainingError, match=r"step 14, .* skipped in a row before it: 2; the last"):
        _fit(_data(2, 3, 4), _batches, out=str(tmp_path), resume=True, **options)


def test_the_command_counts_too(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", _data(4))
    np.save("val.npy", _data())
    small = ["--data", "data.npy", "--val", "val.npy", "--epochs", "2", "--hidden", "8", "--device", "cpu"]
    small += ["--no-report"]
    assert main(["train", *small, "--out", "a", "--batch-size", "30"]) == 1
    assert "--non-finite skip" in capsys.readouterr().err
    assert main(["train", *small, "--out", "b", "--batch-size", "30", "--non-finite", "skip"]) == 0
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["skipped_steps"] == 2
