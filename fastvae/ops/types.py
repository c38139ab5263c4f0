"""What goes into the operator and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Likelihood = Literal["mse", "gaussian", "bernoulli", "laplace"]
Reduction = Literal["none", "sum", "mean", "batchmean"]
FreeBitsForm = Literal["batch", "element"]
Impl = Literal["auto", "reference", "native", "triton"]

LIKELIHOODS: tuple[Likelihood, ...] = ("mse", "gaussian", "bernoulli", "laplace")
REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean", "batchmean")

_CONSTANTS = {"gaussian": 0.5 * math.log(2 * math.pi), "laplace": math.log(2)}


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms, in nats; scalars, or [B] under reduction "none".

    `loss` is `recon + beta * kl`; `recon` and `kl` do not contain beta.
    """

    loss: Tensor
    recon: Tensor
    kl: Tensor


class Extents(NamedTuple):
    """Logical sizes of one call: K samples of x_hat or z, B data, D features, Z latents."""

    samples: int
    batch: int
    features: int
    latents: int


# How log_scale is laid out: a number or one element; one a feature; one for each element of x; of x_hat.
ScaleForm = Literal["scalar", "features", "elements", "samples"]


@dataclass(frozen=True)
class Spec:
    """The choices of one call that are fixed when its kernel is compiled or picked.

    A stage runs where its field says so: reconstruction if `likelihood` is set, KL if mu and logvar are
    given, sampling if `sample` is set. `likelihood` is that of `elbo`, or "probabilities": Bernoulli with
    x_hat its probabilities. `free_bits` is a floor of the KL in the loss: of each of its elements where an
    implementation sees it, and of each latent's mean before `ops.totals` has turned that into a beta.
    `best_variance` says that log_scale is the optimum of this batch, which second derivatives go through.
    Without `terms` an implementation may leave out recon and kl, and give the loss alone.
    """

    likelihood: Likelihood | Literal["probabilities"] | None = None
    recon_reduction: Reduction = "batchmean"
    kl_reduction: Reduction = "batchmean"
    half: bool = False
    logvar_clamp: tuple[float, float] | None = None
    sample: bool = False
    offset: int = 0
    first_row: int = 0
    full: bool = True
    free_bits: float | None = None
    free_bits_form: FreeBitsForm = "element"
    scale_form: ScaleForm = "scalar"
    terms: bool = True
    best_variance: bool = False

    @property
    def per_sample(self) -> bool:
        """Whether the loss and its terms are [B] and not scalars."""
        return self.recon_reduction == "none"

    @property
    def constant(self) -> float:
        """What -log p(x | z) has for each element whatever the inputs are, in nats; 0 without `full`."""
        return _CONSTANTS.get(self.likelihood or "", 0.0) if self.full else 0.0

    def scale_shape(self, extents: Extents) -> tuple[int, ...]:
        """log_scale's shape beside x_hat as [K, B, D]."""
        shapes = {
            "scalar": (),
            "features": (1, 1, extents.features),
            "elements": (1, extents.batch, extents.features),
            "samples": (extents.samples, extents.batch, extents.features),
        }
        return shapes[self.scale_form]

    def recon_scale(self, extents: Extents) -> float:
        """The factor from a sum over K, B and D to the reconstruction term."""
        return _scale(self.recon_reduction, extents.batch, extents.features) / max(extents.samples, 1)

    def kl_scale(self, extents: Extents) -> float:
        """The factor from a sum over B and Z to the KL term."""
        return _scale(self.kl_reduction, extents.batch, extents.latents)


def _scale(reduction: Reduction, batch: int, elements: int) -> float:
    if reduction == "mean":
        return 1.0 / max(batch * elements, 1)
    if reduction == "batchmean":
        return 1.0 / max(batch, 1)
    return 1.0


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of arithmetic, accumulation and loss: float64 if any input is float64, else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


class Inputs(NamedTuple):
    """The inputs of one call, as given: any strides, any trailing shapes; None for what is not given.

    x_hat: [B, *features] or [K, B, *features]. x: [B, *features]. mu, logvar: [B, *latents]; or kl: [B].
    weight: [B]. beta: a number, one element, or one a latent. log_scale: the log of the Gaussian's variance
    or of the Laplace's scale, laid out as Spec.scale_form says. seed: 64 bits, an int or an int64 tensor.
    """

    x_hat: Tensor | None = None
    x: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    kl: Tensor | None = None
    weight: Tensor | None = None
    beta: float | Tensor = 1.0
    log_scale: float | Tensor = 0.0
    seed: int | Tensor | None = None

    @property
    def like(self) -> Tensor:
        """A tensor on the device of all."""
        tensor = self.mu if self.x_hat is None else self.x_hat
        assert tensor is not None
        return tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of arithmetic, accumulation and loss: float64 if any input is, else float32."""
        return compute_dtype(self.x_hat, self.x, self.mu, self.logvar)


class Forward(NamedTuple):
    """What an implementation's forward gives; None for a stage that did not run.

    loss, recon, kl: as in ELBOTerms. z: [B, *latent] or [K, B, *latent] in mu's dtype. kl_rows: [B].
    """

    loss: Tensor | None = None
    recon: Tensor | None = None
    kl: Tensor | None = None
    z: Tensor | None = None
    kl_rows: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of the inputs; None where not needed."""

    x_hat: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    kl: Tensor | None = None
    log_scale: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted, in the order of Gradients."""

    x_hat: bool
    mu: bool
    logvar: bool
    kl: bool
    log_scale: bool
