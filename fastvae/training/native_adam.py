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

# size, gradient and its dtype, weight, moments, copy and its dtype, average: addresses for csrc/bind_adam.cpp
_Part = tuple[int, int, int, int, int, int, int, int, int]


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
        self._places = self._find_places()

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
        leaves = self.weights.leaves
        parts: list[_Part] = []
        gradients = []
        indices = []
        for i, (leaf, gradient) in enumerate(zip(leaves, self.weights.own_gradients(), strict=True)):
            if gradient is None:
                continue
            gradient = _laid_out_as(leaf, gradient)
            gradients.append(gradient)  # alive while its address is in use
            indices.append(i)
            code = DTYPE_CODES[gradient.dtype]
            parts.append((gradient.numel(), gradient.data_ptr(), code, *self._places[i]))
        learned: list[_Part] = []
        for i, parameter in enumerate(self.learned_by_loss, len(leaves)):
            if parameter.grad is None:
                continue
            indices.append(i)
            code = DTYPE_CODES[parameter.grad.dtype]
            learned.append((parameter.numel(), parameter.grad.data_ptr(), code, *self._places[i]))

        threads = torch.get_num_threads()
        factor = 1.0
        if self.clip_norm is not None:
            factor = _native.clip_factor(parts + learned, self.clip_norm, threads)
        # whose norm is finite where each gradient is
        if self.clip_norm is None or not factor > 0:
            bad = _native.first_not_finite(parts + learned, threads)
            if bad < len(indices):
                return _finding(terms, indices[bad])
        self.steps += 1
        average_new = 0.0 if self.ema_decay is None else share_of_new(self.ema_decay, self.steps)
        for group, lr, weight_decay in (
            (parts, self.lr, self.weight_decay),
            (learned, self.lr * LOG_VARIANCE_LR_FACTOR, 0.0),
        ):
            if group:
                _native.adam(group, self.steps, lr, *BETAS, EPS, weight_decay, factor, average_new, threads)
        return None

    def _find_places(self) -> list[tuple[int, int, int, int, int, int]]:
        """Of each parameter, then of those of the loss: all of a _Part that stays from step to step."""
        weights, copies = self.weights, self.weights.copies
        at, mean_at, square_at = (t.data_ptr() for t in (weights.flat, self.mean, self.square))
        copy_at, copy_size, copy_code = 0, 0, DTYPE_CODES[torch.float32]
        if copies is not None:
            copy_at, copy_size, copy_code = copies.data_ptr(), copies.itemsize, DTYPE_CODES[copies.dtype]
        averages_at = [average.data_ptr() for _, average in self.averages] or [0] * (1 + len(self._moments))
        places = []
        for offset in weights.offsets:
            average_at = averages_at[0] + 4 * offset if self.averages else 0
            moments_at = mean_at + 4 * offset, square_at + 4 * offset
            places.append((at + 4 * offset, *moments_at, copy_at + copy_size * offset, copy_code, average_at))
        learned = zip(self.learned_by_loss, self._moments, averages_at[1:], strict=True)
        for parameter, (mean, square), average_at in learned:
            code = DTYPE_CODES[torch.float32]
            places.append((parameter.data_ptr(), mean.data_ptr(), square.data_ptr(), 0, code, average_at))
        return places

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


def _laid_out_as(leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its elements where `leaf` has its own."""
    if gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)
