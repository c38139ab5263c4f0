"""What a training comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and what to try."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    history: the rows of metrics.jsonl: epoch, step, train_loss, train_recon, train_kl, train_extra (only with
        an extra loss, which is a part of train_loss; each None where no step of the epoch had a finite loss),
        val_loss, val_recon, val_kl (nats a datum; None without validation data), skipped_steps (since the
        beginning, those that were not applied since their loss or gradients were not finite),
        samples_per_second, data_wait_share (the part of the steps' time that the iteration over `train`
        took), gpu_memory_bytes, gpu_utilization, gpu_power_watts (see `GPUMeter`), seconds; with validation
        data also kl_by_latent (nats) and active_units (see `LatentStatistics`).
    best: the row whose weights the model has now: the least val_loss, or the last without validation data.
    seconds, samples_per_second: of the epochs' steps, and the checkpoints between them; without validation.
    usage: data_wait_share and the gpu_ figures of the whole training.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    steps: int
    seconds: float
    samples_per_second: float
    usage: dict[str, float | None]
