"""What a training tells others while it runs: the place for wandb, MLflow and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .result import TrainResult
    from .trainer import Trainer


class Callback:
    """Override what you want to hear of, and give an instance to `Trainer(..., callbacks=[...])`.

    The training waits for each call. An error in one ends the training, which raises it. A callback that
    draws from torch's generator changes what the training draws after it. One that changes how the model
    computes (its modes, its layers) does so from the next epoch on: the steps of an epoch may be recorded.
    Of several ranks the first alone calls, and from the next epoch on the others have what it did to weights,
    buffers, modes and `requires_grad`.

    Example:
        >>> class Wandb(fastvae.Callback):
        ...     def on_start(self, trainer, step):
        ...         self.run = wandb.init(config=trainer.config.model_dump())
        ...     def on_epoch(self, row):
        ...         self.run.log(row, step=row["step"])
        ...     def on_end(self, result):
        ...         self.run.finish(exit_code=int(result is None))
    """

    def on_start(self, trainer: Trainer, step: int) -> None:
        """Before training; `step` steps were made before, in a run that is resumed."""

    def on_report(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """About twice a second, after `step` steps: the epoch so far, named as in metrics.jsonl."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch, its validation and its checkpoint: its row of metrics.jsonl."""

    def on_images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Every `image_epochs` epochs, after `on_epoch`: `reconstructions` and `samples`, uint8 [C, H, W]."""

    def on_end(self, result: TrainResult | None) -> None:
        """After training, with the best weights in the model; None if a signal or an error ended it."""


class Callbacks(Callback):
    """Several as one. Those that were told of the start are told of the end, whatever happens."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)
        self._started: list[Callback] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def on_start(self, trainer: Trainer, step: int) -> None:
        for callback in self._all:
            callback.on_start(trainer, step)
            self._started.append(callback)

    def on_report(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for callback in self._all:
            callback.on_report(step, metrics)

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        for callback in self._all:
            callback.on_epoch(row)

    def on_images(self, step: int, images: Mapping[str, Tensor]) -> None:
        for callback in self._all:
            callback.on_images(step, images)

    def on_end(self, result: TrainResult | None) -> None:
        started, self._started = self._started, []
        with ExitStack() as ends:
            for callback in started:
                ends.callback(callback.on_end, result)
