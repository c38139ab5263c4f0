"""The sum of the gradients of all ranks, and of their parts of the loss."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import ELBOTerms
from ..ops.types import Spec
from .distributed import REQUESTS, Ranks, Share
from .weights import FlatWeights

LATE = 4  # steps after which what a GPU has been asked is read, so that no step waits for another


class GradientSum:
    """Adds up the gradients of all ranks, in one all-reduce with all else that they tell each other.

    That is: the terms of the loss; on a CPU, which parameters have a gradient at all; what `ranks` is asked.
    """

    def __init__(self, ranks: Ranks, weights: FlatWeights, learned_by_loss: list[nn.Parameter]) -> None:
        device = weights.flat.device
        self._ranks = ranks
        self._weights = weights
        self._learned = learned_by_loss
        self._leaves = [*weights.leaves, *learned_by_loss]
        sizes = [
            weights.flat.numel(),
            *(p.numel() for p in learned_by_loss),
            len(ELBOTerms._fields),
            len(REQUESTS) + len(self._leaves),
        ]
        self._all = torch.zeros(sum(sizes), device=device)
        flat, *learned, self._terms, self._flags = self._all.split(sizes)
        weights.use_gradient_memory(flat)
        self._learned_gradients = [g.view(p.shape) for g, p in zip(learned, learned_by_loss, strict=True)]
        self._own_flags = (False,) * len(self._flags)
        self._sent_flags = torch.zeros_like(self._flags)
        self._unread: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @torch.no_grad()
    def __call__(self, terms: ELBOTerms | None) -> ELBOTerms:
        """Add up what is at the leaves, for `weights` and in `grad` of the loss's parameters.

        terms: the rank's part of them (see `part_of`), None for a rank without rows.

        Gives the terms of the whole batch.
        """
        own = (
            *(request in self._ranks.asked for request in REQUESTS),
            *(leaf.grad is not None for leaf in self._leaves),
        )
        self._ranks.asked.clear()
        if own != self._own_flags:
            self._own_flags = own
            self._sent_flags.copy_(torch.tensor(own, dtype=torch.float32))
        self._flags.copy_(self._sent_flags)
        self._weights.summed = None
        self._weights.gather_gradients()
        for parameter, gradient in zip(self._learned, self._learned_gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
        if terms is None:
            self._terms.zero_()
        else:
            self._terms.copy_(torch.stack(terms))
        dist.all_reduce(self._all, group=self._ranks.group(self._all.device))
        used = self._read_flags()
        n_weights = len(self._weights.leaves)
        self._weights.summed = [
            gradient if is_used else None
            for gradient, is_used in zip(self._weights.gradients, used[:n_weights], strict=True)
        ]
        for parameter, gradient, is_used in zip(
            self._learned, self._learned_gradients, used[n_weights:], strict=True
        ):
            parameter.grad = gradient.to(parameter.dtype) if is_used else None
        return ELBOTerms(*self._terms.clone())

    def _read_flags(self) -> list[bool]:
        """Tell `ranks` what was asked; give which leaves have a gradient on any rank."""
        n = len(REQUESTS)
        if self._flags.device.type == "cpu":
            flags = self._flags.tolist()
            self._ranks.agreed = {request for request, asked in zip(REQUESTS, flags, strict=False) if asked}
            return [bool(used) for used in flags[n:]]
        copy = torch.empty(n, device="cpu", pin_memory=True).copy_(self._flags[:n], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((event, copy))
        self._ranks.agreed = set()
        if len(self._unread) > LATE:
            event, copy = self._unread.popleft()
            event.synchronize()
            self._ranks.agreed = {r for r, asked in zip(REQUESTS, copy.tolist(), strict=True) if asked}
        return [leaf.requires_grad for leaf in self._leaves]  # to read the flags would be to wait


def part_of(terms: ELBOTerms, spec: Spec, share: Share) -> ELBOTerms:
    """What a rank's terms add to those of the batch: means count by its part of the rows, sums fully."""
    recon, kl = parts(spec, share)
    if recon == kl == 1:
        return terms
    loss = terms.loss * kl
    if recon != kl:
        loss = loss + terms.recon * (recon - kl)
    return ELBOTerms(loss, terms.recon * recon, terms.kl * kl)


def parts(spec: Spec, share: Share) -> tuple[float, float]:
    """The factors from a rank's reconstruction and KL term to what they add to those of the batch."""
    part = 1.0 if share.rows == share.batch else share.rows / share.batch
    recon, kl = (1.0 if r == "sum" else part for r in (spec.recon_reduction, spec.kl_reduction))
    return recon, kl
