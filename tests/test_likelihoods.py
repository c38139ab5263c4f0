"""The likelihoods beyond those of test_elbo.py, and the layouts of their scales: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

import fastvae

pytestmark = pytest.mark.usefixtures("seed")

BATCH, FEATURES = 6, (3, 4)
LAYOUTS = {
    "scalar": (),
    "one element": (1, 1),
    "by feature": FEATURES,
    "by feature, flat": (12,),
    "by element": (BATCH, *FEATURES),
    "by sample": (2, BATCH, *FEATURES),
}


def gaussian(x_hat: Tensor, x: Tensor, s: Tensor) -> Tensor:
    return -torch.distributions.Normal(x_hat, torch.exp(0.5 * s)).log_prob(x)


def laplace(x_hat: Tensor, x: Tensor, s: Tensor) -> Tensor:
    return -torch.distributions.Laplace(x_hat, torch.exp(s)).log_prob(x)


def recon(likelihood: str, x_hat: Tensor, x: Tensor, s: Tensor | float, **options: object) -> Tensor:
    scale = {"log_variance" if likelihood == "gaussian" else "log_scale": s}
    zero = torch.zeros(BATCH, 1)
    return fastvae.elbo(x_hat, x, zero, zero, likelihood=likelihood, **scale, **options).recon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("likelihood", "density"), [("gaussian", gaussian), ("laplace", laplace)])
def test_log_density_and_gradients(
    likelihood: str, density: Callable[..., Tensor], layout: str, dtype: torch.dtype
) -> None:
    x_hat = torch.randn(2, BATCH, *FEATURES).to(dtype)
    x, s = torch.randn(BATCH, *FEATURES).to(dtype), torch.randn(LAYOUTS[layout]).to(dtype)
    weight = torch.rand(BATCH)
    weight[1] = 0

    def hand(to: torch.dtype) -> list[Tensor]:
        h, v = (t.to(to).requires_grad_() for t in (x_hat, s))
        shaped = v.reshape(FEATURES) if layout == "by feature, flat" else v
        rows = density(h, x.to(to), shaped).flatten(2).sum(2).mean(0)
        value = (weight.to(to) * rows).sum() / BATCH
        return [value.detach(), *torch.autograd.grad(value, (h, v))]

    leaves = [t.clone().requires_grad_() for t in (x_hat, s)]
    value = recon(likelihood, leaves[0], x, leaves[1], weight=weight)
    actual = [value.detach(), *torch.autograd.grad(value, leaves)]
    names = ("value", "d x_hat", "d scale")
    for name, a, e, t in zip(names, actual, hand(torch.float32), hand(torch.float64), strict=True):
        if name == "d scale" and s.numel() == 1:
            # a difference of sums: relative to them, and not to itself
            torch.testing.assert_close(a.double(), t, rtol=torch.finfo(dtype).eps, atol=144 * 2e-7)
        else:
            assert_accurate(name, a, e, t)
        assert a.dtype in (dtype, torch.float32)


@pytest.mark.parametrize(
    ("likelihood", "constant"), [("gaussian", 0.5 * math.log(2 * math.pi)), ("laplace", math.log(2))]
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_without_constants(likelihood: str, constant: float, impl: str) -> None:
    x_hat, x = torch.rand(2, BATCH, *FEATURES)
    difference = recon(likelihood, x_hat, x, 0.3, impl=impl) - recon(
        likelihood, x_hat, x, 0.3, full=False, impl=impl
    )
    torch.testing.assert_close(difference, torch.tensor(12 * constant), rtol=1e-5, atol=0)


def test_gaussian_is_torchs_gaussian_nll_loss() -> None:
    x_hat, x, variance = torch.rand(3, BATCH, *FEATURES)
    expected = F.gaussian_nll_loss(x_hat, x, variance, full=True, reduction="mean")
    torch.testing.assert_close(recon("gaussian", x_hat, x, variance.log(), reduction="mean"), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bernoulli_from_probabilities_is_torchs_binary_cross_entropy(autocast: bool) -> None:
    p = torch.rand(BATCH, 10)
    p[0, :4] = torch.tensor([0.0, 1.0, 1e-40, 1 - 2**-24])
    x = torch.rand(BATCH, 10)
    leaf, other = (p.clone().requires_grad_() for _ in range(2))
    expected = F.binary_cross_entropy(other, x, reduction="sum") / BATCH
    with torch.autocast("cpu", enabled=autocast):
        value = recon("bernoulli", leaf, x, 0.0, from_logits=False)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(expected, other))


@pytest.mark.parametrize(
    ("x_hat", "x", "message"),
    [
        (
            1.5,
            0.5,
            r"^x_hat: got values from 0.5 to 1.5, expected probabilities, in \[0, 1\], with from_logits",
        ),
        (math.nan, 0.5, "^x_hat: got values from nan to nan, expected probabilities"),
        (0.5, 255.0, r"^x: got values from 0.5 to 255, expected data in \[0, 1\]; divide pixels by 255"),
        (0.5, -1.0, "^x: got values from -1 to 0.5, expected data"),
    ],
)
def test_values_outside_the_unit_interval_are_named(x_hat: float, x: float, message: str) -> None:
    given = torch.full((2, BATCH, 10), 0.5)
    given[:, 1, 3] = torch.tensor([x_hat, x])
    with pytest.raises(ValueError, match=message):
        recon("bernoulli", given[0].requires_grad_(), given[1], 0.0, from_logits=False)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_a_scale_without_a_reciprocal_makes_no_nan(likelihood: str) -> None:
    x = torch.rand(BATCH, *FEATURES)
    for s in (-300.0, torch.full(FEATURES, -300.0)):
        leaf = x.clone().requires_grad_()
        value = recon(likelihood, leaf, x, s)
        assert value.isfinite()
        assert not torch.autograd.grad(value, leaf)[0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_double_backward(likelihood: str, layout: str) -> None:
    leaves = [torch.randn(2, BATCH, *FEATURES).double(), torch.randn(LAYOUTS[layout]).double()]
    x = torch.randn(BATCH, *FEATURES).double()
    assert torch.autograd.gradgradcheck(
        lambda h, s: recon(likelihood, h, x, s), [leaf.requires_grad_() for leaf in leaves], atol=1e-4
    )


def test_what_is_not_native_compiles_whole() -> None:
    x_hat, x = torch.rand(2, BATCH, 8)
    s = torch.zeros(8)

    def step(h: Tensor, v: Tensor) -> Tensor:
        by_feature = fastvae.elbo(h, x, kl=x.sum(1), likelihood="laplace", log_scale=v).loss
        return by_feature + fastvae.elbo(h, x, kl=x.sum(1), likelihood="bernoulli", from_logits=False).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x_hat.clone().requires_grad_(), s.clone().requires_grad_()]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "mse", "full": False}, r'full: got False with likelihood "mse"'),
        (
            {"likelihood": "gaussian", "from_logits": False},
            'from_logits: got False with likelihood "gaussian"',
        ),
        ({"likelihood": "laplace", "log_variance": 1.0}, 'log_variance: given with likelihood "laplace"'),
        ({"likelihood": "gaussian", "log_scale": 1.0}, 'log_scale: given with likelihood "gaussian"'),
        ({"likelihood": "gaussian", "log_variance": "learned"}, "log_variance: got 'learned'"),
        ({"likelihood": "laplace", "log_scale": "batch"}, "log_scale: got 'batch', expected a number or a"),
        (
            {"likelihood": "gaussian", "log_variance": torch.zeros(5)},
            r"log_variance: got shape \(5,\), expected one element, \[\*features\] with 12",
        ),
        (
            {"likelihood": "gaussian", "log_variance": torch.zeros(12, dtype=torch.int64)},
            "log_variance: got dtype torch.int64",
        ),
        (
            {"likelihood": "gaussian", "log_variance": torch.zeros(12, device="meta")},
            "log_variance: got device meta, expected cpu",
        ),
        ({"likelihood": "laplace", "impl": "native"}, r'impl: got "native" with "laplace", expected "mse"'),
        (
            {"likelihood": "bernoulli", "from_logits": False, "impl": "native"},
            'impl: got "native" with "bernoulli" from probabilities',
        ),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    x_hat, x = torch.rand(2, BATCH, *FEATURES)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        fastvae.elbo(x_hat, x, kl=torch.zeros(BATCH), **arguments)


def test_the_module_registers_its_scale() -> None:
    s = torch.nn.Parameter(torch.zeros(()))
    loss = fastvae.ELBOLoss("laplace", log_scale=s)
    assert dict(loss.named_parameters()) == {"log_scale": s}
    x_hat, x = torch.rand(2, BATCH, *FEATURES)
    loss(x_hat, x, kl=torch.zeros(BATCH)).backward()
    assert s.grad is not None
