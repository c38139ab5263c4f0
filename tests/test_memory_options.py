"""Gradient accumulation, activation checkpointing and channels_last: the same result by other ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import VAE, DataLoader, ELBOLoss
from fastvae.cli import main
from fastvae.inference.evaluate import negative_elbo
from fastvae.ops.products import Product
from fastvae.training.config import ConfigError, TrainConfig
from fastvae.training.distributed import Share
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer

STEPS = 5

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


def trained(make, x: Tensor, loss=negative_elbo, **options) -> tuple[VAE, tuple[float, float, float]]:
    """A model of `make` after a few steps on x, all from the same seeds, and the averages of its terms."""
    torch.manual_seed(0)
    model = make()
    step = TrainStep(model, loss(model), **{"lr": 1e-2, **options})
    for _ in range(STEPS):
        step(x)
    return model, step.averages()


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float = 2e-3) -> None:
    """By the norm of each parameter: where a gradient is almost 0, Adam makes much of its rounding."""
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
@pytest.mark.parametrize(
    ("likelihood", "options"),
    [
        ("mse", {"beta": 3.0}),
        ("gaussian", {"free_bits": 0.1, "free_bits_form": "element"}),
        ("bernoulli", {"reduction": "sum"}),
        ("mse", {"recon_reduction": "mean"}),
    ],
)
def test_parts_add_up_to_the_step(parts: int, likelihood: str, options: dict) -> None:
    """Noise included, for which a part must know its place in the batch."""
    x = torch.rand(50, 12)

    def make() -> VAE:
        return VAE.mlp((12,), (16,), 3, likelihood=likelihood)

    def loss(model: VAE) -> ELBOLoss:
        return ELBOLoss(likelihood, log_variance=model.log_variance, **options)

    (whole, terms), (accumulated, its_terms) = (
        trained(make, x, loss, optimizer="adamw", accumulate=n) for n in (1, parts)
    )
    assert its_terms == pytest.approx(terms, rel=1e-4)
    assert_same_weights(accumulated, whole)


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_parts_add_up_in_low_precision(amp_dtype: torch.dtype) -> None:
    x = torch.rand(50, 12)
    _, terms = trained(lambda: VAE.mlp((12,), (16,), 3), x, amp_dtype=amp_dtype)
    _, its_terms = trained(lambda: VAE.mlp((12,), (16,), 3), x, amp_dtype=amp_dtype, accumulate=4)
    assert its_terms == pytest.approx(terms, rel=2e-2)


def test_the_model_sees_parts_and_a_skipped_step_leaves_no_gradient() -> None:
    model = VAE.mlp((12,), (16,), 3)
    sizes = []
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    step = TrainStep(model, ELBOLoss(), accumulate=4, max_skipped=1)
    x = torch.rand(50, 12)
    step(x)
    assert sizes == [13, 13, 13, 11]
    x[40] = 1e30
    step(x)
    assert step.skipped.total == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ELBOLoss("gaussian", log_variance="batch"), 'log_variance="batch"'),
        (ELBOLoss(capacity=2.0), "a capacity"),
        (ELBOLoss(free_bits=0.1), "free bits by batch"),
        (ELBOLoss(recon_reduction="sum"), 'reduction "batchmean" and reduction "sum"'),
        (ELBOLoss(reduction="none"), 'reduction "none"'),
    ],
)
def test_a_loss_that_does_not_add_up(loss: ELBOLoss, message: str) -> None:
    with pytest.raises(ValueError, match=f"accumulate: given for a loss with {message}, expected one that"):
        TrainStep(VAE.mlp((12,)), loss, accumulate=2)


class Dropping(nn.Module):
    """Drops features at random, and counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(12, 6), 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mu, logvar = nn.functional.dropout(self.layer(x), 0.3).chunk(2, 1)
        return mu, logvar


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: VAE.mlp((1, 9, 9), (16,), 3, likelihood="gaussian"),
        lambda: VAE.conv((1, 9, 9), 3),
        lambda: VAE(nn.Sequential(nn.Flatten(), nn.Linear(81, 12), Dropping()), nn.Linear(3, 81)),
    ],
    ids=["mlp", "conv", "dropout"],
)
def test_activations_computed_again_are_the_same(make, amp_dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(Product, "serves", lambda *_: False)  # as recorded steps have them alone
    x = torch.rand(20, 1, 9, 9)
    (plain, terms), (again, its_terms) = (
        trained(make, x, amp_dtype=amp_dtype, checkpoint_activations=on) for on in (False, True)
    )
    assert its_terms == terms
    assert_same_weights(again, plain, tolerance=0)
    for model, calls in ((plain, STEPS), (again, 2 * STEPS)):
        if isinstance(last := list(model.encoder.modules())[-2], Dropping):
            assert last.calls == calls


class Counting(nn.Module):
    """With running statistics, of torch's and of its own, which one pass reads and replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.passes = self.passes + 1
        mu, logvar = (self.layers(x) * self.passes).chunk(2, 1)
        return mu, logvar


@pytest.mark.parametrize("parts", [1, 3])
def test_buffers_are_written_once_where_activations_are_computed_again(parts: int) -> None:
    x = torch.rand(20, 12)
    (plain, terms), (again, its_terms) = (
        trained(
            lambda: VAE(Counting(), nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12))),
            x,
            checkpoint_activations=on,
            accumulate=parts,
        )
        for on in (False, True)
    )
    assert its_terms == pytest.approx(terms, rel=1e-5)
    assert again.encoder.passes == STEPS * parts
    for (name, a), b in zip(again.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_activations_are_not_kept() -> None:
    """What autograd keeps between forward and backward: the input, the latents and what the loss needs."""

    def kept(on: bool) -> int:
        step = TrainStep(VAE.conv((3, 16, 16), 3), ELBOLoss(), checkpoint_activations=on)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            terms = step.backward.terms(torch.rand(64, 3, 16, 16), Share(0, 64, 64))
        assert terms.loss.isfinite()
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adam", "fused"])
@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 12, 10)])
def test_channels_last(amp_dtype: torch.dtype, optimizer: str, shape, monkeypatch) -> None:
    if optimizer == "fused":  # as on a GPU
        monkeypatch.setattr("fastvae.training.optimizer.NativeAdam", fastvae.training.fused_adam.FusedAdam)
    x = torch.rand(20, *shape)
    (plain, terms), (last, its_terms) = (
        trained(lambda: VAE.conv(shape, 3), x, amp_dtype=amp_dtype, lr=1e-3, ema_decay=0.9, channels_last=on)
        for on in (False, True)
    )
    # sums round otherwise: at the kink of a ReLU, or where a gradient is almost 0, Adam makes much of it
    assert its_terms == pytest.approx(terms, rel=2e-2)
    if amp_dtype == torch.float32:
        assert_same_weights(last, plain, tolerance=2e-2)
    convolutions = [p for p in last.parameters() if p.ndim == 4]
    assert convolutions
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


def test_the_loss_reads_channels_last_as_they_lie() -> None:
    step = TrainStep(VAE.conv((3, 12, 10), 3), ELBOLoss(), channels_last=True)
    x = torch.rand(20, 3, 12, 10)
    arguments, _ = step.backward.loss_arguments(
        x.contiguous(memory_format=torch.channels_last), Share(0, 20, 20)
    )
    seen = arguments["x_hat"], arguments["x"]
    assert [t.shape for t in seen] == [(20, 12, 10, 3)] * 2
    assert all(t.is_contiguous() for t in seen)
    assert torch.equal(seen[1].permute(0, 3, 1, 2), x)


def test_channels_last_with_a_scale_by_feature_keeps_its_order() -> None:
    x = torch.rand(20, 3, 12, 10)
    scale = torch.randn(3, 12, 10)

    def loss(_: VAE) -> ELBOLoss:
        return ELBOLoss("gaussian", log_variance=scale)

    (_, terms), (_, its_terms) = (
        trained(lambda: VAE.conv((3, 12, 10), 3), x, loss, lr=1e-3, channels_last=on) for on in (False, True)
    )
    assert its_terms == pytest.approx(terms, rel=2e-2)


def test_channels_last_without_convolutions() -> None:
    config = TrainConfig(channels_last=True, device="cpu")
    with pytest.raises(ConfigError, match="channels_last: given for a model without convolutions"):
        Trainer(VAE.mlp((12,)), DataLoader(np.zeros((5, 12), np.float32), 5), config=config)


def test_all_three_on_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    np.save("data.npy", rng.integers(0, 256, (90, 3, 9, 8), dtype=np.uint8))
    common = ["train", "--data", "data.npy", "--model", "conv", "--epochs", "2", "--device", "cpu"]
    common += ["--no-report"]
    common += ["--batch-size", "30"]
    options = ["--accumulate", "4", "--checkpoint-activations", "--channels-last"]
    assert main([*common, "--out", "plain"]) == 0
    assert main([*common, *options, "--out", "other"]) == 0
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "other"))
    assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert other["steps"] == one["steps"]
    x = torch.rand(2, 3, 9, 8)
    a, b = (fastvae.load(tmp_path / name).encode(x)[0] for name in ("plain", "other"))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
