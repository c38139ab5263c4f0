"""TensorBoard's event files, of all that metrics.jsonl has, of the reports between, and of pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .callbacks import Callback
from .config import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .trainer import Trainer


def check_tensorboard() -> None:
    """Raise ConfigError where the package is absent."""
    if importlib.util.find_spec("tensorboard") is None:
        got = "got true, but the package tensorboard is not installed"
        raise ConfigError("tensorboard", f"{got}; install it with: pip install tensorboard")


class TensorBoard(Callback):
    """Writes event files into `folder`, so that `tensorboard --logdir` of the folder above it lists the run.

    A resumed run hides what it had written of steps that it makes again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter

    def on_start(self, trainer: Trainer, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def on_report(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                self._writer.add_scalar(_tag(name), value, step)
            elif isinstance(value, list):
                self._writer.add_histogram(_tag(name), np.asarray(value), step)

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self.on_report(row["step"], row)
        self._writer.flush()

    def on_images(self, step: int, images: Mapping[str, Tensor]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, image, step)

    def on_end(self, result: object) -> None:
        self._writer.close()


def _tag(name: str) -> str:
    """train/loss for train_loss, so that TensorBoard shows what belongs together."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "val", "gpu") else f"run/{name}"
