"""What is asked of fastvae on a GPU, beside what the benchmarks there have found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

COPY = "copy"
BY_HAND, COMPILED = "eager, by hand", "torch.compile, by hand"
LOSS = "loss and gradient (B, D, Z) ="
LARGE = (f"{LOSS} (1024, 65536, 128) on cuda", f"{LOSS} (2048, 65536, 128) on cuda, bfloat16")
SMALL = f"{LOSS} (128, 784, 20) on cuda"
DROP_IN, WITHOUT_AUTOGRAD = "fastvae", "fastvae, without autograd"
GRAPH, LOADER = "fastvae, a CUDA graph", "the loader alone"
AGAIN = "the same batch again"


class Goal(NamedTuple):
    """`path` in the row of this title is to be at least so many times as fast as `opponent`.

    Of COPY it is to reach at least this share of the bandwidth.
    """

    title: str
    path: str
    opponent: str
    asked: float


GOALS = (
    *(
        Goal(title, path, opponent, asked)
        for title in LARGE
        for path, opponent, asked in (
            (WITHOUT_AUTOGRAD, COPY, 0.85),
            (WITHOUT_AUTOGRAD, BY_HAND, 3.2),
            (WITHOUT_AUTOGRAD, COMPILED, 1.5),
            (DROP_IN, BY_HAND, 2.0),
            (DROP_IN, COMPILED, 0.97),
        )
    ),
    Goal(SMALL, DROP_IN, BY_HAND, 3.0),
    Goal(SMALL, DROP_IN, COMPILED, 1.5),
    Goal("steps of an epoch", GRAPH, "eager loop, torch DataLoader", 10.0),
    Goal("steps of an epoch", GRAPH, "torch.compile, reduce-overhead", 2.0),
    Goal("steps of an epoch", LOADER, GRAPH, 1.0),  # the loader is never the bottleneck
    Goal("steps of a convolutional VAE", GRAPH, "eager loop, amp, channels_last", 1.5),
    Goal("steps of a convolutional VAE", GRAPH, "torch.compile, amp, channels_last", 1.0),
    *(
        Goal(f"loader on a GPU, rows of 196,608 bytes, uint8 to {dtype}", DROP_IN, COPY, 0.85)
        for dtype in ("uint8", "float32", "bfloat16")
    ),
    *(
        # copies beside a longer step take no time that could be measured
        Goal(f"a step of a product of matrices, batches of rows of {n} bytes", DROP_IN, AGAIN, 0.97)
        for n in ("784", "12,288")
    ),
    Goal(
        "training 3 epochs of 54,000 on cuda, a checkpoint every 100 steps",
        "fastvae --amp",
        "one an epoch",
        0.95,
    ),
)


def compared(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals with what the rows of a benchmark have found; None where there is nothing of it."""
    rows = list(rows)
    return [goal._asdict() | {"found": _found(goal, rows)} for goal in GOALS]


def lines(goals: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each of `compared`."""
    shown = []
    for goal in goals:
        found, asked = (_figure(goal[which], goal["opponent"]) for which in ("found", "asked"))
        mark = "?" if goal["found"] is None else "reached" if goal["found"] >= goal["asked"] else "missed"
        what = f"{goal['title']}: {goal['path']} / {goal['opponent']}"
        shown.append(f"{mark:8} {found:>8} of {asked:>8}  {what}")
    return shown


def _found(goal: Goal, rows: list[dict[str, Any]]) -> float | None:
    row = next((row for row in rows if row["title"].startswith(goal.title)), {})
    if goal.opponent == COPY:
        share: float | None = row.get("share_of_copy", {}).get(goal.path)
        return share
    ours, theirs = (row.get("median_s", {}).get(name) for name in (goal.path, goal.opponent))
    return None if ours is None or theirs is None else theirs / ours


def _figure(value: float | None, opponent: str) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if opponent == COPY else f"{value:.2f} x"
