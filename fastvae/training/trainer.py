"""The training of a model from the first step to the best weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inference.evaluate import Batch, evaluate, inputs, negative_elbo
from ..loss import ELBOLoss
from ..models import VAE
from ..models.files import CONFIG_NAME, write_json
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .device import choose_amp_dtype, choose_device
from .run_folder import METRICS_NAME, OPTIONS_NAME, check_run_folder, prepare_run_folder
from .step import TrainStep
from .telemetry import Telemetry

DEFAULT_EPOCHS = 10
DEFAULT_STEPS_AT_LEAST = 1000
REPORT_SECONDS = 0.5


class Batches(Protocol):
    """What a training iterates over once an epoch: `fastvae.DataLoader`, or torch's."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and what to try."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    history: the rows of metrics.jsonl: epoch, step, train_loss, train_recon, train_kl, val_loss, val_recon,
        val_kl (nats a datum; None without validation data), samples_per_second, seconds.
    best: the row whose weights the model has now: the least val_loss, or the last without validation data.
    seconds, samples_per_second: of the training steps alone, without validation and checkpoints.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    steps: int
    seconds: float
    samples_per_second: float


class Trainer:
    """Trains `model` on `train`, and keeps the weights that are best on `val`.

    train, val: batches x, float32 [B, *item], or (x, y) whose y is not used. `set_epoch(epoch)` of `train`
        is called before each epoch, where there is one.
    loss: None is the negative ELBO of the model's likelihood with `config.beta`. Validation uses it too.
    config: epochs, lr, optimizer, amp, device, seed; with `out` also the folder that gets train.toml,
        config.json, metrics.jsonl and checkpoints/. The other options describe what is given here.

    Moves the model to the chosen device. Raises ConfigError for a device that is absent or a folder that
    may not be written, ValueError for no training data.
    """

    def __init__(
        self,
        model: VAE,
        train: Batches,
        val: Batches | None = None,
        *,
        loss: ELBOLoss | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        config = TrainConfig() if config is None else config
        if len(train) == 0:
            raise ValueError("train: got no batches, expected at least one")
        if config.epochs is None:
            enough = math.ceil(DEFAULT_STEPS_AT_LEAST / len(train))
            config = config.replace(epochs=max(DEFAULT_EPOCHS, enough))
        self.config = config
        self.folder = None if config.out is None else Path(config.out)
        if self.folder is not None:
            check_run_folder(self.folder, config.overwrite)
        self.device, self.device_reason = choose_device(config.device)
        self.amp_dtype, self.amp_reason = choose_amp_dtype(self.device, config.amp)
        self.model = model.to(self.device)
        self.loss = negative_elbo(model, config.beta) if loss is None else loss.to(self.device)
        self.train = train
        self.val = val

    def fit(self) -> TrainResult:
        """Train for `config.epochs` epochs.

        Raises TrainingError, which names epoch and step, if the loss is not finite; the weights of the last
        good checkpoint stay on disk.
        """
        config, epochs = self.config, self.config.epochs
        assert epochs is not None  # resolved above
        torch.manual_seed(config.seed)
        if self.folder is not None:
            prepare_run_folder(self.folder)
            (self.folder / OPTIONS_NAME).write_text(config.to_toml())
            if self.model.config is not None:
                write_json(self.folder / CONFIG_NAME, self.model.config)
        step = TrainStep(
            self.model, self.loss, optimizer=config.optimizer, lr=config.lr, amp_dtype=self.amp_dtype
        )
        history: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        best_weights: dict[str, Tensor] = {}
        samples, seconds = 0, 0.0
        began = time.perf_counter()
        with Telemetry(epochs, len(self.train)) as telemetry:
            for epoch in range(1, epochs + 1):
                terms, epoch_samples, epoch_seconds = self._train_epoch(step, epoch, telemetry)
                samples, seconds = samples + epoch_samples, seconds + epoch_seconds
                row = {
                    "epoch": epoch,
                    "step": epoch * len(self.train),
                    **dict(zip(("train_loss", "train_recon", "train_kl"), terms, strict=True)),
                    **self._validate(epoch),
                    "samples_per_second": epoch_samples / epoch_seconds,
                    "seconds": time.perf_counter() - began,
                }
                history.append(row)
                weights = {name: w.detach().cpu().clone() for name, w in self.model.state_dict().items()}
                is_best = not best or row["val_loss"] is None or row["val_loss"] < best["val_loss"]
                if is_best:
                    best, best_weights = row, weights
                if self.folder is not None:
                    save_checkpoint(self.folder, weights, is_best=is_best)
                    with open(self.folder / METRICS_NAME, "a") as file:
                        file.write(json.dumps(row) + "\n")
                telemetry.epoch(row)
        step.weights.release()
        self.model.load_state_dict(best_weights)
        return TrainResult(history, best, history[-1]["step"], seconds, samples / seconds)

    def _train_epoch(
        self, step: TrainStep, epoch: int, telemetry: Telemetry
    ) -> tuple[tuple[float, float, float], int, float]:
        """One pass over the training data: the average terms, the number of data, the seconds."""
        set_epoch = getattr(self.train, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch - 1)
        self.model.train()
        step.reset()
        began = time.perf_counter()
        next_report = began + REPORT_SECONDS
        n = 0
        for n, x in enumerate(inputs(self.train, self.device), 1):
            step(x)
            if time.perf_counter() >= next_report:
                terms = self._checked(step.averages(), epoch, n)
                now = time.perf_counter()
                telemetry.step(epoch, n, terms, step.count / (now - began))
                next_report = now + REPORT_SECONDS
        terms = self._checked(step.averages(), epoch, n)
        return terms, step.count, time.perf_counter() - began

    def _validate(self, epoch: int) -> dict[str, float | None]:
        names = ("val_loss", "val_recon", "val_kl")
        if self.val is None:
            return dict.fromkeys(names)
        terms = evaluate(self.model, self.val, loss=self.loss, seed=self.config.seed)
        loss, recon, kl = (float(term) for term in terms)
        self._checked((loss, recon, kl), epoch, len(self.train), "validation")
        return dict(zip(names, (loss, recon, kl), strict=True))

    def _checked(
        self, terms: tuple[float, float, float], epoch: int, step: int, which: str = "training"
    ) -> tuple[float, float, float]:
        """The terms, if all are finite."""
        if not all(math.isfinite(term) for term in terms):
            loss, recon, kl = terms
            total = (epoch - 1) * len(self.train) + step
            raise TrainingError(
                f"the {which} loss is not finite in epoch {epoch}, found at step {total}: loss {loss}, "
                f"recon {recon}, KL {kl}; try a lower --lr than {self.config.lr:g}"
            )
        return terms
