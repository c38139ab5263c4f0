"""Sampling on CPU tensors: the generator's known answers, the same noise from all, gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate

import fastvae
from fastvae import _native
from fastvae.ops import reference
from fastvae.ops.library import random_bits

IMPLS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("seed")

# Random123's known answers: counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(impl: str, seed: Any, offset: Any, first_row: Any, batch: int, latents: int) -> torch.Tensor:
    """Standard normals, [batch, latents]."""
    zero = torch.zeros(batch, latents)
    return fastvae.reparameterize(zero, zero, seed=seed, offset=offset, first_row=first_row, impl=impl)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    got = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in got) == words
    assert tuple(_native.philox(counter, key)) == words


def test_native_normals_are_those_of_the_words(seed: int) -> None:
    """Native normals against the formula in float64, from native words."""
    offset, first_row = 2**40 + 3, 2**35 + 1
    key, stream = (seed & 0xFFFFFFFF, seed >> 32), (offset & 0xFFFFFFFF, offset >> 32)
    got = draw("native", seed, offset, first_row, 1, 8).double()[0]
    for block in range(2):
        group = (8 * first_row) // 4 + block
        words = _native.philox((group & 0xFFFFFFFF, group >> 32, *stream), key)
        u = [(w + 0.5) / 2**32 for w in words]
        truth = []
        for radius, angle in (u[:2], u[2:]):
            r = math.sqrt(-2 * math.log(radius))
            truth += [r * math.cos(2 * math.pi * angle), r * math.sin(2 * math.pi * angle)]
        wanted = torch.tensor(truth, dtype=torch.float64)
        torch.testing.assert_close(got[4 * block : 4 * block + 4], wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("latents", [1, 3, 4, 20, 1023, 3001])
def test_the_same_noise_from_both(latents: int, seed: int) -> None:
    for s, offset, first_row in ((seed, 0, 0), (-seed - 1, 2**32 + 5, 2**33 + 1), (2**63 - 1, -1, 7)):
        a, b = (draw(impl, s, offset, first_row, 5, latents) for impl in IMPLS)
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6)


def test_noise_does_not_depend_on_the_default_dtype(seed: int) -> None:
    expected = reference.normal(2, 7, 5, seed)
    torch.set_default_dtype(torch.float64)
    try:
        got = reference.normal(2, 7, 5, seed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_noise_depends_on_place_alone(seed: int) -> None:
    whole = draw("native", seed, 0, 0, 12, 7)
    parts = [draw("native", seed, 0, first, 4, 7) for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    zero = torch.zeros(12, 7)
    samples = fastvae.reparameterize(zero, zero, n_samples=3, seed=seed)
    assert torch.equal(samples, torch.stack([draw("native", seed, k, 0, 12, 7) for k in range(3)]))
    strided = torch.zeros(7, 12).T
    assert torch.equal(fastvae.reparameterize(strided, strided, seed=seed), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_tail_reaches_6_76_sigma(impl: str) -> None:
    words = torch.tensor([0, 0xFFFFFFFF])
    cos, _ = reference.box_muller(words, torch.zeros_like(words))
    assert abs(cos[0].item() - math.sqrt(66 * math.log(2))) < 1e-5
    assert cos[1].item() == 0
    assert torch.isfinite(draw(impl, 1, 0, 0, 1000, 100)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 5, 7), (3, 1500)])
def test_value_and_gradient(
    impl: str, dtype: torch.dtype, samples: int | None, shape: tuple[int, ...], seed: int
) -> None:
    mu, logvar = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    lead = () if samples is None else (samples,)
    g_z, g_kl = torch.randn(*lead, *shape).to(dtype), torch.randn(shape[0])
    eps = reference.normal(samples or 1, shape[0], math.prod(shape[1:]), seed).reshape(*lead, *shape)

    def hand(to: torch.dtype) -> list[torch.Tensor]:
        m, v = (t.detach().to(to).requires_grad_() for t in (mu, logvar))
        z = m + torch.exp(v / 2) * eps.to(to)
        kl = (0.5 * (m**2 + v.exp() - 1 - v)).flatten(1).sum(1)
        grads = torch.autograd.grad([z, kl], [m, v], [g_z.to(to), g_kl.to(to)])
        return [z.detach(), kl.detach(), *grads]

    z, kl = fastvae.sample_and_kl(mu, logvar, n_samples=samples, seed=seed, impl=impl)
    assert z.dtype == dtype
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad([z, kl], [mu, logvar], [g_z, g_kl.to(kl.dtype)])
    for name, a, e, t in zip(
        ("z", "kl", "d mu", "d logvar"),
        (z, kl, *grads),
        hand(torch.float32),
        hand(torch.float64),
        strict=True,
    ):
        assert_accurate(name, a.detach(), e, t)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "logvar"), [(torch.float32, -40.0), (torch.bfloat16, -40.0), (torch.float16, -12.0)]
)
def test_gradient_of_logvar_uses_the_noise_itself(
    impl: str, dtype: torch.dtype, logvar: float, seed: int
) -> None:
    """sigma so small that z - mu rounds to zero: (z - mu) / sigma would give a gradient of zero."""
    mu = torch.full((4, 8), 1e4, dtype=dtype)
    value, logvar = logvar, torch.full((4, 8), logvar, dtype=dtype, requires_grad=True)
    z = fastvae.reparameterize(mu, logvar, seed=seed, impl=impl)
    assert torch.equal(z, mu)
    (got,) = torch.autograd.grad(z.sum(), logvar)
    expected = draw(impl, seed, 0, 0, 4, 8) * math.exp(value / 2) / 2
    torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_output_used_alone(impl: str, seed: int) -> None:
    mu, logvar = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    z, kl = fastvae.sample_and_kl(mu, logvar, seed=seed, impl=impl)
    (got,) = torch.autograd.grad(z.sum(), mu, retain_graph=True)
    assert torch.equal(got, torch.ones_like(mu))
    (got,) = torch.autograd.grad(kl.sum(), mu)
    torch.testing.assert_close(got, mu.detach())


def test_manual_seed_repeats_and_calls_differ() -> None:
    mu, logvar = torch.zeros(3, 4), torch.zeros(3, 4)
    torch.manual_seed(5)
    a, b = (fastvae.reparameterize(mu, logvar) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(fastvae.reparameterize(mu, logvar), a)
    assert not torch.equal(a, b)
    c, d = (fastvae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(c, d)
    e = fastvae.reparameterize(mu, logvar, seed=torch.tensor(7))
    assert torch.equal(e, fastvae.reparameterize(mu, logvar, seed=7))


@pytest.mark.parametrize("samples", [None, 2])
def test_fused_elbo_is_both(samples: int | None, seed: int) -> None:
    lead = () if samples is None else (samples,)
    x_hat, x = torch.rand(*lead, 6, 30, requires_grad=True), torch.rand(6, 30)
    mu, logvar = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    loss, z, kl = fastvae.fused_elbo(x_hat, x, mu, logvar, beta=0.5, seed=seed)
    z2, kl2 = fastvae.sample_and_kl(mu, logvar, n_samples=samples, seed=seed)
    loss2 = fastvae.elbo(x_hat, x, mu, logvar, beta=0.5).loss
    for a, b in zip((loss, z, kl), (loss2, z2, kl2), strict=True):
        torch.testing.assert_close(a, b)
    wrt = (x_hat, mu, logvar)
    got = torch.autograd.grad(loss + (z**2).sum() + (kl**2).sum(), wrt)
    for a, b in zip(got, torch.autograd.grad(loss2 + (z2**2).sum() + (kl2**2).sum(), wrt), strict=True):
        torch.testing.assert_close(a, b)


def test_fused_elbo_of_one_sample_and_one_datum() -> None:
    for batch in (1, 2):
        x, mu, logvar = torch.rand(batch, 5), torch.randn(batch, 3), torch.randn(batch, 3)
        for x_hat, shape in (
            (torch.rand(batch, 5), mu.shape),
            (torch.rand(batch, 1, 1, 5), mu.shape),
            (torch.rand(1, batch, 5), (1, *mu.shape)),
            (torch.rand(2, batch, 5), (2, *mu.shape)),
        ):
            assert fastvae.fused_elbo(x_hat, x, mu, logvar)[1].shape == shape


def test_errors_name_the_argument() -> None:
    mu = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="n_samples: got 0"):
        fastvae.sample_and_kl(mu, mu, n_samples=0)
    with pytest.raises(TypeError, match=r"n_samples: got 2\.0, expected an int"):
        fastvae.sample_and_kl(mu, mu, n_samples=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mu, logvar: got shapes \(3, 4\) and \(3, 5\)"):
        fastvae.sample_and_kl(mu, torch.zeros(3, 5))
    with pytest.raises(TypeError, match=r"mu: got dtype torch\.int64"):
        fastvae.sample_and_kl(mu.long(), mu)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_seed_and_offset_are_64_bits(impl: str, seed: int) -> None:
    for s, offset in ((seed + 2**63, 0), (2**64 - 1, 0), (seed, 2**63), (seed, 2**64 - 1)):
        signed = [n if n < 2**63 else n - 2**64 for n in (s, offset)]
        assert torch.equal(draw(impl, s, offset, 0, 2, 5), draw(impl, *signed, 0, 2, 5))
    assert torch.equal(draw(impl, torch.tensor([seed]), 0, 0, 2, 5), draw(impl, seed, 0, 0, 2, 5))
    given = draw(impl, np.uint64(2**63 + seed), np.int64(-1), np.int32(2), 2, 5)
    assert torch.equal(given, draw(impl, 2**63 + seed, -1, 2, 2, 5))
    mu = torch.zeros(3, 4)
    for wrong, error, message in (
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616, expected 64 bits"),
        ({"seed": 1.5}, TypeError, "seed: got 1.5, expected an int"),
        ({"seed": torch.tensor(1.5)}, TypeError, "seed: got a tensor of torch.float32"),
        ({"seed": torch.tensor([1, 2])}, TypeError, r"seed: got a tensor of torch.int64 and shape \(2,\)"),
        ({"seed": 1, "offset": -(2**63) - 1}, ValueError, "offset: got -9223372036854775809, expected 64"),
        ({"seed": 1, "first_row": -1}, ValueError, "first_row: got -1, expected at least 0"),
        ({"seed": 1, "first_row": 1.0}, TypeError, "first_row: got 1.0, expected an int"),
        ({"seed": "1"}, TypeError, "seed: got '1', expected an int"),
    ):
        for call in (fastvae.sample_and_kl, lambda m, v, **k: fastvae.fused_elbo(m, m, m, v, **k)):
            with pytest.raises(error, match=message):
                call(mu, mu, impl=impl, **wrong)


def test_a_seed_that_is_changed_before_backward_is_noticed(seed: int) -> None:
    """Backward makes the noise again."""
    mu, logvar = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    given = torch.tensor(seed)
    z = fastvae.reparameterize(mu, logvar, seed=given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), logvar)


def test_the_bits_of_a_seed(seed: int) -> None:
    """Those that runs with this seed had from the first version on."""
    torch.manual_seed(seed)
    expected = torch.empty((), dtype=torch.int64).random_(-(2**63), 2**63 - 1)
    for generator in (None, torch.Generator()):
        (torch if generator is None else generator).manual_seed(seed)
        assert torch.equal(random_bits(torch.device("cpu"), generator), expected)
