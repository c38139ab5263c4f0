"""The operators inside torch.compile(fullgraph=True): the same numbers, the same noise, no graph break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
