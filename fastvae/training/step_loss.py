"""A loss as a step needs it: over all ranks, in parts, and with what schedules change as tensors."""

from __future__ import annotations

import copy

import torch

from ..loss import ELBOLoss
from .distributed import Ranks


def check_sums_over_parts(loss: ELBOLoss) -> None:
    """Raise ValueError unless the loss of a batch is a sum over its parts."""
    spec = loss.spec
    reductions = {spec.recon_reduction, spec.kl_reduction}
    found = ""
    if isinstance(loss.log_variance, str):
        found = 'log_variance="batch"'
    elif loss.capacity is not None:
        found = "a capacity"
    elif spec.free_bits is not None and spec.free_bits_form == "batch":
        found = "free bits by batch"
    elif "none" in reductions or ("sum" in reductions and len(reductions) > 1):
        found = " and ".join(f'reduction "{reduction}"' for reduction in sorted(reductions))
    if found:
        raise ValueError(f"accumulate: given for a loss with {found}, expected one that adds up over parts")


def with_own(loss: ELBOLoss, names: list[str], device: torch.device) -> ELBOLoss:
    """A copy of `loss` that shares its parameters and has buffers of its own with these names."""
    own = copy.deepcopy(loss, {id(parameter): parameter for parameter in loss.parameters()})
    for name in names:
        value = torch.as_tensor(getattr(own, name), dtype=torch.float32, device=device).detach().clone()
        delattr(own, name)
        own.register_buffer(name, value, persistent=False)
    return own


def of_all_ranks(loss: ELBOLoss, ranks: Ranks, device: torch.device) -> ELBOLoss:
    """The loss, with the process group where it depends on the totals of a batch."""
    by_free_bits = loss.spec.free_bits is not None and loss.spec.free_bits_form == "batch"
    by_totals = by_free_bits or loss.capacity is not None or isinstance(loss.log_variance, str)
    if loss.process_group is not None or not by_totals:
        return loss
    own = copy.copy(loss)  # with the same parameters and buffers
    own.process_group = ranks.group(device)
    return own
