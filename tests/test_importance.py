"""log p(x) by importance sampling, against closed forms, quadrature and the formula written out."""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from processes import run_python
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal
from torch.overrides import TorchFunctionMode

import fastvae
from fastvae import VAE
from fastvae.inference import flips, importance, reach, weigh
from fastvae.inference.aggregate import AggregatePosterior
from fastvae.inference.flips import FlipWeigher
from fastvae.inference.importance import (
    EvaluationError,
    ImportanceSampler,
    log_likelihood,
    posteriors,
    weigher_of,
)
from fastvae.inference.reach import TurnedWeigher
from fastvae.inference.weigh import Weigher

pytestmark = pytest.mark.usefixtures("seed")

D, Z, N = 6, 3, 400


class LinearGaussian(nn.Module):
    """p(z) = N(0, I), p(x|z) = N(W z + b, s I); q is the true posterior, its means moved and its variances
    scaled."""

    def __init__(self, likelihood: str, move: float = 0.0, widen: float = 1.0) -> None:
        super().__init__()
        # columns that are orthogonal, so that the true posterior is diagonal
        q, _ = torch.linalg.qr(torch.randn(D, Z, dtype=torch.float64))
        self.weight = nn.Parameter(q * torch.tensor([2.0, 1.0, 0.3]))
        self.bias = nn.Parameter(torch.randn(D, dtype=torch.float64))
        self.likelihood = likelihood
        self.variance = 0.5 if likelihood == "mse" else 0.2
        if likelihood == "gaussian":
            self.log_variance = nn.Parameter(torch.tensor(math.log(self.variance), dtype=torch.float64))
        self.move, self.widen = move, widen

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.weight.square().sum(0) / self.variance
        mu = (x - self.bias) @ self.weight / self.variance / precision
        std = precision.rsqrt()
        return mu + self.move * std, (2 * (std * self.widen).log()).expand_as(mu)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def data(self, n: int = N) -> Tensor:
        with torch.no_grad():
            x_hat = self.decode(torch.randn(n, Z, dtype=torch.float64))
            return x_hat + math.sqrt(self.variance) * torch.randn_like(x_hat)

    def log_px(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            covariance = self.weight @ self.weight.T + self.variance * torch.eye(D, dtype=torch.float64)
            return MultivariateNormal(self.bias, covariance).log_prob(x)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
def test_linear_gaussian_meets_its_closed_form(likelihood: str) -> None:
    """Within Monte Carlo errors and the bias: 6 of these, 2e-9 of normal runs are outside."""
    model = LinearGaussian(likelihood, move=0.3, widen=1.2)
    x = model.data()
    found = log_likelihood(model, x.split(150), n_samples=300, seed=3)
    truth = model.log_px(x)
    assert 0 < found.monte_carlo_error < 0.01
    assert found.bias < 0
    assert abs(found.estimate - truth.mean().item()) <= 6 * found.monte_carlo_error - 1.5 * found.bias
    # the errors are of the right size: a chi-squared of N, whose relative standard deviation is sqrt(2 / N),
    # and more as weights are skewed
    chi2 = ((found.log_px - truth) ** 2 / found.log_px_variance).mean().item()
    assert 0.5 < chi2 < 1.8
    assert found.data_error == pytest.approx(found.log_px.std().item() / math.sqrt(N))
    # q's distance from the true posterior, in closed form, is the gap
    kl = Z * (0.5 * (1.2**2 + 0.3**2 - 1) - math.log(1.2))
    assert abs(found.gap - kl) <= 6 * (found.monte_carlo_error + found.elbo_error) - 1.5 * found.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_the_true_posterior_all_weights_are_equal(dtype: torch.dtype) -> None:
    model = LinearGaussian("gaussian")
    x = model.data()
    truth = model.log_px(x)
    found = log_likelihood(model.to(dtype), [x.to(dtype)], n_samples=40)
    precision = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.log_px, truth, rtol=0, atol=precision * truth.abs().max().item())
    torch.testing.assert_close(found.elbo, found.log_px, rtol=0, atol=precision * truth.abs().max().item())
    assert found.effective_samples.min() > 40 * (1 - 40 * precision)
    assert found.monte_carlo_error < math.sqrt(precision)  # of differences of numbers near 1
    assert found.gap < 20 * precision


