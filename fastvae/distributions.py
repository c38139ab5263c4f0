"""The posterior as diffusers' autoencoders hand it out, on the fused operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .ops import sample_and_kl
from .ops.library import random_bits
from .ops.reference import clamped
from .ops.types import compute_dtype

_Versions = tuple[int, int]


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) from an encoder's moments: stands in for diffusers'
    `DiagonalGaussianDistribution`, from which names and behaviour are taken.

    The noise is fastvae's and not `torch.randn`'s: other numbers, the same distribution. KL and NLL are
    computed in float32 and come as float32, in float64 for float64 moments; diffusers' come in the moments'
    dtype.

    Args:
        parameters: the moments, [B, 2 C, *space], floating point: C channels of mean, then C of log-variance.
        deterministic: a point mass at the mean: `std` and `var` are 0, and so are KL and NLL, as tensors [1].

    Attributes:
        parameters, deterministic: as given.
        mean, logvar: [B, C, *space]. logvar is clamped to [-30, 20], with a zero gradient outside.

    Raises:
        ValueError, TypeError: moments that are not [B, 2 C, *space] of a floating-point dtype.

    Example:
        >>> posterior = fastvae.DiagonalGaussian(encoder(x))
        >>> z, kl = posterior.sample(), posterior.kl()
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if not parameters.is_floating_point():
            raise TypeError(f"parameters: got dtype {parameters.dtype}, expected a floating-point tensor")
        if parameters.ndim < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters: got shape {tuple(parameters.shape)}, expected [B, 2 C, *space], an even number "
                "of channels: the mean's, then the log-variance's"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = clamped(logvar, -30.0, 20.0)
        self._kl: tuple[Tensor, _Versions] | None = None  # of the last sample, whose launch makes it too

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2), [B, C, *space]; 0 if deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """exp(logvar), [B, C, *space]; 0 if deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """z = mean + std * eps, [B, C, *space] in the dtype of the moments, differentiable.

        Args:
            generator: where the noise's seed is drawn from, on any device: one on the CPU gives the same
                noise wherever the moments are. A list has one for each datum, whose noise then does not
                depend on the rest of the batch (one launch each); of a list of one, it is that one's.
        """
        if self.deterministic:
            return self.mean.clone()
        if isinstance(generator, Sequence):
            if len(generator) != 1:
                return self._sample_rows(generator)
            generator = generator[0]
        z, kl = _draw(self.mean, self.logvar, generator)
        self._keep(kl)
        return z

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || other) of each datum in nats, [B], summed over all latents; None is N(0, I)."""
        if self.deterministic:
            return self._nothing()
        if other is None:
            kept, self._kl = self._kl, None  # handed out once: the caller may change it in place
            wanted = torch.is_grad_enabled() and self.parameters.requires_grad
            if kept is not None and kept[0].requires_grad == wanted and kept[1] == self._versions():
                return kept[0]
            return _kl(self.mean, self.logvar)
        if other.deterministic:
            raise ValueError("other: is deterministic, expected a distribution with a variance")
        # the KL does not change when both are shifted and scaled so that the other is N(0, I)
        mean, logvar, other_mean, other_logvar = self._widened(
            self.mean, self.logvar, other.mean, other.logvar
        )
        return _kl((mean - other_mean) * torch.exp(-0.5 * other_logvar), logvar - other_logvar)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log N(sample; mean, var) in nats, summed over `dims`; None is all of a datum's, to give [B].

        K samples, [K, B, C, *space], give [K, B].
        """
        if self.deterministic:
            return self._nothing()
        sample, mean, logvar = self._widened(sample, self.mean, self.logvar)
        error = (sample - mean) * torch.exp(-0.5 * logvar)
        elements = 0.5 * (error.square() + logvar + math.log(2 * math.pi))
        return elements.sum(tuple(range(1 - mean.ndim, 0)) if dims is None else tuple(dims))

    def _sample_rows(self, generators: Sequence[Generator]) -> Tensor:
        if len(generators) != len(self.mean):
            raise ValueError(
                f"generator: got a list of {len(generators)}, expected {len(self.mean)}, one for each datum"
            )
        rows = zip(self.mean.split(1), self.logvar.split(1), generators, strict=True)
        z, kl = zip(*(_draw(*row) for row in rows), strict=True)
        self._keep(torch.cat(kl))
        return torch.cat(z)

    def _keep(self, kl: Tensor) -> None:
        """A sample's KL for the next call of `kl`; none of inference mode, which may have ended by then."""
        versions = self._versions()
        self._kl = None if versions is None or kl.is_inference() else (kl, versions)

    def _versions(self) -> _Versions | None:
        """What changes with the moments in place; None where torch does not count, or cannot compile that."""
        if torch.compiler.is_compiling() or self.mean.is_inference() or self.logvar.is_inference():
            return None
        return self.mean._version, self.logvar._version

    def _nothing(self) -> Tensor:
        return torch.zeros(1, device=self.parameters.device)

    def _widened(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        dtype = compute_dtype(*tensors)
        return tuple(t.to(dtype) for t in tensors)


def _draw(mean: Tensor, logvar: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """z, and its KL by datum."""
    if generator is None:
        return sample_and_kl(mean, logvar)
    seed = random_bits(generator.device, generator).to(mean.device)
    return sample_and_kl(mean, logvar, seed=seed)


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """The KL by datum alone; a seed is given so that none is drawn from torch's generator."""
    return sample_and_kl(mean, logvar, seed=0)[1]
