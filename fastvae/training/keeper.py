"""What a training leaves in the folder of its run while it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..models.files import CONFIG_NAME, WEIGHTS_NAME, replacing, save_weights, write_json
from .checkpoint import CheckpointWriter
from .config import TrainConfig
from .launch import note_begun
from .run_folder import METRICS_NAME, OPTIONS_NAME, prepare_run_folder

Row = dict[str, Any]  # of metrics.jsonl


class RunKeeper:
    """Writes to the folder of a run; nothing where it is None, as on all ranks but the first.

    A context manager, which waits for the last checkpoint. All of it raises OSError where writing fails.
    """

    def __init__(self, folder: Path | None, config: TrainConfig) -> None:
        self._folder = folder
        self._config = config
        self._writer: CheckpointWriter | None = None

    def __enter__(self) -> RunKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def begin(self, model_config: Mapping[str, Any] | None, weights: Mapping[str, Tensor]) -> None:
        """A new run, in place of an earlier one: the config of the model, where it is known, and its weights.

        These are kept as those of epoch 0 where the run keeps those of epochs.
        """
        if self._folder is None:
            return
        prepare_run_folder(self._folder)
        note_begun(self._folder)
        if model_config is not None:
            write_json(self._folder / CONFIG_NAME, model_config)
        self.go_on([])
        if self._writer is not None and self._config.weights_epochs is not None:
            self._writer.save_epoch(0, weights)

    def go_on(self, history: list[Row]) -> None:
        """The options, which a resumption may have changed, and the rows of the epochs that are finished."""
        if self._folder is None:
            return
        # without where it lies: as --config it begins a run of its own, and the folder can be moved
        options = self._config.replace(out=None, overwrite=False)
        # all or nothing: without the options that it had, a run cannot be resumed
        for name, text in ((OPTIONS_NAME, options.to_toml()), (METRICS_NAME, "".join(map(_line, history)))):
            with replacing(self._folder / name) as temporary:
                temporary.write_text(text)
        self._writer = CheckpointWriter(self._folder)

    def epoch(self, row: Row, weights: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> None:
        """The row and the weights of a finished epoch; `best` are these where no epoch was better so far."""
        if self._folder is None or self._writer is None:
            return
        if best is not None:
            self._writer.save_best(best)
        every = self._config.weights_epochs
        if every is not None and row["epoch"] % every == 0:
            self._writer.save_epoch(row["epoch"], weights)
        with open(self._folder / METRICS_NAME, "a") as file:
            file.write(_line(row))

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of copies; raises the OSError of the one before."""
        if self._writer is not None:
            self._writer.save(step, tensors, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._writer is not None:
            self._writer.wait()

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """The weights that the training is about."""
        if self._folder is not None:
            save_weights(self._folder / WEIGHTS_NAME, weights)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
