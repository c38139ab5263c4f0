"""The operators on CPU tensors, each implementation against float64: values and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate, by_hand
from timing import memory_peak
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.dlpack import from_dlpack

import fastvae
from fastvae import _native
from fastvae.ops import native
from fastvae.ops.types import Extents, Inputs, Needs, Spec

IMPLS = ["reference", "native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIKELIHOODS = ["mse", "gaussian", "bernoulli"]
SHAPES = [(128, 784, 20), (1, 1, 1), (7, 131, 13), (3, 5000, 1500), (2, 4097, 1025), (61, 17, 3)]

pytestmark = pytest.mark.usefixtures("seed")


def inputs(
    batch: int, features: int, latents: int, dtype: torch.dtype, lead: tuple[int, ...] = ()
) -> list[Tensor]:
    """x_hat, x, mu, logvar; x in [0, 1]."""
    return [
        torch.randn(*lead, batch, features).to(dtype),
        torch.rand(batch, features).to(dtype),
        torch.randn(batch, latents).to(dtype),
        torch.randn(batch, latents).to(dtype),
    ]


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], wrt: tuple[int, ...] = (0, 2, 3)
) -> list[Tensor]:
    """The value and the gradients with respect to x_hat, mu and logvar."""
    leaves = [t.detach().clone().requires_grad_(i in wrt) for i, t in enumerate(tensors)]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [leaves[i] for i in wrt])]


def check(loss: Callable[..., Tensor], hand: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """`loss` on the tensors as they are, against `hand` in float64 and in float32."""
    actual = gradients(loss, tensors)
    eager = gradients(hand, [t.float() for t in tensors])
    truth = gradients(hand, [t.double() for t in tensors])
    for name, a, e, t in zip(("loss", "d x_hat", "d mu", "d logvar"), actual, eager, truth, strict=True):
        assert_accurate(name, a, e, t)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(
    impl: str, dtype: torch.dtype, likelihood: str, shape: tuple[int, int, int]
) -> None:
    options = {"likelihood": likelihood, "beta": 0.7}
    if likelihood == "gaussian":
        options["log_variance"] = -1.3

    def hand(*tensors: Tensor) -> Tensor:
        recon, kl = by_hand(*tensors, **options)
        return (recon + kl).mean()

    check(lambda *t: fastvae.elbo(*t, impl=impl, **options).loss, hand, inputs(*shape, dtype))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_float64_is_computed_in_float64(likelihood: str) -> None:
    tensors = inputs(5, 77, 9, torch.float64)

    def hand(*t: Tensor) -> Tensor:
        return sum(by_hand(*t, likelihood=likelihood)).mean()

    actual = gradients(lambda *t: fastvae.elbo(*t, likelihood=likelihood, impl="native").loss, tensors)
    for a, t in zip(actual, gradients(hand, tensors), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, t, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "reductions", [*itertools.product(["sum", "mean", "batchmean"], repeat=2), ("none", "none")]
)
def test_reductions_weights_and_upstream(impl: str, reductions: tuple[str, str]) -> None:
    batch, features, latents = 11, 37, 5
    tensors = inputs(batch, features, latents, torch.float32)
    weight = torch.rand(batch)
    weight[3] = 0
    # of one sign, so that the sums do not cancel
    upstream = -0.1 - torch.rand(batch) if reductions[0] == "none" else torch.tensor(-65536.0)
    scales = {
        "none": (1.0, 1.0),
        "sum": (1.0, 1.0),
        "mean": (1 / (batch * features), 1 / (batch * latents)),
        "batchmean": (1 / batch, 1 / batch),
    }

    def hand(*t: Tensor) -> Tensor:
        recon, kl = by_hand(*t, beta=3.0)
        w = weight.to(recon.dtype)
        recon, kl = w * recon * scales[reductions[0]][0], w * kl * scales[reductions[1]][1]
        total = recon + kl if reductions[0] == "none" else recon.sum() + kl.sum()
        return (total * upstream.to(recon.dtype)).sum()

    def ours(*t: Tensor) -> Tensor:
        terms = fastvae.elbo(
            *t, beta=3.0, weight=weight, recon_reduction=reductions[0], kl_reduction=reductions[1], impl=impl
        )
        return (terms.loss * upstream).sum()

    check(ours, hand, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_term_is_differentiable(impl: str) -> None:
    tensors = inputs(6, 33, 7, torch.float32)

    def mix(loss: Tensor, recon: Tensor, kl: Tensor) -> Tensor:
        return 0.3 * loss - 2 * recon + 5 * kl

    def hand(*t: Tensor) -> Tensor:
        recon, kl = (term.mean() for term in by_hand(*t))
        return mix(recon + 0.5 * kl, recon, kl)

    check(lambda *t: mix(*fastvae.elbo(*t, beta=0.5, impl=impl)), hand, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_samples_lead_and_are_averaged(impl: str) -> None:
    tensors = inputs(5, 41, 6, torch.float32, lead=(3,))
    check(lambda *t: fastvae.elbo(*t, impl=impl).loss, lambda *t: sum(by_hand(*t)).mean(), tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_beta_as_tensor(impl: str) -> None:
    tensors = inputs(8, 20, 6, torch.float32)
    for beta in (torch.tensor(0.25), torch.rand(6)):
        check(
            lambda *t, b=beta: fastvae.elbo(*t, beta=b, impl=impl).loss,
            lambda *t, b=beta: sum(by_hand(*t, beta=b.to(t[0].dtype))).mean(),
            tensors,
        )
        leaf = beta.clone().requires_grad_()
        (got,) = torch.autograd.grad(fastvae.elbo(*tensors, beta=leaf, impl=impl).loss, leaf)
        kl = 0.5 * (tensors[2] ** 2 + tensors[3].exp() - 1 - tensors[3])
        want = kl.mean(0).sum() if beta.ndim == 0 else kl.mean(0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_given(impl: str) -> None:
    x_hat, x, mu, logvar = inputs(9, 30, 4, torch.float32)
    _, kl = by_hand(x_hat, x, mu, logvar)
    kl.requires_grad_()
    given = fastvae.elbo(x_hat, x, kl=kl, beta=0.3, impl=impl)
    computed = fastvae.elbo(x_hat, x, mu, logvar, beta=0.3, impl=impl)
    for a, b in zip(given, computed, strict=True):
        torch.testing.assert_close(a, b)
    (got,) = torch.autograd.grad(given.loss, kl)
    torch.testing.assert_close(got, torch.full((9,), 0.3 / 9))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_learned_variance(impl: str, reduction: str) -> None:
    tensors = inputs(7, 300, 3, torch.float32)

    def ours(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, s: Tensor) -> Tensor:
        return fastvae.elbo(
            x_hat, x, mu, logvar, likelihood="gaussian", log_variance=s, reduction=reduction, impl=impl
        ).loss.mean()

    def hand(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, s: Tensor) -> Tensor:
        return sum(by_hand(x_hat, x, mu, logvar, likelihood="gaussian", log_variance=s)).mean()

    tensors.append(torch.tensor(0.4))
    wrt = (0, 2, 3, 4)
    actual = gradients(ours, tensors, wrt)
    eager = gradients(hand, tensors, wrt)
    truth = gradients(hand, [t.double() for t in tensors], wrt)
    names = ("loss", "x_hat", "mu", "logvar")
    for name, a, e, t in zip(names, actual, eager, truth, strict=False):
        assert_accurate(name, a, e, t)
    # a difference of large sums: relative to them, and not to itself
    torch.testing.assert_close(actual[4].double(), truth[4], rtol=0, atol=300 * 2e-7)


def strided(kind: str, t: Tensor) -> Tensor:
    """The same values in other storage."""
    if kind == "chunked":
        return torch.cat([torch.randn_like(t), t], -1).chunk(2, -1)[1]
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    if kind == "unaligned":
        flat = t.new_zeros(t.numel() + 1)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    if kind == "negated":  # as the imaginary part of z.conj() is
        return torch._neg_view(-t)
    return t[:1].expand_as(t)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["chunked", "transposed", "sliced", "unaligned", "negated", "expanded"])
def test_strides(impl: str, dtype: torch.dtype, kind: str) -> None:
    tensors = [strided(kind, t) for t in inputs(12, 100, 8, dtype)]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    loss = fastvae.ELBOLoss(impl=impl)

    def run(values: list[Tensor]) -> list[Tensor]:
        # alias: a leaf would be made contiguous
        leaves = [v.detach().requires_grad_() for v in values]
        return [loss(*leaves).detach(), *torch.autograd.grad(loss(*leaves), leaves)]

    exact = {"rtol": 0, "atol": 0} if impl == "native" else {}
    for a, b in zip(run(tensors), run(plain), strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_trailing_shape(impl: str) -> None:
    x = torch.rand(4, 3, 8, 10).to(memory_format=torch.channels_last)
    x_hat = torch.rand(4, 3, 8, 10, requires_grad=True)
    mu, logvar = torch.randn(4, 2, 3, 5), torch.randn(4, 4, 3, 5)[:, 2:]
    loss = fastvae.elbo(x_hat, x, mu, logvar, impl=impl).loss
    flat = [t.reshape(4, -1) for t in (x_hat, x, mu, logvar)]
    expected = sum(by_hand(*flat)).mean()
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, x_hat)
    torch.testing.assert_close(got, 2 * (x_hat - x).detach() / 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_uint8_means_x_over_255(impl: str) -> None:
    x = torch.randint(0, 256, (5, 40), dtype=torch.uint8)
    x_hat, _, mu, logvar = inputs(5, 40, 3, torch.float32)
    a = fastvae.elbo(x_hat, x, mu, logvar, impl=impl).loss
    b = fastvae.elbo(x_hat, x.float() / 255, mu, logvar, impl=impl).loss
    assert a == b
    a = fastvae.elbo(x_hat.double(), x, mu, logvar, impl=impl).loss
    b = fastvae.elbo(x_hat.double(), x.double() / 255, mu, logvar, impl=impl).loss
    assert a == b


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_hard_inputs(impl: str, dtype: torch.dtype) -> None:
    """The KL and its gradients where the textbook formula in float32 cancels or overflows."""
    logvar = torch.cat([torch.linspace(-100, 100, 400), 10.0 ** torch.linspace(-8, 0, 50)])[:, None].to(dtype)
    mu = torch.linspace(-1e4, 1e4, 450)[:, None] * torch.tensor([0.0, 1.0]).repeat(225)[:, None]
    mu = mu.to(dtype)
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    x = torch.zeros(450, 1)
    kl = fastvae.elbo(x, x, *leaves, reduction="none", impl=impl).kl
    m, v = mu.double()[:, 0], logvar.double()[:, 0]
    # f(v) by its series where even float64 cancels
    f = torch.where(v.abs() < 1e-3, v**2 * (0.5 + v / 6 + v**2 / 24 + v**3 / 120), torch.expm1(v) - v)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert kl.dtype == compute
    assert (kl >= 0).all()
    overflows = (m**2 + f).to(compute).isinf()  # the KL is half of a number that must be held
    assert torch.equal(kl.isinf(), overflows)
    truth = (0.5 * m**2 + 0.5 * f)[~overflows]
    torch.testing.assert_close(kl.double()[~overflows], truth, rtol=1e-6, atol=0)
    d_mu, d_logvar = torch.autograd.grad(kl.sum(), leaves)
    assert torch.equal(d_mu, mu)
    held = (0.5 * torch.expm1(v).to(compute)).to(dtype)
    finite = held.isfinite()
    assert torch.equal(d_logvar[:, 0].isinf(), held.isinf())
    rtol = 1e-6 + torch.finfo(dtype).eps * (dtype != torch.float64)
    # fp16: below its normal numbers a rounding is an absolute step
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(d_logvar[finite, 0].double(), held[finite].double(), rtol=rtol, atol=step)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_upstream_gradients_as_they_come(impl: str, dtype: torch.dtype) -> None:
    """By datum: expanded, strided, negative and large, and none for a term that nobody used."""
    tensors = [t.requires_grad_(i != 1) for i, t in enumerate(inputs(6, 31, 5, dtype))]
    wrt = [tensors[0], tensors[2], tensors[3]]
    terms = fastvae.elbo(*tensors, reduction="none", beta=0.5, impl=impl)
    wide = torch.randn(12, dtype=terms.loss.dtype) * 65536
    for g in (torch.tensor(-2.0, dtype=wide.dtype).expand(6), wide[::2], wide[6:], torch._neg_view(wide[6:])):
        got = torch.autograd.grad([terms.loss, terms.kl], wrt, [g, g], retain_graph=True)
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        recon, kl = by_hand(*doubles)
        truth = torch.autograd.grad(((recon + 1.5 * kl) * g).sum(), [doubles[0], doubles[2], doubles[3]])
        for a, t in zip(got, truth, strict=True):
            bar = max(torch.finfo(dtype).eps, 1e-6) * t.abs().max()
            assert torch.equal(a.isinf(), t.to(dtype).isinf())  # float16 holds 65504
            assert ((a.double() - t)[a.isfinite()].abs() <= bar).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_bernoulli_far_logits(impl: str) -> None:
    logits = torch.tensor([[-1e4, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1e4]])
    mu = torch.zeros(1, 1)
    for target in (0.0, 0.25, 1.0):
        x = torch.full_like(logits, target)
        leaf = logits.clone().requires_grad_()
        recon = fastvae.elbo(leaf, x, mu, mu, likelihood="bernoulli", reduction="sum", impl=impl).recon
        (got,) = torch.autograd.grad(recon, leaf)
        wide = logits.double().requires_grad_()
        truth = by_hand(wide, x.double(), mu, mu, likelihood="bernoulli")[0].sum()
        (expected,) = torch.autograd.grad(truth, wide)
        torch.testing.assert_close(recon.double(), truth, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_inf_stay_in_their_rows(impl: str) -> None:
    x_hat, x, mu, logvar = inputs(6, 20, 4, torch.float32)
    x_hat[1, 3], mu[2, 0], logvar[4, 1] = math.nan, math.inf, math.nan
    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
    loss = fastvae.elbo(
        leaves[0], x, leaves[1], leaves[2], reduction="none", logvar_clamp=(-30, 20), impl=impl
    ).loss
    assert torch.isfinite(loss).tolist() == [True, False, False, True, False, True]
    assert torch.isinf(loss[2])
    for g in torch.autograd.grad(loss.sum(), leaves):
        assert torch.isfinite(g[[0, 3, 5]]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_factors_drop_infinite_terms(impl: str) -> None:
    x_hat, x, mu, logvar = inputs(3, 10, 2, torch.float32)
    logvar[1] = 1000.0
    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
    for beta in (0.0, torch.tensor(0.0), torch.zeros(2)):
        loss = fastvae.elbo(leaves[0], x, *leaves[1:], beta=beta, impl=impl).loss
        torch.testing.assert_close(loss, ((x_hat - x) ** 2).sum(1).mean())
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[2].any()
    weight = torch.tensor([1.0, 0.0, 1.0])
    loss = fastvae.elbo(leaves[0], x, *leaves[1:], weight=weight, impl=impl).loss
    assert torch.isfinite(loss)
    for g in torch.autograd.grad(loss, leaves):
        assert torch.isfinite(g).all()
        assert not g[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_error_has_no_part_in_the_gradients_of_the_kl(impl: str) -> None:
    x_hat, x, mu, logvar = inputs(3, 10, 2, torch.float32)
    x_hat[1, 2] = math.inf
    s = torch.tensor(0.3)
    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar, s)]
    terms = fastvae.elbo(x_hat, x, mu, logvar, likelihood="gaussian", log_variance=s, beta=0.5, impl=impl)
    of_kl = torch.autograd.grad(terms.kl, leaves, retain_graph=True, materialize_grads=True)
    assert not of_kl[0].any()
    assert torch.isfinite(of_kl[1]).all()
    assert not of_kl[3]


@pytest.mark.parametrize("impl", IMPLS)
def test_logvar_clamp(impl: str) -> None:
    x_hat, x, mu, _ = inputs(5, 10, 1, torch.float32)
    logvar = torch.tensor([[-31.0], [-30.0], [0.3], [20.0], [21.0]], requires_grad=True)
    loss = fastvae.elbo(x_hat, x, mu, logvar, reduction="sum", logvar_clamp=(-30, 20), impl=impl).loss
    bounded = logvar.detach().clamp(-30, 20).requires_grad_()
    expected = fastvae.elbo(x_hat, x, mu, bounded, reduction="sum", impl="reference").loss
    torch.testing.assert_close(loss, expected)
    (got,), (want,) = torch.autograd.grad(loss, logvar), torch.autograd.grad(expected, bounded)
    torch.testing.assert_close(got, want * (logvar == bounded))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(0, 10, 2, torch.float32)]
    loss = fastvae.elbo(*tensors, impl=impl).loss
    assert loss == 0
    assert [g.shape for g in torch.autograd.grad(loss, tensors)] == [t.shape for t in tensors]
    assert fastvae.elbo(*tensors, reduction="none", impl=impl).loss.shape == (0,)
    z, kl = fastvae.sample_and_kl(tensors[2], tensors[3], impl=impl)
    assert z.shape == (0, 2)
    assert kl.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1.0, 65536.0, -3.0, 0.0])
def test_two_backward_passes_agree_whatever_is_done_to_the_first(impl: str, scale: float) -> None:
    tensors = [t.requires_grad_() for t in inputs(4, 30, 3, torch.float32)]
    wrt = [tensors[0], tensors[2], tensors[3]]
    loss = fastvae.elbo(*tensors, impl=impl).loss
    g = torch.tensor(scale)
    first = torch.autograd.grad(loss, wrt, g, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.fill_(math.nan)
    for a, b in zip(kept, torch.autograd.grad(loss, wrt, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_scaled_before_rounding(dtype: torch.dtype) -> None:
    """A loss scale must rescue gradients that would underflow: it is applied in float32."""
    x_hat, x, mu, logvar = inputs(4, 30, 3, dtype)
    tiny = 2.0**-20
    x_hat = (x.float() + tiny * torch.randn(4, 30)).to(dtype).requires_grad_()
    loss = fastvae.elbo(x_hat, x, mu, logvar, reduction="mean").loss
    (got,) = torch.autograd.grad(loss * 65536, x_hat)
    expected = 2 * 65536 * (x_hat.detach().double() - x.double()) / x.numel()
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_double_backward(likelihood: str) -> None:
    x_hat, x, mu, logvar = (t.double() for t in inputs(3, 5, 2, torch.float32))
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=likelihood == "gaussian")
    leaves = [t.requires_grad_() for t in (x_hat, x, mu, logvar)]

    def loss(*t: Tensor) -> Tensor:
        given = {"log_variance": s} if likelihood == "gaussian" else {}
        return fastvae.elbo(*t, likelihood=likelihood, impl="native", **given).loss

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_with_a_beta_of_zero(impl: str) -> None:
    """It is learned too: the derivative by beta and mu is that of the KL by mu."""
    x_hat, x, *latents = (t.double() for t in inputs(3, 5, 2, torch.float32))
    beta = torch.tensor([0.0, 0.7], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*latents, beta)]

    def loss(mu: Tensor, logvar: Tensor, beta: Tensor) -> Tensor:
        return fastvae.elbo(x_hat, x, mu, logvar, beta=beta, impl=impl).loss

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_double_backward_through_a_decoder() -> None:
    """x_hat depends on mu: the partial derivative by mu must not run through x_hat as well."""
    decoder = torch.nn.Linear(3, 8).double()
    x, logvar = torch.rand(4, 8).double(), torch.zeros(4, 3).double()
    mu = torch.randn(4, 3).double().requires_grad_()

    def through(impl: str) -> Tensor:
        loss = fastvae.elbo(torch.tanh(decoder(mu)), x, mu, logvar, impl=impl).loss
        (g,) = torch.autograd.grad(loss, mu, create_graph=True)
        return torch.autograd.grad((g**3).sum(), mu)[0]

    torch.testing.assert_close(through("native"), through("reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrt", ["x", "weight", "x and weight"])
def test_gradients_of_x_and_weight(impl: str, wrt: str) -> None:
    x_hat, x, mu, logvar = inputs(5, 12, 3, torch.float32)
    weight = torch.rand(5)
    leaves = [t.requires_grad_() for name, t in (("x", x), ("weight", weight)) if name in wrt.split()]
    loss = fastvae.elbo(x_hat, x, mu, logvar, weight=weight, impl=impl).loss
    got = torch.autograd.grad(loss, leaves)
    recon, kl = by_hand(x_hat, x, mu, logvar)
    expected = torch.autograd.grad((weight * (recon + kl)).mean(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_gradient_of_a_weight_of_zero_is_that_of_its_row(impl: str, likelihood: str) -> None:
    given = [t.double() for t in inputs(4, 6, 2, torch.float32)]
    weight = torch.tensor([1.5, 0.0, 0.0, -1.0], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*given, weight)]

    def loss(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor) -> Tensor:
        return fastvae.elbo(x_hat, x, mu, logvar, weight=weight, likelihood=likelihood, impl=impl).loss

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    with torch.no_grad():
        given[0][1] = math.inf
        given[3][2] = math.inf
    for g in torch.autograd.grad(loss(*leaves), leaves):
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("real64", [False, True])
def test_bits_do_not_depend_on_threads_or_instruction_set(
    likelihood: str, real64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if real64 else torch.float32
    x_hat, x, mu, logvar = inputs(5, 20011, 1031, dtype)
    spec, extents = Spec(likelihood, sample=True), Extents(1, 5, 20011, 1031)
    needs = Needs(True, True, True, False, likelihood == "gaussian")
    log_scale = torch.tensor(0.2) if likelihood == "gaussian" else 0.0
    inputs_ = Inputs(x_hat, x, mu, logvar, log_scale=log_scale, seed=3)
    plain = _native.elbo

    def run(isa: str, threads: int) -> list[Tensor]:
        pinned = lambda *a: plain(*a[:2], threads, *a[3:], instruction_set=isa)  # noqa: E731
        monkeypatch.setattr(native._native, "elbo", pinned)
        values, grads = native.forward_and_gradients(inputs_, spec, extents, needs)
        return [t for t in (*values, *grads) if t is not None]

    runs = [run(isa, threads) for isa in _native.instruction_sets() for threads in (1, 2, 3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_hat": torch.rand(4, 9)}, r"x_hat: got shape \(4, 9\)"),
        ({"x_hat": torch.zeros(4, 10, dtype=torch.int64)}, "x_hat: got dtype torch.int64"),
        ({"x": torch.zeros(4, 10, dtype=torch.int32)}, "x: got dtype torch.int32"),
        (
            {"x_hat": torch.zeros(4, 10).to(torch.float8_e4m3fn)},
            "x_hat: got dtype torch.float8_e4m3fn",
        ),
        ({"x": torch.zeros(4, 10).to(torch.float8_e5m2)}, "x: got dtype torch.float8_e5m2, expected"),
        ({"x_hat": None}, "x_hat: got NoneType, expected a tensor"),
        ({"beta": [0.5, 1.0, 2.0]}, "beta: got list, expected a number or a tensor"),
        ({"beta": None, "impl": "reference"}, "beta: got NoneType, expected a number or a tensor"),
        ({"free_bits": "0.5"}, "free_bits: got str, expected a number or a tensor"),
        ({"capacity": [5.0]}, "capacity: got list, expected a number or a tensor"),
        ({"likelihood": "gaussian", "log_variance": None}, "log_variance: got NoneType, expected a number"),
        ({"x": torch.zeros(4, 10).to_sparse()}, r"x: got layout torch\.sparse_coo, expected a dense tensor"),
        ({"mu": torch.zeros(4, 3).to_sparse()}, r"mu: got layout torch\.sparse_coo"),
        ({"x": None}, "x: got NoneType, expected a tensor"),
        ({"x_hat": (torch.zeros(4, 10),)}, "x_hat: got tuple, expected a tensor"),
        ({"x": torch.zeros(4, 10).numpy()}, "x: got ndarray, expected a tensor"),
        ({"mu": torch.zeros(4, 2).numpy()}, "mu: got ndarray, expected a tensor"),
        ({"weight": [1.0] * 4}, "weight: got list, expected a tensor"),
        ({"kl": 1.0, "mu": None, "logvar": None}, "kl: got float, expected a tensor"),
        ({"mu": torch.rand(3, 2), "logvar": torch.rand(3, 2)}, "mu: got batch size 3, expected 4"),
        ({"logvar": torch.rand(4, 3)}, r"mu, logvar: got shapes \(4, 2\) and \(4, 3\)"),
        ({"logvar": None}, "mu, logvar: expected both"),
        ({"kl": torch.rand(4)}, "kl: given beside mu"),
        ({"kl": torch.rand(3), "mu": None, "logvar": None}, r"kl: got shape \(3,\)"),
        ({"weight": torch.rand(5)}, r"weight: got shape \(5,\)"),
        ({"weight": torch.ones(4) * 1j}, r"weight: got dtype torch\.complex64, expected real numbers"),
        ({"beta": torch.tensor(1j)}, r"beta: got dtype torch\.complex64, expected real numbers"),
        ({"beta": torch.rand(3)}, r"beta: got shape \(3,\)"),
        ({"likelihood": "poisson"}, "likelihood: got 'poisson'"),
        ({"reduction": "avg"}, "^reduction: got 'avg'"),
        ({"kl_reduction": "avg"}, "kl_reduction: got 'avg'"),
        ({"recon_reduction": "none"}, '"none" for both or for neither'),
        ({"half": True, "likelihood": "bernoulli"}, "half: got True"),
        ({"log_variance": 1.0}, "log_variance: given with likelihood"),
        ({"logvar_clamp": (3, 1)}, "logvar_clamp: got"),
        ({"impl": "cuda"}, "impl: got 'cuda'"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    x_hat, x, mu, logvar = inputs(4, 10, 2, torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        fastvae.elbo(**{"x_hat": x_hat, "x": x, "mu": mu, "logvar": logvar, **arguments})


def test_a_named_impl_that_cannot_run_says_why() -> None:
    tensors = inputs(4, 10, 2, torch.float32)
    with pytest.raises(RuntimeError, match=r'impl: got "triton" for tensors on cpu'):
        fastvae.elbo(*tensors, impl="triton")
    with pytest.raises(RuntimeError, match=r'impl: got "native" for tensors on meta'):
        fastvae.elbo(*(t.to("meta") for t in tensors), impl="native")


def zeros_without_memory(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape)


def wrapped(t: Tensor) -> Tensor:
    """Of a subclass that has operations, and no memory itself."""
    return TwoTensor(t, t.clone())


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("change", [zeros_without_memory, wrapped])
def test_elements_that_are_not_in_memory(change: Callable[[Tensor], Tensor], place: int) -> None:
    tensors = inputs(4, 10, 2, torch.float32)
    loss = fastvae.ELBOLoss()
    loss(*tensors)  # a kind that is known then
    given = [change(t) if i == place else t for i, t in enumerate(tensors)]
    plain = [t * 0 if i == place and change is zeros_without_memory else t for i, t in enumerate(tensors)]
    mu, logvar = given[2:]
    for ours, expected in (
        (loss(*given), fastvae.elbo(*plain, impl="reference").loss),
        (fastvae.reparameterize(mu, logvar, seed=1), fastvae.reparameterize(*plain[2:], seed=1)),
    ):
        for got in (ours.a, ours.b) if isinstance(ours, TwoTensor) else (ours,):
            torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match=r'impl: got "native" with elements that are not in memory \(of T'):
        fastvae.elbo(*given, impl="native")


@pytest.mark.parametrize("change", [zeros_without_memory, wrapped])
def test_upstream_gradients_that_are_not_in_memory(change: Callable[[Tensor], Tensor]) -> None:
    x_hat, x, mu, logvar = inputs(4, 10, 2, torch.float32)
    mu.requires_grad_()
    per_datum = fastvae.elbo(x_hat, x, mu, logvar, reduction="none").loss
    upstream = change(torch.rand(4))
    (got,) = torch.autograd.grad(per_datum, mu, upstream)
    expected = (upstream.a if isinstance(upstream, TwoTensor) else torch.zeros(4))[:, None] * mu.detach()
    torch.testing.assert_close(got.a if isinstance(got, TwoTensor) else got, expected)


def test_module_matches_function_and_learns_its_variance() -> None:
    tensors = inputs(16, 10, 2, torch.float32)
    s = torch.nn.Parameter(torch.zeros(()))
    loss = fastvae.ELBOLoss("gaussian", log_variance=s, beta=0.5)
    assert dict(loss.named_parameters()) == {"log_variance": s}
    assert loss.terms(*tensors).recon == fastvae.elbo(*tensors, likelihood="gaussian", log_variance=s).recon
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss(*tensors).backward()
        optimizer.step()
    mse = ((tensors[0] - tensors[1]) ** 2).mean()
    torch.testing.assert_close(s.exp(), mse, rtol=1e-3, atol=0)
    assert "likelihood='gaussian'" in repr(loss)


@pytest.mark.parametrize("name", ["beta", "capacity", "log_variance"])
def test_a_module_refuses_what_is_computed_anew_in_each_step(name: str) -> None:
    learned = torch.nn.Parameter(torch.ones(()))
    message = rf"^{name}: got a tensor computed from others .* in each call of fastvae\.elbo$"
    with pytest.raises(ValueError, match=message):
        fastvae.ELBOLoss("gaussian", **{name: learned + 1})
    for leaf in (learned, learned.detach() + 1):
        fastvae.ELBOLoss("gaussian", **{name: leaf})


def test_torch_may_have_another_default_device() -> None:
    tensors = [t.requires_grad_() for t in inputs(8, 6, 2, torch.float32)]
    expected = fastvae.elbo(*tensors, reduction="none").loss
    with torch.device("meta"):
        per_sample = fastvae.elbo(*tensors, reduction="none").loss
        mean = fastvae.elbo(*tensors).loss
        z, kl = fastvae.sample_and_kl(*tensors[2:], seed=1)
        gradients = torch.autograd.grad(mean + z.sum() + kl.sum(), tensors)
    assert torch.equal(per_sample, expected)
    torch.testing.assert_close(mean, expected.mean())
    assert {t.device.type for t in (z, kl, *gradients)} == {"cpu"}


def test_large_gradients_lie_in_memory_that_is_kept() -> None:
    """The next gradient of this size takes the memory of the last one, and never that of one in use."""
    x_hat, x, mu, logvar = inputs(16, 50_000, 2, torch.float32)
    x_hat.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(fastvae.elbo(x_hat, x, mu, logvar).loss, x_hat)[0]

    first, second = gradient(), gradient()
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, 2 * (x_hat - x).detach() / 16)
    assert not first._is_view()
    address = second.data_ptr()
    del second
    assert gradient().data_ptr() == address
    assert torch.equal(first, gradient())


def test_memory_pool() -> None:
    pool = _native.MemoryPool()

    def lent(*shape: int) -> Tensor:
        return from_dlpack(pool.lend(shape, 2, 32))

    a = lent(5, 512, 512)
    assert (a.shape, a.dtype, a.is_contiguous()) == ((5, 512, 512), torch.float32, True)
    a[-1, -1, -1] = 7
    del a
    pool.lend((6, 1 << 18), 2, 32)  # which nobody takes: it returns as well
    b = lent(6, 1 << 18)  # three huge pages, as before
    assert b[4, -1] == 7
    del b
    assert lent(1 << 18).shape == (1 << 18,)


def test_memory_is_one_gradient_and_only_where_it_is_needed() -> None:
    tensors = inputs(64, 4096, 8, torch.float32)
    size, rest = tensors[0].nbytes, 64 * 1024  # the gradients of the latents, sums over rows
    for wrt, bytes_ in (((), 0), ((2, 3), 0), ((0,), size), ((0, 2, 3), size)):
        leaves = [t.clone().requires_grad_(i in wrt) for i, t in enumerate(tensors)]

        def call(leaves: list[Tensor] = leaves, wrt: tuple[int, ...] = wrt) -> object:
            loss = fastvae.elbo(*leaves).loss
            return torch.autograd.grad(loss, [leaves[i] for i in wrt]) if wrt else loss

        assert memory_peak(call, "cpu") <= bytes_ + rest
