"""Draws weighed by the units that flip, against decoding in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import _native
from fastvae.inference.flips import FlipWeigher
from fastvae.inference.importance import weigher_of
from fastvae.inference.weigh import Weigher

pytestmark = pytest.mark.usefixtures("seed")

# The scale of the units' biases, or all of them; the log variance of the posterior; whether some units are
# sure to be on in all draws, off in all, and neither.
CASES = {
    "as in a trained model": (2.0, -3.0, (True, True, True)),
    "wide": (0.5, 1.0, (False, False, True)),
    "no unit flips": (2.0, -60.0, (True, True, False)),
    "all are off": (-1e3, 0.0, (False, True, False)),
    "all are on": (1e3, 0.0, (True, False, False)),
}
SIZES = [(1, 7, 20, 9), (5, 130, 150, 70), (16, 128, 784, 64)]


@pytest.mark.parametrize(("latents", "units", "features", "n_draws"), SIZES)
@pytest.mark.parametrize("variance", [None, 0.05, "learned"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_is_as_exact_as_decoding(
    case: str, variance: float | str | None, latents: int, units: int, features: int, n_draws: int
) -> None:
    """At most twice the error of decoding in float32, and 16 roundings: where draws are far from their mean,
    what it sums is larger than the sum."""
    bias, log_variance, expected = CASES[case]
    likelihood = "mse" if variance is None else "gaussian"
    model = fastvae.VAE.mlp((features,), (units,), latents, likelihood=likelihood, variance=variance)
    first = model.decoder.layers[0]
    first.weight.normal_()
    first.bias.copy_(torch.full((units,), bias) if abs(bias) > 100 else bias * torch.randn(units))
    x, mu, eps = torch.rand(3, features), torch.randn(3, latents), torch.randn(n_draws, 3, latents)
    logvar = log_variance + torch.rand(3, latents)
    on = first(mu + torch.exp(0.5 * logvar) * eps) > 0
    if units > 100:  # of few there may be none of a kind
        always, never = on.all(0), ~on.any(0)
        found = (always.any(), never.any(), not (always | never).all())
        assert all(there for there, sure in zip(found, expected, strict=True) if sure)

    weigher = weigher_of(model, n_draws)
    assert type(weigher) is FlipWeigher
    exact = Weigher(copy.deepcopy(model).double())
    truth = exact.near(x.double(), mu.double(), logvar.double())(eps.double())
    found, decoded = (w.near(x, mu, logvar)(eps) for w in (weigher, Weigher(model)))
    bar = 2 * (decoded - truth).abs().max() + 16 * 2**-23 * truth.abs().max()
    assert (found - truth).abs().max() <= bar


def call(extents: tuple[int, int, int, int], threads: int = 1, instruction_set: str | None = None) -> Tensor:
    """The form of csrc/flips.hpp of random inputs, and as it is written there."""
    n, batch, latents, units = extents
    noise, layer = torch.randn(n, batch, latents), torch.randn(batch, 1 + latents, units)
    layer[:, 0] -= 1
    cross, square = torch.randn_like(layer), torch.randn(batch, latents, 1 + latents)
    gram = torch.randn(units, units).triu()
    strips = gram.unflatten(1, (-1, _native.FLIP_COLUMNS)).transpose(0, 1).contiguous()
    values = torch.full((n, batch), torch.nan, dtype=torch.float64)
    tensors = (noise, layer, cross, square, strips, values)
    _native.flips(extents, threads, *(t.data_ptr() for t in tensors), instruction_set=instruction_set)
    noise, layer, cross, square, gram = (t.double() for t in (noise, layer, cross, square, gram))
    y = torch.cat((torch.ones(n, batch, 1), noise), 2)
    delta = torch.einsum("nbl,blh->nbh", y, layer).relu()
    expected = torch.einsum("nbk,bkl,nbl->nb", noise, square, y)
    expected += torch.einsum("nbl,blh,nbh->nb", y, cross, delta) + ((delta @ gram.T) * delta).sum(2)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    return values


def test_bits_do_not_depend_on_threads_or_instruction_set() -> None:
    extents, state = (67, 5, 21, 3 * _native.FLIP_COLUMNS), torch.random.get_rng_state()
    runs = []
    for instruction_set in _native.instruction_sets():
        for threads in (1, 3):
            torch.random.set_rng_state(state)
            runs.append(call(extents, threads, instruction_set))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("extents", [(1, 1, 1, 1), (32, 2, 15, 2), (33, 1, 16, 1), (5, 3, 40, 7)])
def test_is_the_form_written_out(extents: tuple[int, int, int, int]) -> None:
    n, batch, latents, strips = extents
    call((n, batch, latents, strips * _native.FLIP_COLUMNS))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="extents: got a size below 1"):
        _native.flips((1, 1, 0, 64), 1, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="units: got 65, expected a multiple of"):
        _native.flips((1, 1, 1, 65), 1, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="threads: got 0"):
        _native.flips((1, 1, 1, 64), 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="instruction_set: got 'mmx'"):
        _native.flips((1, 1, 1, 64), 1, 0, 0, 0, 0, 0, 0, instruction_set="mmx")
