"""Whole training, 784-400-20-400-784 on Fashion-MNIST at batch 128, against loops that people write.

One call is a few epochs of 54,000 data, with everything that they take: batches, steps, and for fastvae its
metrics too. The compiled opponent has compiled before it is timed. Those that are near each other in speed
are compared by themselves: their turns are short, and many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

import fastvae
from fastvae.data import DataError, resolve
from fastvae.inference.evaluate import negative_elbo
from fastvae.training.config import TrainConfig
from fastvae.training.device import choose_amp_dtype
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer

N, BATCH = 54_000, 128
EPOCHS = 3
ROUNDS = 3
N_CONV = 32 * BATCH
GPUS = ["cuda"] if torch.cuda.is_available() else []
DEVICES = ["cpu", *GPUS]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [N, 784]; of random bytes where Fashion-MNIST is absent, which takes as long."""
    try:
        return resolve("fashion-mnist").train.x.reshape(-1, 784)[:N]
    except DataError:
        return np.random.default_rng(0).integers(0, 256, (N, 784), dtype=np.uint8)


def engine(images: np.ndarray, device: str, epochs: int = EPOCHS, **options: Any) -> Callable[[], None]:
    """What `fastvae train --amp` runs: on a CPU it gathers between steps."""
    config = TrainConfig(epochs=epochs, amp=True, device=device, **options)
    workers = 0 if device == "cpu" else None
    loader = fastvae.DataLoader(images, BATCH, shuffle=True, num_workers=workers, device=device)
    model = fastvae.VAE.mlp((784,))
    return lambda: void(Trainer(model, loader, config=config).fit())


def void(_: object) -> None:
    """A training's result is not of interest here."""


def steps(
    model: fastvae.VAE, batches: Callable[[], Iterator[Tensor]], device: str, **options: Any
) -> Callable[[], None]:
    """An epoch of the engine's steps without its loader."""
    config, model = TrainConfig(amp=True, **options), model.to(device)
    dtype, _ = choose_amp_dtype(torch.device(device), True)
    step = TrainStep.from_config(model, negative_elbo(model), config, 1, dtype)

    def epoch() -> None:
        for x in batches():
            step(x)
        step.averages()
        step.reset()

    return epoch


def torch_loader(images: Tensor) -> Iterator[Tensor]:
    for (x,) in TorchDataLoader(TensorDataset(images), BATCH, shuffle=True):
        yield x


def indexing(images: Tensor) -> Iterator[Tensor]:
    order = torch.randperm(len(images), device=images.device)
    for start in range(0, len(images) - BATCH + 1, BATCH):
        yield images[order[start : start + BATCH]]


