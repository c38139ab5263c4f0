"""SIGTERM and Ctrl-C: noticed between two steps, so that a training can save itself before it ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(RuntimeError):
    """A signal ended a training after a checkpoint. exit_status: what a process ends with, 128 + signal."""

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; the checkpoint is {checkpoint}")
        self.exit_status = 128 + number
        self.step = step
        self.checkpoint = checkpoint


class StopSignal:
    """While it lasts, the first signal is kept in `signal` and ends nothing; a second acts as it always did.

    A signal that is ignored stays so: a shell starts what it puts into the background without Ctrl-C. Outside
    the main thread, which alone may handle signals, nothing is done.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._notice) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
