"""What depends on a batch's totals: the best variance, free bits, capacity, on one rank and on two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accuracy import assert_accurate, by_hand
from ranks import losses_and_gradients, options_of_totals
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives_go_through_the_best_variance(impl: str, weighted: bool) -> None:
    x_hat, x, mu, logvar = inputs(batch=4, features=3, latents=2)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0]) if weighted else None
    direction = torch.randn_like(x_hat)

    def hand(h: Tensor) -> Tensor:
        w = torch.ones(4, 1).double() if weight is None else weight.double()[:, None]
        mean = (w * (h - x.double()) ** 2).sum() / (3 * w.sum())
        return 0.5 * 3 * w.sum() * mean.log() / 4

    def ours(h: Tensor) -> Tensor:
        given = {"likelihood": "gaussian", "log_variance": "batch", "weight": weight, "impl": impl}
        return fastvae.elbo(h, x, mu, logvar, **given).loss

    def product(function, leaf: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad((g * direction).sum(), leaf)[0]

    expected = product(hand, x_hat.double().requires_grad_())
    actual = product(ours, x_hat.clone().requires_grad_())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


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
@pytest.mark.parametrize("form", ["batch", "element"])
def test_beta_in_the_shape_of_the_latents(impl: str, form: str) -> None:
    x_hat, x, *_ = inputs()
    mu, logvar, beta = torch.randn(12, 3, 2, 2), torch.randn(12, 3, 2, 2), torch.rand(3, 2, 2)
    options = {"free_bits": 0.4, "free_bits_form": form, "impl": impl}
    got = fastvae.elbo(x_hat, x, mu, logvar, beta=beta, **options).loss
    flat = fastvae.elbo(x_hat, x, mu.flatten(1), logvar.flatten(1), beta=beta.flatten(), **options).loss
    assert torch.equal(got, flat)


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["batch", "element"])
def test_a_kl_at_its_floor_has_no_gradient(impl: str, form: str) -> None:
    x_hat, x, *_ = inputs()
    mu = torch.tensor([[1.0, -1.0]] * 12, requires_grad=True)  # a KL of 0.5 each, exactly
    logvar = torch.zeros_like(mu, requires_grad=True)
    loss = fastvae.elbo(x_hat, x, mu, logvar, free_bits=0.5, free_bits_form=form, impl=impl).loss
    for g in torch.autograd.grad(loss, (mu, logvar)):
        assert not g.any()


def capacities(mu: Tensor, logvar: Tensor, weight: Tensor) -> dict[str, float]:
    """One below and one above the batch's mean KL."""
    kl = (weight[:, None] * 0.5 * (mu**2 + logvar.exp() - 1 - logvar)).sum(1).mean().item()
    return {"below": 0.6 * kl, "above": 1.7 * kl}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("beta", [1.7, "tensor", 0.0])
