"""The training of a model from the first step to the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataLoader
from ..inference.evaluate import negative_elbo
from ..loss import ELBOLoss
from ..models import VAE, as_model
from ..models.model import check_one_datum, check_parameters, modes_kept
from ..models.own import describe
from .callbacks import Callback, Callbacks
from .checkpoint import checkpoint_path, checkpoints, load_newest_checkpoint
from .collapse import CollapseWatch
from .config import ConfigError, TrainConfig
from .device import choose_amp_dtype, choose_device
from .distributed import REPORT, Share, check_devices, check_same_options, join
from .given import (
    check_batches,
    check_item_shape,
    check_items,
    check_loss,
    check_val_items,
    ends_with_one_datum,
)
from .images import Images
from .keeper import Row, RunKeeper
from .launch import open_run
from .numbers import NonFiniteError, largest_of, remedy_for
from .result import TrainingError, TrainResult
from .shares import Batches, check_same_batches, shares_of_epoch
from .signals import SIGNALS, StopSignal, TrainingStopped
from .state import Progress, checkpoint_of, go_on_from
from .step import TrainStep
from .telemetry import Telemetry
from .tensorboard import TensorBoard, check_tensorboard
from .usage import Figures, GPUMeter, WaitClock, overall
from .validation import Validation

DEFAULT_EPOCHS = 10
DEFAULT_STEPS_AT_LEAST = 1000
REPORT_SECONDS = 0.5


class Trainer:
    """Trains `model` on `train`, and keeps the weights that are best on `val`, or the best of their averages.

    model: a VAE, or any nn.Module with encode(x [B, *item]) -> (mu, logvar), [B, *latent] each, and
        decode(z [B, *latent]) -> x_hat [B, *item]. Its `likelihood` counts where it has one, and the
        `log_variance` of a "gaussian", as in VAE; else it is "mse".
    train, val: batches x [B, *item], or (x, y) whose y is not used, of any loader that has a length: floating
        point, or uint8 for x / 255. `set_epoch(epoch)` of `train`
        is called before each epoch, where there is one.
    loss: None is the negative ELBO of the model's likelihood with config's beta, free_bits, capacity and
        logvar_clamp; one that is given has these itself. Validation uses it too, always with the full beta
        and capacity and without free bits.
    extra_loss: a term to add in training, not in validation, such as a perceptual or an adversarial one. It
        is called with x_hat and x of a batch, [B, *item], and by name with those of z, mu and logvar,
        [B, *latent], that its signature has, under autocast with `amp`, and gives a scalar; `train_extra` in
        the metrics is its average. A module is moved to the device. Its parameters are not trained here; its
        buffers and those parameters that require gradients are kept in the checkpoints.
    config: epochs, patience, lr, optimizer and what goes with them, kl_warmup, amp, cuda_graph, device, seed;
        with `out` also the folder that gets train.toml, config.json, metrics.jsonl and checkpoints/, one
        every `checkpoint_steps` and one at the end of each epoch, and in the end model.safetensors;
        `image_epochs` (reconstructions are of the first validation data), `weights_epochs` and `tensorboard`.
        The other options describe what is given here.
    resume: go on with the run that is in `out`, from its newest checkpoint.
    callbacks: what else is told of the training, see `fastvae.Callback`.

    Under torchrun the ranks train together, as `docs/training.md` says; `train` gives each the same batches,
    and each takes its rows. Callbacks are told on rank 0 alone.

    Moves the model to the chosen device. Raises ConfigError for a device or a package that is absent, a
    folder that may not be written or an option that does not go with model, data or loss, ValueError for no
    training or validation data and for a loss that is none or no scalar, ModelError for a model without
    encode and decode, with nothing to train, for other items or for logits where the loss takes a mean.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        val: Batches | None = None,
        *,
        loss: ELBOLoss | None = None,
        extra_loss: Callable[..., Tensor] | None = None,
        config: TrainConfig | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        config = TrainConfig() if config is None else config
        self.ranks = join()
        check_same_options(self.ranks, config)
        check_batches(train, val)
        if config.epochs is None:
            enough = math.ceil(DEFAULT_STEPS_AT_LEAST / len(train))
            config = config.replace(epochs=max(DEFAULT_EPOCHS, enough))
        self.config = config
        self.folder = None if config.out is None else Path(config.out)
        folder = self.folder
        if resume and folder is None:
            raise ValueError("resume: got no config.out, expected the folder of a run")
        if config.patience is not None and val is None:
            got = f"got {config.patience} without validation data"
            raise ConfigError("patience", f"{got}, expected these, whose loss is to improve")
        if config.channels_last and not any(p.ndim == 4 for p in model.parameters()):
            raise ConfigError(
                "channels_last", "given for a model without convolutions, expected one with them"
            )
        if config.tensorboard:
            if folder is None:
                raise ConfigError("tensorboard", "got true without out, expected a run folder")
            check_tensorboard()
        self.resume = folder is not None and self.ranks.from_first(
            lambda: open_run(folder, config.overwrite, resume)
        )
        self.device, self.device_reason = choose_device(config.device)
        check_devices(self.ranks, self.device)
        self.amp_dtype, self.amp_reason = choose_amp_dtype(self.device, config.amp)
        self.model = as_model(model)
        check_parameters(model, are_written=folder is not None)
        check_items(model, train=train, val=val)
        self.model.to(self.device)
        if loss is None:
            loss = negative_elbo(
                model,
                config.beta,
                logvar_clamp=config.logvar_clamp,
                free_bits=config.free_bits,
                free_bits_form=config.free_bits_form,
                capacity=config.capacity,
            )
        check_loss(loss, config, model)
        self.loss = loss.to(self.device)
        self.extra_loss = extra_loss
        self.train = train
        self.val = val
        writers = [TensorBoard(folder)] if config.tensorboard and folder is not None else []
        # the writer first: another one may raise
        self._callbacks = Callbacks([*writers, *callbacks] if self.ranks.is_first else [])
        self._validation = Validation(self.val, self.loss, config, self.ranks)
        self._images = Images(config.image_epochs, config.seed, val, self.device, self.folder)
        self._started: Iterator[tuple[Tensor, Share]] | None = None  # an epoch, its first batch looked at

    def fit(self) -> TrainResult:
        """Train for `config.epochs` epochs, or until `config.patience` is at its end.

        A run that was stopped and resumed ends with the weights of one that was not, bit for bit on the same
        machine with the same number of threads, if `train` is a `fastvae.DataLoader` (of other batches those
        that were done are read and left out, whatever they are). The model is left in the mode it was in.

        Raises:
            ModelError: mu, logvar or x_hat of the first batch have a wrong shape, or the model does not take
                the data of `val`. Nothing is written.
            TrainingError, which names the step: a loss, a gradient or a weight is not finite. A step whose
                loss or gradient is not has not been applied. Earlier checkpoints stay.
            ValueError: `train` gave more or fewer batches than its length.
            TrainingStopped: SIGTERM or Ctrl-C came; where there is a folder, after a checkpoint.
            CheckpointError: there is no checkpoint to resume from, or it is of another training.
            OSError: writing failed, as where the disk is full. Earlier checkpoints stay.
            RankError: another rank has failed or is gone.
            RuntimeError: called where torch makes no gradients.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "fit: called under no_grad or inference_mode, expected gradients to be enabled"
            )
        with self.ranks.together():
            result = None
            try:
                with modes_kept(self.model):
                    result = self._fit()
            finally:
                self._callbacks.on_end(result)
            return result

    def _fit(self) -> TrainResult:
        config = self.config
        assert config.epochs is not None  # resolved above
        torch.manual_seed(config.seed)
        self.model.train()
        check_same_batches(self.ranks, "data", self.train)
        check_same_batches(self.ranks, "val", self.val)
        extra = self.extra_loss
        for module in (self.model, self.loss, *([extra] if isinstance(extra, nn.Module) else [])):
            self.ranks.broadcast([*module.parameters(), *module.buffers()])
        if isinstance(self.train, DataLoader) and self.ranks.size > 1:  # all have its window
            self.train.load_state_dict(self.ranks.from_first(self.train.state_dict))
        total_steps = config.epochs * len(self.train)
        step = TrainStep.from_config(
            self.model, self.loss, config, total_steps, self.amp_dtype, self.extra_loss, self.ranks
        )
        best_weights: dict[str, Tensor] = {}
        progress = Progress()
        if self.resume:
            progress, best_weights = self._restore(step)
        config_of_model = self._check_first_batch(step, progress)
        keeper = RunKeeper(self.folder if self.ranks.is_first else None, config)
        try:
            stopping = nullcontext() if self.folder is None else StopSignal()
            with keeper, stopping as stop:
                if self.resume:
                    keeper.go_on(progress.history)
                else:
                    keeper.begin(config_of_model, self.model.state_dict())
                self._run(step, progress, best_weights, keeper, stop)
        except NonFiniteError as error:
            raise self._not_finite(error) from error
        step.weights.release()
        self.model.load_state_dict(best_weights)
        keeper.finish(best_weights)
        rate = progress.samples / progress.seconds if progress.seconds else 0.0
        history = progress.history
        usage = overall(history, progress.wait_seconds, progress.seconds)
        return TrainResult(history, progress.best, history[-1]["step"], progress.seconds, rate, usage)

    def _run(
        self,
        step: TrainStep,
        progress: Progress,
        best_weights: dict[str, Tensor],
        keeper: RunKeeper,
        stop: StopSignal | None,
    ) -> None:
        """Train from where `progress` stands to the end; `best_weights` is filled."""
        epochs = self.config.epochs
        assert epochs is not None  # resolved above
        self._callbacks.on_start(self, progress.step(len(self.train)))
        began = time.perf_counter() - progress.wall_seconds
        gpu = GPUMeter(self.device)
        watch = CollapseWatch(self.config, epochs * len(self.train), self.loss.spec.likelihood)
        for row in progress.history:
            watch.update(row)
        with Telemetry(epochs, len(self.train)) as telemetry:
            while progress.epoch <= epochs and not progress.out_of_patience(self.config.patience):
                for _ in self._train_epoch(step, progress, telemetry, gpu):
                    total = progress.step(len(self.train))
                    stopped = self._agreed_signal(stop)
                    every = self.config.checkpoint_steps
                    if self.folder is None or (stopped is None and (every is None or total % every)):
                        continue
                    progress.wall_seconds = time.perf_counter() - began
                    self._save(keeper, step, progress, best_weights)
                    if stopped is not None:
                        keeper.wait()
                        self.ranks.wait()  # torchrun ends them all when one has ended
                        raise TrainingStopped(stopped, total, checkpoint_path(self.folder, total))
                metrics = self._metrics(step, progress, gpu.average())
                self.ranks.make_equal(self.model.buffers())
                with step.averaged_weights():
                    row = {
                        "epoch": progress.epoch,
                        "step": progress.epoch * len(self.train),
                        **metrics,
                        **self._validation(self.model, progress.epoch),
                        "seconds": time.perf_counter() - began,
                    }
                    images = self._images.draw(self.model, progress.epoch)
                    self._end_epoch(progress, row, best_weights, keeper)
                if images and self.ranks.is_first:  # before the checkpoint, or nobody draws them again
                    self._images.write(row["epoch"], images)
                if self.folder is not None:
                    progress.wall_seconds = time.perf_counter() - began
                    self._save(keeper, step, progress, best_weights)
                telemetry.epoch(row)
                self._callbacks.on_epoch(row)
                if images:
                    self._callbacks.on_images(row["step"], images)
                warning = watch.update(row)
                if warning is not None:
                    telemetry.warn(warning)
        if progress.epoch <= epochs:
            without = f"{self.config.patience} epochs without a better validation loss"
            print(
                f"stopped after epoch {progress.epoch - 1}: {without} than in epoch {progress.best['epoch']}"
            )

    def _agreed_signal(self, stop: StopSignal | None) -> int | None:
        """The signal that this rank or another one got."""
        if stop is None:
            return None
        return next((number for number in SIGNALS if self.ranks.agree(number, stop.signal == number)), None)

    def _train_epoch(
        self, step: TrainStep, progress: Progress, telemetry: Telemetry, gpu: GPUMeter
    ) -> Iterator[None]:
        """The rest of an epoch; yields after each step, when `progress` is up to date."""
        first = progress.batch
        if self.ranks.from_first(lambda: bool(self._callbacks)):
            for module in (self.model, self.loss):
                self.ranks.follow_first(module)
        if not self.model.training:  # else a callback may have put a part of it into eval mode
            self.model.train()
        if first == 0:
            step.reset()
        else:  # on_start of a callback came after what was resumed
            step.take_up()
        earlier, waited_earlier = progress.epoch_seconds, progress.epoch_wait_seconds
        began = time.perf_counter()
        next_report = began + REPORT_SECONDS
        self.ranks.share_generators(self.device)
        batches = WaitClock(self._shares(progress.epoch, first))
        expected = len(self.train)
        for done, (x, share) in enumerate(batches, first + 1):
            if done > expected:  # the steps would be counted twice, and a checkpoint called older than it is
                got = f"more batches in epoch {progress.epoch} than its length, {expected}"
                raise ValueError(f"train: got {got}; give it the __len__ that it has, or no workers")
            try:
                step(x, share)
            except NonFiniteError as error:
                largest = max(self.ranks.gather(largest_of(x)))  # which another rank may have
                error.remedy = remedy_for(largest, with_first_weights=step.skipped.total == error.step)
                raise
            progress.batch = done
            progress.epoch_samples = step.count
            progress.epoch_seconds = earlier + time.perf_counter() - began
            progress.epoch_wait_seconds = waited_earlier + batches.seconds
            yield
            is_due = self.ranks.is_first and time.perf_counter() >= next_report
            if self.ranks.agree(REPORT, is_due):
                metrics = self._metrics(step, progress, gpu.read())
                telemetry.step(progress.epoch, progress.batch, metrics)
                self._callbacks.on_report(progress.step(len(self.train)), metrics)
                next_report = time.perf_counter() + REPORT_SECONDS
        if progress.batch < expected:
            got = f"{progress.batch} batches in epoch {progress.epoch}"
            raise ValueError(f"train: got {got}, expected {expected} in each, which is its length")
        step.averages()  # waits for the device
        progress.epoch_seconds = earlier + time.perf_counter() - began

    def _check_first_batch(self, step: TrainStep, progress: Progress) -> dict[str, Any] | None:
        """Raise ModelError unless the model takes the next batch, and data of val; its config.

        The batch is not lost, for other loaders than ours may draw at random. None where there is no batch
        of which a model without a config could be described.
        """
        config = self.model.config if isinstance(self.model, VAE) else None
        if config is not None and isinstance(self.train, DataLoader):
            check_val_items(self.model, self.val, self.train.item_shape)
            return config
        assert self.config.epochs is not None
        self._started = None
        if progress.epoch > self.config.epochs:
            return config
        shares = self._shares(progress.epoch, progress.batch)
        first = list(islice(shares, 1))
        self._started = chain(first, shares)
        for x, share in first:
            item_shape = tuple(x.shape[1:])
            check_item_shape(self.model, item_shape, "train")
            if config is None and share.rows > 0:
                config = describe(self.model, item_shape, step.backward.check(x))
                if self.ranks.size == 1 and ends_with_one_datum(self.train):
                    check_one_datum(self.model, x[:1])
            check_val_items(self.model, self.val, item_shape)
        return config

    def _metrics(self, step: TrainStep, progress: Progress, gpu: Figures) -> Figures:
        """What is reported of an epoch so far."""
        terms = dict(zip(("train_loss", "train_recon", "train_kl"), step.averages(), strict=True))
        return {
            **{n: None if math.isnan(v) else v for n, v in (terms | step.extra_average()).items()},
            "skipped_steps": step.skipped.total,
            "samples_per_second": progress.epoch_samples / progress.epoch_seconds,
            "data_wait_share": progress.epoch_wait_seconds / progress.epoch_seconds,
            **gpu,
        }

    def _shares(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Share]]:
        """This rank's rows of the batches of an epoch, on its device, from that with index `first` on."""
        if self._started is not None:
            started, self._started = self._started, None
            return started
        return shares_of_epoch(self.train, self.ranks, self.device, epoch, first)

    def _end_epoch(
        self, progress: Progress, row: Row, best_weights: dict[str, Tensor], keeper: RunKeeper
    ) -> None:
        """Take the row of a finished epoch into `progress` and the run folder, and begin the next."""
        progress.history.append(row)
        weights = self.model.state_dict()
        is_best = not progress.best or row["val_loss"] is None or row["val_loss"] < progress.best["val_loss"]
        if is_best:
            progress.best = row
            best_weights.update({name: w.detach().to("cpu", copy=True) for name, w in weights.items()})
        keeper.epoch(row, weights, best_weights if is_best else None)
        progress.samples += progress.epoch_samples
        progress.seconds += progress.epoch_seconds
        progress.wait_seconds += progress.epoch_wait_seconds
        progress.epoch += 1
        progress.batch = progress.epoch_samples = 0
        progress.epoch_seconds = progress.epoch_wait_seconds = 0.0

    def _save(
        self, keeper: RunKeeper, step: TrainStep, progress: Progress, best_weights: dict[str, Tensor]
    ) -> None:
        """Write a checkpoint; all ranks come here, for what it holds is of them all."""
        step.averages()  # raises where a step was not applied
        total = progress.step(len(self.train))
        if not step.weights.are_finite():
            raise TrainingError(
                f"weights are not finite after step {total}; try a lower --lr than {self.config.lr:g}"
            )
        self.ranks.make_equal(self.model.buffers())
        if self.ranks.is_first:
            now = checkpoint_of(self.model, self.loss, step, self.train, progress, best_weights)
            keeper.checkpoint(total, *now)

    def _restore(self, step: TrainStep) -> tuple[Progress, dict[str, Tensor]]:
        """Put everything where the newest checkpoint has it."""
        folder = self.folder
        assert folder is not None
        (tensors, state), problems = self.ranks.from_first(lambda: load_newest_checkpoint(folder))
        for problem in problems:
            print(f"{problem}; the one before it is used")
        return go_on_from(tensors, state, self.model, self.loss, step, self.train)

    def _not_finite(self, error: NonFiniteError) -> TrainingError:
        """What to tell of a step that could not be applied."""
        epoch = (error.step - 1) // len(self.train) + 1
        good = [] if self.folder is None else checkpoints(self.folder)
        kept = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        skip = "" if self.config.non_finite == "skip" else ", or --non-finite skip"
        return TrainingError(
            f"step {error.step}, in epoch {epoch}, was not applied: {error.what}; {kept}; "
            f"{error.remedy or f'try a lower --lr than {self.config.lr:g}'}{skip}"
        )
