"""The equations of docs/theory.md that no other test checks, and the names that it gives."""

from __future__ import annotations

import math
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accuracy import by_hand
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import fastvae
from fastvae.inference.generate import sample
from fastvae.models import VAE

IMPLS = ["reference", "native"]
BATCH, FEATURES, LATENTS = 4, 6, 3

pytestmark = pytest.mark.usefixtures("seed")


class LinearGaussian(NamedTuple):
    """p(z) = N(0, I), p(x|z) = N(W z + b, s I): log p(x) and p(z|x) are known in closed form."""

    weight: Tensor
    bias: Tensor
    variance: float

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), [B]."""
        noise = self.variance * torch.eye(FEATURES, dtype=x.dtype)
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + noise).log_prob(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z|x)."""
        precision = torch.eye(LATENTS, dtype=x.dtype) + self.weight.T @ self.weight / self.variance
        mean = torch.linalg.solve(precision, self.weight.T @ (x - self.bias).T / self.variance).T
        return MultivariateNormal(mean, precision_matrix=precision)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def negative_elbo(self, x: Tensor, mu: Tensor, logvar: Tensor, impl: str = "auto") -> Tensor:
        """[B]: fastvae's at z = mu, and what the spread of z adds to the expected squared error."""
        at_mean = fastvae.elbo(self.decode(mu), x, mu, logvar, impl=impl, **self.options).loss
        return at_mean + 0.5 / self.variance * logvar.exp() @ self.weight.square().sum(0)

    @property
    def options(self) -> dict:
        return {
            "likelihood": "gaussian",
            "log_variance": math.log(self.variance),
            "reduction": "none",
        }


@pytest.fixture
def model(seed: int) -> LinearGaussian:
    weight = torch.randn(FEATURES, LATENTS, dtype=torch.float64)
    return LinearGaussian(weight, torch.randn(FEATURES, dtype=torch.float64), 0.3)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_mean(draws: Tensor, truth: Tensor) -> None:
    """The mean of independent draws along dimension 0 is `truth`, within five standard errors."""
    distance = (draws.mean(0) - truth).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert (distance < 5).all(), f"{distance.max():.1f} standard errors off"


@pytest.mark.parametrize("impl", IMPLS)
def test_log_evidence_is_elbo_plus_kl_to_the_true_posterior(impl: str, model: LinearGaussian) -> None:
    x, mu, logvar = normal(BATCH, FEATURES), normal(BATCH, LATENTS), normal(BATCH, LATENTS)
    q = MultivariateNormal(mu, torch.diag_embed(logvar.exp()))
    elbo = -model.negative_elbo(x, mu, logvar, impl)
    gap = kl_divergence(q, model.posterior(x))
    torch.testing.assert_close(elbo + gap, model.log_evidence(x), rtol=1e-11, atol=1e-11)


def test_elbo_by_samples_is_the_elbo_in_closed_form(model: LinearGaussian, seed: int) -> None:
    x, mu, logvar = normal(BATCH, FEATURES), normal(BATCH, LATENTS), normal(BATCH, LATENTS)
    estimates = 400  # of each datum, by 50 samples each
    rows = [t.repeat(estimates, 1) for t in (x, mu, logvar)]
    z, kl = fastvae.sample_and_kl(*rows[1:], n_samples=50, seed=seed)
    draws = fastvae.elbo(model.decode(z), rows[0], kl=kl, **model.options).loss
    assert_mean(draws.view(estimates, BATCH), model.negative_elbo(x, mu, logvar))


def test_elbo_is_a_lower_bound_that_the_true_posterior_reaches(model: LinearGaussian) -> None:
    # orthogonal columns of W make the true posterior diagonal, so that q can reach it
    orthogonal = torch.linalg.qr(model.weight).Q * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    model = model._replace(weight=orthogonal)
    x = normal(1000, FEATURES)
    posterior = model.posterior(x)
    mu = posterior.mean.clone().requires_grad_()
    logvar = posterior.variance.log().clone().requires_grad_()
    loss = model.negative_elbo(x, mu, logvar)
    torch.testing.assert_close(-loss, model.log_evidence(x), rtol=1e-11, atol=1e-11)
    for g in torch.autograd.grad(loss.sum(), (mu, logvar)):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-11)
    other = model.negative_elbo(x, mu + normal(1000, LATENTS), logvar + normal(1000, LATENTS))
    assert (-other < model.log_evidence(x)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("options", "integral"),
    [
        ({"likelihood": "gaussian", "log_variance": -0.7}, 1.0),
        ({"likelihood": "mse"}, math.sqrt(math.pi)),
        ({"likelihood": "mse", "half": True}, math.sqrt(2 * math.pi)),
    ],
    ids=["gaussian", "mse", "half mse"],
)
def test_integral_of_the_likelihood(impl: str, options: dict, integral: float) -> None:
    """exp(-recon) over all x: 1 for a density; the missing constant of "mse"."""
    grid = torch.linspace(-15, 15, 2001, dtype=torch.float64)[:, None]
    x_hat, kl = torch.full_like(grid, 0.37), grid.new_zeros(len(grid))
    density = torch.exp(-fastvae.elbo(x_hat, grid, kl=kl, reduction="none", impl=impl, **options).recon)
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(integral, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_bernoulli_sums_to_one_and_has_the_mean_sigmoid(impl: str) -> None:
    logits = 3 * normal(FEATURES)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * FEATURES)
    kl = x.new_zeros(len(x))
    options = {"likelihood": "bernoulli", "reduction": "none", "impl": impl}
    p = torch.exp(-fastvae.elbo(logits.expand_as(x), x, kl=kl, **options).recon)
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(p @ x, logits.sigmoid(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("half", "variance"), [(False, 0.5), (True, 1.0)])
def test_squared_error_is_a_gaussian_less_its_constant(impl: str, half: bool, variance: float) -> None:
    tensors = normal(4, FEATURES), normal(4, FEATURES), normal(4, LATENTS), normal(4, LATENTS)
    mse = fastvae.elbo(*tensors, half=half, impl=impl).loss
    gaussian = fastvae.elbo(*tensors, likelihood="gaussian", log_variance=math.log(variance), impl=impl).loss
    constant = FEATURES / 2 * math.log(2 * math.pi * variance)
    assert mse.item() == pytest.approx(gaussian.item() - constant, rel=1e-12)
    if not half:
        assert constant == pytest.approx(FEATURES / 2 * math.log(math.pi))
        assert mse.item() == pytest.approx(sum(by_hand(*tensors)).mean().item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 4.0])
