"""The aggregate posterior's moments, its KL to the prior, and mutual information."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastvae.inference import aggregate
from fastvae.inference.aggregate import Aggregate, AggregatePosterior, log_mixture

pytestmark = pytest.mark.usefixtures("seed")


def gathered(mu: torch.Tensor, logvar: torch.Tensor, sizes: list[int], **options: int) -> Aggregate:
    posterior = AggregatePosterior(**options)
    for m, v in zip(mu.split(sizes), logvar.split(sizes), strict=True):
        posterior.update(m, v)
    return posterior.result()


@pytest.mark.parametrize("sizes", [[500], [1, 0, 299, 200]])
def test_moments_are_those_of_the_mixture(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of means far from 0."""
    mu = 100 + torch.randn(500, 2, 3) @ torch.randn(3, 3)
    logvar = torch.randn(500, 2, 3)
    found = gathered(mu, logvar, sizes)
    m, v = (t.double().flatten(1).numpy() for t in (mu, logvar))
    covariance = np.cov(m, rowvar=False, bias=True) + np.diag(np.exp(v).mean(0))
    np.testing.assert_allclose(found.mean, m.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(found.std, np.sqrt(np.diag(covariance)), rtol=1e-8)
    assert found.kl == pytest.approx((0.5 * (m**2 + np.exp(v) - 1 - v)).sum(1).mean(), rel=1e-6)
    assert found.n_data == found.n_mixture == 500
    monkeypatch.setattr(aggregate, "LARGEST_COVARIANCE", 5)
    without = gathered(mu, logvar, sizes)
    assert without.covariance is None
    np.testing.assert_allclose(without.std, found.std)


def test_density_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "_ROWS", 7)
    monkeypatch.setattr(aggregate, "_COLUMNS", 13)
    z, (mu, logvar) = torch.randn(20, 4).double(), torch.randn(2, 50, 4).double()
    parts = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    expected = MixtureSameFamily(Categorical(torch.ones(50, dtype=torch.float64)), parts).log_prob(z)
    torch.testing.assert_close(log_mixture(z, mu, logvar), expected, rtol=1e-10, atol=1e-10)


def test_kl_to_the_prior_meets_quadrature() -> None:
    """Two groups of data on one latent; 6 standard errors."""
    mu = torch.randn(1000, 1) * 0.1 + torch.tensor([-1.0, 1.5]).repeat(500)[:, None]
    logvar = torch.full((1000, 1), 2 * math.log(0.4)) + 0.1 * torch.randn(1000, 1)
    found = gathered(mu, logvar, [300, 700])
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    log_q = log_mixture(z[:, None], mu, logvar)
    divergence = torch.trapezoid(log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(z)), z).item()
    assert found.error < 0.05
    assert abs(found.kl_to_prior - divergence) < 6 * found.error
    assert found.kl == pytest.approx(found.kl_to_prior + found.mutual_information)
    assert 0 < found.mutual_information < math.log(1000)


def test_mutual_information_is_from_nothing_to_all_that_the_mixture_can_tell() -> None:
    same = gathered(torch.ones(50, 3), torch.zeros(50, 3), [50])
    assert same.mutual_information == pytest.approx(0, abs=1e-9)
    assert same.kl_to_prior == pytest.approx(1.5)
    # as narrow as points, where exp(-logvar) has no room in float64
    apart = gathered(torch.randn(50, 3), torch.full((50, 3), -80.0), [50])
    assert apart.mutual_information == pytest.approx(math.log(50), abs=1e-4)
    one = gathered(torch.randn(1, 3), torch.zeros(1, 3), [1])
    assert one.mutual_information == pytest.approx(0, abs=1e-9)
    assert math.isnan(one.error)


def test_some_of_the_data_make_the_mixture_whatever_the_batches() -> None:
    """Drawn from all of them: half of each half, within 6 standard deviations of a hypergeometric draw."""
    mu, logvar = torch.randn(2, 4000, 2)
    found = [gathered(mu, logvar, sizes, n_mixture=1000, seed=4) for sizes in ([4000], [7] * 571 + [3])]
    assert found[0].mutual_information == pytest.approx(found[1].mutual_information, abs=1e-12)
    assert found[0].n_mixture == 1000
    whole = gathered(mu, logvar, [4000])
    other = gathered(mu, logvar, [4000], n_mixture=1000, seed=5)
    assert whole.kl == pytest.approx(found[0].kl)
    assert other.mutual_information != found[0].mutual_information
    posterior = AggregatePosterior(n_mixture=1000, seed=4)
    for m, v in zip(mu.split(100), logvar.split(100), strict=True):
        posterior.update(m, v)
    late = (posterior._kept[1] >= 2000).sum().item()
    assert abs(late - 500) < 6 * math.sqrt(1000 * 0.25 * 3000 / 3999)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="got no posteriors"):
        AggregatePosterior().result()
    with pytest.raises(ValueError, match="n_mixture: got 0, expected at least 1"):
        AggregatePosterior(0)
