"""The optimizers of a step: Adam and AdamW, over weights that lie in one tensor.

Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (AdamW).
Gradients are clipped by their global norm, as by torch.nn.utils.clip_grad_norm_: Pascanu et al. 2013, "On the
difficulty of training recurrent neural networks".
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

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""

    def step(self) -> None:
        """Update the weights by their gradients, which are used up."""

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
) -> Optimizer:
    """Adam ("adam") or AdamW ("adamw"): native on the CPU, torch's fused one elsewhere.

    weight_decay: of AdamW; None is 0.01 there. Adam has none.
    clip_norm: the largest norm of all gradients together; None does not clip.
    """
    if name != "adamw":
        weight_decay = 0.0
    elif weight_decay is None:
        weight_decay = ADAMW_WEIGHT_DECAY
    if weights.flat.device.type == "cpu" and not _is_half(weights):
        return NativeAdam(weights, learned_by_loss, lr, weight_decay, clip_norm)
    return FusedAdam(weights, learned_by_loss, lr, weight_decay, clip_norm)


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
    ) -> None:
        self.weights = weights
        self.learned_by_loss = learned_by_loss
        self.lr = lr
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.steps = 0
        self.mean, self.square = (torch.zeros_like(weights.flat.detach()) for _ in range(2))
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned_by_loss]

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        self.lr = lr

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
        learned: list[_Part] = []
        for parameter, (mean, square) in zip(self.learned_by_loss, self._moments, strict=True):
            if parameter.grad is None:
                continue
            places = parameter.data_ptr(), mean.data_ptr(), square.data_ptr()
            code = DTYPE_CODES[parameter.grad.dtype]
            learned.append((parameter.numel(), parameter.grad.data_ptr(), code, *places, 0, code))

        threads = torch.get_num_threads()
        factor = 1.0
        if self.clip_norm is not None:
            factor = _native.clip_factor(parts + learned, self.clip_norm, threads)
        for group, lr, weight_decay in (
            (parts, self.lr, self.weight_decay),
            (learned, self.lr * LOG_VARIANCE_LR_FACTOR, 0.0),
        ):
            if group:
                _native.adam(group, self.steps, lr, *BETAS, EPS, weight_decay, factor, threads)
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


class FusedAdam:
    """torch's fused Adam or AdamW over the flat weights; with a GradScaler for float16.

    The learning rates are tensors on the device, changed in place: a captured graph reads them anew.
    """

    def __init__(
        self,
        weights: FlatWeights,
        learned_by_loss: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        clip_norm: float | None = None,
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

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        for group, factor in zip(self.adam.param_groups, (1.0, LOG_VARIANCE_LR_FACTOR), strict=False):
            group["lr"].fill_(lr * factor)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, scaled where float16 would lose them."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """Update the weights by their gradients; with a scaler, unless these overflowed."""
        self.weights.gather_gradients()
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.adam)
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
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
