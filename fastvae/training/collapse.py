"""Watches for posterior collapse: latents that say next to nothing of the data, though training went on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import TrainConfig
from .schedules import first_full_capacity, first_full_kl

NATS, NATS_A_LATENT = 1.0, 0.05  # with a KL below both, the latents are hardly used
FEWEST_STEPS = 500  # before which a model may only not have begun to use them


class CollapseWatch:
    """Takes the row of each epoch, and answers once with a warning, when the posterior has collapsed.

    It has when for a tenth of all steps, and for 500 at least, no unit was active (Burda et al. 2016), or
    the KL, which bounds what z can say of x (Hoffman and Johnson 2016), was below 1 nat and below 0.05 nats
    a latent. Epochs that begin before the warm-ups of beta and of the learning rate are over, or before the
    capacity has risen, do not count.
    """

    def __init__(self, config: TrainConfig, total_steps: int, likelihood: str | None) -> None:
        self.config = config
        self.likelihood = likelihood
        self._first = max(
            config.lr_warmup_steps,
            first_full_kl(total_steps, config.kl_warmup, config.kl_warmup_steps),
            0 if config.capacity is None else first_full_capacity(total_steps, config.capacity_steps),
        )
        self._enough = max(FEWEST_STEPS, total_steps / 10)
        self._step = self._collapsed_steps = 0
        self._warned = False

    def update(self, row: Mapping[str, Any]) -> str | None:
        """The warning that is due after this row; rows without validation say nothing."""
        began, self._step = self._step, row["step"]
        if "kl_by_latent" not in row:
            return None
        latents, active, kl = len(row["kl_by_latent"]), row["active_units"], sum(row["kl_by_latent"])
        if active > 0 and kl >= min(NATS, NATS_A_LATENT * latents):
            self._collapsed_steps = 0
        elif began >= self._first:
            self._collapsed_steps += self._step - began
        if self._warned or self._collapsed_steps < self._enough:
            return None
        self._warned = True
        return (
            f"posterior collapse: for {self._collapsed_steps} steps the latents have said next to nothing of "
            f"the data (KL {kl:.2g} nats, {active} of {latents} active); {self._advice()}"
        )

    def _advice(self) -> str:
        if self.config.beta > 1:
            return f"try a lower --beta than {self.config.beta:g}"
        if self.likelihood == "mse":
            return "mse stands for a variance of 1/2, --likelihood gaussian learns one that fits"
        if self.config.kl_warmup == "none":
            return "try --kl-warmup linear, or a lower --beta"
        return "try --free-bits, or a lower --beta"
