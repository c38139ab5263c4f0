"""The optimizers of a step: Adam and AdamW, over weights that lie in one tensor.

Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (AdamW).
Averages of weights: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
Gradients are clipped by their global norm, as by torch.nn.utils.clip_grad_norm_: Pascanu et al. 2013, "On the
difficulty of training recurrent neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import _native
from ..ops import ELBOTerms
from ..ops.native import DTYPE_CODES
from .numbers import Finding
from .weights import FlatWeights

BETAS, EPS, ADAMW_WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01

# Adam moves a parameter by about lr a step. ln of a learned variance has several nats to go, where weights
# have hundredths.
LOG_VARIANCE_LR_FACTOR = 10.0

# with a smaller scale even a gradient of 1 is 0 in float16
LEAST_SCALE = 2.0**-24

Number = TypeVar("Number", float, Tensor)

# size, gradient and its dtype, weight, moments, copy and its dtype, average: addresses for csrc/bind_adam.cpp
_Part = tuple[int, int, int, int, int, int, int, int, int]


class Optimizer(Protocol):
    """What a step asks of an optimizer.

    averages: each tensor of weights, and its exponential moving average; none without `ema_decay`.
    """

    averages: list[tuple[Tensor, Tensor]]

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""

    def step(self, terms: ELBOTerms | None = None) -> None:
        """Update the weights by their gradients, which are used up; `terms` are those of their loss.

        Where the loss or a gradient is not finite, nothing changes but the `findings`.
        """

    def findings(self) -> list[Finding | None]:
        """What was not finite in each step since the last call; waits for the device."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside weights and options; what is no tensor in 0-d ones."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""


