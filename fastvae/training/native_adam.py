"""Adam in C++, for weights on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import _native
from ..ops import ELBOTerms
from ..ops.native import DTYPE_CODES
from .adam import BETAS, EPS, LOG_VARIANCE_LR_FACTOR, averages_of, named_averages, share_of_new
from .numbers import Finding
from .weights import FlatWeights


class NativeAdam:
    """Adam with decoupled weight decay on the CPU, in one pass.

    It reads the gradients where backward left them, in their own dtype, and writes the weights and their
    copies for the next step together. The learned parameters of a loss have no weight decay.
    """

    def __init__(
        self,
        weights: FlatWeights,
        learned_by_loss: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.weights = weights
        self.learned_by_loss = learned_by_loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.steps = 0
        self._findings: list[Finding | None] = []
        self.applied = True
        self.mean, self.square = (torch.zeros_like(weights.flat.detach()) for _ in range(2))
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned_by_loss]
        self.ema_decay = ema_decay
        self.averages = [] if ema_decay is None else averages_of(weights, learned_by_loss)
        self._addresses: list[int] = []  # for which `_parts` is

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        self.lr = lr

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""
        loss.backward()

    def step(self, terms: ELBOTerms | None = None) -> list[Tensor]:
        """Update the weights by their gradients; those without a gradient stay.

        Where the loss or a gradient is not finite, nothing changes but the `findings`. Gives the terms.
        """
        finding = self._update(terms)
        self._findings.append(finding)
        self.applied = finding is None
        self.abandon()
        return [] if terms is None else [term.detach() for term in terms]

    def abandon(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.weights.leaves, *self.learned_by_loss):
            parameter.grad = None

    def _update(self, terms: ELBOTerms | None) -> Finding | None:
        """One step, unless something is not finite."""
        if terms is not None and not math.isfinite(terms.loss.item()):
            return _finding(terms)
        leaves = (*self.weights.leaves, *self.learned_by_loss)
        own = (*self.weights.own_gradients(), *(parameter.grad for parameter in self.learned_by_loss))
        gradients = [
            None if gradient is None else _laid_out_as(leaf, gradient)
            for leaf, gradient in zip(leaves, own, strict=True)
        ]
        at = [(0, 0) if g is None else (g.data_ptr(), DTYPE_CODES[g.dtype]) for g in gradients]
        addresses = [t.data_ptr() for t in (self.weights.flat, *self.learned_by_loss)]
        if addresses != self._addresses:  # as share_memory() changes them
            self._addresses, self._parts = addresses, self._find_parts()
        threads = torch.get_num_threads()
        factor = 1.0
        if self.clip_norm is not None:
            factor = self._parts.clip_factor(at, self.clip_norm, threads)
        # whose norm is finite where each gradient is
        check = self.clip_norm is None or not factor > 0
        average_new = 0.0 if self.ema_decay is None else share_of_new(self.ema_decay, self.steps + 1)
        first_bad = self._parts.step(
            at, self.steps + 1, self.lr, *BETAS, EPS, factor, average_new, check, threads
        )
        if first_bad < len(at):
            return _finding(terms, first_bad)
        self.steps += 1
        return None

    def _find_parts(self) -> _native.AdamParts:
        """The parameters, then those of the loss."""
        weights, copies = self.weights, self.weights.copies
        flat, averages = weights.flat.detach(), [average for _, average in self.averages]
        places = []
        for leaf, offset in zip(weights.leaves, weights.offsets, strict=True):
            tensors = [t[offset:] for t in (flat, self.mean, self.square)]
            copy = None if copies is None else copies[offset:]
            average = averages[0][offset:] if averages else None
            places.append(_place(leaf.numel(), tensors, copy, average, 1.0, self.weight_decay))
        for i, (parameter, moments) in enumerate(zip(self.learned_by_loss, self._moments, strict=True), 1):
            average = averages[i] if averages else None
            tensors = [parameter.detach(), *moments]
            places.append(_place(parameter.numel(), tensors, None, average, LOG_VARIANCE_LR_FACTOR, 0.0))
        return _native.AdamParts(places)

    def findings(self, rows: Tensor | None = None) -> list[Finding | None]:
        """What was not finite in each step since the last call, known without `rows`."""
        found, self._findings = self._findings, []
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The moments, the averages, and the number of steps."""
        found = {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}
        for i, (mean, square) in enumerate(self._moments):
            found |= {f"loss.{i}.mean": mean, f"loss.{i}.square": square}
        return found | named_averages(self.averages)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])


def _finding(terms: ELBOTerms | None, parameter: int | None = None) -> Finding:
    return Finding(() if terms is None else tuple(term.item() for term in terms), parameter)


def _place(
    n: int, tensors: list[Tensor], copy: Tensor | None, average: Tensor | None, lr_factor: float, decay: float
) -> tuple[int, int, int, int, int, int, int, float, float]:
    """A parameter for csrc/bind_adam.cpp: its n elements begin where `tensors` do, weight and moments."""
    weight, mean, square = (t.data_ptr() for t in tensors)
    at, code = (0, DTYPE_CODES[torch.float32]) if copy is None else (copy.data_ptr(), DTYPE_CODES[copy.dtype])
    return n, weight, mean, square, at, code, 0 if average is None else average.data_ptr(), lr_factor, decay


def _laid_out_as(leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its elements, and their signs, where `leaf` has its own."""
    if gradient.stride() == leaf.stride() and not gradient.is_neg():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)
