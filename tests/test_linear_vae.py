"""A linear VAE trained with fastvae's operators ends where probabilistic PCA says, in closed form.

Sources: Tipping and Bishop 1999, "Probabilistic principal component analysis"; Lucas et al. 2019, "Don't
Blame the ELBO!", for the optimum of the ELBO with a diagonal posterior.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import fastvae

BATCH = 1000

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


class LinearVAE(nn.Module):
    """p(x|z) has mean W z + b; q(z|x) = N(V x + c, diag(exp(logvar))), one logvar for all data."""

    def __init__(self, features: int, latents: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, latents)
        self.decoder = nn.Linear(latents, features)
        self.logvar = nn.Parameter(torch.zeros(latents))

    def forward(self, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """x_hat, [samples, B, D], and the KL, [B]."""
        mu = self.encoder(x)
        z, kl = fastvae.sample_and_kl(mu, self.logvar.expand_as(mu), n_samples=samples)
        return self.decoder(z), kl

    def log_evidence(self, x: Tensor, variance: float) -> float:
        """The mean of ln N(x; b, W W^T + variance I), in float64."""
        weight, bias = self.decoder.weight.detach().double(), self.decoder.bias.detach().double()
        covariance = weight @ weight.T + variance * torch.eye(len(bias), dtype=torch.float64)
        return MultivariateNormal(bias, covariance).log_prob(x.double()).mean().item()


def data_with(eigenvalues: Tensor) -> Tensor:
    """[BATCH, D] random data whose covariance has exactly these eigenvalues, around a random mean."""
    normals = torch.randn(BATCH, len(eigenvalues), dtype=torch.float64)
    white, _ = torch.linalg.qr(normals - normals.mean(0))
    rotation, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    centred = white * (BATCH * eigenvalues).sqrt() @ rotation
    return (centred + torch.randn(len(eigenvalues))).float()


def best_log_evidence(eigenvalues: Tensor, latents: int, variance: float) -> float:
    """The largest mean ln p(x) that a model with this variance reaches; eigenvalues fall."""
    model = torch.full_like(eigenvalues, variance)
    model[:latents] = eigenvalues[:latents].clamp(min=variance)
    return -0.5 * (math.log(2 * math.pi) + model.log() + eigenvalues / model).sum().item()


def train(model: LinearVAE, loss: fastvae.ELBOLoss, x: Tensor, steps: int = 1500) -> float:
    """Full-batch Adam; returns the loss at the end, by many samples."""
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x_hat, kl = model(x, samples=2)
        optimizer.zero_grad()
        loss(x_hat, x, kl=kl).backward()
        optimizer.step()
        schedule.step()
    x_hat, kl = model(x, samples=1000)
    return loss(x_hat, x, kl=kl).item()


def test_learned_variance_reaches_probabilistic_pca() -> None:
    """ELBO and ln p(x) reach their maximum, s the mean discarded eigenvalue, q's variances s / lambda."""
    eigenvalues = torch.tensor([12, 5, 2.4, 1.2, 0.5, 0.45, 0.35, 0.3], dtype=torch.float64)
    x, model = data_with(eigenvalues), LinearVAE(features=8, latents=4)
    loss = fastvae.ELBOLoss("gaussian", log_variance=nn.Parameter(torch.tensor(0.0)))
    elbo = -train(model, loss, x)
    variance, learned = eigenvalues[4:].mean().item(), math.exp(loss.log_variance.item())
    best = best_log_evidence(eigenvalues, 4, variance)
    assert model.log_evidence(x, learned) == pytest.approx(best, rel=1e-3)
    assert elbo == pytest.approx(best, rel=1e-3)
    assert learned == pytest.approx(variance, rel=0.01)
    # the posterior is diagonal, so the latents are the principal axes, in some order
    variances = model.logvar.detach().double().exp().sort().values
    torch.testing.assert_close(variances, variance / eigenvalues[:4], rtol=0.05, atol=0)


def test_default_loss_keeps_the_eigenvalues_above_its_variance() -> None:
    """Squared error has variance 1/2: a latent is active for each eigenvalue above it, the rest collapse."""
    eigenvalues = torch.tensor([6, 3, 1.2, 0.4, 0.3, 0.25, 0.2, 0.15], dtype=torch.float64)
    x, model = data_with(eigenvalues), LinearVAE(features=8, latents=6)
    elbo = -train(model, fastvae.ELBOLoss(), x) - len(eigenvalues) / 2 * math.log(math.pi)
    best = best_log_evidence(eigenvalues, 6, 0.5)
    assert model.log_evidence(x, 0.5) == pytest.approx(best, rel=1e-3)
    assert elbo == pytest.approx(best, rel=1e-3)
    mu, logvar = model.encoder(x).detach(), model.logvar.detach()
    # transposed: the KL of each latent, summed over the data
    kl = fastvae.sample_and_kl(mu.T, logvar[:, None].expand(-1, BATCH))[1] / BATCH
    assert (kl > 0.01).sum() == (eigenvalues > 0.5).sum()
    # 1/2 ln(lambda / s) nats and the variance s / lambda where active, none and 1 where collapsed
    ratio = (eigenvalues[:6] / 0.5).clamp(min=1)
    torch.testing.assert_close(
        kl.double().sort(descending=True).values, ratio.log() / 2, rtol=0.05, atol=0.01
    )
    torch.testing.assert_close(logvar.double().exp().sort().values, 1 / ratio, rtol=0.05, atol=0)
