"""The averages of the terms of the loss over many steps, without waiting for any of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops import ELBOTerms

MOST_KEPT = 1000  # steps whose terms are kept before they are added up


class TermSums:
    """Sums of loss, recon and kl, weighed by the data of each step, of the steps whose terms are finite.

    What a step leaves is kept as it is until it is read, so that no step waits for the one before.

    count: the data of all steps since `reset`.
    """

    def __init__(self, device: torch.device) -> None:
        self._kept: list[Tensor] = []
        self._sizes: list[int] = []
        # of the terms, and of the data whose terms are finite
        self._sums = torch.zeros(len(ELBOTerms._fields) + 1, dtype=torch.float64, device=device)
        self.count = 0

    def keep(self, made: Iterable[Tensor], size: int) -> bool:
        """Take what a step has made (see Optimizer.step) of `size` data; whether it is time to `read`."""
        self._kept += made
        self._sizes.append(size)
        self.count += size
        return len(self._sizes) == MOST_KEPT

    def read(self) -> Tensor | None:
        """Add up what was kept. Gives it, a row a step, beginning with loss, recon and kl."""
        if not self._sizes:
            return None
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self._sums.device)
        rows = torch.stack(self._kept).view(len(sizes), -1)
        terms = rows[:, : len(ELBOTerms._fields)].double()
        finite = terms.isfinite().all(1, keepdim=True)
        counted = torch.where(finite, torch.cat((terms, torch.ones_like(terms[:, :1])), 1), 0.0)
        self._sums += sizes @ counted
        self._kept, self._sizes = [], []
        return rows

    def averages(self) -> tuple[float, float, float]:
        """(loss, recon, kl) of what was read, NaN where that is nothing; waits for the device."""
        loss, recon, kl, data = self._sums.tolist()
        data = data or math.nan
        return loss / data, recon / data, kl / data

    def reset(self) -> None:
        """Begin anew."""
        self._kept, self._sizes = [], []
        self._sums.zero_()
        self.count = 0

    def tensors(self) -> dict[str, Tensor]:
        """The sums of what was read, for a checkpoint."""
        return {"sums": self._sums, "count": torch.tensor(self.count)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._sums.copy_(tensors["sums"])
        self.count = int(tensors["count"])
