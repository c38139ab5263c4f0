"""ln p(x) by importance sampling, 784-400-20-400-784, 500 draws a datum, against loops that people write.

Of test images after an epoch of training, a part of them standing for all (`-m slow` takes all), and of noise
before any training: what fastvae saves depends on how few hidden units the draws of a datum flip, as
fastvae/inference/flips.py says. The bare products are those of the decoder as it is, in pieces of the size at
which they are fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import fastvae
from fastvae.data import DataError, resolve
from fastvae.inference import log_likelihood
from fastvae.training.config import TrainConfig
from fastvae.training.trainer import Trainer

N, DRAWS = 300, 500
PYTHAE_BATCH = 100  # draws at a time, by default
ROUNDS = 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def by_hand(model: fastvae.VAE, x: Tensor, step: int) -> Tensor:
    """A datum at a time, `step` of its draws at a time."""
    bounds = []
    for datum in x:
        mu, logvar = model.encode(datum[None])
        parts = []
        for _ in range(DRAWS // step):
            eps = torch.randn(step, mu.shape[1], device=x.device)
            z = mu + torch.exp(0.5 * logvar) * eps
            log_px_z = -((model.decode(z) - datum) ** 2).sum(1) - datum.numel() / 2 * math.log(math.pi)
            parts.append(log_px_z - 0.5 * (z**2 - eps**2 - logvar).sum(1))
        bounds.append(torch.logsumexp(torch.cat(parts), 0) - math.log(DRAWS))
    return torch.stack(bounds)


def by_distributions(model: fastvae.VAE, x: Tensor) -> Tensor:
    """A datum at a time, by torch.distributions."""
    bounds, prior = [], Normal(torch.zeros((), device=x.device), 1.0)
    for datum in x:
        mu, logvar = model.encode(datum[None])
        posterior = Normal(mu[0], torch.exp(0.5 * logvar[0]))
        z = posterior.sample((DRAWS,))
        log_px_z = Normal(model.decode(z), math.sqrt(0.5)).log_prob(datum).sum(1)
        log_w = log_px_z + prior.log_prob(z).sum(1) - posterior.log_prob(z).sum(1)
        bounds.append(torch.logsumexp(log_w, 0) - math.log(DRAWS))
    return torch.stack(bounds)


def bare_products(device: str, n: int = N) -> Callable[[], None]:
    rows = 1000 if device == "cpu" else 50_000
    z, h = torch.randn(rows, 20, device=device), torch.randn(rows, 400, device=device)
    first, last = torch.randn(20, 400, device=device), torch.randn(400, 784, device=device)

    def products() -> None:
        for _ in range(n * DRAWS // rows):
            torch.mm(z, first)
            torch.mm(h, last)

    return products


@pytest.fixture(scope="module")
def trained() -> tuple[fastvae.VAE, Tensor]:
    """A model after an epoch on Fashion-MNIST, and the 10,000 test images."""
    try:
        images = resolve("fashion-mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is absent")
    assert images.test is not None
    torch.manual_seed(0)
    model = fastvae.VAE.mlp((784,))
    loader = fastvae.DataLoader(images.train.x.reshape(-1, 784), 128, shuffle=True)
    Trainer(model, loader, config=TrainConfig(epochs=1, amp=True, device="cpu")).fit()
    return model.eval(), torch.from_numpy(images.test.x).flatten(1) / 255


Compare = Callable[..., None]
Bounds = Callable[[fastvae.VAE, Tensor], Tensor]
OPPONENTS: dict[str, Bounds] = {
    "a datum at a time": lambda model, x: by_hand(model, x, DRAWS),
    "a datum at a time, 100 draws of it": lambda model, x: by_hand(model, x, PYTHAE_BATCH),
    "a datum at a time, torch.distributions": by_distributions,
}


@torch.no_grad()
def compare_all(
    compare: Compare, title: str, model: fastvae.VAE, x: Tensor, opponents: dict[str, Bounds], rounds: int
) -> None:
    """Against opponents, whose bounds are first seen to agree."""
    device, some = x.device.type, x[:N]
    expected = log_likelihood(model, [some], n_samples=DRAWS)
    for opponent in opponents.values():
        error = expected.monte_carlo_error * math.sqrt(2)
        assert abs(opponent(model, some).mean().item() - expected.estimate) < 6 * error
    ours = {"fastvae": lambda: log_likelihood(model, x.split(256), n_samples=DRAWS)}
    others = {name: partial(opponent, model, x) for name, opponent in opponents.items()}
    compare(
        f"ln p(x) of {title}, {DRAWS} draws each, on {device}",
        {**ours, **others, "the bare decoder products": bare_products(device, len(x))},
        rounds=rounds,
        synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
        samples=len(x) * DRAWS,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bench_evaluate(compare: Compare, trained: tuple[fastvae.VAE, Tensor], device: str) -> None:
    model, x = trained
    compare_all(compare, f"{N} test images", model.to(device), x[:N].to(device), OPPONENTS, ROUNDS)


@pytest.mark.parametrize("device", DEVICES)
def test_bench_evaluate_untrained(compare: Compare, device: str) -> None:
    torch.manual_seed(0)
    model, x = fastvae.VAE.mlp((784,)).to(device).eval(), torch.rand(N, 784, device=device)
    compare_all(compare, f"{N} data, untrained", model, x, OPPONENTS, ROUNDS)


@pytest.mark.slow
def test_bench_evaluate_of_a_test_set(compare: Compare, trained: tuple[fastvae.VAE, Tensor]) -> None:
    model, x = trained
    best = dict(list(OPPONENTS.items())[:1])
    compare_all(compare, f"Fashion-MNIST's {len(x):,} test images", model.to("cpu"), x, best, 1)
