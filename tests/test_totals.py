"""What depends on a batch's totals: the best variance and free bits, on one rank and on two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accuracy import assert_accurate, by_hand
from ranks import losses_and_gradients
from torch import Tensor

import fastvae

pytestmark = pytest.mark.usefixtures("seed")

IMPLS = ["reference", "native"]


def inputs(batch: int = 12, features: int = 30, latents: int = 7) -> list[Tensor]:
    """x_hat, x, mu, logvar; the KL of the latents from almost nothing to a few nats."""
    spread = torch.linspace(0.05, 2, latents)
    return [
        torch.randn(batch, features),
        torch.rand(batch, features),
        torch.randn(batch, latents) * spread,
        torch.randn(batch, latents) * spread,
    ]


def gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    """The value and the gradients with respect to x_hat, mu and logvar."""
    leaves = [t.detach().clone().requires_grad_(i != 1) for i, t in enumerate(tensors)]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [leaves[i] for i in (0, 2, 3)])]


def check(ours, hand, tensors: list[Tensor]) -> None:
    actual, eager = gradients(ours, tensors), gradients(hand, tensors)
    truth = gradients(hand, [t.double() for t in tensors])
    for name, a, e, t in zip(("loss", "d x_hat", "d mu", "d logvar"), actual, eager, truth, strict=True):
        assert_accurate(name, a, e, t)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_best_variance_is_that_of_sigma_vae(impl: str, weighted: bool, samples: int) -> None:
    x_hat, *rest = inputs()
    if samples > 1:
        x_hat = torch.randn(samples, *x_hat.shape)
    weight = torch.rand(12) if weighted else torch.ones(12)

    def hand(h: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        # differentiated through the variance itself
        w = weight.to(h.dtype)
        squares = ((h - x) ** 2).mean(0) if samples > 1 else (h - x) ** 2
        variance = (w[:, None] * squares).sum() / (w.sum() * 30)
        recon = 0.5 * (squares / variance + variance.log() + math.log(2 * math.pi)).sum(1)
        return (w * (recon + by_hand(h, x, mu, logvar)[1])).mean()

    def ours(*t: Tensor) -> Tensor:
        given = {"weight": weight} if weighted else {}
        return fastvae.elbo(*t, likelihood="gaussian", log_variance="batch", impl=impl, **given).loss

    check(ours, hand, [x_hat, *rest])


def test_a_perfect_reconstruction_and_an_empty_batch_make_no_nan() -> None:
    loss = fastvae.ELBOLoss("gaussian", log_variance="batch")
    x = torch.rand(4, 5)
    leaf = x.clone().requires_grad_()
    value = loss(leaf, x, kl=torch.zeros(4))
    assert value.isfinite()
    assert not torch.autograd.grad(value, leaf)[0].any()
    assert loss(x[:0], x[:0], kl=torch.zeros(0)) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["batch", "element"])
@pytest.mark.parametrize("beta", ["number", "by latent", "zero"])
@pytest.mark.parametrize("kl_reduction", ["batchmean", "sum", "mean"])
def test_free_bits(impl: str, form: str, beta: str, kl_reduction: str) -> None:
    tensors, floor = inputs(), 0.4
    factor = {"number": 1.7, "by latent": torch.rand(7), "zero": 0.0}[beta]
    weight = torch.rand(12)
    scale = {"batchmean": 1.0, "sum": 12.0, "mean": 1 / 7}[kl_reduction]

    def hand(h: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        w = weight.to(h.dtype)[:, None]
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
        per_latent = (
            (w * kl).mean(0).clamp(min=floor) if form == "batch" else (w * kl.clamp(min=floor)).mean(0)
        )
        f = factor.to(h.dtype) if isinstance(factor, Tensor) else factor
        return (w[:, 0] * by_hand(h, x, mu, logvar)[0]).mean() + scale * (f * per_latent).sum()

    def ours(*t: Tensor) -> Tensor:
        return fastvae.elbo(
            *t, beta=factor, weight=weight, free_bits=floor, free_bits_form=form, kl_reduction=kl_reduction,
            impl=impl,
        ).loss  # fmt: skip

    check(ours, hand, tensors)
    kl = fastvae.elbo(*tensors, free_bits=floor, free_bits_form=form, impl=impl).kl
    torch.testing.assert_close(kl, fastvae.elbo(*tensors, impl=impl).kl)


@pytest.mark.parametrize("impl", IMPLS)
def test_free_bits_by_datum_and_what_they_do_not_hide(impl: str) -> None:
    x_hat, x, mu, logvar = inputs()
    mu[2, 1], logvar[4, 0] = math.nan, 1000.0
    leaves = [t.requires_grad_() for t in (mu, logvar)]
    terms = fastvae.elbo(
        x_hat, x, *leaves, reduction="none", free_bits=0.4, free_bits_form="element", impl=impl
    )
    assert terms.loss.isnan().nonzero().flatten().tolist() == [2]
    assert terms.loss.isinf().nonzero().flatten().tolist() == [4]
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    rows = [i for i in range(12) if i not in (2, 4)]
    expected = ((x_hat - x) ** 2).sum(1) + kl.clamp(min=0.4).sum(1)
    torch.testing.assert_close(terms.loss[rows], expected[rows])
    for g in torch.autograd.grad(terms.loss[rows].sum(), leaves):
        assert not g[rows][(kl < 0.4)[rows]].any()
    # not a number in a row is not a number in a latent's mean
    assert fastvae.elbo(x_hat, x, mu, logvar, free_bits=0.4, impl=impl).loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["batch", "element"])
def test_gradient_of_beta_and_double_backward_with_free_bits(impl: str, form: str) -> None:
    tensors = [t.double() for t in inputs(4, 3, 5)]
    beta = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def ours(mu: Tensor, logvar: Tensor, beta: Tensor) -> Tensor:
        return fastvae.elbo(
            *tensors[:2], mu, logvar, beta=beta, free_bits=0.3, free_bits_form=form, impl=impl
        ).loss

    leaves = [*(t.requires_grad_() for t in tensors[2:]), beta]
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


def test_both_compile_whole() -> None:
    tensors = inputs()

    def step(*t: Tensor) -> Tensor:
        bits = (
            fastvae.elbo(*t, free_bits=0.4).loss
            + fastvae.elbo(*t, free_bits=0.4, free_bits_form="element").loss
        )
        return bits + fastvae.elbo(*t, likelihood="gaussian", log_variance="batch").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(step, tensors), gradients(compiled, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    """As DDP averages them: the mean over ranks of each rank's gradient is that of the whole batch."""
    batch = inputs()
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(losses_and_gradients, args=(2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, options in (
        ("variance", {"likelihood": "gaussian", "log_variance": "batch"}),
        ("free bits", {"free_bits": 0.5}),
    ):
        whole = gradients(lambda *t, o=options: fastvae.elbo(*t, **o).loss, batch)
        losses, *grads = zip(*(rank[name] for rank in ranks), strict=True)
        torch.testing.assert_close(sum(losses) / 2, whole[0])
        for parts, expected in zip(grads, whole[1:], strict=True):
            torch.testing.assert_close(torch.cat(parts) / 2, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"free_bits": -1.0}, "free_bits: got -1.0, expected nats a latent"),
        ({"free_bits": math.nan}, "free_bits: got nan"),
        ({"free_bits": 1.0, "reduction": "none"}, 'free_bits: the "batch" form .* reduction "none"'),
        ({"free_bits": 1.0, "free_bits_form": "row"}, "free_bits_form: got 'row'"),
        (
            {"likelihood": "gaussian", "log_variance": "batch", "reduction": "none"},
            'log_variance: got "batch", .* with reduction "none"',
        ),
        ({"free_bits": 1.0, "mu": None, "logvar": None, "kl": torch.zeros(12)}, "free_bits: given with kl"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    names = ("x_hat", "x", "mu", "logvar")
    with pytest.raises(ValueError, match=message):
        fastvae.elbo(**{**dict(zip(names, inputs(), strict=True)), **arguments})
