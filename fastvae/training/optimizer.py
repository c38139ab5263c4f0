"""The optimizers of a step: Adam and AdamW, over weights that lie in one tensor.

Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (AdamW).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import _native
from ..ops.native import DTYPE_CODES
from .weights import FlatWeights

BETAS, EPS, ADAMW_WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01

# Adam moves a parameter by about lr a step. ln of a learned variance has several nats to go, where weights
# have hundredths.
LOG_VARIANCE_LR_FACTOR = 10.0


# size, gradient and its dtype, weight, moments, copy and its dtype: addresses for csrc/bind_adam.cpp
_Part = tuple[int, int, int, int, int, int, int, int]


class Optimizer(Protocol):
    """What a step asks of an optimizer."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""

    def step(self) -> None:
        """Update the weights by their gradients, which are used up."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside weights and options; what is no tensor in 0-d ones."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""


def make_optimizer(
    weights: FlatWeights, learned_by_loss: list[nn.Parameter], name: str, lr: float
) -> Optimizer:
    """Adam ("adam") or AdamW ("adamw", weight decay 0.01): native on the CPU, torch's fused one elsewhere."""
    weight_decay = ADAMW_WEIGHT_DECAY if name == "adamw" else 0.0
    if weights.flat.device.type == "cpu" and not _is_half(weights):
        return NativeAdam(weights, learned_by_loss, lr, weight_decay)
    return FusedAdam(weights, learned_by_loss, lr, weight_decay)


class NativeAdam:
    """Adam with decoupled weight decay on the CPU, in one pass.

    It reads the gradients where backward left them, in their own dtype, and writes the weights and their
    copies for the next step together. The learned parameters of a loss have no weight decay.
    """

    def __init__(
        self, weights: FlatWeights, learned_by_loss: list[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        self.weights = weights
        self.learned_by_loss = learned_by_loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.steps = 0
        self.mean, self.square = (torch.zeros_like(weights.flat.detach()) for _ in range(2))
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned_by_loss]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""
        loss.backward()

    def step(self) -> None:
        """Update the weights by their gradients; those without a gradient stay."""
        self.steps += 1
        weights, copies = self.weights, self.weights.copies
        at, mean_at, square_at = (t.data_ptr() for t in (weights.flat, self.mean, self.square))
        copy_at, copy_size, copy_code = 0, 0, DTYPE_CODES[torch.float32]
        if copies is not None:
            copy_at, copy_size, copy_code = copies.data_ptr(), copies.itemsize, DTYPE_CODES[copies.dtype]
        parts: list[_Part] = []
        gradients = []
        for leaf, offset in zip(weights.leaves, weights.offsets, strict=True):
            if leaf.grad is None:
                continue
            gradient = leaf.grad.contiguous()
            gradients.append(gradient)  # alive while its address is in use
            leaf.grad = None
            places = at + 4 * offset, mean_at + 4 * offset, square_at + 4 * offset
            code = DTYPE_CODES[gradient.dtype]
            copy = copy_at + copy_size * offset
            parts.append((gradient.numel(), gradient.data_ptr(), code, *places, copy, copy_code))
        self._update(parts, self.lr, self.weight_decay)

        parts = []
        for parameter, (mean, square) in zip(self.learned_by_loss, self._moments, strict=True):
            if parameter.grad is None:
                continue
            places = parameter.data_ptr(), mean.data_ptr(), square.data_ptr()
            code = DTYPE_CODES[parameter.grad.dtype]
            parts.append((parameter.numel(), parameter.grad.data_ptr(), code, *places, 0, code))
        self._update(parts, self.lr * LOG_VARIANCE_LR_FACTOR, 0.0)
        for parameter in self.learned_by_loss:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The moments, and the number of steps."""
        found = {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}
        for i, (mean, square) in enumerate(self._moments):
            found |= {f"loss.{i}.mean": mean, f"loss.{i}.square": square}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])

    def _update(self, parts: list[_Part], lr: float, weight_decay: float) -> None:
        if parts:
            _native.adam(parts, self.steps, lr, *BETAS, EPS, weight_decay, torch.get_num_threads())


class FusedAdam:
    """torch's fused Adam or AdamW over the flat weights; with a GradScaler for float16."""

    def __init__(
        self, weights: FlatWeights, learned_by_loss: list[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        self.weights = weights
        groups = [{"params": [weights.flat], "weight_decay": weight_decay}]
        if learned_by_loss:
            own = {"lr": lr * LOG_VARIANCE_LR_FACTOR, "weight_decay": 0.0}
            groups.append({"params": learned_by_loss, **own})
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)
        self.scaler = torch.amp.GradScaler(weights.flat.device.type) if _is_half(weights) else None

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, scaled where float16 would lose them."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """Update the weights by their gradients; with a scaler, unless these overflowed."""
        self.weights.gather_gradients()
        if self.scaler is None:
            self.adam.step()
        else:
            self.scaler.step(self.adam)
            self.scaler.update()
        self.weights.refresh_copies()
        for group in self.adam.param_groups[1:]:
            for parameter in group["params"]:
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the numbers of steps, and the scale of the gradients."""
        found = {
            f"{i}.{name}": value
            for i, parameter in enumerate(self._updated())
            for name, value in self.adam.state[parameter].items()
        }
        if self.scaler is not None:
            numbers = self.scaler.state_dict()
            found |= {f"scaler.{name}": torch.tensor(value) for name, value in numbers.items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for i, parameter in enumerate(self._updated()):
            start = f"{i}."
            self.adam.state[parameter] = {
                name.removeprefix(start): value.to(parameter.device)
                for name, value in tensors.items()
                if name.startswith(start)
            }
        if self.scaler is not None:
            numbers = {n: tensors[f"scaler.{n}"].item() for n in self.scaler.state_dict()}
            self.scaler.load_state_dict(numbers)

    def _updated(self) -> list[nn.Parameter]:
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]


def _is_half(weights: FlatWeights) -> bool:
    return weights.copies is not None and weights.copies.dtype == torch.float16
