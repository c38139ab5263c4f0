"""Factors of the learning rate and of beta in the course of a training.

Pure functions of the step, counted from 0, and of the training's total steps: a training that is resumed has
nothing to restore.
"""

from __future__ import annotations

import math
from typing import Literal

LRSchedule = Literal["constant", "cosine"]
KLWarmup = Literal["none", "linear", "cosine", "cyclical"]


def lr_factor(step: int, total: int, schedule: LRSchedule = "constant", warmup: int = 0) -> float:
    """The factor of the learning rate: from 0 to 1 in the first `warmup` steps, then as `schedule` says.

    "cosine" falls from 1 to 0 over the steps from `warmup` to `total`: Loshchilov and Hutter 2017, "SGDR:
    stochastic gradient descent with warm restarts", equation 5, without restarts.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def kl_factor(step: int, total: int, schedule: KLWarmup = "none", warmup: int | None = None) -> float:
    """The factor of beta, from 0 to 1.

    "linear" and "cosine" (half a wave) rise over the first `warmup` steps and stay at 1: Bowman et al. 2016,
    "Generating sentences from a continuous space", section 3.1. "cyclical" repeats cycles of `warmup` steps,
    in which it rises linearly in the first half and is 1 in the second: Fu et al. 2019, "Cyclical annealing
    schedule", with R = 0.5; a cycle has at least 2 steps. `warmup` None is a tenth of `total`, rounded up so
    that a training does not end with the start of a cycle.
    """
    if schedule == "none":
        return 1.0
    warmup = _warmup_steps(total, warmup)
    if schedule == "cyclical":
        return min(2 * (step % warmup) / warmup, 1.0)
    done = min(step / warmup, 1.0)
    return done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))


def capacity_factor(step: int, total: int, steps: int | None = None) -> float:
    """The factor of the KL's capacity: from 0 to 1 in the first `steps` steps, half of `total` if None.

    Burgess et al. 2018, "Understanding disentangling in beta-VAE".
    """
    return min(step / (max(total / 2, 1) if steps is None else steps), 1.0)


def first_full_kl(total: int, schedule: KLWarmup = "none", warmup: int | None = None) -> int:
    """The first step whose `kl_factor` is 1."""
    if schedule == "none":
        return 0
    warmup = _warmup_steps(total, warmup)
    return math.ceil(warmup / 2) if schedule == "cyclical" else warmup


def first_full_capacity(total: int, steps: int | None = None) -> int:
    """The first step whose `capacity_factor` is 1."""
    return max(math.ceil(total / 2), 1) if steps is None else steps


def _warmup_steps(total: int, warmup: int | None) -> int:
    return max(math.ceil(total / 10), 2) if warmup is None else warmup
