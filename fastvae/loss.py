"""The loss of a VAE as a module."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .ops.api import elbo_from_spec, elbo_with_gradients
from .ops.checks import check_capacity, check_scale, make_spec
from .ops.types import ELBOTerms, FreeBitsForm, Impl, Inputs, Likelihood, Reduction, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ELBOLoss(nn.Module):
    """The negative ELBO, recon + beta * kl, in nats; arguments as in `fastvae.elbo`.

    The default is the mean over the batch of the squared error summed over features plus the KL to N(0, I):
    the negative ELBO of a Gaussian likelihood with variance 1/2, less its constant.

    A `log_variance` or `log_scale` that is an `nn.Parameter` is learned: give `loss.parameters()` to the
    optimizer too. What is computed anew in each step, from such a parameter or by a decoder, is for
    `fastvae.elbo`: here it is a ValueError.

    Example:
        >>> loss = fastvae.ELBOLoss()
        >>> loss(x_hat, x, mu, logvar).backward()
    """

    beta: float | Tensor
    log_variance: float | Tensor | Literal["batch"]
    log_scale: float | Tensor
    capacity: float | Tensor | None

    def __init__(
        self,
        likelihood: Likelihood = "mse",
        *,
        beta: float | Tensor = 1.0,
        log_variance: float | Tensor | Literal["batch"] = 0.0,
        log_scale: float | Tensor = 0.0,
        reduction: Reduction = "batchmean",
        recon_reduction: Reduction | None = None,
        kl_reduction: Reduction | None = None,
        half: bool = False,
        full: bool = True,
        from_logits: bool = True,
        logvar_clamp: tuple[float, float] | None = None,
        free_bits: float | None = None,
        free_bits_form: FreeBitsForm = "batch",
        capacity: float | Tensor | None = None,
        process_group: ProcessGroup | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.spec = make_spec(
            likelihood, reduction, recon_reduction, kl_reduction, half, full, from_logits, logvar_clamp,
            free_bits, free_bits_form,
        )  # fmt: skip
        self._loss_spec = replace(self.spec, terms=False)
        self.process_group = process_group
        self.impl: Impl = impl
        check_scale(log_variance, log_scale, self.spec)
        check_capacity(capacity, self.spec)
        for name, value in (
            ("beta", beta),
            ("log_variance", log_variance),
            ("log_scale", log_scale),
            ("capacity", capacity),
        ):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise ValueError(
                    f"{name}: got a tensor computed from others that are learned, which would stay as it is "
                    "while they change; expected an nn.Parameter, or this tensor in each call of fastvae.elbo"
                )
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
        return self._elbo(Inputs(x_hat, x, mu, logvar, kl, weight, self.beta), self._loss_spec).loss

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
        return self._elbo(Inputs(x_hat, x, mu, logvar, kl, weight, self.beta), self.spec)

    def terms_and_gradients(
        self,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[ELBOTerms, list[tuple[Tensor, Tensor]]]:
        """`terms` of a scalar loss, and where its backward begins: tensors, each with the loss's gradient.

        For `torch.autograd.backward(tensors, gradients)`. In C++ and in Triton these are x_hat and what else
        the loss depends on, whose gradients are made in the same pass as the terms; else the loss itself.
        """
        inputs = Inputs(x_hat, x, mu, logvar, kl, weight, self.beta)
        scales = self.log_variance, self.log_scale
        return elbo_with_gradients(inputs, *scales, self.capacity, self.spec, self.process_group, self.impl)

    @property
    def is_by_latent(self) -> bool:
        """Whether it takes mu and logvar alone, as the `kl` of each datum does not say that of a latent."""
        by_beta = isinstance(self.beta, Tensor) and self.beta.numel() != 1
        return by_beta or self.spec.free_bits is not None or self.spec.kl_reduction == "mean"

    def _elbo(self, inputs: Inputs, spec: Spec) -> ELBOTerms:
        scales = self.log_variance, self.log_scale
        return elbo_from_spec(inputs, *scales, self.capacity, spec, self.process_group, self.impl)

    def __deepcopy__(self, memo: dict[int, Any]) -> ELBOLoss:
        """A copy over the same ranks, as in the copy of a model that an average of its weights keeps."""
        memo[id(self.process_group)] = self.process_group
        own = memo[id(self)] = type(self).__new__(type(self))
        own.__dict__ = copy.deepcopy(self.__dict__, memo)
        return own

    def extra_repr(self) -> str:
        spec = self.spec
        shown = f"likelihood={spec.likelihood!r}, beta={self.beta}, recon_reduction={spec.recon_reduction!r}"
        if spec.free_bits is not None:
            shown += f", free_bits={spec.free_bits}, free_bits_form={spec.free_bits_form!r}"
        if self.capacity is not None:
            shown += f", capacity={self.capacity}"
        return f"{shown}, kl_reduction={spec.kl_reduction!r}, impl={self.impl!r}"