def test_bounds_rise_with_the_number_of_samples() -> None:
    model = LinearGaussian("mse", move=1.0, widen=1.1)
    x = model.data(4000)
    truth = model.log_px(x).mean().item()
    bounds = [log_likelihood(model, [x], n_samples=k, seed=k) for k in (1, 5, 50)]
    elbo = truth - Z * (0.5 * (1.1**2 + 1.0**2 - 1) - math.log(1.1))
    # L_1 is the ELBO by one draw, whose error over data that are compared with themselves is a draw's alone
    error = (bounds[0].log_px - model.log_px(x)).std().item() / math.sqrt(4000)
    assert abs(bounds[0].estimate - elbo) < 6 * error
    assert bounds[0].estimate + 0.2 < bounds[1].estimate
    assert bounds[1].estimate + 0.05 < bounds[2].estimate
    assert bounds[2].estimate < truth + 6 * bounds[2].monte_carlo_error
    assert math.isnan(bounds[0].monte_carlo_error)


class Curved(nn.Module):
    """Two latents, a decoder that bends."""

    likelihood = "gaussian"
    log_variance = math.log(0.3)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 3)
        self.double()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        return self.outer(torch.tanh(2 * self.inner(z)))


def test_meets_quadrature_on_two_latents() -> None:
    """The trapezoid rule, which converges fast here: the integrand is smooth, and 0 at the borders."""
    model = Curved()
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        x = model.decode(torch.randn(25, 2, dtype=torch.float64))
        x += math.sqrt(0.3) * torch.randn_like(x)
        log_joint = Normal(model.decode(grid)[:, None], math.sqrt(0.3)).log_prob(x).sum(2)
        log_joint += Normal(0.0, 1.0).log_prob(grid).sum(1)[:, None]
    truth = log_joint.logsumexp(0) + 2 * math.log(axis[1] - axis[0])
    # a wide q with the mean of the true posterior, so that the weights are bounded well
    posterior = log_joint.softmax(0).T
    mu = posterior @ grid
    variance = posterior @ grid.square() - mu.square()
    sampler = ImportanceSampler(model, n_samples=4000, seed=5)
    sampler.update(x, mu, (2 * variance).log(), 0)
    found = sampler.result()
    assert abs(found.estimate - truth.mean().item()) <= 6 * found.monte_carlo_error - 1.5 * found.bias
    assert found.monte_carlo_error < 0.02


class Own(nn.Module):
    """A model with latents in two dimensions and a variance for each feature."""

    def __init__(self, likelihood: str) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 2 * 4), nn.Linear(4, D)
        self.likelihood = likelihood
        if likelihood == "gaussian":
            self.log_variance = nn.Parameter(torch.randn(2, 3))
        self.double()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.inner(x.flatten(1)).view(-1, 2, 2, 2).unbind(1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.outer(z.flatten(1)).view(-1, 2, 3)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "bernoulli"])
