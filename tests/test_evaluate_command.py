"""`fastvae evaluate` as a user types it, and what it is made of."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
import torch
from digits import validation
from scipy.stats import norm
from torch import Tensor, nn

from fastvae import VAE, DataLoader, load
from fastvae.cli.evaluate import _notes
from fastvae.data import Transform, split
from fastvae.inference.aggregate import AggregatePosterior
from fastvae.inference.importance import EvaluationError, log_likelihood
from fastvae.inference.judge import dequantized, judge
from fastvae.models.files import WEIGHTS_NAME, save_weights
from fastvae.training.config import TrainConfig
from fastvae.training.run_folder import prepare_run_folder

SEED = 3
OPTIONS = f"--epochs 1 --hidden 16 --latent-dim 3 --seed {SEED} --no-report"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(train: Callable[..., Path]) -> Callable[[str], Path]:
    """A run with a likelihood, trained once."""

    @cache
    def run(likelihood: str) -> Path:
        beta = 4 if likelihood == "mse" else 1
        return train(f"{OPTIONS} --likelihood {likelihood} --beta {beta}")

    return run


@pytest.fixture
def evaluate(runs: Callable[[str], Path], typed: Callable[..., str]) -> Callable[..., str]:
    """Runs the command on the run with a likelihood; what it printed."""
    return lambda likelihood, *options, status=0: typed("evaluate", runs(likelihood), *options, status=status)


def assert_close(figures: dict[str, Any], expected: dict[str, Any], precision: float) -> None:
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or isinstance(value, (str, bool)) or name == "notes":
            assert figures[name] == value, name
        else:
            np.testing.assert_allclose(figures[name], value, precision, 0.1 * precision, err_msg=name)


def test_prints_and_keeps_the_figures_of_the_library(
    evaluate: Callable[..., str], runs: Callable[[str], Path]
) -> None:
    printed = json.loads(evaluate("gaussian", "--json", "--importance-samples", 30))
    assert printed == json.loads((runs("gaussian") / "evaluation.json").read_text())
    assert (printed["data"], printed["seed"], printed["beta_of_training"]) == ("digits (validation)", SEED, 1)
    model, x = load(runs("gaussian")), validation(SEED)
    expected = judge(model, DataLoader(x, 100), n_samples=30, seed=SEED).figures()
    assert_close({name: printed[name] for name in expected}, expected, 1e-4)


def test_figures_are_what_their_names_say(runs: Callable[[str], Path]) -> None:
    """Of bounds that tests/test_importance.py checks, and a mixture that tests/test_aggregate.py does."""
    model, x, n, root = load(runs("gaussian")), validation(SEED), 180, math.sqrt(180)
    figures = judge(model, [x[:70], x[70:]], n_samples=30, seed=SEED, n_mixture=50).figures()
    with torch.no_grad():
        mu, logvar = (t.double() for t in model.encode(x))
        squares = (model.decode_mean(mu.float()) - x).square().sum().item()
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    bounds = log_likelihood(model, [x], n_samples=30, seed=SEED)
    elbo = bounds.elbo.mean().item()
    covariance = mu.T.cov(correction=0) + torch.diag(logvar.exp().mean(0))
    aggregate = AggregatePosterior(50, SEED)
    aggregate.update(mu, logvar)
    expected = {
        "n_data": n,
        "features": 64,
        "likelihood": "gaussian",
        "variance": model.log_variance.exp().item(),
        "elbo": elbo,
        "elbo_monte_carlo_error": bounds.elbo_variance.sum().sqrt() / n,
        "elbo_data_error": bounds.elbo.std() / root,
        "reconstruction": elbo + kl.sum(1).mean(),
        "kl": kl.sum(1).mean(),
        "importance_samples": 30,
        "log_likelihood": bounds.log_px.mean(),
        "log_likelihood_monte_carlo_error": bounds.log_px_variance.sum().sqrt() / n,
        "log_likelihood_data_error": bounds.log_px.std() / root,
        "log_likelihood_bias": -bounds.log_px_variance.mean() / 2,
        "effective_samples": bounds.effective_samples.mean(),
        "inference_gap": (bounds.log_px - bounds.elbo).mean(),
        "levels": None,
        "bits_per_dimension": None,
        "bits_per_dimension_data_error": None,
        "active_units": (mu.var(0, correction=0) > 0.01).sum(),
        "kl_by_latent": kl.mean(0),
        "mean_variance_by_latent": mu.var(0, correction=0),
        "aggregate_mean": mu.mean(0),
        "aggregate_std": covariance.diagonal().sqrt(),
        "aggregate_covariance": covariance,
        "aggregate_kl_to_prior": kl.sum(1).mean() - aggregate.result().mutual_information,
        "mutual_information": aggregate.result().mutual_information,
        "mutual_information_monte_carlo_error": aggregate.result().error,
        "mutual_information_limit": math.log(50),
        "aggregate_n_mixture": 50,
        "squared_error": squares / n,
        "mean_squared_error": squares / n / 64,
    }
    assert_close(figures, expected, 1e-4)


ROWS = {
    "ELBO": ("elbo", "elbo"),
    "E ln p(x|z)": ("reconstruction", None),
    "KL(q(z|x) || p(z))": ("kl", None),
    "ln p(x), by L_30": ("log_likelihood", "log_likelihood"),
    "bias, about": ("log_likelihood_bias", None),
    "inference gap, ln p(x) - ELBO": ("inference_gap", None),
    "bits per dimension": ("bits_per_dimension", "bits_per_dimension"),
    "aggregate posterior: KL(q(z) || p(z))": ("aggregate_kl_to_prior", "mutual_information"),
    "mutual information I(x; z)": ("mutual_information", "mutual_information"),
}


def test_table_shows_what_was_computed(evaluate: Callable[..., str], runs: Callable[[str], Path]) -> None:
    printed = evaluate("gaussian", "--importance-samples", 30, "--dequantize", 16)
    f = json.loads((runs("gaussian") / "evaluation.json").read_text())
    lines = [line.strip() for line in printed.splitlines()]
    first = lines.index("") + 2
    for line, (name, (key, error)) in zip(lines[first : first + len(ROWS)], ROWS.items(), strict=True):
        errors = [f.get(f"{error}_{kind}_error") for kind in ("monte_carlo", "data")]
        expected = [f"{value:.4f}" for value in (f[key], *errors) if value is not None]
        assert (line.startswith(name), line.removeprefix(name).split()) == (True, expected)
    text = " ".join(lines)
    order = sorted(range(3), key=lambda i: -f["kl_by_latent"][i])
    mean, std, covariance = (np.array(f[f"aggregate_{name}"]) for name in ("mean", "std", "covariance"))
    correlations = np.abs(covariance / np.outer(std, std))[np.triu_indices(3, 1)]
    for shown in (
        f"with variance {f['variance']:.4g} on 180 of digits (validation), with uniform noise of 1/16 ",
        f"active units: {f['active_units']} of 3 ",
        "KL by latent, in nats: " + ", ".join(f"z{i}={f['kl_by_latent'][i]:.2f}" for i in order),
        f"means within {np.abs(mean).max():.3g} of 0, ",
        f"standard deviations {std.min():.3g} to {std.max():.3g}, ",
        f"correlations within {correlations.max():.2g} of 0 ",
        f"mean squared error {f['mean_squared_error']:.5g} a value, {f['squared_error']:.5g} a datum ",
    ):
        assert shown in text


def test_no_number_is_cut_in_a_narrow_terminal_and_no_line_in_a_pipe(
    evaluate: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(printed: str) -> list[str]:
        return [word for word in printed.split() if re.fullmatch(r"-?[\d.]+", word)]

    piped = evaluate("gaussian", "--importance-samples", 30)
    assert any(line.startswith("note: no bits") and line.endswith("adds it") for line in piped.splitlines())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = evaluate("gaussian", "--importance-samples", 30)
    assert "nats a datum" not in narrow
    assert sorted(words(narrow)) == sorted(words(piped))


def test_notes_are_of_what_a_reader_should_know(runs: Callable[[str], Path]) -> None:
    model, x = load(runs("gaussian")), validation(SEED)
    figures = judge(model, [x], n_samples=200, levels=16).figures()
    plain = TrainConfig()
    assert _notes(figures, plain) == []
    for config, changed, note in (
        (plain, {"effective_samples": 3.9}, "3.9 of 200 draws have nearly all the weight"),
        (plain, {"mutual_information": math.log(180) - 0.4}, "I(x; z) is near ln 180 = 5.19, the most"),
        (plain, {"bits_per_dimension": None}, "no bits per dimension"),
        (TrainConfig(beta=2), {}, "trained with beta 2, evaluated at beta 1"),
        (TrainConfig(free_bits=0.5), {}, "trained with free bits 0.5, evaluated without"),
        (TrainConfig(capacity=3), {}, "trained with capacity 3, evaluated without"),
    ):
        (said,) = _notes({**figures, **changed}, config)
        assert said.startswith(note)
    assert _notes({**figures, "effective_samples": 4.1}, plain) == []
    assert _notes({**figures, "mutual_information": math.log(180) - 0.6}, plain) == []


def test_nothing_depends_on_the_batch_size(evaluate: Callable[..., str]) -> None:
    options = ["--json", "--dequantize", 16, "--mixture", 50, "--importance-samples", 20]
    one, other = (json.loads(evaluate("gaussian", *options, "--batch-size", n)) for n in (256, 7))
    assert_close(one, other, 1e-3)
    assert one["aggregate_n_mixture"] == 50
    different = json.loads(evaluate("gaussian", *options, "--seed", 8))
    assert different["log_likelihood"] != pytest.approx(one["log_likelihood"], rel=1e-7)


def test_mse_is_a_density_of_variance_one_half(
    evaluate: Callable[..., str], runs: Callable[[str], Path]
) -> None:
    """Constant included; and a beta of the training is named."""
    figures = json.loads(evaluate("mse", "--json", "--importance-samples", 10))
    vae, x = load(runs("mse")), validation(SEED)
    gaussian = VAE(vae.encoder, vae.decoder, likelihood="gaussian", log_variance=math.log(0.5))
    expected = log_likelihood(gaussian, [x], n_samples=10, seed=SEED)
    assert figures["log_likelihood"] == pytest.approx(expected.estimate, rel=1e-6)
    assert figures["elbo"] == pytest.approx(expected.elbo.mean().item(), rel=1e-6)
    assert figures["beta_of_training"] == 4
    beta, constant, bits = figures["notes"][:3]
    assert beta.startswith("trained with beta 4, evaluated at beta 1")
    assert f"{32 * math.log(math.pi):.2f} nats" in constant
    assert bits.startswith("no bits per dimension")
    assert figures["bits_per_dimension"] is None


def test_bernoulli_asks_for_binary_data(
    evaluate: Callable[..., str], runs: Callable[[str], Path], tmp_path: Path
) -> None:
    said = evaluate("bernoulli", status=2)
    assert "--data: got 0." in said
    assert "expected binary data, or --binarize" in said
    with pytest.raises(EvaluationError, match=r"transform=Transform\(binarize=True, fixed=True\)"):
        judge(load(runs("bernoulli")), [validation(SEED)])
    np.save(tmp_path / "counts.npy", np.full((3, 8, 8), 1.5))
    said = evaluate("bernoulli", "--binarize", "--data", tmp_path / "counts.npy", status=2)
    assert "--binarize: got counts with values from 1.5 to 1.5, expected probabilities, in [0, 1]" in said


def test_values_are_drawn_as_the_loader_draws_them(
    evaluate: Callable[..., str], runs: Callable[[str], Path]
) -> None:
    """In the same way each time, and in another with another seed."""
    options = ["--binarize", "--json", "--importance-samples", 5]
    figures, other = (json.loads(evaluate("bernoulli", *options, *seed)) for seed in ([], ["--seed", 8]))
    assert figures["binarized"]
    rows = split(1797, 0.1, SEED)[1]
    drawn = Transform(binarize=True, fixed=True)
    loader = DataLoader(digits.images(), 50, seed=SEED, indices=rows, transform=drawn)
    expected = judge(load(runs("bernoulli")), loader, n_samples=5, seed=SEED).figures()
    assert_close({name: figures[name] for name in expected}, expected, 1e-4)
    assert figures["squared_error"] != other["squared_error"]  # which has to do with no other draws
    bits = -figures["log_likelihood"] / 64 / math.log(2)
    assert figures["bits_per_dimension"] == pytest.approx(bits)


def test_a_run_on_binarized_data_is_evaluated_on_such(
    train: Callable[..., Path], typed: Callable[..., str]
) -> None:
    run = train(f"{OPTIONS} --binarize")
    figures = [json.loads(typed("evaluate", run, "--json", *more)) for more in ([], ["--binarize"])]
    assert figures[0] == figures[1]
    assert figures[0]["binarized"]


def test_dequantized_data_have_bits_per_dimension(evaluate: Callable[..., str]) -> None:
    figures = json.loads(evaluate("gaussian", "--dequantize", 16, "--json", "--importance-samples", 5))
    bits = -figures["log_likelihood"] / 64 / math.log(2) + 4
    assert figures["bits_per_dimension"] == pytest.approx(bits)
    error = figures["log_likelihood_data_error"] / 64 / math.log(2)
    assert figures["bits_per_dimension_data_error"] == pytest.approx(error)
    assert "--dequantize: got 0." in (said := evaluate("gaussian", "--dequantize", status=2))
    assert "expected an integer / 255; --dequantize S is for data in steps of 1/S" in said
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
    with pytest.raises(EvaluationError, match="levels: got 2 with likelihood bernoulli"):
        judge(VAE.mlp((2,), likelihood="bernoulli"), [torch.zeros(1, 2)], levels=2)


def test_one_draw_has_no_error(evaluate: Callable[..., str]) -> None:
    figures = json.loads(evaluate("gaussian", "--json", "--importance-samples", 1))
    assert figures["log_likelihood_monte_carlo_error"] is None
    assert figures["log_likelihood"] == pytest.approx(figures["elbo"])
    assert "by L_1 " in evaluate("gaussian", "--importance-samples", 1)


def test_broken_weights_are_named_and_change_nothing(
    evaluate: Callable[..., str], runs: Callable[[str], Path]
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


def test_a_model_of_the_users_own(
    train: Callable[..., Path], typed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_judged.py").write_text(OWN)
    run = train("--epochs 1 --model own_judged:Own --no-report")
    options = "--model own_judged:Own --json --importance-samples 3"
    figures = json.loads(typed("evaluate", run, *options.split()))
    assert len(figures["kl_by_latent"]) == 4
    assert figures["variance"] is None
    prepare_run_folder(run)  # as another training does, whose evaluation this is not
    assert not (run / "evaluation.json").exists()
