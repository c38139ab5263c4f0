"""The buffers of a model, such as running statistics: put back where a step turns out not to be applied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


class Buffers:
    """What the buffers of `model` were before a step. A forward pass changes them, whatever comes of it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[dict[str, Tensor | None], str]] = []  # where modules have them
        self._own: list[Tensor] = []
        self._before: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Find them anew, for the model's owner may have put others in their places."""
        found = {
            id(b): (b, (module._buffers, name))
            for module in self._model.modules()
            for name, b in module._buffers.items()
            if b is not None
        }
        own = [b for b, _ in found.values()]
        self._places = [place for _, place in found.values()]
        if [id(b) for b in own] != [id(b) for b in self._own]:  # else a captured graph has their addresses
            self._own, self._before = own, [torch.empty_like(b) for b in own]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them; before a step."""
        if any(now is not own for now, own in self._now()):
            self.refresh()
        if self._own:
            torch._foreach_copy_(self._before, self._own)

    @torch.no_grad()
    def settle(self, applied: Tensor | bool) -> None:
        """Put them back unless the step was applied: a bool, or a number on the device that is then not 0."""
        if isinstance(applied, Tensor):
            for i, (now, own) in enumerate(self._now()):
                before = self._before[i]
                if (
                    now is not None and now.shape == own.shape
                ):  # another tensor where forward has assigned one
                    own.copy_(torch.where(applied != 0, now, before))
                    self._put_back(i)
        elif self._own and not applied:
            torch._foreach_copy_(self._own, self._before)
            for i in range(len(self._own)):
                self._put_back(i)

    def _now(self) -> list[tuple[Tensor | None, Tensor]]:
        """What is in the place of each, and what was there when they were found."""
        return [
            (buffers.get(name), own) for (buffers, name), own in zip(self._places, self._own, strict=True)
        ]

    def _put_back(self, i: int) -> None:
        buffers, name = self._places[i]
        buffers[name] = self._own[i]


def computed_again(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For a part of a forward pass, and for the same again: that finds the buffers as this one has.

    What it does to them is dropped, so that running statistics move once a step.
    """
    modules = [module for module in model.modules() if module._buffers]
    copies = {id(b): b.clone() for b in model.buffers()}
    before = [
        {name: None if b is None else copies[id(b)] for name, b in module._buffers.items()}
        for module in modules
    ]

    @contextmanager
    def again() -> Iterator[None]:
        own = [dict(module._buffers) for module in modules]
        for module, buffers in zip(modules, before, strict=True):
            module._buffers.update(buffers)
        try:
            yield
        finally:
            for module, buffers in zip(modules, own, strict=True):
                module._buffers.update(buffers)

    return nullcontext(), again()
