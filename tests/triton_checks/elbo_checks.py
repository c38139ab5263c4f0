"""Checks of the kernels' numbers, collected only by the process that tests/test_triton_interpreted.py starts.

The device comes from FASTVAE_CHECK_DEVICE: "cpu" under Triton's interpreter, or "cuda".
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from numerics import Case, check, make_inputs, run_backward, run_triton

from fastvae.ops import reference
from fastvae.ops import triton as launcher
from fastvae.ops.autograd import fused_elbo as differentiable
from fastvae.ops.types import Extents, Forward, Inputs, Needs, Spec

DEVICE = os.environ["FASTVAE_CHECK_DEVICE"]
BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8

CASES = {
    # shapes: one element, primes, several chunks, several row groups, K samples, nothing at all
    "one element": Case(batch=1, features=1, latents=1),
    "one feature": Case(batch=5, features=1, latents=4),
    "primes": Case(batch=13, features=101, latents=7),
    "mnist": Case(batch=5, features=784, latents=20),
    "chunks": Case(batch=2, features=4099, latents=1031),
    "chunks by row": Case(batch=3, features=4099, latents=6, recon_reduction="none", kl_reduction="none"),
    "row groups": Case(batch=131, features=3, latents=4),
    "samples": Case(samples=3, batch=5, features=16, latents=4),
    "no rows": Case(batch=0, features=16, latents=4, likelihood="gaussian", log_scale="learned"),
    "no rows by row": Case(batch=0, recon_reduction="none", kl_reduction="none", sample=True),
    # choices
    "half": Case(half=True, recon_reduction="sum", kl_reduction="mean"),
    "mean": Case(recon_reduction="mean", kl_reduction="sum", beta=0.3),
    "none": Case(recon_reduction="none", kl_reduction="none", weighted=True, upstream="strided"),
    "loss alone": Case(terms=False),
    "loss alone, none": Case(terms=False, recon_reduction="none", kl_reduction="none", features=4099),
    "weights": Case(weighted=True, beta=2.5),
    "beta tensor": Case(beta="scalar", weighted=True, upstream="loss"),
    "beta by latent": Case(beta="latents", weighted=True),
    "beta by latent, none": Case(beta="latents", recon_reduction="none", kl_reduction="none"),
    "beta zero": Case(beta=0.0),
    "clamp": Case(clamp=(-0.5, 0.75), latents=33),
    "kl given": Case(kl_given=True, weighted=True, beta=0.4),
    "kl given, none": Case(kl_given=True, recon_reduction="none", kl_reduction="none", features=4099),
    "gaussian": Case(likelihood="gaussian", log_scale=0.8),
    "gaussian learned": Case(likelihood="gaussian", log_scale="learned", weighted=True, samples=2),
    "gaussian none": Case(
        likelihood="gaussian", log_scale="learned", recon_reduction="none", kl_reduction="none"
    ),
    "bernoulli": Case(likelihood="bernoulli", features=64, latents=8),
    "bernoulli samples": Case(likelihood="bernoulli", samples=2, weighted=True, spread=8.0),
    "gaussian not full": Case(likelihood="gaussian", log_scale=0.3, full=False),
    "laplace": Case(likelihood="laplace", log_scale=-0.5, weighted=True),
    "laplace learned": Case(likelihood="laplace", log_scale="learned", samples=2, full=False, latents=8),
    "probabilities": Case(likelihood="probabilities", features=64, latents=8),
    "probabilities samples": Case(likelihood="probabilities", samples=2, weighted=True, x_dtype=UINT8),
    "scale by feature": Case(likelihood="gaussian", log_scale="features", weighted=True, samples=2),
    "scale by feature, many": Case(likelihood="gaussian", log_scale="features", batch=20, features=260),
    "scale by element": Case(likelihood="laplace", log_scale="elements", samples=3, weighted=True),
    "scale by sample": Case(
        likelihood="gaussian", log_scale="samples", samples=2, recon_reduction="none", kl_reduction="none"
    ),
    "free bits": Case(free_bits=0.4, weighted=True, beta=0.7),
    "free bits by latent": Case(free_bits=0.4, beta="latents", clamp=(-1.0, 1.0), latents=33),
    "free bits, none": Case(
        free_bits=0.3, recon_reduction="none", kl_reduction="none", features=4099, sample=True, latents=8
    ),
    # dtypes
    "bf16": Case(dtype=BF16, features=64, latents=16, likelihood="bernoulli"),
    "fp16": Case(dtype=FP16, upstream="large", likelihood="gaussian", log_scale="learned"),
    "mixed": Case(dtype=BF16, x_dtype=FP32, latent_dtype=FP16, beta="latents"),
    "bytes": Case(x_dtype=UINT8, features=784),
    "bytes bf16": Case(dtype=BF16, x_dtype=UINT8, likelihood="bernoulli"),
    # layouts
    "chunked": Case(layout="chunked", features=32, latents=8, sample=True),
    "transposed": Case(layout="transposed", samples=2, sample=True),
    "expanded": Case(layout="expanded", upstream="expanded", recon_reduction="none", kl_reduction="none"),
    "sliced scales": Case(layout="sliced", likelihood="gaussian", log_scale="samples", samples=2, dtype=BF16),
    "transposed scales": Case(layout="transposed", likelihood="laplace", log_scale="features"),
    "sliced": Case(layout="sliced", x_dtype=UINT8, sample=True),
    "unaligned": Case(layout="unaligned", features=64, latents=16, dtype=BF16, sample=True),
    "trailing": Case(layout="trailing", features=32, latents=8, samples=2, sample=True),
    # upstream gradients
    "upstream large": Case(upstream="large"),
    "upstream partial": Case(upstream="partial", sample=True),
    "upstream expanded": Case(upstream="expanded", sample=True, samples=2),
    # sampling
    "sample": Case(likelihood=None, sample=True, batch=7, latents=20),
    "sample odd": Case(likelihood=None, sample=True, batch=7, latents=13, first_row=3),
    "sample chunks": Case(likelihood=None, sample=True, batch=2, latents=1030, upstream="strided"),
    "sample bf16": Case(likelihood=None, sample=True, samples=3, dtype=BF16, latents=8),
    "sample far away": Case(likelihood=None, sample=True, latents=12, first_row=2**31 + 5, offset=2**32 + 7),
    "sample clamp": Case(likelihood=None, sample=True, samples=2, clamp=(-1.0, 0.5), latents=4),
    "fused": Case(sample=True, likelihood="bernoulli", latents=8, beta="scalar"),
    "fused none": Case(
        sample=True, samples=2, recon_reduction="none", kl_reduction="none", weighted=True, features=4099
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, seed: int) -> None:
    check(CASES[name], DEVICE, seed)


@pytest.mark.parametrize("spread", [1e-4, 0.03, 3.0, 30.0])
def test_kl_over_magnitudes(spread: float) -> None:
    """f(v) by its series and by exp, relative to float64 in each element."""
    logvar = spread * torch.linspace(-1, 1, 64, dtype=torch.float64).float()[:, None].to(DEVICE)
    kl = _sample_and_kl(torch.zeros_like(logvar), logvar)[1]
    v = logvar.double()[:, 0]
    truth = 0.5 * (torch.expm1(v) - v)
    series = 0.5 * v * v * (0.5 + v * (1 / 6 + v * (1 / 24 + v / 120)))
    truth = torch.where(v.abs() < 1e-2, series, truth)
    assert (kl >= 0).all()
    assert ((kl.double() - truth).abs() <= 1e-6 * truth).all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_hard_inputs(dtype: torch.dtype) -> None:
    """KL and gradients from logvar -100 to 100, with |mu| to 1e4, and KL terms down to 1e-9."""
    logvar = torch.cat([torch.linspace(-100, 100, 41), 10.0 ** torch.linspace(-4.2, 0, 23)])[:, None]
    mu = (torch.linspace(-1e4, 1e4, 64)[:, None] * torch.tensor([0.0, 1.0]).repeat(32)[:, None]).to(
        DEVICE, dtype
    )
    logvar = logvar.to(DEVICE, dtype)
    spec, extents = Spec(sample=True), Extents(1, 64, 0, 1)
    inputs = Inputs(mu=mu, logvar=logvar, seed=7)
    values = launcher.forward(inputs, spec, extents)
    assert values.z is not None
    assert values.kl_rows is not None
    m, v = mu.double()[:, 0], logvar.double()[:, 0]
    series = v * v * (0.5 + v * (1 / 6 + v * (1 / 24 + v / 120)))
    twice = m * m + torch.where(v.abs() < 1e-3, series, torch.expm1(v) - v)
    overflows = twice.float().isinf()
    assert torch.equal(values.kl_rows.isinf(), overflows)
    truth = 0.5 * twice[~overflows]
    assert ((values.kl_rows.double()[~overflows] - truth).abs() <= 1e-6 * truth).all()
    assert not values.z.isnan().any()

    upstream, needs = Forward(kl_rows=torch.ones(64, device=DEVICE)), Needs(False, True, True, False, False)
    gradients = launcher.backward(inputs, spec, extents, upstream, needs)
    assert gradients.mu is not None
    assert gradients.logvar is not None
    assert torch.equal(gradients.mu, mu)
    held = (0.5 * torch.expm1(v).float()).to(dtype)
    got, finite = gradients.logvar[:, 0], held.isfinite()
    assert torch.equal(got.isinf(), held.isinf())
    rtol = 2e-6 if dtype == FP32 else torch.finfo(dtype).eps
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got[finite], held[finite], rtol=rtol, atol=step)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "bernoulli", "laplace", "probabilities"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rows_stay_in_their_row(likelihood: str, bad: float) -> None:
    case = Case(
        likelihood=likelihood, batch=4, recon_reduction="none", kl_reduction="none", clamp=(-3.0, 3.0)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    inputs = make_inputs(case, generator, DEVICE)
    clean, _, _ = run_triton(case, inputs, generator, DEVICE)
    assert inputs.x_hat is not None
    assert inputs.logvar is not None
    inputs.x_hat[1, 2] = bad
    inputs.logvar[2, 3] = math.nan
    spoiled, gradients, _ = run_triton(case, inputs, generator, DEVICE)
    assert clean.recon is not None
    assert spoiled.recon is not None
    assert spoiled.kl is not None
    assert spoiled.loss is not None
    assert gradients.x_hat is not None
    assert gradients.mu is not None
    others = torch.tensor([0, 2, 3], device=DEVICE)
    assert torch.equal(spoiled.recon[others], clean.recon[others])
    assert not spoiled.recon[1].isfinite()
    assert spoiled.kl.isnan().tolist() == [False, False, True, False]
    assert spoiled.loss.isfinite().tolist() == [True, False, False, True]
    assert gradients.x_hat[others].isfinite().all()
    assert gradients.mu.isfinite().all()


@pytest.mark.parametrize("dropped", ["beta", "beta tensor", "beta by latent", "weight"])
def test_a_factor_of_zero_drops_an_infinite_term(dropped: str) -> None:
    case = Case(batch=3, latents=5, features=7)
    inputs = make_inputs(case, torch.Generator().manual_seed(2), DEVICE)
    assert inputs.logvar is not None
    inputs.logvar[0, 1] = 200.0  # exp overflows
    if dropped == "beta":
        inputs = inputs._replace(beta=0.0)
    elif dropped == "beta tensor":
        inputs = inputs._replace(beta=torch.zeros((), device=DEVICE))
    elif dropped == "beta by latent":
        inputs = inputs._replace(beta=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], device=DEVICE))
    else:
        inputs = inputs._replace(weight=torch.tensor([0.0, 1.0, 1.0], device=DEVICE))
    values = launcher.forward(inputs, case.spec, case.extents)
    gradients = run_backward(case, inputs, [torch.ones((), device=DEVICE), None, None, None, None])
    assert values.loss is not None
    assert values.kl is not None
    assert values.loss.isfinite()
    assert values.kl.isfinite() == (dropped == "weight")
    for gradient in (gradients.mu, gradients.logvar, gradients.x_hat):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert gradients.logvar is not None
    assert gradients.logvar[0, 1] == 0


def test_softplus_keeps_its_digits_in_the_tail() -> None:
    """-log p of a sure and right answer is e^-|l|, far below 1."""
    logits = torch.tensor([-80.0, -30.0, -5.0, 5.0, 30.0, 80.0], device=DEVICE)[:, None]
    x = (logits > 0).float()
    inputs = Inputs(logits, x, kl=torch.zeros(6, device=DEVICE))
    spec, extents = Spec("bernoulli", "none", "none"), Extents(1, 6, 1, 1)
    values = launcher.forward(inputs, spec, extents)
    truth = torch.log1p(torch.exp(-logits.double().abs()))[:, 0]
    assert values.recon is not None
    assert ((values.recon.double() - truth).abs() <= 1e-6 * truth).all()
    needs = Needs(True, False, False, False, False)
    slope = launcher.backward(inputs, spec, extents, Forward(torch.ones(6, device=DEVICE)), needs).x_hat
    assert slope is not None
    truth = torch.sigmoid(-logits.double().abs()) * -logits.sign()
    assert ((slope.double() - truth).abs() <= 1e-6 * truth.abs()).all()


def test_through_autograd_twice() -> None:
    """As the operators call it: gradients of a loss and of z, and once more from a retained graph."""
    case = Case(sample=True, likelihood="gaussian", log_scale="learned", kl_reduction="mean")
    inputs = make_inputs(case, torch.Generator().manual_seed(5), DEVICE)
    leaves = [inputs.x_hat, inputs.mu, inputs.logvar, inputs.log_scale]
    for leaf in leaves:
        leaf.requires_grad_()
    result = differentiable(inputs, case.spec, case.extents, launcher)
    assert result.loss is not None
    assert result.z is not None
    total = 3 * result.loss + result.z.sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    upstream = [torch.tensor(3.0, device=DEVICE), None, None, torch.ones_like(result.z), None]
    expected = run_backward(case, inputs, upstream)
    for one, two, value in zip(first, second, [g for g in expected if g is not None], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, value)


def test_only_the_needed_gradients_are_made() -> None:
    case = Case(sample=True)
    generator = torch.Generator().manual_seed(3)
    inputs = make_inputs(case, generator, DEVICE)
    _, every, upstream = run_triton(case, inputs, generator, DEVICE)
    for wanted in ("x_hat", "mu", "logvar"):
        needs = Needs(*(name == wanted for name in Needs._fields))
        got = launcher.backward(inputs, case.spec, case.extents, Forward(*upstream), needs)
        for name, gradient in got._asdict().items():
            if name == wanted:
                torch.testing.assert_close(gradient, getattr(every, name))
            else:
                assert gradient is None


def test_float64_is_refused_by_name() -> None:
    inputs = make_inputs(Case(), torch.Generator(), DEVICE)
    assert inputs.logvar is not None
    inputs = inputs._replace(logvar=inputs.logvar.double())
    with pytest.raises(TypeError, match=r"logvar: .*got float64, expected float32"):
        launcher.forward(inputs, Case().spec, Case().extents)


def test_probabilities_at_their_ends() -> None:
    """As F.binary_cross_entropy: logarithms bounded at -100, slopes at a spread of 1e-12."""
    p = torch.tensor([0.0, 1e-45, 1e-40, 1e-30, 1e-8, 0.29, 0.3, 0.5, 0.9999999, 1.0], device=DEVICE)
    for target in (0.0, 0.3, 1.0):
        x = torch.full_like(p, target)
        leaf = p.clone().requires_grad_()
        truth = torch.nn.functional.binary_cross_entropy(leaf, x, reduction="none")
        (slope,) = torch.autograd.grad(truth.sum(), leaf)
        extents = Extents(1, p.numel(), 1, 1)
        inputs = Inputs(p[:, None], x[:, None], kl=torch.zeros_like(p))
        spec = Spec("probabilities", "none", "none")
        got = launcher.forward(inputs, spec, extents).recon
        torch.testing.assert_close(got, truth.detach(), rtol=1e-6, atol=1e-9)
        upstream, needs = Forward(torch.ones_like(p)), Needs(True, False, False, False, False)
        got = launcher.backward(inputs, spec, extents, upstream, needs).x_hat
        assert got is not None
        torch.testing.assert_close(got[:, 0], slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_a_scale_without_a_reciprocal_makes_no_nan(likelihood: str) -> None:
    x = torch.rand(3, 4, device=DEVICE)
    inputs = Inputs(x, x.clone(), kl=torch.zeros(3, device=DEVICE), log_scale=-300.0)
    spec, extents = Spec(likelihood), Extents(1, 3, 4, 1)
    values = launcher.forward(inputs, spec, extents)
    assert values.loss is not None
    assert values.loss.isfinite()
    upstream, needs = Forward(torch.ones((), device=DEVICE)), Needs(True, False, False, False, False)
    gradient = launcher.backward(inputs, spec, extents, upstream, needs).x_hat
    assert gradient is not None
    assert not gradient.any()


def test_rows_may_lie_further_apart_than_2_31_elements() -> None:
    """row * stride beyond 32 bits, where each factor fits: the memory between the rows is never touched."""
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + 16, dtype=UINT8, device=DEVICE)
    x = memory.as_strided((3, 16), (stride, 1))
    x.fill_(0)
    x[2] = 255
    inputs = Inputs(torch.zeros(3, 16, device=DEVICE), x, kl=torch.zeros(3, device=DEVICE))
    spec, extents = Spec("mse", "none", "none"), Extents(1, 3, 16, 1)
    recon = launcher.forward(inputs, spec, extents).recon
    assert recon is not None
    assert recon.tolist() == [0, 0, 16]
    upstream, needs = Forward(torch.ones(3, device=DEVICE)), Needs(True, False, False, False, False)
    gradient = launcher.backward(inputs, spec, extents, upstream, needs).x_hat
    assert gradient is not None
    assert gradient.sum(1).tolist() == [0, 0, -32]


def test_one_sample_of_one_feature_that_is_not_contiguous() -> None:
    """x_hat is [K, B] beside an x of [B]: two dimensions that are not those of data and features."""
    x_hat = torch.stack([torch.arange(5.0), torch.full((5,), 9.0)], 1).to(DEVICE).t()[:1]
    x, kl = torch.zeros(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    values = launcher.forward(Inputs(x_hat, x, kl=kl), Spec("mse", "none", "none"), Extents(1, 5, 1, 1))
    assert values.recon is not None
    assert values.recon.tolist() == [0, 1, 4, 9, 16]


def test_no_latents_and_no_beta_of_any() -> None:
    x_hat, x = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    none = torch.zeros(3, 0, device=DEVICE)
    inputs = Inputs(x_hat, x, none, none, beta=torch.zeros(0, device=DEVICE))
    values = launcher.forward(inputs, Spec("mse"), Extents(1, 3, 4, 0))
    assert values.loss is not None
    assert values.loss.item() == 4


@pytest.mark.parametrize(("batch", "latents"), [(0, 3), (5, 1), (70, 300), (1300, 20)])
def test_kl_of_each_latent(batch: int, latents: int) -> None:
    case = Case(
        likelihood=None, batch=batch, latents=latents, clamp=(-1.0, 1.0), weighted=True, layout="chunked"
    )
    inputs = make_inputs(case, torch.Generator().manual_seed(2), DEVICE)
    got = launcher.latent_kl_sums(inputs, case.spec, case.extents)
    wide = Inputs(*(v.double() if isinstance(v, torch.Tensor) else v for v in inputs))
    truth = reference.latent_kl_sums(wide, case.spec, case.extents)
    assert got.shape == (latents,)
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-9)


def _sample_and_kl(mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    extents = Extents(1, mu.shape[0], 0, mu.shape[1])
    values = launcher.forward(Inputs(mu=mu, logvar=logvar, seed=7), Spec(sample=True), extents)
    assert values.z is not None
    assert values.kl_rows is not None
    return values.z, values.kl_rows


@pytest.mark.parametrize("features", [65536, 196608])
def test_programs_walk_about_the_same_way(features: int) -> None:
    """A GPU has nothing to do where some of its programs have ended and others walk on."""
    for batch in range(100, 5000, 7):
        cut = launcher.plan(batch, features, 20, multiprocessors=132)
        assert cut.row_programs * cut.splits <= 528
        chunks = -(-features // cut.block_d)
        longest = -(-batch // cut.row_programs) * -(-chunks // cut.splits)
        assert batch * chunks / 528 >= 0.75 * longest, (batch, cut)
