"""A step whose loss or gradient is not finite: it changes nothing, and the training stops or goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TERMS = ("reconstruction term", "KL term")
_LARGE = 1e6  # absolute values of x beyond it want another scale, whatever the learning rate


class Finding(NamedTuple):
    """What was not finite in a step, which therefore was not applied.

    terms: loss, recon and kl. parameter: the index of the first parameter whose gradient is not finite, if
    the loss is. overflow: the gradient was scaled, and is to be tried again with a smaller scale.
    """

    terms: tuple[float, ...]
    parameter: int | None = None
    overflow: bool = False


class NonFiniteError(ArithmeticError):
    """A step that was not applied ends the training.

    step: its number, from 1. what: was not finite. remedy: what to do other than to learn more slowly.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step
        self.what = what
        self.remedy: str | None = None


def largest_of(x: Tensor) -> float:
    """The largest absolute value, infinite where one is not finite; 0 of none."""
    largest = x.abs().max().item() if x.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def remedy_for(largest: float, with_first_weights: bool = False) -> str | None:
    """What to do about a loss that is not finite, where no lower learning rate would help; else None.

    largest: absolute value of its x (see `largest_of`). with_first_weights: of a model that was not trained
    yet.
    """
    if not math.isfinite(largest):
        return "look at x, which itself is not finite"
    scale = f"scale x, whose largest absolute value is {largest:g}"
    if largest > _LARGE:
        return scale
    return f"{scale}, or begin with other weights" if with_first_weights else None


class SkippedSteps:
    """Counts the steps that were not applied, and ends the training after more than `most` in a row.

    names: of the parameters, as findings count them. loss: what to call it.
    total: all of them so far. in_a_row: the last ones, without those that only overflowed.
    """

    def __init__(self, most: int, names: Sequence[str], loss: str = "loss") -> None:
        self.most = most
        self.names = names
        self.loss = loss
        self.total = 0
        self.in_a_row = 0

    def count(self, findings: Iterable[Finding | None], first: int) -> None:
        """Count what was found in the steps from number `first` on; None for a step that was applied.

        Raises NonFiniteError.
        """
        for step, finding in enumerate(findings, first):
            if finding is None or finding.overflow:
                self.total += finding is not None
                self.in_a_row = 0
                continue
            self.total += 1
            self.in_a_row += 1
            what = self._described(finding)
            if self.in_a_row > self.most:
                skipped = f"; skipped in a row before it: {self.in_a_row - 1}" if self.most else ""
                raise NonFiniteError(step, what + skipped)
            if self.total == 1:
                print(f"step {step} is skipped: {what}; metrics.jsonl counts the steps that are", flush=True)

    def tensors(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        return {"total": torch.tensor(self.total), "in_a_row": torch.tensor(self.in_a_row)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.total, self.in_a_row = int(tensors["total"]), int(tensors["in_a_row"])

    def _described(self, finding: Finding) -> str:
        if finding.parameter is not None:
            return f"the gradient of {self.names[finding.parameter]} is not finite"
        found = [
            f"the {name} is {value}"
            for name, value in zip((self.loss, *_TERMS), finding.terms, strict=True)
            if not math.isfinite(value)
        ]
        return " and ".join(found[1:] or found)
