"""What the commands after training share: a run, its data, and what its model makes of latents."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..training.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from ..data import DataLoader, Dataset, Source
    from ..models import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run: its model in eval mode on `device`, and the options that it was trained with.

    seed: of --seed, else the run's own. item_shape, latent_shape: of one x and of one z. summary: what
    summary.json holds; empty without one, as where `Trainer` has made the run.
    """

    folder: Path
    model: Model
    config: TrainConfig
    device: torch.device
    seed: int
    item_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    summary: dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """Data for a run's model, in their own order.

    name: what they are, for messages. loader: their batches, on the run's device. source, rows: where they
    are from, and which rows of it they are; None is all of them. labels: int64 [N], or None. classes: the
    names of the labels 0, 1, ..., where they have names.
    """

    name: str
    loader: DataLoader
    source: Source
    rows: npt.NDArray[np.int64] | None
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def some(self, n: int, seed: int) -> RunData:
        """At most n of the data, drawn by `seed`, in their own order."""
        import numpy as np

        if n >= self.loader.n_samples:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(self.loader.n_samples, n, replace=False))
        rows = chosen if self.rows is None else self.rows[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        name = f"{n:,} of {self.name}"
        loader = self._loader(rows, self.loader.device)
        return replace(self, name=name, loader=loader, rows=rows, labels=labels)

    def batches(self, indices: Sequence[int], option: str = "index") -> list[Tensor]:
        """x of the data at `indices`, in that order: float32 [B, *item] on the CPU.

        Raises ConfigError, of `option`.
        """
        for index in indices:
            if not 0 <= index < self.loader.n_samples:
                expected = f"0 to {self.loader.n_samples - 1}, of {self.name}"
                raise ConfigError(option, f"got {index}, expected {expected}")
        rows = list(indices) if self.rows is None else self.rows[list(indices)]
        return [batch[0] if isinstance(batch, tuple) else batch for batch in self._loader(rows)]

    def _loader(self, rows: npt.ArrayLike, device: torch.device | None = None) -> DataLoader:
        """One like `loader`, of other rows of the source."""
        from ..data import DataLoader

        like = self.loader
        return DataLoader(
            self.source,
            like.batch_size,
            seed=like.seed,
            indices=rows,
            num_workers=like.num_workers,
            device=device,
            transform=like.transform,
        )


def open_run(arguments: argparse.Namespace, folder: Path | None = None, *, finished: bool = True) -> Run:
    """The run in the folder that the command line names, or in another, its model on --device.

    finished: whether it has to be; else it has the weights that it would end with now.

    Raises ModelFilesError for a folder without such a run, ConfigError for an option that does not fit,
    ConfigFileError for a train.toml that is none.
    """
    from ..models import ModelFilesError
    from ..models.files import CONFIG_NAME, WEIGHTS_NAME, read, read_config, read_json
    from ..training.checkpoint import BEST_NAME, checkpoints
    from ..training.device import choose_device
    from ..training.run_folder import CHECKPOINTS_NAME, OPTIONS_NAME, SUMMARY_NAME
    from .model import own_class

    folder = folder or Path(arguments.folder)
    device, _ = choose_device(arguments.device)
    weights, options = folder / WEIGHTS_NAME, folder / OPTIONS_NAME
    has_checkpoints = bool(checkpoints(folder))
    if not weights.is_file() and finished and (has_checkpoints or options.is_file()):
        if has_checkpoints:
            how = f"fastvae train --resume {folder} goes on with one that was stopped"
        else:
            again = f"--config {options} --out {folder} --overwrite"
            how = f"fastvae train {again} begins one again that was stopped before its first checkpoint"
        raise ModelFilesError(f"{folder}: the run is not finished, there is no {WEIGHTS_NAME} yet; {how}")
    if not weights.is_file() and not finished:
        weights = folder / CHECKPOINTS_NAME / BEST_NAME
    config = TrainConfig.from_toml(options) if options.is_file() else TrainConfig()
    of_model, own = read_config(folder / CONFIG_NAME), None
    architecture = str(of_model.get("architecture"))
    if ":" in architecture:
        if arguments.model is None:
            name = config.model if ":" in config.model else architecture
            raise ModelFilesError(f"{folder}: the model is a class of your own; name it with --model {name}")
        own = own_class(TrainConfig(model=arguments.model))
    return Run(
        folder,
        read(folder / CONFIG_NAME, weights, own).to(device),
        config,
        device,
        config.seed if arguments.seed is None else arguments.seed,
        tuple(of_model["item_shape"]),
        tuple(of_model.get("latent_shape") or (of_model["latent_dim"],)),
        read_json(folder / SUMMARY_NAME),
    )


def open_data(
    run: Run, arguments: argparse.Namespace, part: str | None = None, *, binarize: bool = False
) -> RunData:
    """The data of --data and --split, by default those that `run` has not trained on, or their `part`.

    binarize: draw each value as 1 with the probability that it says; as in training where that did so.

    Raises ConfigError, and DataError for data that cannot be used.
    """
    from ..data import DataError, DataLoader, Transform, resolve
    from ..training.transforms import of_evaluation

    name = arguments.data or run.config.data
    if name is None:
        raise ConfigError("data", f"got none, and {run.folder} does not say what it was trained on")
    try:
        data = resolve(name, image_size=run.config.image_size)
    except DataError as error:
        if arguments.data is not None:
            raise
        raise ConfigError("data", f"got none, and the run's own cannot be opened: {error}") from error
    source, rows, which = _part(run, data, name, arguments, arguments.split or part)
    source = as_counts(source, run.config)
    if binarize:
        low, high = source.value_range()
        if low < 0 or high > 1:
            got = f"got {data.name} with values from {low:g} to {high:g}"
            raise ConfigError("binarize", f"{got}, expected probabilities, in [0, 1]")
    loader = DataLoader(
        source,
        arguments.batch_size,
        seed=run.seed,
        indices=rows,
        num_workers=workers(source, run.device.type != "cpu"),
        device=run.device,
        transform=Transform(binarize=True, fixed=True) if binarize else of_evaluation(run.config),
    )
    if loader.item_shape != run.item_shape:
        got, expected = (" x ".join(map(str, shape)) for shape in (loader.item_shape, run.item_shape))
        raise ConfigError(
            "data", f"got {data.name} with items of {got}, expected {expected}, as {run.folder}"
        )
    labels = source.y if rows is None or source.y is None else source.y[rows]
    return RunData(f"{data.name} ({which})", loader, source, rows, labels, source.classes or None)


def _part(
    run: Run, data: Dataset, name: str, arguments: argparse.Namespace, part: str | None
) -> tuple[Source, npt.NDArray[np.int64] | None, str]:
    """The source and the rows of `part`, or of the default, and a word for them."""
    from ..data import open_source, split
    from ..data.datasets import NAMES

    own = _same(name, run.config.data)
    if part is None and data.test is not None:
        part = "test"
    elif part is None:
        part = "val" if own and (arguments.data is None or name in NAMES) else "all"
    if part == "test":
        if data.test is None:
            raise ConfigError("split", f"got test, but {data.name} has none; expected val, train or all")
        return data.test, None, "test"
    if part == "val" and not own:
        got = f"got val, but {run.folder} was not trained on {data.name}"
        raise ConfigError("split", f"{got}; expected test or all")
    if part == "all" or not own:
        return data.train, None, f"all {data.train.n_samples:,}"
    if isinstance(run.config.val, str):
        return (
            (data.train, None, "training")
            if part == "train"
            else (open_source(run.config.val, run.config.image_size), None, "validation")
        )
    train_rows, val_rows = split(data.train.n_samples, run.config.val, run.config.seed)
    return (data.train, train_rows, "training") if part == "train" else (data.train, val_rows, "validation")


def _same(name: str, other: str | None) -> bool:
    return other is not None and (name == other or os.path.abspath(name) == os.path.abspath(other))


def as_counts(source: Source, config: TrainConfig) -> Source:
    """The source with what --normalize-counts and --log1p make of its counts. Raises DataError."""
    if config.normalize_counts is None and not config.log1p:
        return source
    from ..data import counts

    return counts(source, normalize=config.normalize_counts, log1p=config.log1p)


def workers(source: Source, on_gpu: bool) -> int | None:
    """Of a loader: none where the cores compute already and no disk is to be waited for."""
    return 0 if source.in_memory and not on_gpu else None


def track(batches: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same batches, with a progress bar on standard error while it is a terminal.

    total: their number, where they do not know it themselves.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(batches, what, total, console=console, transient=True, disable=not console.is_terminal)


def latents_of(values: Sequence[int], run: Run, option: str) -> list[int]:
    """Places in a flattened z. Raises ConfigError, of `option`, for one that z does not have."""
    n = math.prod(run.latent_shape)
    for value in values:
        if not 0 <= value < n:
            known = f"0 to {n - 1}, the latents" if n > 1 else "0, the one latent"
            raise ConfigError(option, f"got {value}, expected {known} of {run.folder}")
    return list(values)


def decoded(run: Run, z: Tensor, arguments: argparse.Namespace) -> Tensor:
    """The means of p(x|z), or draws of it, for z [R, S, *latent]: [R, S, *item]."""
    import torch

    from ..inference import decode

    batches = track(z.flatten(0, 1).split(arguments.batch_size), "decoding")
    x = decode(run.model, batches, draw_x=arguments.draw_x, seed=run.seed)
    return torch.cat(list(x)).reshape(*z.shape[:2], *run.item_shape)