def test_beta_is_twice_the_variance(beta: float) -> None:
    x = normal(4, FEATURES)
    leaves = [normal(4, n).requires_grad_() for n in (FEATURES, LATENTS, LATENTS)]
    x_hat, mu, logvar = leaves
    weighted = fastvae.elbo(x_hat, x, mu, logvar, beta=beta).loss
    log_variance = math.log(beta / 2)
    gaussian = fastvae.elbo(x_hat, x, mu, logvar, likelihood="gaussian", log_variance=log_variance).loss
    constant = FEATURES / 2 * math.log(math.pi * beta)
    assert weighted.item() == pytest.approx(beta * (gaussian.item() - constant), rel=1e-12)
    pairs = zip(
        torch.autograd.grad(weighted, leaves), torch.autograd.grad(beta * gaussian, leaves), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_optimal_variance_is_the_mean_squared_error(impl: str) -> None:
    x_hat, x, kl = normal(4, FEATURES), normal(4, FEATURES), normal(4).abs()
    mse = (x_hat - x).square().mean()
    s = mse.log().requires_grad_()
    recon = fastvae.elbo(x_hat, x, kl=kl, likelihood="gaussian", log_variance=s, impl=impl).recon
    (slope,) = torch.autograd.grad(recon, s)
    assert abs(slope.item()) < 1e-12
    assert recon.item() == pytest.approx(FEATURES / 2 * math.log(2 * math.pi * math.e * mse), rel=1e-12)
    for wrong in (s.item() - 0.1, s.item() + 0.1):
        worse = fastvae.elbo(x_hat, x, kl=kl, likelihood="gaussian", log_variance=wrong, impl=impl).recon
        assert worse > recon


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_is_the_expected_log_ratio(impl: str, seed: int) -> None:
    mu, logvar = normal(BATCH, LATENTS), normal(BATCH, LATENTS)
    z, kl = fastvae.sample_and_kl(mu, logvar, n_samples=50_000, seed=seed, impl=impl)
    log_ratio = Normal(mu, (logvar / 2).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    assert_mean(log_ratio.sum(-1), kl)


@pytest.mark.parametrize("impl", IMPLS)
def test_reparameterization_gradient_of_an_expectation(impl: str, seed: int) -> None:
    """E cos(z) = cos(mu) exp(-sigma^2 / 2), differentiated along z and, as a check, by the score of q."""
    mu = torch.full((100_000, 1), 0.7, dtype=torch.float64, requires_grad=True)
    logvar = torch.full_like(mu, -1.5).requires_grad_()
    z = fastvae.reparameterize(mu, logvar, seed=seed, impl=impl)
    pathwise = torch.cat(torch.autograd.grad(z.cos().sum(), (mu, logvar)), 1)

    at = torch.tensor([0.7, -1.5], dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(at[0].cos() * torch.exp(-at[1].exp() / 2), at)
    assert_mean(pathwise, truth)

    z = z.detach()
    log_q = Normal(mu, (logvar / 2).exp()).log_prob(z)
    score = z.cos() * torch.cat(torch.autograd.grad(log_q.sum(), (mu, logvar)), 1)
    assert_mean(score, truth)
    assert (pathwise.var(0) < score.var(0)).all()


def test_generation_decodes_the_prior(seed: int) -> None:
    """A linear decoder W z + b of z from the prior has mean b and covariance W W^T: no noise is added."""
    model = VAE.mlp((FEATURES,), (), LATENTS)
    weight, bias = (p.detach().double() for p in model.decoder.parameters())
    x = sample(model, 50_000, seed=seed).double()
    assert_mean(x, bias)
    assert_mean((x - bias)[:, :, None] * (x - bias)[:, None, :], weight @ weight.T)


def test_every_name_in_the_document_exists() -> None:
    root = Path(__file__).parents[1]
    text = (root / "docs" / "theory.md").read_text()
    tests = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", text))
    functions = set(re.findall(r"`(fastvae(?:\.\w+)+)", text))
    assert len(tests) > 10
    assert len(functions) > 5
    for path, name in tests:
        assert f"\ndef {name}(" in (root / path).read_text(), f"{path}::{name}"
    for name in functions:
        pkgutil.resolve_name(name)
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", text)]
    assert numbers == list(range(1, len(numbers) + 1))
    rows = [int(n) for n in re.findall(r"^\| \((\d+)\)", text, re.MULTILINE)]
    assert rows == numbers
