"""What depends on a batch's totals: the best variance, free bits by latent, capacity. One reduction more.

Numbers become tensors where the others are (`new_full`): a copy from the host would make a GPU be waited for.

All are found first, without a gradient, and then stand in the loss as numbers: the loss is stationary in the
best variance, and a mean above its floor, or on one side of a capacity, is linear in its elements, so that
the gradients are exact. Second derivatives, which the reference makes, go through the variance of one rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import latent_kl_sums, run
from .types import Extents, Impl, Inputs, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SQUARES = Spec("mse", "sum", "sum")


@torch.no_grad()
def best_log_variance(inputs: Inputs, extents: Extents, group: ProcessGroup | None, impl: Impl) -> Tensor:
    """ln of the mean squared error, the variance at which the Gaussian likelihood of a batch is greatest.

    Rybkin et al. 2021, "Simple and effective VAE training with calibrated decoders", equation 4. With weights
    it is the weighted mean.
    """
    x_hat, x, weight = inputs.x_hat, inputs.x, inputs.weight
    squares = run(Inputs(x_hat, x, weight=weight), _SQUARES, extents, impl).recon
    assert squares is not None
    data = squares.new_full((), extents.batch) if weight is None else weight.sum(dtype=squares.dtype)
    squares, elements = _over_ranks(torch.stack((squares, data * extents.features)), group)
    mean = squares / torch.where(elements == 0, 1, elements)
    # clamp keeps NaN
    best: Tensor = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return best


def floored_beta(
    inputs: Inputs, spec: Spec, extents: Extents, group: ProcessGroup | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """beta by latent, 0 where the batch's mean KL is at most free_bits; and what those add to the loss.

    beta * sum_j max(free_bits, mean_b KL_bj), in nats: Kingma et al. 2016, "Improved variational inference
    with inverse autoregressive flow", appendix C8.
    """
    assert spec.free_bits is not None
    with torch.no_grad():
        sums = latent_kl_sums(inputs, spec, extents, impl)
        totals = _over_ranks(torch.cat((sums, sums.new_full((1,), extents.batch))), group)
        means = totals[:-1] / totals[-1].clamp(min=1)
        free = means <= spec.free_bits  # NaN is not
    beta = inputs.beta.to(sums) if isinstance(inputs.beta, Tensor) else sums.new_full((), inputs.beta)
    beta = beta.reshape(-1).expand(extents.latents)
    floor = torch.where(free, beta, 0.0).sum() * (spec.free_bits * extents.batch * spec.kl_scale(extents))
    return torch.where(free, 0.0, beta), floor


def signed_beta(
    inputs: Inputs,
    spec: Spec,
    extents: Extents,
    capacity: float | Tensor,
    group: ProcessGroup | None,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """beta with the sign of the batch's mean KL - capacity; and what the capacity then adds to the loss.

    beta * |mean_b KL_b - capacity|, in nats: Burgess et al. 2018, "Understanding disentangling in beta-VAE",
    equation 8.
    """
    with torch.no_grad():
        total = _kl_sum(inputs, spec, extents, impl)
        totals = _over_ranks(torch.stack((total, torch.full_like(total, extents.batch))), group)
        excess = totals[0] / totals[1].clamp(min=1) - _scalar(capacity, total.dtype)
        # torch.sign is 0 of NaN, and would hide it; a beta that is 0 itself drops it
        unknown = excess.isnan() & (_scalar(inputs.beta, total.dtype) != 0)
        sign = torch.where(excess > 0, 1.0, torch.where(excess < 0, -1.0, torch.where(unknown, excess, 0.0)))
    beta = sign.to(total.dtype) * _scalar(inputs.beta, total.dtype)
    return beta, -beta * _scalar(capacity, total.dtype) * (extents.batch * spec.kl_scale(extents))


def _scalar(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype).view(()) if isinstance(value, Tensor) else value


def _kl_sum(inputs: Inputs, spec: Spec, extents: Extents, impl: Impl) -> Tensor:
    """The KL summed over the batch with its weights."""
    kl, weight = inputs.kl, inputs.weight
    if kl is None:
        return latent_kl_sums(inputs, spec, extents, impl).sum()
    kl = kl.to(inputs.compute_dtype)
    if weight is not None:
        kl = torch.where(weight == 0, 0.0, weight.to(kl.dtype) * kl)
    return kl.sum()


def _over_ranks(totals: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals
