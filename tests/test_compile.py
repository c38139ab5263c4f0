"""The operators inside torch.compile(fullgraph=True) and torch.func: the same numbers, the same noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastvae

pytestmark = pytest.mark.usefixtures("seed")


def terms(model: nn.ModuleDict, x: Tensor) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, -1)
    z = fastvae.reparameterize(mu, logvar)
    return fastvae.elbo(model["decoder"](z), x, mu, logvar, beta=0.5).loss


def kl_once(model: nn.ModuleDict, x: Tensor) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, -1)
    z, kl = fastvae.sample_and_kl(mu, logvar, n_samples=2)
    return fastvae.elbo(model["decoder"](z), x, kl=kl, likelihood="bernoulli", reduction="none").loss.mean()


def fused(model: nn.ModuleDict, x: Tensor) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, -1)
    loss, z, kl = fastvae.fused_elbo(
        model["decoder"](mu), x, mu, logvar, likelihood="gaussian", log_variance=-0.5
    )
    return loss + z.square().mean() + kl.sum()


@pytest.mark.parametrize("step", [terms, kl_once, fused])
def test_compiled_is_eager(step: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
    torch.compiler.reset()
    model = nn.ModuleDict({"encoder": nn.Linear(30, 10), "decoder": nn.Linear(5, 30)})
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (16, 17, 33):
        x, results = torch.rand(batch, 30), []
        for function in (step, compiled):
            torch.manual_seed(1)
            loss = function(model, x)
            results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def flops(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        with FlopCounterMode(display=False):
            return loss(*tensors)

    return run


def recomputed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    contexts = partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    )
    return partial(checkpoint, loss, use_reentrant=False, context_fn=contexts)


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(loss, backend="eager")


@pytest.mark.parametrize("around", [flops, recomputed, compiled])
def test_double_backward_of_what_was_seen(around: Callable) -> None:
    """Where forward ran as an op, whose gradient is an op too."""
    x_hat, x, mu, logvar = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(2, 4, 3)

    def loss(h: Tensor, m: Tensor) -> Tensor:
        z, kl = fastvae.sample_and_kl(m, logvar, seed=1)
        terms = fastvae.elbo(h, x, m, logvar, logvar_clamp=(-1, 1))
        return terms.loss + (z.square().sum() + kl.square().sum()) / 4

    results = []
    for function in (loss, around(loss)):
        leaves = [t.clone().requires_grad_() for t in (x_hat, mu)]
        gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        results.append((*gradients, *torch.autograd.grad(sum((g**3).sum() for g in gradients), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_per_sample_gradients_by_torch_func() -> None:
    x_hat, x, mu, logvar = torch.randn(5, 8), torch.rand(5, 8), torch.randn(5, 3), torch.randn(5, 3)

    def of_one(h: Tensor, t: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return fastvae.elbo(*(value[None] for value in (h, t, m, v)), reduction="sum").loss

    gradients = torch.func.vmap(torch.func.grad(of_one, argnums=(0, 2, 3)))(x_hat, x, mu, logvar)
    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
    loss = fastvae.elbo(leaves[0], x, *leaves[1:], reduction="sum").loss
    for got, expected in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(got, expected)
    z = torch.func.grad(lambda m: fastvae.reparameterize(m, logvar, seed=1).sum())(mu.detach())
    torch.testing.assert_close(z, torch.ones_like(z))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_sampling_under_vmap(randomness: str) -> None:
    mu, logvar = torch.randn(1, 4), torch.randn(1, 4)
    moments = mu.expand(3, 1, 4), logvar.expand(3, 1, 4)
    z = torch.func.vmap(fastvae.reparameterize, randomness=randomness)(*moments)
    assert z.shape == (3, 1, 4)
    assert torch.equal(z[0], z[1]) == (randomness == "same")
    assert not torch.equal(z[0], mu)


def test_a_kernel_by_name_inside_torch_func_says_why_not() -> None:
    x = torch.rand(2, 3)

    def loss(x_hat: Tensor) -> Tensor:
        return fastvae.elbo(x_hat, x, kl=torch.zeros(2), impl="native").loss

    with pytest.raises(RuntimeError, match=r"impl: got \"native\" inside a transform of torch\.func"):
        torch.func.grad(loss)(x)


@pytest.mark.parametrize("around", [lambda loss: loss, flops])
def test_batched_backward(around: Callable) -> None:
    x_hat, x, mu, logvar = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(2, 4, 3)

    def loss(h: Tensor, m: Tensor, v: Tensor) -> Tensor:
        given = h, x, m, v
        z = fastvae.reparameterize(m, v, seed=1)
        per_datum = fastvae.elbo(*given, reduction="none").loss + z.square().sum(1)
        return torch.stack((*per_datum, fastvae.elbo(*given).loss))

    leaves = [t.requires_grad_() for t in (x_hat, mu, logvar)]
    values = around(loss)(*leaves)
    batched = torch.autograd.grad(values, leaves, torch.eye(5), is_grads_batched=True, retain_graph=True)
    for i in range(5):
        one = torch.autograd.grad(values[i], leaves, retain_graph=True)
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(got[i], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode() -> None:
    """The tangents of dual tensors, which need no gradient, and of torch.func, which records operations."""
    x_hat, x, mu, logvar, tangent = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(3, 4, 2)
    loss = fastvae.ELBOLoss()

    def of_mu(m: Tensor) -> Tensor:
        return loss(x_hat, x, m, logvar) + fastvae.reparameterize(m, logvar, seed=1).sum()

    expected = (mu * tangent).sum() / 4 + tangent.sum()
    of_mu(mu)  # a kind that is known then
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(of_mu(forward_ad.make_dual(mu, tangent))).tangent
        with pytest.raises(RuntimeError, match=r'impl: got "native" inside torch\.autograd\.forward_ad'):
            fastvae.elbo(x_hat, x, mu, logvar, impl="native")
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_linearized() -> None:
    x_hat, x, mu, logvar, tangent = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(3, 4, 2)
    _, of_tangent = torch.func.linearize(lambda m: fastvae.elbo(x_hat, x, m, logvar).loss, mu)
    torch.testing.assert_close(of_tangent(tangent), (mu * tangent).sum() / 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced() -> None:
    x_hat, x, mu, logvar = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(2, 4, 3)
    loss = fastvae.ELBOLoss("gaussian", log_variance=torch.zeros(()), beta=torch.ones(()))
    loss(x_hat, x, mu, logvar)  # a kind that is known then
    traced = torch.jit.trace(loss, (x_hat, x, mu, logvar))
    loss.beta.fill_(0.5)
    loss.log_variance.fill_(-0.5)
    given = torch.randn(4, 6), torch.rand(4, 6), *torch.randn(2, 4, 3)
    torch.testing.assert_close(traced(*given), loss(*given))
    sample = torch.jit.trace(fastvae.reparameterize, (mu, logvar), check_trace=False)
    assert not torch.equal(sample(mu, logvar), sample(mu, logvar))
    torch.manual_seed(1)
    z = sample(mu, logvar)
    torch.manual_seed(1)
    torch.testing.assert_close(z, fastvae.reparameterize(mu, logvar))
    with pytest.raises(RuntimeError, match=r'impl: got "native" inside torch\.jit\.trace'):
        torch.jit.trace(lambda m: fastvae.reparameterize(m, m, impl="native"), (mu,))
