"""Against the libraries themselves, where they are installed: pip install ".[integration]"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("seed")]


@pytest.fixture
def pythae_vae() -> Any:
    """pythae's VAE class."""
    return pytest.importorskip("pythae.models").VAE


def pythae_config(loss: str) -> Any:
    return pytest.importorskip("pythae.models").VAEConfig(
        input_dim=(1, 6, 6), latent_dim=4, reconstruction_loss=loss
    )


def fastvae_for_pythae(loss: str) -> fastvae.ELBOLoss:
    return fastvae.ELBOLoss(half=True) if loss == "mse" else fastvae.ELBOLoss("bernoulli", from_logits=False)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # of the model's largest: a bias before a softmax or a norm has a gradient of 0 and rounding
    size = max(g.abs().max().item() for g in theirs.values())
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-4, atol=1e-6 * size, msg=name)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_pythae_loss(pythae_vae: Any, loss: str) -> None:
    x, x_hat = torch.rand(5, 1, 6, 6), torch.rand(5, 1, 6, 6, requires_grad=True)
    mu, logvar = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    theirs = pythae_vae(pythae_config(loss)).loss_function(x_hat, x, mu, logvar, None)
    ours = fastvae_for_pythae(loss).terms(x_hat, x, mu, logvar)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    wrt = (x_hat, mu, logvar)
    for a, b in zip(torch.autograd.grad(ours.loss, wrt), torch.autograd.grad(theirs[0], wrt), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_pythae_model_with_its_loss_replaced(pythae_vae: Any, loss: str, seed: int) -> None:
    class Swapped(pythae_vae):
        def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
            return fastvae_for_pythae(loss).terms(recon_x, x, mu, log_var)

    theirs, ours = pythae_vae(pythae_config(loss)), Swapped(pythae_config(loss))
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(5, 1, 6, 6)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(seed)
        output = model({"data": x})
        results.append((output, gradients(output.loss, model)))
    (a, a_gradients), (b, b_gradients) = results
    for name in ("loss", "recon_loss", "reg_loss"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name))
    assert_same_gradients(b_gradients, a_gradients)


@pytest.fixture
def their_gaussian() -> Any:
    return pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution


@pytest.fixture
def autoencoder() -> nn.Module:
    """An AutoencoderKL for images of 3 x 8 x 8."""
    return pytest.importorskip("diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        sample_size=8,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1, 50])
def test_diffusers_gaussian(their_gaussian: Any, dtype: torch.dtype, spread: int) -> None:
    """Values and gradients of ours against theirs in float64, on the same moments."""
    p, q = (torch.randn(3, 8, 4, 5) for _ in range(2))
    p[:, 4:, 0] *= spread  # 50: beyond both bounds of the clamp
    x = torch.randn(3, 4, 4, 5)
    p, q, x = p.to(dtype), q.to(dtype), x.to(dtype)

    def values(cls: Any, to: torch.dtype) -> list[tuple[Tensor, list[Tensor]]]:
        leaves = [t.to(to).requires_grad_() for t in (p, q, x)]
        a, b = cls(leaves[0]), cls(leaves[1])
        results = (a.kl(), a.kl(b), a.nll(leaves[2]), a.nll(leaves[2], dims=[1]), a.mode(), a.std, a.var)
        weights = torch.ones((), dtype=to)
        return [
            (
                v,
                list(
                    torch.autograd.grad(v, leaves, weights.expand_as(v).to(v.dtype), True, allow_unused=True)
                ),
            )
            for v in results
        ]

    rtol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    ours, theirs = values(fastvae.DiagonalGaussian, dtype), values(their_gaussian, torch.float64)
    for (a, a_gradients), (b, b_gradients) in zip(ours, theirs, strict=True):
        for got, expected in zip([a, *a_gradients], [b, *b_gradients], strict=True):
            assert (got is None) == (expected is None)
            if got is not None and expected is not None:
                size = expected.abs().max().item()
                torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-6 * size)


def test_diffusers_gaussian_when_deterministic(their_gaussian: Any) -> None:
    p = torch.randn(2, 8, 3, 3)
    ours, theirs = fastvae.DiagonalGaussian(p, deterministic=True), their_gaussian(p, deterministic=True)
    for name in ("sample", "mode", "kl"):
        torch.testing.assert_close(getattr(ours, name)(), getattr(theirs, name)())
    torch.testing.assert_close(ours.nll(p[:, :4]), theirs.nll(p[:, :4]))
    for name in ("std", "var", "mean", "logvar"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("beta", [1e-6, 0.5])
def test_diffusers_autoencoder_step(autoencoder: Any, beta: float) -> None:
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    posterior = autoencoder.encode(x).latent_dist
    x_hat = autoencoder.decode(posterior.sample()).sample
    theirs = ((x_hat - x) ** 2).sum() / 4 + beta * posterior.kl().sum() / 4

    loss = fastvae.ELBOLoss(beta=beta, logvar_clamp=(-30, 20))
    swapped = fastvae.DiagonalGaussian(posterior.parameters)
    for ours in (
        loss(x_hat, x, *posterior.parameters.chunk(2, 1)),
        loss(x_hat, x, kl=swapped.kl()),
    ):
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(gradients(ours, autoencoder), gradients(theirs, autoencoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_autoencoder_with_its_gaussian_replaced(
    autoencoder: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    autoencoder.to(dtype)
    x = (torch.rand(4, 3, 8, 8) * 2 - 1).to(dtype)
    plain = autoencoder(x).sample
    home = "diffusers.models.autoencoders.autoencoder_kl.DiagonalGaussianDistribution"
    monkeypatch.setattr(home, fastvae.DiagonalGaussian)
    posterior = autoencoder.encode(x).latent_dist
    assert isinstance(posterior, fastvae.DiagonalGaussian)
    assert torch.equal(autoencoder(x).sample, plain)

    def sampled(generator: Any) -> Tensor:
        return autoencoder(x, sample_posterior=True, generator=generator).sample

    a, b = (sampled(torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, plain)
    assert sampled([torch.Generator().manual_seed(seed + i) for i in range(4)]).shape == x.shape

    z = posterior.sample()
    x_hat = autoencoder.decode(z).sample
    assert z.dtype == x_hat.dtype == dtype
    fastvae.ELBOLoss(beta=0.5)(x_hat, x, kl=posterior.kl()).backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert autoencoder.encoder.conv_in.weight.grad.any()
