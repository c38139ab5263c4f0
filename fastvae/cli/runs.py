"""What the commands after training share: a finished run, its data, and where their output goes."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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

SPLITS = ("train", "val", "test", "all")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A finished run: its model in eval mode on `device`, and the options that it was trained with.

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

    name: what they are, for messages. loader: their batches. source, rows: where they are from, and which
    rows of it they are; None is all of them. labels: int64 [N], or None. classes: the names of the labels 0,
    1, ..., where they have names.
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

        from ..data import DataLoader

        if n >= self.loader.n_samples:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(self.loader.n_samples, n, replace=False))
        rows = chosen if self.rows is None else self.rows[chosen]
        loader = self.loader
        return replace(
            self,
            name=f"{n:,} of {self.name}",
            loader=DataLoader(
                self.source,
                loader.batch_size,
                seed=loader.seed,
                indices=rows,
                num_workers=loader.num_workers,
                transform=loader.transform,
            ),
            rows=rows,
            labels=None if self.labels is None else self.labels[chosen],
        )

    def batches(self, indices: Sequence[int], option: str = "index") -> list[Tensor]:
        """x of the data at `indices`, in that order: float32 [B, *item]. Raises ConfigError, of `option`."""
        from ..data import DataLoader

        for index in indices:
            if not 0 <= index < self.loader.n_samples:
                expected = f"0 to {self.loader.n_samples - 1}, of {self.name}"
                raise ConfigError(option, f"got {index}, expected {expected}")
        rows = list(indices) if self.rows is None else [int(self.rows[index]) for index in indices]
        loader = DataLoader(
            self.source,
            self.loader.batch_size,
            seed=self.loader.seed,
            indices=rows,
            num_workers=0,
            transform=self.loader.transform,
        )
        return [batch[0] if isinstance(batch, tuple) else batch for batch in loader]


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str
) -> argparse.ArgumentParser:
    """Add a command on a run to argparse's subcommands, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.set_defaults(run=run, options=parser._option_string_actions)
    return parser


def add_run_options(
    parser: argparse.ArgumentParser, *, data: bool | str = False, part: str | None = None
) -> None:
    """Add the options that `open_run` reads, and with `data` those of `open_data`.

    data: a text says in the help what the command needs data for. part: what it takes of them by default.
    """
    if data:
        group = parser.add_argument_group("data")
        what = "" if data is True else f"{data}: "
        group.add_argument(
            "--data",
            metavar="NAME|PATH",
            help=f"{what}a name or a path, as of fastvae train (default: the run's own)",
        )
        group.add_argument(
            "--split",
            choices=SPLITS,
            help="which part: test, what the run has validated on (val) or trained on (train), or both (all) "
            "(default: "
            + (part or "test data where there are any, else val; of a file given with --data, all")
            + ")",
        )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--model",
        metavar="MODULE:CLASS",
        help="the class of a run with a model of your own, as for fastvae train",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="data at a time; no result depends on it (default: 256)",
    )
    group.add_argument("--seed", type=seed, metavar="N", help="of all draws (default: the run's)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def open_run(arguments: argparse.Namespace) -> Run:
    """The run in the folder that the command line names, its model on --device.

    Raises ModelFilesError for a folder without a finished run, ConfigError for an option that does not fit,
    ConfigFileError for a train.toml that is none.
    """
    from ..models import ModelFilesError, load
    from ..models.files import CONFIG_NAME, WEIGHTS_NAME
    from ..training.checkpoint import checkpoints
    from ..training.device import choose_device
    from ..training.run_folder import OPTIONS_NAME, SUMMARY_NAME
    from .model import own_class

    folder = Path(arguments.folder)
    device, _ = choose_device(arguments.device)
    if not (folder / WEIGHTS_NAME).is_file() and checkpoints(folder):
        raise ModelFilesError(
            f"{folder}: the run is not finished, there are checkpoints but no {WEIGHTS_NAME}; finish it with "
            f"fastvae train --resume {folder}"
        )
    options = folder / OPTIONS_NAME
    config = TrainConfig.from_toml(options) if options.is_file() else TrainConfig()
    own = None if arguments.model is None else own_class(TrainConfig(model=arguments.model))
    model_config = _json(folder / CONFIG_NAME)
    architecture = str(model_config.get("architecture"))
    if own is None and ":" in architecture:
        name = config.model if ":" in config.model else architecture
        raise ModelFilesError(f"{folder}: the model is a class of your own; name it with --model {name}")
    model: Model = load(folder) if own is None else load(folder, own)
    return Run(
        folder,
        model.to(device),
        config,
        device,
        config.seed if arguments.seed is None else arguments.seed,
        tuple(model_config["item_shape"]),
        tuple(model_config.get("latent_shape") or (model_config["latent_dim"],)),
        _json(folder / SUMMARY_NAME),
    )


def open_data(run: Run, arguments: argparse.Namespace, part: str | None = None) -> RunData:
    """The data of --data and --split, by default those that `run` has not trained on, or their `part`.

    Raises ConfigError, and DataError for data that cannot be used.
    """
    from ..data import DataError, DataLoader, resolve
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
    loader = DataLoader(
        source,
        arguments.batch_size,
        seed=run.config.seed,
        indices=rows,
        num_workers=workers(source, run.device.type != "cpu"),
        transform=of_evaluation(run.config),
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


def _json(path: Path) -> dict[str, Any]:
    """What a file of the run holds; empty where it is absent or no JSON."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


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
            raise ConfigError(option, f"got {value}, expected 0 to {n - 1}, the latents of {run.folder}")
    return list(values)


def kl_of_latents(run: Run, arguments: argparse.Namespace) -> list[float] | None:
    """The KL of each latent in nats, [Z]: of summary.json, else of the data; None where there are neither."""
    found = run.summary.get("kl_by_latent")
    if found is not None:
        return list(found)
    if arguments.data is None and run.config.data is None:
        return None
    import torch

    from ..inference.evaluate import inputs
    from ..inference.latents import LatentStatistics

    statistics = LatentStatistics()
    with torch.no_grad():
        for x in inputs(track(open_data(run, arguments).loader, "encoding"), run.device):
            statistics.update(*run.model.encode(x))
    return [float(kl) for kl in statistics.kl]


def positive(value: str) -> int:
    """An option's number of at least 1."""
    return _integer(value, 1)


def index(value: str) -> int:
    """An option's place in data or latents."""
    return _integer(value, 0)


def seed(value: str) -> int:
    """An option's seed."""
    return _integer(value, 0)


def _integer(value: str, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"got {value!r}, expected an integer of at least {least}")
    return number