def test_is_the_formula_written_out(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every likelihood, however data and draws are divided, whatever the batches."""
    model, n, k = Own(likelihood), 23, 37
    x = (torch.rand(n, 2, 3, dtype=torch.float64) < 0.4).double()
    with torch.no_grad():
        mu, logvar = model.encode(x)
        eps = torch.stack([fastvae.reparameterize(0 * mu, 0 * mu, seed=9, offset=i) for i in range(k)])
        std = (0.5 * logvar).exp()
        z = mu + std * eps
        x_hat = model.decode(z.flatten(0, 1)).view(k, n, 2, 3)
        if likelihood == "bernoulli":
            log_pxz = Bernoulli(logits=x_hat).log_prob(x)
        else:
            variance = torch.tensor(0.5).double() if likelihood == "mse" else model.log_variance.exp()
            log_pxz = Normal(x_hat, variance.sqrt()).log_prob(x)
        log_ratio = Normal(0.0, 1.0).log_prob(z) - Normal(mu, std).log_prob(z)
        log_w = log_pxz.flatten(2).sum(2) + log_ratio.flatten(2).sum(2)
    w = log_w.exp()
    expected = {
        "log_px": log_w.logsumexp(0) - math.log(k),
        "elbo": log_w.mean(0),
        "kl": (0.5 * (mu**2 + std**2 - 1) - std.log()).flatten(1).sum(1),
        "log_px_variance": w.var(0) / (k * w.mean(0) ** 2),
        "elbo_variance": log_w.var(0) / k,
        "effective_samples": w.sum(0) ** 2 / (w**2).sum(0),
    }
    for rows, sizes in ((1024, [n]), (40, [10, 0, 13]), (7, [9, 14]), (1, [n])):
        monkeypatch.setitem(weigh._ROWS, "cpu", rows)
        found = log_likelihood(model, x.split(sizes), n_samples=k, seed=9)
        assert (found.n_samples, found.features) == (k, D)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-9, msg=name)
    s, bits = 255, -expected["log_px"].mean().item() / D / math.log(2)
    assert found.bits_per_dimension() == pytest.approx(bits)
    assert found.bits_per_dimension(s) == pytest.approx(bits + math.log2(s))


@pytest.mark.parametrize(("likelihood", "variance"), [("mse", None), ("gaussian", 0.1)])
@pytest.mark.parametrize(("hidden", "weigher"), [((10,), FlipWeigher), ((40, 90), TurnedWeigher)])
def test_what_is_not_decoded_changes_no_bound(
    likelihood: str,
    variance: float | None,
    hidden: tuple[int, ...],
    weigher: type[Weigher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of VAE.mlp, with several blocks of the triangle, and many tiles of data and draws."""
    monkeypatch.setattr(reach, "_BLOCK", 12)
    monkeypatch.setattr(flips, "_ELEMENTS", 800)
    model = fastvae.VAE.mlp((4, 5, 6), hidden, 3, likelihood=likelihood, variance=variance)
    x = torch.rand(30, 4, 5, 6)
    assert type(weigher_of(model, 20)) is weigher
    found = [log_likelihood(model, x.split(n), n_samples=20) for n in (30, 13)]
    monkeypatch.setattr(importance, "weigher_of", lambda model, _: Weigher(model))
    expected = log_likelihood(model, [x], n_samples=20)
    for some in found:
        for name in ("log_px", "elbo", "log_px_variance", "effective_samples"):
            torch.testing.assert_close(
                getattr(some, name), getattr(expected, name), rtol=1e-3, atol=2e-4, msg=name
            )


def test_only_a_decoder_that_is_known_is_not_decoded() -> None:
    class Squashed(fastvae.VAE):
        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z).sigmoid()

    def hook(*_: object) -> None: ...

    plain, instance, hooked, bent = (fastvae.VAE.mlp((20,), (5,), 2) for _ in range(4))
    instance.decode = lambda z: plain.decode(z).sigmoid()
    hooked.decoder.layers[0].register_forward_hook(hook)
    bent.decoder.layers[1] = nn.Tanh()
    decoded = [
        Squashed(plain.encoder, plain.decoder),
        instance,
        hooked,
        fastvae.VAE.mlp((20,), (20,), 2),
        fastvae.VAE.mlp((20,), (5,), 2, likelihood="bernoulli"),
        fastvae.VAE.conv((1, 8, 8), 2),
        Own("gaussian"),
    ]
    turned = [
        bent,
        fastvae.VAE.mlp((20,), (5,), 2).double(),
        fastvae.VAE.mlp((20,), (5, 6), 2),
        fastvae.VAE.mlp((20,), (5,), 3),  # for whose latents these draws are too few
    ]
    assert [type(weigher_of(model, 8)) for model in decoded] == [Weigher] * len(decoded)
    assert [type(weigher_of(model, 8)) for model in turned] == [TurnedWeigher] * len(turned)
    assert [type(weigher_of(plain, n)) for n in (7, 8)] == [Weigher, FlipWeigher]


def test_weights_are_summed_in_log_space() -> None:
    """Over ranges that no float holds."""
    log_w = 3e4 * torch.randn(60, 50, dtype=torch.float64) - 1e6
    weights = importance._Weights()
    for part in log_w.split([1, 9, 20, 30]):
        weights.update(part)
    moments = weights.moments()
    torch.testing.assert_close(moments[0], log_w.logsumexp(0) - math.log(60), rtol=1e-12, atol=0)
    relative = (log_w - log_w.amax(0)).exp()
    torch.testing.assert_close(moments[4], relative.sum(0) ** 2 / relative.square().sum(0))


