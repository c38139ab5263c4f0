"""The losses of other libraries against the lines of docs/drop_in.md, evaluated as they stand there.

`theirs` is what those people write; each test checks value and gradients of our line against it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import fastvae

DOCS = Path(__file__).resolve().parent.parent / "docs/drop_in.md"
ROW = re.compile(r"^\|.*\| `(fastvae\..*)` \| `(test_\w+)` \|$", re.MULTILINE)
LINES = {test: line for line, test in ROW.findall(DOCS.read_text())}

BATCH, FEATURES, LATENTS = 7, 150, 6
NATIVE = pytest.mark.parametrize("impl", ["reference", "native"])  # what the C++ operators can run
AUTO = pytest.mark.parametrize("impl", ["reference", "auto"])

pytestmark = pytest.mark.usefixtures("seed")


def flat(**others: Tensor) -> dict[str, Tensor]:
    """Inputs of a VAE of vectors."""
    return {
        "x_hat": torch.randn(BATCH, FEATURES),
        "x": torch.rand(BATCH, FEATURES),
        "mu": torch.randn(BATCH, LATENTS),
        "logvar": torch.randn(BATCH, LATENTS),
        **others,
    }


def images(**others: Tensor) -> dict[str, Tensor]:
    """Inputs of a convolutional VAE, with latents of 4 x 3 x 5; some of logvar is outside of [-30, 20]."""
    moments = torch.randn(BATCH, 8, 3, 5)
    moments[0, 4:, 0, 0], moments[1, 4:, 0, 0] = -60, 60
    return {
        "x_hat": torch.randn(BATCH, 3, 6, 10),
        "x": torch.randn(BATCH, 3, 6, 10),
        "moments": moments,
        **others,
    }


def kl_of(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar)


def of_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    mu, logvar = moments.chunk(2, 1)
    return mu, logvar.clamp(-30, 20)


def ours(test: str, impl: str, tensors: dict[str, Tensor], **choices: object) -> Tensor:
    """The line of the documentation that names `test`, on these tensors."""
    library = SimpleNamespace(
        ELBOLoss=partial(fastvae.ELBOLoss, impl=impl), elbo=partial(fastvae.elbo, impl=impl)
    )
    loss: Tensor = eval(LINES[test], {"fastvae": library}, {**tensors, **choices})
    return loss


def check(
    test: str, theirs: Callable[..., Tensor], tensors: dict[str, Tensor], impl: str, **choices: object
) -> None:
    """Value and gradients of our line against theirs in float64, as accurate as theirs in float32."""

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_(n != "x") for n, t in tensors.items()}
        wanted = {n: t for n, t in leaves.items() if n != "x"}
        loss = function(leaves)
        return {
            "loss": loss.detach(),
            **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)),
        }

    def by_them(leaves: dict[str, Tensor]) -> Tensor:
        return theirs(**leaves)

    actual = run(lambda leaves: ours(test, impl, leaves, **choices), None)
    eager, truth = run(by_them, torch.float32), run(by_them, torch.float64)
    for name in truth:
        assert_accurate(name, actual[name], eager[name], truth[name])


def test_the_documentation_names_these_tests() -> None:
    assert len(LINES) == DOCS.read_text().count("`test_")
    about_others = {
        "test_the_documentation_names_these_tests",
        "test_what_beta_is",
        "test_two_backward_passes",
    }
    assert set(LINES) == {name for name in globals() if name.startswith("test_")} - about_others


@AUTO
def test_pytorch_examples(impl: str) -> None:
    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return F.binary_cross_entropy(x_hat, x, reduction="sum") + kl_of(mu, logvar).sum()

    check("test_pytorch_examples", theirs, flat(x_hat=torch.randn(BATCH, FEATURES).sigmoid()), impl)


@NATIVE
def test_pythae_mse(impl: str) -> None:
    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        recon = 0.5 * F.mse_loss(x_hat, x, reduction="none").sum(-1)
        return (recon + kl_of(mu, logvar).sum(-1)).mean(0)

    check("test_pythae_mse", theirs, flat(), impl)


@AUTO
def test_pythae_bce(impl: str) -> None:
    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        recon = F.binary_cross_entropy(x_hat, x, reduction="none").sum(-1)
        return (recon + kl_of(mu, logvar).sum(-1)).mean(0)

    check("test_pythae_bce", theirs, flat(x_hat=torch.randn(BATCH, FEATURES).sigmoid()), impl)


@NATIVE
def test_pytorch_vae(impl: str) -> None:
    w = BATCH / 1000

    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return F.mse_loss(x_hat, x) + w * kl_of(mu, logvar).sum(1).mean(0)

    check("test_pytorch_vae", theirs, flat(), impl, w=w)


@NATIVE
def test_lightning_bolts(impl: str) -> None:
    w = 0.1

    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        q, p = Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros_like(mu), torch.ones_like(mu))
        return F.mse_loss(x_hat, x) + w * kl_divergence(q, p).mean()

    check("test_lightning_bolts", theirs, flat(), impl, w=w)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers(impl: str, dtype: torch.dtype) -> None:
    def theirs(x_hat: Tensor, x: Tensor, moments: Tensor) -> Tensor:
        kl = kl_of(*of_moments(moments)).sum([1, 2, 3])
        return F.mse_loss(x_hat, x, reduction="none").sum() / len(x) + 1e-6 * kl.sum() / len(x)

    check("test_diffusers", theirs, {n: t.to(dtype) for n, t in images().items()}, impl)


def latent_diffusion_terms(x_hat: Tensor, x: Tensor, moments: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    nll = (x - x_hat).abs() / s.exp() + s
    kl = kl_of(*of_moments(moments)).sum([1, 2, 3])
    return nll.sum() / len(x), kl.sum() / len(x)


@AUTO
def test_latent_diffusion(impl: str) -> None:
    w = 1e-6

    def theirs(x_hat: Tensor, x: Tensor, moments: Tensor, s: Tensor) -> Tensor:
        nll, kl = latent_diffusion_terms(x_hat, x, moments, s)
        return nll + w * kl

    # far enough from its optimum for a gradient that is not a difference of large numbers
    check("test_latent_diffusion", theirs, images(s=1 + torch.rand(())), impl, w=w)


def test_two_backward_passes() -> None:
    """A training step of latent-diffusion: the same gradients from their loss and from ours."""
    w, data = 0.1, images()
    encoder, decoder, critic = nn.Conv2d(8, 8, 1), nn.Linear(60, 180), nn.Linear(180, 1)
    s = nn.Parameter(torch.tensor(0.5))
    parameters = [*encoder.parameters(), *decoder.parameters(), s]
    noise = torch.randn(BATCH, 4, 3, 5)
    loss_fn = fastvae.ELBOLoss("laplace", log_scale=s, full=False, beta=w, logvar_clamp=(-30, 20))

    def terms_by_them(x_hat: Tensor, x: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nll, kl = latent_diffusion_terms(x_hat, x, moments, s)
        return nll + w * kl, nll, kl

    def terms_by_us(x_hat: Tensor, x: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss_fn.terms(x_hat, x, *moments.chunk(2, dim=1))

    def step(terms: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        moments = encoder(data["moments"].clamp(-3, 3))
        mu, logvar = of_moments(moments)
        x_hat = decoder((mu + torch.exp(logvar / 2) * noise).flatten(1)).reshape(data["x"].shape)
        loss, nll, _ = terms(x_hat, data["x"], moments)
        adversarial = -critic(x_hat.flatten(1)).mean()
        (g_nll,) = torch.autograd.grad(nll, decoder.weight, retain_graph=True)
        (g_adversarial,) = torch.autograd.grad(adversarial, decoder.weight, retain_graph=True)
        factor = (g_nll.norm() / (g_adversarial.norm() + 1e-4)).clamp(0, 1e4).detach()
        for parameter in parameters:
            parameter.grad = None
        (loss + factor * adversarial).backward()
        return [factor, *(parameter.grad.clone() for parameter in parameters)]

    for a, b in zip(step(terms_by_us), step(terms_by_them), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@AUTO
def test_scvi_tools(impl: str) -> None:
    w, samples = 0.3, 3

    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, s: Tensor) -> Tensor:
        recon = -Normal(x_hat, s.exp()).log_prob(x).sum(-1)  # [K, B]
        prior = Normal(torch.zeros(samples, *mu.shape, dtype=mu.dtype), 1.0)
        kl = kl_divergence(Normal(mu, torch.exp(logvar / 2)), prior).sum(-1)
        return torch.mean(recon + w * kl)

    tensors = flat(x_hat=torch.randn(samples, BATCH, FEATURES), s=1 + torch.rand(FEATURES))
    check("test_scvi_tools", theirs, tensors, impl, w=w)
    weight = torch.tensor(w)
    assert ours("test_scvi_tools", impl, tensors, w=weight) == ours("test_scvi_tools", impl, tensors, w=w)


@NATIVE
def test_encoder_of_sigma(impl: str) -> None:
    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        kl = 0.5 * (mu**2 + sigma**2 - 1) - sigma.log()
        return ((x_hat - x) ** 2).sum(1).mean() + kl.sum(1).mean()

    tensors = flat(sigma=F.softplus(torch.randn(BATCH, LATENTS)))
    del tensors["logvar"]
    check("test_encoder_of_sigma", theirs, tensors, impl)


@NATIVE
@pytest.mark.parametrize("detached", [False, True])
def test_sigma_vae(impl: str, detached: bool) -> None:
    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        log_sigma = ((x - x_hat) ** 2).mean().sqrt().log()
        log_sigma = log_sigma.detach() if detached else log_sigma
        nll = 0.5 * ((x - x_hat) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        return nll.sum() + kl_of(mu, logvar).sum()

    check("test_sigma_vae", theirs, flat(), impl)


@AUTO
def test_gaussian_nll_loss(impl: str) -> None:
    w = 0.01

    def theirs(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, v: Tensor) -> Tensor:
        return nn.GaussianNLLLoss()(x_hat, x, v) + w * kl_of(mu, logvar).sum(1).mean()

    check("test_gaussian_nll_loss", theirs, flat(v=F.softplus(torch.randn(BATCH, FEATURES))), impl, w=w)


def test_what_beta_is() -> None:
    """The second table of the documentation."""
    tensors, w = flat().values(), 0.3
    for line, beta, factor in (
        (fastvae.ELBOLoss(recon_reduction="mean", beta=w), w * FEATURES, 1 / FEATURES),
        (fastvae.ELBOLoss(reduction="mean", beta=w), w * FEATURES / LATENTS, 1 / FEATURES),
        (fastvae.ELBOLoss(half=True, beta=w), 2 * w, 1 / 2),
        (fastvae.ELBOLoss(reduction="sum", beta=w), w, BATCH),
    ):
        torch.testing.assert_close(line(*tensors), fastvae.ELBOLoss(beta=beta)(*tensors) * factor)
