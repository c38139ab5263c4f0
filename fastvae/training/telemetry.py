"""How a training shows its progress: a live bar on a terminal, a line after each epoch elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


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
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
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

    def step(
        self, epoch: int, step: int, terms: tuple[float, float, float], samples_per_second: float
    ) -> None:
        """Show the running averages after `step` steps of `epoch`; terms: loss, recon, kl in nats."""
        if self._bar is not None:
            figures = f"{_terms(*terms)}  {samples_per_second:,.0f} samples/s"
            done = (epoch - 1) * self.steps + step
            self._bar.update(self._task, completed=done, epoch=epoch, figures=figures, refresh=True)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch's row of metrics.jsonl."""
        terms = (row["train_loss"], row["train_recon"], row["train_kl"])
        if self._bar is not None:
            self.step(row["epoch"], self.steps, terms, row["samples_per_second"])
            return
        val = "" if row["val_loss"] is None else f"  val loss {row['val_loss']:.4g}"
        print(
            f"epoch {row['epoch']}/{self.epochs}  {_terms(*terms)}{val}  "
            f"{row['samples_per_second']:,.0f} samples/s",
            flush=True,
        )

    def warn(self, warning: str) -> None:
        """Show a line that is not of one step; rich shows it above a live bar."""
        print(f"warning: {warning}", flush=True)


def _terms(loss: float, recon: float, kl: float) -> str:
    return f"loss {loss:.4g}  recon {recon:.4g}  KL {kl:.4g}"