def test_memory_does_not_grow_with_the_samples() -> None:
    model = Own("mse")
    rows = []
    decode = model.decode
    model.decode = lambda z: rows.append(len(z)) or decode(z)
    x = torch.rand(50, 2, 3, dtype=torch.float64)
    log_likelihood(model, [x], n_samples=300)
    assert max(rows) <= 1024 + 50
    assert sum(rows) == 50 * 300
    assert min(rows[:-1]) > 900  # and few draws fill the machine as well as many


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_is_kept_from_piece_to_piece() -> None:
    """Without that each of the four pieces would fetch the pages of all activations, 30 MB and more."""
    faults = run_python(
        """
        import resource
        import torch
        from fastvae import VAE
        from fastvae.inference import log_likelihood

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        model, x = VAE.conv((1, 28, 28), 2), torch.rand(100, 1, 28, 28)
        log_likelihood(model, [x], n_samples=5)
        before = faults()
        log_likelihood(model, [x], n_samples=20)
        print(faults() - before)
        """
    )
    assert int(faults) < 10_000


def test_leaves_model_and_generators_as_they_were() -> None:
    model = nn.Sequential(nn.Dropout()).append(Own("mse"))
    model.encode, model.decode = model[1].encode, lambda z: model[0](model[1].decode(z))
    x = torch.rand(5, 2, 3, dtype=torch.float64)
    state = torch.random.get_rng_state()
    first, second = (log_likelihood(model.train(), [(x, None)], n_samples=4).log_px for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, log_likelihood(model, [x], n_samples=4, seed=1).log_px)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training


def test_clamp_of_logvar_is_that_of_training() -> None:
    model, x = Own("mse"), torch.rand(5, 2, 3, dtype=torch.float64)
    sampler = ImportanceSampler(model, n_samples=3)
    with torch.no_grad():
        mu, logvar = model.encode(x)
    sampler.update(x, mu, logvar.clamp(-0.1, 0.1), 0)
    expected = sampler.result()
    found = log_likelihood(model, [x], n_samples=3, logvar_clamp=(-0.1, 0.1))
    assert torch.equal(found.log_px, expected.log_px)


READING = {"item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"}


class Reads(TorchFunctionMode):
    """Counts what would wait for a GPU: numbers taken from tensors, and tensors for the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in READING:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_numbers_are_read_when_all_data_are_taken_in() -> None:
    """And once before, where a model that is not finite would go on for long."""
    model = VAE.mlp((12,), hidden=(8,), latent_dim=3, likelihood="gaussian")
    gatherers = ImportanceSampler(model, n_samples=10), AggregatePosterior(n_mixture=20)
    batches = posteriors(model, torch.rand(50, 12).split(10))
    with torch.no_grad(), Reads() as reads:
        for first_row, x, mu, logvar in batches:
            gatherers[0].update(x, mu, logvar, first_row)
            gatherers[1].update(mu, logvar, first_row)
            if first_row == 0:
                assert "cpu" in reads.found
                reads.found.clear()
        assert reads.found == ["__float__"] * 4  # by the operator in C++, of the variance
    results = [gatherer.result() for gatherer in gatherers]
    assert [len(results[0].log_px), results[1].n_data] == [50, 50]


def test_a_model_that_is_not_finite_is_an_error_at_once() -> None:
    model, x = Own("mse"), torch.rand(9, 2, 3, dtype=torch.float64)
    sampler = ImportanceSampler(model, n_samples=3)
    with torch.no_grad(), pytest.raises(EvaluationError, match="for datum 5, expected finite numbers"):
        sampler.update(x, *(t * math.nan for t in model.encode(x)), 5)


def test_errors_say_what_is_wrong() -> None:
    model, x = Own("mse"), torch.rand(9, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="batches: got no data"):
        log_likelihood(model, [])
    with pytest.raises(ValueError, match="n_samples: got 0, expected at least 1"):
        log_likelihood(model, [x], n_samples=0)
    x[7, 1, 1] = math.nan
    with pytest.raises(EvaluationError, match="for datum 7, expected finite numbers"):
        log_likelihood(model, x.split(4))
