"""DiagonalGaussian: values and gradients against float64, its noise, and what it does at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import fastvae
from fastvae import DiagonalGaussian

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(3, 8), (2, 6, 11), (4, 8, 6, 5), (2, 4, 3, 4, 5)]  # flat, audio, images, video

pytestmark = pytest.mark.usefixtures("seed")


def moments(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def by_hand(p: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = p.chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def hand_kl(p: Tensor, other: Tensor | None = None) -> Tensor:
    """KL by datum, from the textbook formula."""
    m, v = by_hand(p)
    m2, v2 = (torch.zeros_like(m), torch.zeros_like(v)) if other is None else by_hand(other)
    return (0.5 * ((m - m2) ** 2 / v2.exp() + (v - v2).exp() - 1 - v + v2)).flatten(1).sum(1)


def hand_nll(p: Tensor, sample: Tensor) -> Tensor:
    m, v = by_hand(p)
    return (0.5 * (math.log(2 * math.pi) + v + (sample - m) ** 2 / v.exp())).flatten(1).sum(1)


def check(ours: Callable[..., Tensor], hand: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Value and gradients of `ours` on the tensors as they are, against `hand` in float32 and float64."""
    upstream = None

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        nonlocal upstream
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        value = function(*leaves)
        upstream = torch.rand(value.shape) + 0.5 if upstream is None else upstream
        return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]

    runs = run(ours, None), run(hand, torch.float32), run(hand, torch.float64)
    for i, (actual, eager, truth) in enumerate(zip(*runs, strict=True)):
        assert_accurate("value" if i == 0 else f"gradient {i - 1}", actual, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_and_nll(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p, q = moments(*shape, dtype=dtype), moments(*shape, dtype=dtype)
    x = DiagonalGaussian(moments(*shape, dtype=dtype)).mode()
    check(lambda p: DiagonalGaussian(p).kl(), hand_kl, [p])
    check(lambda p, q: DiagonalGaussian(p).kl(DiagonalGaussian(q)), hand_kl, [p, q])
    check(lambda p, x: DiagonalGaussian(p).nll(x), hand_nll, [p, x])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    posterior = DiagonalGaussian(p)
    assert posterior.kl().dtype == posterior.kl(DiagonalGaussian(q)).dtype == posterior.nll(x).dtype == wide
    assert posterior.kl(DiagonalGaussian(p)).tolist() == [0] * shape[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attributes(dtype: torch.dtype) -> None:
    p = moments(4, 6, 3, 5, dtype=dtype)
    posterior = DiagonalGaussian(p)
    mean, logvar = by_hand(p)
    assert posterior.parameters is p
    assert not posterior.deterministic
    for got, expected in (
        (posterior.mean, mean),
        (posterior.mode(), mean),
        (posterior.logvar, logvar),
        (posterior.std, (0.5 * logvar).exp()),
        (posterior.var, logvar.exp()),
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_is_mean_and_std_times_noise(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    """With the noise read off a standard normal that is drawn alike."""
    noise = DiagonalGaussian(torch.zeros(shape)).sample(torch.Generator().manual_seed(seed))

    def ours(p: Tensor) -> Tensor:
        z = DiagonalGaussian(p).sample(torch.Generator().manual_seed(seed))
        assert z.dtype == dtype
        return z

    def hand(p: Tensor) -> Tensor:
        mean, logvar = by_hand(p)
        return mean + (0.5 * logvar).exp() * noise.to(p.dtype)

    check(ours, hand, [moments(*shape, dtype=dtype)])


def test_the_clamp_of_logvar_holds_everywhere() -> None:
    p = torch.tensor([[0.3, -31.0], [0.3, -30.0], [0.3, 1.0], [0.3, 20.0], [0.3, 21.0]], requires_grad=True)
    posterior = DiagonalGaussian(p)
    assert posterior.logvar.flatten().tolist() == [-30, -30, 1, 20, 20]
    other, x = DiagonalGaussian(torch.zeros(5, 2)), torch.ones(5, 1)
    values = [posterior.sample(), posterior.kl(), posterior.kl(other), posterior.nll(x), posterior.std]
    for value in values:
        (got,) = torch.autograd.grad(value.sum(), p, retain_graph=True)
        assert (got[:, 1] != 0).tolist() == [False, True, True, True, False]


def test_kl_of_the_last_sample_is_the_kl() -> None:
    """It comes from the sample's launch where it can, and is computed where it cannot."""
    p = moments(3, 4, 2, 2)
    expected = hand_kl(p)
    posterior = DiagonalGaussian(p)
    posterior.sample()
    first = posterior.kl()
    torch.testing.assert_close(first, expected)
    with torch.no_grad():
        first.mul_(7)
    torch.testing.assert_close(posterior.kl(), expected)
    with torch.no_grad():
        posterior.sample()
    torch.testing.assert_close(
        torch.autograd.grad(posterior.kl().sum(), p), torch.autograd.grad(expected.sum(), p)
    )
    posterior.sample()
    with torch.no_grad():
        assert not posterior.kl().requires_grad


def test_kl_of_moments_that_were_changed_in_place() -> None:
    p = torch.randn(3, 4)
    for change in (lambda d: d.mean.zero_(), lambda d: d.logvar.zero_(), lambda d: d.parameters.mul_(2)):
        posterior = DiagonalGaussian(p.clone())
        posterior.sample()
        change(posterior)
        expected = fastvae.sample_and_kl(posterior.mean, posterior.logvar)[1]
        assert torch.equal(posterior.kl(), expected)


def test_kl_after_a_sample_in_inference_mode() -> None:
    p = torch.randn(3, 4)
    posterior = DiagonalGaussian(p)
    with torch.inference_mode():
        posterior.sample()
        inside = DiagonalGaussian(p)
        inside.sample()
        torch.testing.assert_close(inside.kl(), hand_kl(p))
    assert not posterior.kl().is_inference()
    inside.sample()
    torch.testing.assert_close(inside.kl(), hand_kl(p))


def test_generators(seed: int) -> None:
    p = torch.zeros(3, 4, 5, 2)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + s) for s in seeds]

    (one,) = generators(0)
    first, second = (DiagonalGaussian(p).sample(one) for _ in range(2))
    assert torch.equal(first, DiagonalGaussian(p).sample(generators(0)))
    assert not torch.equal(first, second)

    rows = DiagonalGaussian(p).sample(generators(0, 1, 2))
    swapped = DiagonalGaussian(p).sample(generators(2, 0, 1))
    assert torch.equal(swapped, rows[[2, 0, 1]])
    assert torch.equal(rows[1:2], DiagonalGaussian(p[:1]).sample(generators(1)))
    posterior = DiagonalGaussian(moments(3, 4))
    posterior.sample(generators(0, 1, 2))
    torch.testing.assert_close(posterior.kl(), hand_kl(posterior.parameters))

    torch.manual_seed(seed)
    a = DiagonalGaussian(p).sample()
    DiagonalGaussian(p).kl()  # draws nothing
    b = DiagonalGaussian(p).sample()
    torch.manual_seed(seed)
    assert torch.equal(DiagonalGaussian(p).sample(), a)
    assert torch.equal(DiagonalGaussian(p).sample(), b)


@pytest.mark.gpu
def test_a_generator_on_the_cpu_gives_the_same_noise_on_a_gpu(seed: int) -> None:
    p = torch.randn(3, 4, 5, 2)
    for count in (1, 3):
        here, there = (
            DiagonalGaussian(p.to(device)).sample(
                [torch.Generator().manual_seed(seed + i) for i in range(count)]
            )
            for device in ("cpu", "cuda")
        )
        torch.testing.assert_close(here, there.cpu(), rtol=1e-5, atol=1e-5)
    assert DiagonalGaussian(p.cuda()).sample(torch.Generator("cuda")).device.type == "cuda"


def test_deterministic_is_the_mean() -> None:
    p = moments(2, 4, 3, 3)
    posterior = DiagonalGaussian(p, deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert posterior.sample().data_ptr() != posterior.mean.data_ptr()
    assert not posterior.std.any()
    assert not posterior.var.any()
    assert posterior.kl().tolist() == posterior.nll(posterior.mean).tolist() == [0]
    (got,) = torch.autograd.grad(posterior.sample().sum(), p)
    assert torch.equal(got[:, :2], torch.ones(2, 2, 3, 3))
    with pytest.raises(ValueError, match="other: is deterministic"):
        DiagonalGaussian(p).kl(posterior)


def test_nll_sums_over_the_dims_that_are_asked_for() -> None:
    p, x = moments(2, 6, 4, 5), torch.randn(2, 3, 4, 5)
    posterior = DiagonalGaussian(p)
    assert posterior.nll(x, dims=[1]).shape == (2, 4, 5)
    torch.testing.assert_close(posterior.nll(x, dims=[1]).sum((1, 2)), posterior.nll(x))
    torch.testing.assert_close(posterior.nll(x, dims=[1, 2, 3]), posterior.nll(x))


def test_nll_of_several_samples_is_that_of_each() -> None:
    posterior = DiagonalGaussian(moments(2, 6, 4, 5))
    samples = torch.randn(7, 2, 3, 4, 5)
    torch.testing.assert_close(posterior.nll(samples), torch.stack([posterior.nll(x) for x in samples]))


def test_far_apart_gaussians_stay_finite() -> None:
    """Moments at the clamps, where var / other.var passes e^50."""
    p = torch.tensor([[1e3, -40.0], [-1e3, 40.0], [0.0, 40.0]])
    q = torch.tensor([[-1e3, 40.0], [1e3, -40.0], [0.0, -40.0]])
    got = DiagonalGaussian(p).kl(DiagonalGaussian(q))
    torch.testing.assert_close(got.double(), hand_kl(p.double(), q.double()), rtol=1e-5, atol=0)


def test_compiles_without_graph_breaks() -> None:
    def terms(p: Tensor) -> tuple[Tensor, Tensor]:
        posterior = DiagonalGaussian(p)
        return posterior.sample(), posterior.kl()

    p = moments(3, 8, 4, 4)
    _, kl = torch.compile(terms, fullgraph=True, backend="aot_eager")(p)
    torch.testing.assert_close(kl, hand_kl(p))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), p), torch.autograd.grad(hand_kl(p).sum(), p))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"parameters: got shape \(2, 5, 3\), expected \[B, 2 C, \*space\]"):
        DiagonalGaussian(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"parameters: got shape \(4,\)"):
        DiagonalGaussian(torch.zeros(4))
    with pytest.raises(TypeError, match=r"parameters: got dtype torch\.int64"):
        DiagonalGaussian(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="generator: got a list of 2, expected 3, one for each datum"):
        DiagonalGaussian(torch.zeros(3, 4)).sample([torch.Generator(), torch.Generator()])


def test_is_what_elbo_makes_of_the_same_moments() -> None:
    p, x_hat, x = moments(3, 8, 2, 2), torch.rand(3, 5), torch.rand(3, 5)
    posterior = DiagonalGaussian(p)
    a = fastvae.elbo(x_hat, x, *p.chunk(2, 1), logvar_clamp=(-30, 20)).loss
    b = fastvae.elbo(x_hat, x, kl=posterior.kl()).loss
    torch.testing.assert_close(a, b)