def by_hand(
    batches: Callable[[], Iterator[Tensor]],
    device: str,
    *,
    amp: bool,
    fused: bool,
    compiled: str = "",
    model: fastvae.VAE | None = None,
    epochs: int = 1,
) -> Callable[[], None]:
    """The training loop as written in plain PyTorch; `compiled` is a mode of torch.compile."""
    model = (fastvae.VAE.mlp((784,)) if model is None else model).to(device)
    encoder, decoder = model.encoder, model.decoder
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    dtype, _ = choose_amp_dtype(torch.device(device), amp)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            mu, logvar = encoder(x)
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            x_hat = decoder(z)
        mu, logvar = mu.float(), logvar.float()
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (F.mse_loss(x_hat.float(), x, reduction="sum") + kl) / len(x)

    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, mode=compiled)

    def train() -> None:
        for _ in range(epochs):
            for x in batches():
                optimizer.zero_grad(set_to_none=True)
                loss(x.to(device, non_blocking=True)).backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def bare_products(device: str) -> Callable[[], None]:
    """The matrix products of the steps and nothing else, in the dtype of --amp: no step is faster."""
    dtype, _ = choose_amp_dtype(torch.device(device), True)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    layers = [
        (tensor(BATCH, n_in), tensor(n_out, n_in), tensor(BATCH, n_out))
        for n_in, n_out in ((784, 400), (400, 40), (20, 400), (400, 784))
    ]

    def multiply() -> None:
        for _ in range(EPOCHS * (N // BATCH)):
            for i, (x, weight, gradient) in enumerate(layers):
                torch.mm(x, weight.t())
                torch.mm(gradient.t(), x)
                if i > 0:
                    torch.mm(gradient, weight)
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("device", DEVICES)
def test_bench_train(compare: Callable[..., None], images: np.ndarray, device: str) -> None:
    on_device = (torch.from_numpy(images).float() / 255).to(device)
    compare(
        f"training {EPOCHS} epochs of {N:,} on {device}",
        {
            "fastvae --amp": engine(images, device),
            "torch.compile, amp, fused Adam, indexing": by_hand(
                lambda: indexing(on_device), device, amp=True, fused=True, compiled="default", epochs=EPOCHS
            ),
            "the bare matrix products": bare_products(device),
        },
        rounds=2 * ROUNDS,
        samples=EPOCHS * N,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bench_train_loaders(compare: Callable[..., None], images: np.ndarray, device: str) -> None:
    x = torch.from_numpy(images).float() / 255

    def batches() -> Iterator[Tensor]:
        return torch_loader(x)

    compare(
        f"training an epoch of {N:,} on {device}, against torch's DataLoader",
        {
            "fastvae --amp": engine(images, device, epochs=1),
            "eager loop": by_hand(batches, device, amp=False, fused=False),
            "eager loop, amp, fused Adam": by_hand(batches, device, amp=True, fused=True),
        },
        rounds=ROUNDS,
        samples=N,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("device", GPUS)
def test_bench_step(compare: Callable[..., None], images: np.ndarray, device: str) -> None:
    """With the data on the GPU: what a graph saves, and what torch.compile makes of the same step."""
    x = torch.from_numpy(images).float() / 255
    on_device = x.to(device)

    def batches() -> Iterator[Tensor]:
        return indexing(on_device)

    loader = fastvae.DataLoader(images, BATCH, shuffle=True, drop_last=True, device=device)

    def load() -> None:
        for _ in loader:
            pass
        torch.cuda.synchronize()

    compare(
        f"steps of an epoch of {N:,} on {device}",
        {
            "fastvae, a CUDA graph": steps(fastvae.VAE.mlp((784,)), batches, device),
            "fastvae, no graph": steps(fastvae.VAE.mlp((784,)), batches, device, cuda_graph="never"),
            "eager loop, torch DataLoader": by_hand(lambda: torch_loader(x), device, amp=False, fused=False),
            "torch.compile, reduce-overhead": by_hand(
                batches, device, amp=True, fused=True, compiled="reduce-overhead"
            ),
            "the loader alone": load,
        },
        rounds=ROUNDS,
        samples=N // BATCH * BATCH,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("device", GPUS)
def test_bench_conv_step(compare: Callable[..., None], device: str) -> None:
    """A convolutional VAE at 64 x 64 in bf16, with the data on the GPU."""
    x = torch.rand(N_CONV, 3, 64, 64, device=device)

    def conv() -> fastvae.VAE:
        return fastvae.VAE.conv((3, 64, 64))

    def batches() -> Iterator[Tensor]:
        return indexing(x)

    def last() -> Iterator[Tensor]:
        return (batch.contiguous(memory_format=torch.channels_last) for batch in indexing(x))

    eager, compiled = conv(), conv()
    for model in (eager, compiled):
        model.to(memory_format=torch.channels_last)
    compare(
        f"steps of a convolutional VAE on {N_CONV:,} of 64 x 64 on {device}",
        {
            "fastvae, a CUDA graph": steps(conv(), batches, device, channels_last=True),
            "eager loop, amp, channels_last": by_hand(last, device, amp=True, fused=True, model=eager),
            "torch.compile, amp, channels_last": by_hand(
                last, device, amp=True, fused=True, model=compiled, compiled="default"
            ),
        },
        rounds=ROUNDS,
        samples=N_CONV,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bench_checkpoints(
    compare: Callable[..., None], images: np.ndarray, device: str, tmp_path: Path
) -> None:
    often, once = ({"out": str(tmp_path / name), "overwrite": True} for name in ("often", "once"))
    # the first checkpoint alone has to find its memory
    compare(
        f"training {EPOCHS} epochs of {N:,} on {device}, a checkpoint every 100 steps",
        {
            "fastvae --amp": engine(images, device, checkpoint_steps=100, **often),
            "one an epoch": engine(images, device, **once),
        },
        rounds=2 * ROUNDS,
        samples=EPOCHS * N,
    )
