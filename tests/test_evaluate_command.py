"""`fastvae evaluate` as a user types it, and what it is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastvae import VAE, DataLoader, load
from fastvae.cli import main
from fastvae.data import split
from fastvae.inference.importance import EvaluationError, log_likelihood
from fastvae.inference.judge import binarized, dequantized, judge
from fastvae.models.files import WEIGHTS_NAME, save_weights
from fastvae.training.run_folder import prepare_run_folder

SEED = 3
TRAIN = f"train --data digits --epochs 1 --hidden 16 --latent-dim 3 --seed {SEED}".split()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run with a likelihood, trained once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(likelihood: str) -> Path:
        if not (folder / likelihood).exists():
            beta = "4" if likelihood == "mse" else "1"
            options = ["--likelihood", likelihood, "--beta", beta, "--out", str(folder / likelihood)]
            assert main([*TRAIN, *options]) == 0
        return folder / likelihood

    return run


@pytest.fixture
def evaluate(runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def evaluate(likelihood: str, *options: object, status: int = 0) -> str:
        folder = str(runs(likelihood))
        capsys.readouterr()
        assert main(["evaluate", folder, *map(str, options)]) == status
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (status != 0)
        return printed.err or printed.out

    return evaluate


def digits() -> Tensor:
    """What the runs have validated on."""
    images = (load_digits().images / 16).astype(np.float32)
    return torch.from_numpy(images[split(len(images), 0.1, SEED)[1], None])


def assert_close(figures: dict[str, Any], expected: dict[str, Any], precision: float) -> None:
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or isinstance(value, (str, bool)) or name == "notes":
            assert figures[name] == value, name
        else:
            np.testing.assert_allclose(figures[name], value, precision, 0.1 * precision, err_msg=name)


def test_prints_and_keeps_the_figures_of_the_library(
    evaluate: Callable[..., str], runs: Callable[..., Path]
) -> None:
    printed = json.loads(evaluate("gaussian", "--json", "--importance-samples", 30))
    assert printed == json.loads((runs("gaussian") / "evaluation.json").read_text())
    assert (printed["data"], printed["seed"], printed["beta_of_training"]) == ("digits (validation)", SEED, 1)
    model, x = load(runs("gaussian")), digits()
    expected = judge(model, DataLoader(x, 100), n_samples=30, seed=SEED).figures()
    assert_close({name: printed[name] for name in expected}, expected, 1e-4)
    bounds = log_likelihood(model, [x], n_samples=30, seed=SEED)
    assert printed["log_likelihood"] == pytest.approx(bounds.estimate, rel=1e-6)
    assert printed["log_likelihood_monte_carlo_error"] == pytest.approx(bounds.monte_carlo_error, rel=1e-3)
    assert printed["log_likelihood_data_error"] == pytest.approx(bounds.data_error, rel=1e-5)
    assert printed["inference_gap"] == pytest.approx(bounds.gap, rel=1e-3)
    assert printed["elbo"] == pytest.approx(printed["reconstruction"] - printed["kl"], rel=1e-6)
    assert printed["kl"] == pytest.approx(sum(printed["kl_by_latent"]), rel=1e-5)
    parts = printed["aggregate_kl_to_prior"] + printed["mutual_information"]
    assert printed["kl"] == pytest.approx(parts, rel=1e-5)
    assert np.sqrt(np.diag(printed["aggregate_covariance"])) == pytest.approx(printed["aggregate_std"])
    with torch.no_grad():
        error = (model.decode_mean(model.encode(x)[0]) - x).square().mean().item()
    assert printed["mean_squared_error"] == pytest.approx(error, rel=1e-5)
    assert printed["squared_error"] == pytest.approx(64 * error, rel=1e-5)


def test_table_shows_what_was_computed(evaluate: Callable[..., str], runs: Callable[..., Path]) -> None:
    table = evaluate("gaussian", "--importance-samples", 30)
    figures = json.loads((runs("gaussian") / "evaluation.json").read_text())
    values = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    bound = values["ln p(x), by L_30"][-3:]
    errors = [figures[f"log_likelihood_{kind}_error"] for kind in ("monte_carlo", "data")]
    assert bound == [f"{value:.4f}" for value in (figures["log_likelihood"], *errors)]
    assert f"{figures['elbo']:.4f}" in values["ELBO"]
    assert "180 of digits (validation)" in table
    assert f"active units: {figures['active_units']} of 3" in table
    largest = max(range(3), key=lambda i: figures["kl_by_latent"][i])
    assert f"(latent): {figures['kl_by_latent'][largest]:.2f} ({largest})" in table


def test_nothing_depends_on_the_batch_size(evaluate: Callable[..., str]) -> None:
    options = ["--json", "--dequantize", 16, "--mixture", 50, "--importance-samples", 20]
    one, other = (json.loads(evaluate("gaussian", *options, "--batch-size", n)) for n in (256, 7))
    assert_close(one, other, 1e-3)
    assert one["aggregate_n_mixture"] == 50
    different = json.loads(evaluate("gaussian", *options, "--seed", 8))
    assert different["log_likelihood"] != pytest.approx(one["log_likelihood"], rel=1e-7)


def test_mse_is_a_density_of_variance_one_half(
    evaluate: Callable[..., str], runs: Callable[..., Path]
) -> None:
    """Constant included; and a beta of the training is named."""
    figures = json.loads(evaluate("mse", "--json", "--importance-samples", 10))
    vae, x = load(runs("mse")), digits()
    gaussian = VAE(vae.encoder, vae.decoder, likelihood="gaussian", log_variance=math.log(0.5))
    expected = log_likelihood(gaussian, [x], n_samples=10, seed=SEED)
    assert figures["log_likelihood"] == pytest.approx(expected.estimate, rel=1e-6)
    assert figures["elbo"] == pytest.approx(expected.elbo.mean().item(), rel=1e-6)
    beta, constant, bits = figures["notes"][:3]
    assert beta.startswith("trained with beta 4, evaluated at beta 1")
    assert f"{32 * math.log(math.pi):.2f} nats" in constant
    assert bits.startswith("no bits per dimension")
    assert figures["bits_per_dimension"] is None


def test_bernoulli_asks_for_binary_data(evaluate: Callable[..., str]) -> None:
    said = evaluate("bernoulli", status=2)
    assert "--data: got 0." in said
    assert "expected binary data, or --binarize" in said
    figures = json.loads(evaluate("bernoulli", "--binarize", "--json", "--importance-samples", 5))
    assert figures["binarized"]
    bits = -figures["log_likelihood"] / 64 / math.log(2)
    assert figures["bits_per_dimension"] == pytest.approx(bits)


def test_dequantized_data_have_bits_per_dimension(evaluate: Callable[..., str]) -> None:
    figures = json.loads(evaluate("gaussian", "--dequantize", 16, "--json", "--importance-samples", 5))
    bits = -figures["log_likelihood"] / 64 / math.log(2) + 4
    assert figures["bits_per_dimension"] == pytest.approx(bits)
    error = figures["log_likelihood_data_error"] / 64 / math.log(2)
    assert figures["bits_per_dimension_data_error"] == pytest.approx(error)
    assert "--dequantize: got 0." in (said := evaluate("gaussian", "--dequantize", status=2))
    assert "expected an integer / 255" in said
    for likelihood, other in (("bernoulli", []), ("gaussian", ["--binarize"])):
        said = evaluate(likelihood, "--dequantize", 16, *other, status=2)
        assert "expected a likelihood with a density, and no --binarize" in said


class Constant(nn.Module):
    """Data are independent of z."""

    likelihood = "gaussian"

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean)
        self.log_variance = 2 * math.log(std)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(len(x), 2)
        return zeros, zeros

    def decode(self, z: Tensor) -> Tensor:
        return self.mean.expand(len(z), -1)


@pytest.mark.usefixtures("seed")
def test_bits_are_those_of_the_discretized_density() -> None:
    """Of which they are an upper bound (Theis et al. 2016), here a close one: steps are small."""
    mean, std, s = torch.full((4,), 0.5), 0.2, 255
    k = ((mean + std * torch.randn(2000, 4)) * s).floor()
    found = judge(Constant(mean, std), [k / s], n_samples=2, levels=s)
    edges = torch.stack((k, k + 1)).double().numpy() / s
    probability = np.diff(norm.cdf(edges, 0.5, std), axis=0)
    # a value's noise moves it by at most 1 / (s std) of the density's standard score, 4.5 of which are rare
    error = 1 / (s * std) / math.sqrt(12) / math.log(2) / math.sqrt(k.numel())
    assert abs(found.bits_per_dimension - -np.log2(probability).mean()) < 8 * error
    assert found.log_likelihood.gap == pytest.approx(0, abs=1e-5)
    assert found.latents.active_units == 0
    assert found.aggregate.mutual_information == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("seed")
def test_noise_of_the_data_depends_on_their_place() -> None:
    k = torch.randint(256, (400, 3, 5)).float()
    x = dequantized(k / 255, 255, seed=1)
    assert torch.equal(dequantized(k[7:] / 255, 255, seed=1, first_row=7), x[7:])
    u = (x * 255 - k).flatten().double()
    assert -1e-3 < u.min() < 0.01  # of rounding
    assert 0.99 < u.max() < 1 + 1e-3
    assert abs(u.mean() - 0.5) < 6 / math.sqrt(12 * len(u))
    p = torch.rand(400, 3, 5)
    drawn = binarized(p, seed=1)
    assert torch.equal(binarized(p[9:], seed=1, first_row=9), drawn[9:])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    residual = (drawn - p).double().flatten()
    assert abs(residual.mean()) < 6 * 0.5 / math.sqrt(len(residual))
    assert abs((residual * p.flatten()).mean()) < 6 * 0.5 / math.sqrt(len(residual))
    assert torch.equal(binarized((p < 0.5).float(), seed=1), (p < 0.5).float())
    with pytest.raises(EvaluationError, match="binarize: got values from 0 to 2, expected probabilities"):
        binarized(torch.tensor([[0.0, 2.0]]), seed=1)
    with pytest.raises(EvaluationError, match="levels: got 2 with likelihood bernoulli"):
        judge(VAE.mlp((2,), likelihood="bernoulli"), [torch.zeros(1, 2)], levels=2)


def test_one_draw_has_no_error(evaluate: Callable[..., str]) -> None:
    figures = json.loads(evaluate("gaussian", "--json", "--importance-samples", 1))
    assert figures["log_likelihood_monte_carlo_error"] is None
    assert figures["log_likelihood"] == pytest.approx(figures["elbo"])
    assert "by L_1 " in evaluate("gaussian", "--importance-samples", 1)


def test_broken_weights_are_named_and_change_nothing(
    evaluate: Callable[..., str], runs: Callable[..., Path]
) -> None:
    evaluate("gaussian", "--importance-samples", 2)
    folder = runs("gaussian")
    before, weights = (folder / "evaluation.json").read_text(), (folder / WEIGHTS_NAME).read_bytes()
    state = load(folder).state_dict()
    save_weights(folder / WEIGHTS_NAME, {name: tensor * math.nan for name, tensor in state.items()})
    said = evaluate("gaussian", status=2)
    assert "model: got ln p(x) nan" in said
    assert "for datum 0, expected finite numbers" in said
    assert (folder / "evaluation.json").read_text() == before
    (folder / WEIGHTS_NAME).write_bytes(weights)


OWN = """
import torch
from torch import nn

class Own(nn.Module):
    likelihood = "gaussian"

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 2 * 4), nn.Linear(4, 64)
        self.log_variance = nn.Parameter(torch.zeros(1, 8, 8))  # one a pixel

    def encode(self, x):
        mu, logvar = self.inner(x.flatten(1)).view(-1, 2, 2, 2).unbind(1)
        return mu, logvar

    def decode(self, z):
        return self.outer(z.flatten(1)).view(-1, 1, 8, 8)
"""


def test_a_model_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_judged.py").write_text(OWN)
    options = "--data digits --epochs 1 --model own_judged:Own --out run"
    assert main(["train", *options.split()]) == 0
    capsys.readouterr()
    options = "--model own_judged:Own --json --importance-samples 3"
    assert main(["evaluate", "run", *options.split()]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["kl_by_latent"]) == 4
    assert figures["variance"] is None
    prepare_run_folder(tmp_path / "run")  # as another training does, whose evaluation this is not
    assert not Path("run/evaluation.json").exists()
