"""The optimizers of a step: Adam and AdamW, over weights that lie in one tensor.

Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (AdamW).
Gradients are clipped by their global norm, as by torch.nn.utils.clip_grad_norm_: Pascanu et al. 2013, "On the
difficulty of training recurrent neural networks".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from ..ops import ELBOTerms
from .fused_adam import FusedAdam
from .native_adam import NativeAdam
from .numbers import Finding
from .weights import FlatWeights

ADAMW_WEIGHT_DECAY = 0.01


class Optimizer(Protocol):
    """What a step asks of an optimizer.

    averages: each tensor of weights, and its exponential moving average; none without `ema_decay`.
    """

    averages: list[tuple[Tensor, Tensor]]

    @property
    def applied(self) -> Tensor | bool:
        """Whether the last step was; a number on the device, 1 or 0, where that would be waited for."""

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""

    def step(self, terms: ELBOTerms | None = None) -> Iterable[Tensor]:
        """Update the weights by their gradients, which are used up; `terms` are those of their loss.

        Where the loss or a gradient is not finite, nothing changes. Gives what is to be kept of the step: the
        terms, and after them what `findings` reads.
        """

    def abandon(self) -> None:
        """Forget a step that was begun and not ended: no gradients are there any more."""

    def findings(self, rows: Tensor | None = None) -> list[Finding | None]:
        """What was not finite in each step since the last call; waits for the device.

        rows: what these steps gave, a row each; None where that is not needed.
        """

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
    if weights.flat.device.type == "cpu" and not weights.is_half:
        return NativeAdam(weights, learned_by_loss, lr, weight_decay, clip_norm, ema_decay)
    return FusedAdam(weights, learned_by_loss, lr, weight_decay, clip_norm, ema_decay)
