"""The loss of a VAE as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .ops.api import elbo_from_spec
from .ops.checks import make_spec
from .ops.types import ELBOTerms, Impl, Likelihood, Reduction


class ELBOLoss(nn.Module):
    """The negative ELBO, recon + beta * kl, in nats; arguments as in `fastvae.elbo`.

    The default is the mean over the batch of the squared error summed over features plus the KL to N(0, I):
    the negative ELBO of a Gaussian likelihood with variance 1/2, less its constant.

    A `log_variance` that is an `nn.Parameter` is learned: give `loss.parameters()` to the optimizer too.

    Example:
        >>> loss = fastvae.ELBOLoss()
        >>> loss(x_hat, x, mu, logvar).backward()
    """

    beta: float | Tensor
    log_variance: float | Tensor

    def __init__(
        self,
        likelihood: Likelihood = "mse",
        *,
        beta: float | Tensor = 1.0,
        log_variance: float | Tensor = 0.0,
        reduction: Reduction = "batchmean",
        recon_reduction: Reduction | None = None,
        kl_reduction: Reduction | None = None,
        half: bool = False,
        logvar_clamp: tuple[float, float] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.spec = make_spec(likelihood, reduction, recon_reduction, kl_reduction, half, logvar_clamp)
        self.impl: Impl = impl
        for name, value in (("beta", beta), ("log_variance", log_variance)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(
        self,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or [B] under reduction "none"."""
        return self.terms(x_hat, x, mu, logvar, kl=kl, weight=weight).loss

    def terms(
        self,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> ELBOTerms:
        """The loss and its two terms, each differentiable; `recon` and `kl` do not contain beta."""
        return elbo_from_spec(
            x_hat, x, mu, logvar, kl, weight, self.beta, self.log_variance, self.spec, self.impl
        )

    def extra_repr(self) -> str:
        spec = self.spec
        shown = f"likelihood={spec.likelihood!r}, beta={self.beta}, recon_reduction={spec.recon_reduction!r}"
        return f"{shown}, kl_reduction={spec.kl_reduction!r}, impl={self.impl!r}"
