"""What the two Adams share: their constants, and averages of the weights.

Averages of weights: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from .weights import FlatWeights

BETAS, EPS = (0.9, 0.999), 1e-8

# Adam moves a parameter by about lr a step. ln of a learned variance has several nats to go, where weights
# have hundredths.
LOG_VARIANCE_LR_FACTOR = 10.0

Number = TypeVar("Number", float, Tensor)


def averages_of(weights: FlatWeights, learned_by_loss: list[nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    """The weights and those of the loss, and copies of them to begin with."""
    tensors = [t.detach() for t in (weights.flat, *learned_by_loss)]
    return [(tensor, tensor.clone()) for tensor in tensors]


def named_averages(averages: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The averages, for a checkpoint."""
    return {f"average.{i}": average for i, (_, average) in enumerate(averages)}


def share_of_new(decay: float, steps: Number) -> Number:
    """What an average takes of the new weights in the update with number `steps`, from 1: 1 - decay, or more.

    With few steps behind it, it follows them faster: its decay is at most (1 + steps) / (10 + steps), as in
    TensorFlow's ExponentialMovingAverage with num_updates. The first weights are soon forgotten.
    """
    share = 9 / (10 + steps)
    return share.clamp(min=1 - decay) if isinstance(share, Tensor) else max(share, 1 - decay)
