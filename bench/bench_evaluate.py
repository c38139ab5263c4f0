"""ln p(x) by importance sampling, 784-400-20-400-784, 500 draws a datum, against loops that people write.

A datum costs what any other does, so a part of a test set stands for all of it; `-m slow` takes it whole. The
bare products are those of the decoder as it is, in pieces of the size at which they are fastest; fastvae
needs fewer, as fastvae/inference/reach.py says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import fastvae
from fastvae.data import resolve
from fastvae.inference import log_likelihood

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


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_bench_evaluate(compare: Callable[..., None], device: str) -> None:
    torch.manual_seed(0)
    model = fastvae.VAE.mlp((784,)).to(device).eval()
    x = torch.rand(N, 784, device=device)
    ours = {"fastvae": lambda: log_likelihood(model, [x], n_samples=DRAWS)}
    opponents: dict[str, Callable[[], object]] = {
        "a datum at a time": lambda: by_hand(model, x, DRAWS),
        "a datum at a time, 100 draws of it": lambda: by_hand(model, x, PYTHAE_BATCH),
        "a datum at a time, torch.distributions": lambda: by_distributions(model, x),
    }
    expected = ours["fastvae"]()
    for opponent in opponents.values():
        error = expected.monte_carlo_error * math.sqrt(2)
        assert abs(opponent().mean().item() - expected.estimate) < 6 * error
    compare(
        f"ln p(x) of {N} data, {DRAWS} draws each, on {device}",
        {**ours, **opponents, "the bare decoder products": bare_products(device)},
        rounds=ROUNDS,
        synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
        samples=N * DRAWS,
    )


@pytest.mark.slow
@torch.no_grad()
def test_bench_evaluate_of_a_test_set(compare: Callable[..., None]) -> None:
    test = resolve("fashion-mnist").test
    assert test is not None
    model, loader = fastvae.VAE.mlp((1, 28, 28)).eval(), fastvae.DataLoader(test, 256)
    compare(
        f"ln p(x) of Fashion-MNIST's {test.n_samples:,} test images, {DRAWS} draws each, on cpu",
        {
            "fastvae": lambda: log_likelihood(model, loader, n_samples=DRAWS),
            "the bare decoder products": bare_products("cpu", test.n_samples),
        },
        rounds=1,
        samples=test.n_samples * DRAWS,
    )
