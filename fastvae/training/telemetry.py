"""How a training shows its progress: a live bar on a terminal, a line after each epoch elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from .usage import GPU_NAMES


class Telemetry:
    """Progress of `epochs` epochs of `steps` steps each, on standard output; a context manager."""

    def __init__(self, epochs: int, steps: int) -> None:
        self.epochs = epochs
        self.steps = steps
        console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        if console.is_terminal:
            # refreshed by hand: a thread of its own would take time from the training
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(bar_width=16),
                # wraps where the terminal is narrow
                TextColumn("{task.fields[figures]}", table_column=Column(overflow="fold")),
                TimeRemainingColumn(),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=epochs * steps, epoch=1, epochs=epochs, figures="")

    def __enter__(self) -> Telemetry:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the running averages after `step` steps of `epoch`, named as in metrics.jsonl."""
        if self._bar is not None:
            figures = f"{_terms(metrics)}  {_usage(metrics)}"
            done = (epoch - 1) * self.steps + step
            self._bar.update(self._task, completed=done, epoch=epoch, figures=figures, refresh=True)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch's row of metrics.jsonl."""
        if self._bar is not None:
            self.step(row["epoch"], self.steps, row)
            return
        val = "" if row["val_loss"] is None else f"  val loss {row['val_loss']:.4g}"
        print(f"epoch {row['epoch']}/{self.epochs}  {_terms(row)}{val}  {_usage(row)}", flush=True)

    def warn(self, warning: str) -> None:
        """Show a line that is not of one step; rich shows it above a live bar."""
        print(f"warning: {warning}", flush=True)


def _terms(metrics: Mapping[str, Any]) -> str:
    terms = (metrics[f"train_{name}"] for name in ("loss", "recon", "kl"))
    loss, recon, kl = (math.nan if term is None else term for term in terms)
    return f"loss {loss:.4g}  recon {recon:.4g}  KL {kl:.4g}"


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _usage(metrics: Mapping[str, Any]) -> str:
    """Throughput and, of the rest, what is known."""
    memory, utilization, power = (metrics[name] for name in GPU_NAMES)
    gpu = [
        "" if utilization is None else f" {utilization:.0%}",
        "" if power is None else f" {power:.0f} W",
        "" if memory is None else f" {_size(memory)}",
    ]
    shown = f"{metrics['samples_per_second']:,.0f} samples/s  {metrics['data_wait_share']:.0%} data wait"
    return f"{shown}  GPU{''.join(gpu)}" if any(gpu) else shown
