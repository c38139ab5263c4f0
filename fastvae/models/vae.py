"""What a VAE is: an encoder for q(z|x), a decoder for p(x|z), and the prior N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import reparameterize
from ..ops.types import Likelihood
from .conv import ConvDecoder, ConvEncoder
from .hub import Hub
from .mlp import MLPDecoder, MLPEncoder
from .model import LIKELIHOODS, Model, evaluating


class VAE(Hub, Model):
    """A variational autoencoder (Kingma and Welling 2014).

    encoder: module, x [B, *item] -> (mu, logvar), [B, Z] each: the posterior q(z|x) = N(mu, exp(logvar)).
    decoder: module, z [B, Z] -> [B, *item]: the mean of p(x|z), or its logits under "bernoulli".
    likelihood: p(x|z), one of "mse" (squared error), "gaussian", "bernoulli".
    log_variance: ln of the variance of a gaussian p(x|z): a number, or "learned" (one parameter, which
        starts at 0). None means "learned" under "gaussian"; the other likelihoods have none.

    Raises ValueError for a likelihood that does not exist, and for a log_variance that the likelihood has
    no use for.
    """

    log_variance: Tensor | float

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        likelihood: Likelihood = "mse",
        log_variance: float | Literal["learned"] | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: got {likelihood!r}, expected one of {', '.join(LIKELIHOODS)}")
        if likelihood != "gaussian" and log_variance is not None:
            raise ValueError(f"log_variance: got {log_variance!r}, expected None under {likelihood!r}")
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self._config: dict[str, Any] | None = None
        if likelihood == "gaussian" and log_variance in (None, "learned"):
            self.log_variance = nn.Parameter(torch.zeros(()))
        elif likelihood == "gaussian":
            self.register_buffer("log_variance", torch.tensor(float(log_variance or 0)))
        else:
            self.log_variance = 0.0

    @classmethod
    def mlp(
        cls,
        item_shape: Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (400,),
        latent_dim: int = 20,
        *,
        likelihood: Likelihood = "mse",
        variance: float | Literal["learned"] | None = None,
    ) -> VAE:
        """Fully connected with ReLU: features - hidden - latent_dim - hidden reversed - features.

        variance: of a gaussian p(x|z), > 0, or "learned" (also what None means there).
        """
        config = {
            "architecture": "mlp",
            "item_shape": list(item_shape),
            "hidden": list(hidden),
            "latent_dim": latent_dim,
            "likelihood": likelihood,
            "variance": variance,
        }
        encoder = MLPEncoder(item_shape, hidden, latent_dim)
        decoder = MLPDecoder(item_shape, hidden, latent_dim)
        return cls._with_config(encoder, decoder, config)

    @classmethod
    def conv(
        cls,
        item_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 20,
        *,
        likelihood: Likelihood = "mse",
        variance: float | Literal["learned"] | None = None,
    ) -> VAE:
        """Convolutional, for items of C x H x W of any size: halved to at most 4 x 4, and back.

        variance: of a gaussian p(x|z), > 0, or "learned" (also what None means there).
        Raises ValueError for items that are not C x H x W.
        """
        if len(item_shape) != 3:
            raise ValueError(f"item_shape: got {tuple(item_shape)}, expected channels, height and width")
        config = {
            "architecture": "conv",
            "item_shape": list(item_shape),
            "latent_dim": latent_dim,
            "likelihood": likelihood,
            "variance": variance,
        }
        encoder = ConvEncoder(item_shape, latent_dim)
        decoder = ConvDecoder(item_shape, latent_dim)
        return cls._with_config(encoder, decoder, config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VAE:
        """A fresh model of the architecture that `VAE.config` describes.

        Raises ValueError for an architecture that does not exist, TypeError for missing or unknown keys.
        """
        arguments = dict(config)
        architecture = arguments.pop("architecture", None)
        if architecture == "mlp":
            return cls.mlp(**arguments)
        if architecture == "conv":
            return cls.conv(**arguments)
        raise ValueError(f"architecture: got {architecture!r}, expected 'mlp' or 'conv'")

    @property
    def config(self) -> dict[str, Any] | None:
        """What `from_config` needs to build this model again, for JSON.

        None for a model made of the caller's own encoder and decoder.
        """
        return None if self._config is None else dict(self._config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, *item] -> (mu, logvar) of q(z|x), [B, Z] each."""
        mu, logvar = self.encoder(x)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """z [..., Z] -> the parameters of p(x|z), [..., *item]: the mean, or logits under "bernoulli"."""
        if z.ndim == 2:
            x_hat: Tensor = self.decoder(z)
            return x_hat
        rows = self.decode(z.reshape(-1, z.shape[-1]))
        return rows.reshape(*z.shape[:-1], *rows.shape[1:])

    def decode_mean(self, z: Tensor) -> Tensor:
        """z [..., Z] -> the mean of p(x|z), [..., *item]."""
        x_hat = self.decode(z)
        return x_hat.sigmoid() if self.likelihood == "bernoulli" else x_hat

    @torch.no_grad()
    def sample(self, n: int, *, temperature: float = 1.0, seed: int | None = None) -> Tensor:
        """The means of p(x|z) for n draws z of the prior, in eval mode, on the model's device: [n, *item].

        temperature: a factor of the prior's standard deviation. seed: the same z on every device; None draws
        from torch's generator of the CPU. See `fastvae.inference.sample` for draws of x, in batches.
        Raises ValueError for a model that is not VAE.mlp or VAE.conv.
        """
        if self._config is None:
            raise ValueError(
                "model: has a decoder of its own, expected VAE.mlp or VAE.conv; use decode_mean(z)"
            )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        z = temperature * torch.randn(n, self._config["latent_dim"], generator=generator, device="cpu")
        with evaluating(self):
            return self.decode_mean(z.to(next(self.parameters()).device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, *item] -> (x_hat [B, *item], mu [B, Z], logvar [B, Z]), with one draw z of q(z|x)."""
        mu, logvar = self.encode(x)
        return self.decode(reparameterize(mu, logvar)), mu, logvar

    @classmethod
    def _with_config(cls, encoder: nn.Module, decoder: nn.Module, config: dict[str, Any]) -> VAE:
        variance = config["variance"]
        if not (variance is None or variance == "learned" or 0 < variance < math.inf):
            raise ValueError(f"variance: got {variance!r}, expected a number above 0 or 'learned'")
        log_variance = math.log(variance) if isinstance(variance, (int, float)) else variance
        model = cls(encoder, decoder, likelihood=config["likelihood"], log_variance=log_variance)
        model._config = config
        return model
