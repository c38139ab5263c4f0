"""A term of the user's own, beside the ELBO's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Ranks

LATENTS = {"z", "mu", "logvar"}


class ExtraLossError(TypeError):
    """An extra loss that gave something else than a scalar; the message says what."""


class ExtraLoss:
    """`function`, called as function(x_hat, x) and by name with those of z, mu and logvar that it names.

    x_hat: [B, *item], the parameters of p(x|z), in the dtype that the decoder gave; x: [B, *item], float32;
    z, mu, logvar: [B, *latent], logvar clamped where the loss's is. It gives a scalar, which is added to the
    loss as it is: weigh it yourself. The average stays on the device until it is read.
    """

    def __init__(
        self, function: Callable[..., Tensor], device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.function = function.to(device) if isinstance(function, nn.Module) else function
        self._names = LATENTS & _parameters(function.forward if isinstance(function, nn.Module) else function)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the values, and of their data
        self._own = torch.zeros_like(self._sums)  # of this rank, not in those yet
        self._group = None if ranks is None else ranks.group(device)

    def __call__(self, x_hat: Tensor, x: Tensor, **latents: Tensor) -> Tensor:
        """The value for a batch, a float32 scalar. Raises ExtraLossError."""
        value = self.function(x_hat, x, **{name: latents[name] for name in self._names})
        if not isinstance(value, Tensor) or value.ndim:
            got = (
                f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise ExtraLossError(f"extra_loss: got {got} of it, expected a tensor without dimensions")
        value = value.float()
        kept = value.detach().double()
        counted = torch.where(kept.isfinite(), torch.stack((kept, torch.ones_like(kept))), 0.0)
        self._own += counted * len(x)
        return value

    def gather(self) -> None:
        """Take in what each rank has counted since the last call; for all of them to call."""
        if self._group is not None:
            dist.all_reduce(self._own, group=self._group)
        self._sums += self._own
        self._own.zero_()

    def average(self) -> float:
        """The average over the data since `reset`, NaN of none; waits for the device, and for other ranks."""
        self.gather()
        total, data = self._sums.tolist()
        return float(total / (data or math.nan))

    def reset(self) -> None:
        """Begin a new average."""
        self._sums.zero_()
        self._own.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The average so far, and what may change in a module: buffers, and parameters with gradients.

        Of several ranks, after `gather`.
        """
        if self._group is None:
            self.gather()
        found = {"sums": self._sums}
        if isinstance(self.function, nn.Module):
            found |= {f"buffer.{name}": t for name, t in self.function.named_buffers()}
            trained = {n: p.detach() for n, p in self.function.named_parameters() if p.requires_grad}
            found |= {f"parameter.{name}": t for name, t in trained.items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; what is absent there, since the term is new, begins as it is."""
        for name, tensor in self.tensors().items():
            if name in tensors:
                tensor.copy_(tensors[name])


def _parameters(function: Callable[..., Tensor]) -> set[str]:
    """The names of its parameters; none where Python does not know them, as of what is written in C."""
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:
        return set()