@pytest.mark.parametrize("kl_reduction", ["batchmean", "sum", "mean", "batchmean of kl"])
@pytest.mark.parametrize("weighted", [False, True])
def test_capacity(impl: str, side: str, beta: float | str, kl_reduction: str, weighted: bool) -> None:
    tensors = inputs()
    factor = torch.rand(()) + 0.5 if isinstance(beta, str) else beta
    weight = torch.rand(12) if weighted else torch.ones(12)
    capacity = capacities(*tensors[2:], weight)[side]
    kl_reduction, _, given = kl_reduction.partition(" of ")
    scale = {"batchmean": 1.0, "sum": 12.0, "mean": 1 / 7}[kl_reduction]
    options = {"beta": factor, "kl_reduction": kl_reduction, "impl": impl}
    if weighted:
        options["weight"] = weight

    def hand(h: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        recon, kl = by_hand(h, x, mu, logvar)
        w = weight.to(h.dtype)
        return (w * recon).mean() + scale * factor * ((w * kl).mean() - capacity).abs()

    def ours(h: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        if given:
            kl = by_hand(h, x, mu, logvar)[1]
            return fastvae.elbo(h, x, kl=kl, capacity=capacity, **options).loss
        return fastvae.elbo(h, x, mu, logvar, capacity=capacity, **options).loss

    check(ours, hand, tensors)
    terms, plain = (fastvae.elbo(*tensors, capacity=c, **options) for c in (capacity, None))
    torch.testing.assert_close(terms[1:], plain[1:])
    module = fastvae.ELBOLoss(capacity=torch.tensor(capacity), **{k: options[k] for k in ("beta", "impl")})
    if kl_reduction == "batchmean" and not weighted:
        torch.testing.assert_close(module(*tensors), terms.loss)
        torch.testing.assert_close(
            fastvae.fused_elbo(*tensors, capacity=capacity, beta=factor, impl=impl)[0], terms.loss
        )
        assert "capacity=" in repr(module)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_kl_at_its_capacity_has_no_gradient(impl: str) -> None:
    x_hat, x, _, _ = inputs()
    mu = torch.tensor([[3.0, 1.0]] * 12, requires_grad=True)  # a KL of 5, exactly
    logvar = torch.zeros_like(mu, requires_grad=True)
    terms = fastvae.elbo(x_hat, x, mu, logvar, capacity=5.0, beta=7.0, impl=impl)
    assert terms.loss == terms.recon
    assert terms.kl == 5
    for g in torch.autograd.grad(terms.loss, (mu, logvar)):
        assert not g.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_capacity_hides_nothing_that_is_not_finite(impl: str) -> None:
    tensors = inputs()
    for value, expected in ((math.nan, math.isnan), (math.inf, math.isinf)):
        tensors[2][3, 1] = value
        assert expected(fastvae.elbo(*tensors, capacity=3.0, impl=impl).loss.item())
        for beta in (0.0, torch.tensor([0.0], requires_grad=True)):
            assert fastvae.elbo(*tensors, capacity=3.0, beta=beta, impl=impl).loss.isfinite()
    empty = [t[:0] for t in tensors]
    assert fastvae.elbo(*empty, capacity=3.0, impl=impl).loss == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["below", "above"])
def test_gradients_of_beta_and_capacity_and_double_backward(impl: str, side: str) -> None:
    tensors = [t.double() for t in inputs(4, 3, 5)]
    capacity = capacities(*tensors[2:], torch.ones(4))[side]

    def ours(mu: Tensor, logvar: Tensor, beta: Tensor, capacity: Tensor) -> Tensor:
        return fastvae.elbo(*tensors[:2], mu, logvar, beta=beta, capacity=capacity, impl=impl).loss

    numbers = [torch.tensor(t, dtype=torch.float64) for t in (1.3, capacity)]
    leaves = [t.requires_grad_() for t in (*tensors[2:], *numbers)]
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"capacity": 2.0}, {"capacity": 40.0}, {"free_bits": 0.4}])
def test_gradients_of_beta_made_with_the_loss(impl: str, options: dict) -> None:
    x_hat, x, *latents = inputs()
    loss = fastvae.ELBOLoss(beta=nn.Parameter(torch.tensor(1.3)), impl=impl, **options)
    wrt = [loss.beta, *(t.requires_grad_() for t in latents)]
    terms, roots = loss.terms_and_gradients(x_hat, x, *latents)
    torch.testing.assert_close(terms.loss, loss(x_hat, x, *latents))
    tensors, gradients = zip(*roots, strict=True)
    expected = torch.autograd.grad(loss(x_hat, x, *latents), wrt)
    for a, b in zip(torch.autograd.grad(tensors, wrt, gradients), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_capacity_that_alone_is_learned(impl: str) -> None:
    capacity = torch.tensor(2.0, requires_grad=True)
    loss = fastvae.ELBOLoss(beta=1.5, capacity=capacity, impl=impl)
    _, roots = loss.terms_and_gradients(*inputs())
    tensors, gradients = zip(*roots, strict=True)
    (got,) = torch.autograd.grad(tensors, capacity, gradients)
    assert got.abs() == 1.5


def test_all_compile_whole() -> None:
    tensors = inputs()

    def step(*t: Tensor) -> Tensor:
        bits = (
            fastvae.elbo(*t, free_bits=0.4).loss
            + fastvae.elbo(*t, free_bits=0.4, free_bits_form="element").loss
        )
        bits = bits + fastvae.elbo(*t, capacity=2.0, beta=0.7).loss
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
    for name, options in options_of_totals(batch, 2).items():
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
        ({"capacity": -1.0}, "capacity: got -1.0, expected nats a datum, at least 0"),
        ({"capacity": math.nan}, "capacity: got nan"),
        ({"capacity": torch.ones(2)}, r"capacity: got shape \(2,\), expected a number or one element"),
        ({"capacity": 1.0, "reduction": "none"}, 'capacity: .* which reduction "none" does not take'),
        ({"capacity": 1.0, "free_bits": 0.1}, "capacity: given with free_bits 0.1, expected one of the two"),
        (
            {"capacity": 1.0, "beta": torch.ones(7)},
            r"beta: got shape \(7,\) with capacity",
        ),
        ({"free_bits": 1.0, "mu": None, "logvar": None, "kl": torch.zeros(12)}, "free_bits: given with kl"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    names = ("x_hat", "x", "mu", "logvar")
    with pytest.raises(ValueError, match=message):
        fastvae.elbo(**{**dict(zip(names, inputs(), strict=True)), **arguments})


def test_a_copy_of_a_loss_is_over_the_same_ranks() -> None:
    """As of a model that holds it, in an average of its weights."""
    group = dist.ProcessGroup(0, 1)
    scale = nn.Parameter(torch.zeros(()))
    options = {"log_variance": scale, "beta": torch.tensor(0.5), "free_bits": 0.1, "process_group": group}
    model = nn.ModuleDict(
        {"scale": nn.ParameterList([scale]), "loss": fastvae.ELBOLoss("gaussian", **options)}
    )
    average = AveragedModel(model).module
    assert average["loss"].process_group is group
    assert average["loss"].log_variance is average["scale"][0] is not scale
    average["loss"].beta.fill_(2)
    assert model["loss"].beta == 0.5
