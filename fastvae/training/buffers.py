"""The buffers of a model, such as running statistics: put back where a step turns out not to be applied."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Buffers:
    """What the buffers of `model` were before a step. A forward pass changes them, whatever comes of it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: list[Tensor] = []
        self._before: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Find them anew, for the model's owner may have put others in their places."""
        own = list(self._model.buffers())
        if [id(b) for b in own] != [id(b) for b in self._own]:  # else a captured graph has their addresses
            self._own, self._before = own, [torch.empty_like(b) for b in own]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them; before a step."""
        if self._own:
            torch._foreach_copy_(self._before, self._own)

    @torch.no_grad()
    def settle(self, applied: Tensor | bool) -> None:
        """Put them back unless the step was applied: a bool, or a number on the device that is then not 0."""
        if isinstance(applied, Tensor):
            for own, before in zip(self._own, self._before, strict=True):
                own.copy_(torch.where(applied != 0, own, before))
        elif self._own and not applied:
            torch._foreach_copy_(self._own, self._before)