def make_optimizer(
    weights: FlatWeights,
    learned_by_loss: list[nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    """Adam ("adam") or AdamW ("adamw"): native on the CPU, torch's fused one elsewhere.

    weight_decay: of AdamW; None is 0.01 there. Adam has none.
    clip_norm: the largest norm of all gradients together; None does not clip.
    ema_decay: of an exponential moving average of the weights; None has none.
    """
    if name != "adamw":
        weight_decay = 0.0
    elif weight_decay is None:
        weight_decay = ADAMW_WEIGHT_DECAY
    if weights.flat.device.type == "cpu" and not _is_half(weights):
        return NativeAdam(weights, learned_by_loss, lr, weight_decay, clip_norm, ema_decay)
    return FusedAdam(weights, learned_by_loss, lr, weight_decay, clip_norm, ema_decay)


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
        self.mean, self.square = (torch.zeros_like(weights.flat.detach()) for _ in range(2))
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned_by_loss]
        self.ema_decay = ema_decay
        self.averages = [] if ema_decay is None else _averages(weights, learned_by_loss)

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        self.lr = lr

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""
        loss.backward()

    def step(self, terms: ELBOTerms | None = None) -> None:
        """Update the weights by their gradients; those without a gradient stay.

        Where the loss or a gradient is not finite, nothing changes but the `findings`.
        """
        finding = self._update(terms)
        self._findings.append(finding)
        for parameter in (*self.weights.leaves, *self.learned_by_loss):
            parameter.grad = None

    def _update(self, terms: ELBOTerms | None) -> Finding | None:
        """One step, unless something is not finite."""
        if terms is not None and not math.isfinite(terms.loss.item()):
            return _finding(terms)
        weights, copies = self.weights, self.weights.copies
        at, mean_at, square_at = (t.data_ptr() for t in (weights.flat, self.mean, self.square))
        copy_at, copy_size, copy_code = 0, 0, DTYPE_CODES[torch.float32]
        if copies is not None:
            copy_at, copy_size, copy_code = copies.data_ptr(), copies.itemsize, DTYPE_CODES[copies.dtype]
        averages_at = [average.data_ptr() for _, average in self.averages]
        parts: list[_Part] = []
        gradients = []
        indices = []
        for i, (gradient, offset) in enumerate(zip(weights.own_gradients(), weights.offsets, strict=True)):
            if gradient is None:
                continue
            gradient = _laid_out_as(weights.leaves[i], gradient)
            gradients.append(gradient)  # alive while its address is in use
            indices.append(i)
            places = at + 4 * offset, mean_at + 4 * offset, square_at + 4 * offset
            code = DTYPE_CODES[gradient.dtype]
            copy = copy_at + copy_size * offset
            average = averages_at[0] + 4 * offset if averages_at else 0
            parts.append((gradient.numel(), gradient.data_ptr(), code, *places, copy, copy_code, average))
        learned: list[_Part] = []
        learned_moments = zip(self.learned_by_loss, self._moments, strict=True)
        for i, (parameter, (mean, square)) in enumerate(learned_moments, len(weights.leaves)):
            if parameter.grad is None:
                continue
            indices.append(i)
            places = parameter.data_ptr(), mean.data_ptr(), square.data_ptr()
            code = DTYPE_CODES[parameter.grad.dtype]
            average = averages_at[1 + i - len(weights.leaves)] if averages_at else 0
            learned.append((parameter.numel(), parameter.grad.data_ptr(), code, *places, 0, code, average))

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
        average_new = 0.0 if self.ema_decay is None else _share_of_new(self.ema_decay, self.steps)
        for group, lr, weight_decay in (
            (parts, self.lr, self.weight_decay),
            (learned, self.lr * LOG_VARIANCE_LR_FACTOR, 0.0),
        ):
            if group:
                _native.adam(group, self.steps, lr, *BETAS, EPS, weight_decay, factor, average_new, threads)
        return None

    def findings(self) -> list[Finding | None]:
        """What was not finite in each step since the last call."""
        found, self._findings = self._findings, []
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The moments, the averages, and the number of steps."""
        found = {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}
        for i, (mean, square) in enumerate(self._moments):
            found |= {f"loss.{i}.mean": mean, f"loss.{i}.square": square}
        return found | _named(self.averages)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])


class FusedAdam:
    """torch's fused Adam or AdamW over the flat weights; with a GradScaler for float16.

    The learning rates are tensors on the device, changed in place: a captured graph reads them anew. So is
    what Adam is told not to apply a step by.
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
        self.clip_norm = clip_norm
        device = weights.flat.device
        self._parameters = [weights.flat, *learned_by_loss]
        own_lr = torch.tensor(lr * LOG_VARIANCE_LR_FACTOR, device=device)
        groups = [
            {"params": [weights.flat], "lr": torch.tensor(lr, device=device), "weight_decay": weight_decay},
            *([{"params": learned_by_loss, "lr": own_lr, "weight_decay": 0.0}] if learned_by_loss else []),
        ]
        self.adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
        self.scaler = torch.amp.GradScaler(device.type) if _is_half(weights) else None
        self._found, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self._kept: list[tuple[ELBOTerms | None, Tensor]] = []
        self.ema_decay = ema_decay
        self.averages = [] if ema_decay is None else _averages(weights, learned_by_loss)

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        for group, factor in zip(self.adam.param_groups, (1.0, LOG_VARIANCE_LR_FACTOR), strict=False):
            group["lr"].fill_(lr * factor)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, scaled where float16 would lose them."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, terms: ELBOTerms | None = None) -> None:
        """Update the weights by their gradients; not where these or the loss are not finite."""
        self.weights.gather_gradients()
        self._kept.append((terms, self._look(terms)))
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.adam)
            self._clip(self.clip_norm)
        applied = None if self.ema_decay is None else self._applied().clone()
        if self.scaler is None:
            self.adam.step()
        else:
            self.scaler.step(self.adam)
            self.scaler.update()
        if applied is not None:
            self._average(self._applied() - applied)
        self.weights.refresh_copies()
        for group in self.adam.param_groups[1:]:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def _look(self, terms: ELBOTerms | None) -> Tensor:
        """The loss, and the largest element of each gradient; Adam hears of what is not finite."""
        gradients = [*self.weights.gradients, *(p.grad for p in self._parameters[1:] if p.grad is not None)]
        loss = self._one if terms is None else terms.loss.detach().float()
        largest = torch.stack([loss, *torch._foreach_norm(gradients, math.inf)])
        if self.scaler is None:
            self._found.zero_()
            # the scaler's own test, in one launch
            torch._amp_foreach_non_finite_check_and_unscale_([largest], self._found, self._one)
            self.adam.found_inf = self._found  # type: ignore[attr-defined]
        else:
            # which makes a gradient not a number, as the scaler looks at these alone
            self._parameters[0].grad[:1].add_(loss * 0)  # type: ignore[index]
        return largest

    def _applied(self) -> Tensor:
        """The steps that were applied, counted on the device."""
        state = self.adam.state.get(self.weights.flat)
        found: Tensor = state["step"] if state else torch.zeros_like(self._one)
        return found

    @torch.no_grad()
    def _average(self, applied: Tensor) -> None:
        """Take the weights into their averages; `applied` is 1, or 0 where the last step was not applied."""
        assert self.ema_decay is not None
        share = applied * _share_of_new(self.ema_decay, self._applied())
        for weights, average in self.averages:
            average.lerp_(weights, share)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        # a factor that is not a number would stay in the flat gradient, between those of the parameters
        factor = (max_norm / (norm + 1e-6)).clamp(max=1).nan_to_num(0.0)
        torch._foreach_mul_(gradients, factor)

    def findings(self) -> list[Finding | None]:
        """What was not finite in each step since the last call; waits for the device.

        With a scaler, gradients that overflow are no matter while there is a smaller scale to try.
        """
        if not self._kept:
            return []
        kept, self._kept = self._kept, []
        finite = torch.stack([largest for _, largest in kept]).isfinite().tolist()
        overflow = self.scaler is not None and self.scaler.get_scale() >= LEAST_SCALE
        found: list[Finding | None] = []
        for (terms, _), (of_loss, *of_gradients) in zip(kept, finite, strict=True):
            if not of_loss:
                found.append(_finding(terms))
            elif not all(of_gradients):
                found.append(_finding(terms, of_gradients.index(False), overflow))
            else:
                found.append(None)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the numbers of steps, the averages, and the scale of the gradients."""
        found = {
            f"{i}.{name}": value
            for i, parameter in enumerate(self._updated())
            for name, value in self.adam.state[parameter].items()
        }
        if self.scaler is not None:
            numbers = self.scaler.state_dict()
            found |= {f"scaler.{name}": torch.tensor(value) for name, value in numbers.items()}
        return found | _named(self.averages)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for i, parameter in enumerate(self._updated()):
            start = f"{i}."
            self.adam.state[parameter] = {
                name.removeprefix(start): value.to(parameter.device)
                for name, value in tensors.items()
                if name.startswith(start)
            }
        for name, average in _named(self.averages).items():
            average.copy_(tensors[name])
        if self.scaler is not None:
            numbers = {n: tensors[f"scaler.{n}"].item() for n in self.scaler.state_dict()}
            self.scaler.load_state_dict(numbers)

    def _updated(self) -> list[nn.Parameter]:
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]


def _averages(weights: FlatWeights, learned_by_loss: list[nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    """The weights and those of the loss, and copies of them to begin with."""
    tensors = [t.detach() for t in (weights.flat, *learned_by_loss)]
    return [(tensor, tensor.clone()) for tensor in tensors]


def _named(averages: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {f"average.{i}": average for i, (_, average) in enumerate(averages)}


def _share_of_new(decay: float, steps: Number) -> Number:
    """What an average takes of the new weights in the update with number `steps`, from 1: 1 - decay, or more.

    With few steps behind it, it follows them faster: its decay is at most (1 + steps) / (10 + steps), as in
    TensorFlow's ExponentialMovingAverage with num_updates. The first weights are soon forgotten.
    """
    share = 9 / (10 + steps)
    return share.clamp(min=1 - decay) if isinstance(share, Tensor) else max(share, 1 - decay)


def _laid_out_as(leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its elements where `leaf` has its own."""
    if gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)


def _finding(terms: ELBOTerms | None, parameter: int | None = None, overflow: bool = False) -> Finding:
    return Finding(() if terms is None else tuple(term.item() for term in terms), parameter, overflow)


def _is_half(weights: FlatWeights) -> bool:
    return weights.copies is not None and weights.copies.dtype == torch.float16
