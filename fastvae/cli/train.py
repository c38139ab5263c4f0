"""`fastvae train`: data, model, training, test, pictures, and the folder that holds them."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError, TrainConfig
from .model import build_model, likelihood_of_run, own_class
from .options import add_train_options, given_options, train_config
from .output import number_of
from .runs import as_counts, workers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import DataLoader, Dataset, Source
    from ..ops import ELBOTerms
    from ..training.distributed import Ranks
    from ..training.result import TrainResult

EVALUATED = 256  # data at a time; no result depends on it


def add(commands: Any) -> None:
    """Add `train` to argparse's subcommands."""
    parser = commands.add_parser(
        "train",
        usage="%(prog)s [options]",  # of which there are too many for a line each
        help="train a VAE",
        description="Train a VAE and leave a run folder.",
        allow_abbrev=False,
    )
    flags = add_train_options(parser)
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in DIR from its newest checkpoint; its options hold, but for --epochs",
    )
    parser.set_defaults(run=run, options=[*flags, "--resume"])


def run(arguments: argparse.Namespace) -> None:
    """Train as the command line says; nothing is written before every option and the data are checked."""
    resume = getattr(arguments, "resume", None) is not None
    config = None if resume else train_config(arguments)

    from ..training.distributed import join

    ranks = join()
    with ranks.together():
        if config is None:
            config = ranks.from_first(lambda: _options_of_run(arguments))
        _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> None:
    import torch

    from ..data import resolve
    from ..inference.evaluate import evaluate, negative_elbo
    from ..ops import resolve_impl
    from ..training.device import choose_device
    from ..training.launch import open_run
    from ..training.tensorboard import check_tensorboard
    from ..training.trainer import Trainer

    given = None if config.out is None else Path(config.out)
    ranks.from_first(lambda: open_run(given, config.overwrite, resume))
    device, _ = choose_device(config.device)
    if config.tensorboard:
        check_tensorboard()
    own = own_class(config)
    _check_image_size(config)

    with ranks.node_first():
        data = resolve(config.data, config.download, config.image_size)
    name = f"{data.name}-{config.model.rpartition(':')[2]}"
    default = ranks.from_first(lambda: f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    out = Path(config.out or default)
    config = config.replace(
        data=config.data or data.name, likelihood=likelihood_of_run(config, data.name, own), out=str(out)
    )
    data, config = _counted(data, config)
    train, val, test = _loaders(config, data, device)
    torch.manual_seed(config.seed)
    model, latent_shape = build_model(config, own, val)
    config = config.replace(latent_dim=math.prod(latent_shape))
    _print_data(data, train, val, test)
    _note_grey(config, val)
    trainer = Trainer(model, train, val, config=config, resume=resume)

    impl, impl_reason = resolve_impl("auto", trainer.device)
    parameters = sum(p.numel() for p in model.parameters())
    amp_dtype = str(trainer.amp_dtype).removeprefix("torch.")
    print(
        f"model: {config.model}, {number_of(config.latent_dim, 'latent')}, {parameters:,} parameters, "
        f"{config.likelihood} likelihood"
    )
    print(f"device: {trainer.device} ({trainer.device_reason}), {amp_dtype} ({trainer.amp_reason})")
    print(f"operators: {impl} ({impl_reason})", flush=True)
    result = trainer.fit()
    loss = negative_elbo(model, logvar_clamp=config.logvar_clamp)
    test_terms = None
    if test is not None:
        group = ranks.group(trainer.device)
        test_terms = evaluate(model, test, loss=loss, seed=config.seed, process_group=group)
    if not ranks.is_first:
        return
    summary = {
        **_losses(test_terms, result),
        "epochs": len(result.history),
        "best_epoch": result.best["epoch"],
        "steps": result.steps,
        "skipped_steps": result.history[-1]["skipped_steps"],
        "seconds": result.seconds,
        "samples_per_second": result.samples_per_second,
        **result.usage,
        "kl_by_latent": result.best.get("kl_by_latent"),
        "active_units": result.best.get("active_units"),
        "device": trainer.device.type,
        "impl": impl,
        "amp_dtype": amp_dtype,
        "parameters": parameters,
        "seed": config.seed,
        "versions": _versions(),
    }
    _write_run(out, model, val, summary)
    report = _write_report(out, model, val, config, data.classes) if config.report else None
    _print_end(summary, out, report)


def _options_of_run(arguments: argparse.Namespace) -> TrainConfig:
    """The options of the run that --resume names. Raises ConfigError where there is none."""
    from ..training.run_folder import OPTIONS_NAME

    folder = Path(arguments.resume)
    given = given_options(arguments)
    others = sorted(given.keys() - {"epochs", "debug"} | vars(arguments).keys() & {"config"})
    if others:
        expected = "the run's own options, and beside them only --epochs"
        raise ConfigError("resume", f"given with --{others[0].replace('_', '-')}, expected {expected}")
    options = folder / OPTIONS_NAME
    if not options.is_file():
        raise ConfigError(
            "resume", f"got '{folder}', which has no {OPTIONS_NAME}; expected a run of fastvae train"
        )
    config = TrainConfig.from_toml(options)
    if config.data is None:  # which the command always writes
        got = f"got '{folder}', which does not say what it was trained on"
        raise ConfigError(
            "resume", f"{got}; expected a run of fastvae train, or Trainer(resume=True) in Python"
        )
    return config.replace(out=str(folder), **given)


def _check_image_size(config: TrainConfig) -> None:
    from ..data.sources import is_image_folder

    if config.image_size is None or (config.data is not None and is_image_folder(Path(config.data))):
        return
    data = config.data or "the default data"
    hint = f"for others: fastvae data pack {config.data or 'SRC'} DST.npy --size {config.image_size}"
    raise ConfigError(
        "image_size", f"got {config.image_size} for {data}, expected a folder of images; {hint}"
    )


def _counted(data: Dataset, config: TrainConfig) -> tuple[Dataset, TrainConfig]:
    """The data with the counts that the options ask for, and the options with the sum that a median is."""
    from ..data import SparseSource

    train = as_counts(data.train, config)
    if isinstance(train, SparseSource):
        config = config.replace(normalize_counts=train.target)
    test = None if data.test is None else as_counts(data.test, config)
    return replace(data, train=train, test=test), config


def _loaders(
    config: TrainConfig, data: Dataset, device: torch.device
) -> tuple[DataLoader, DataLoader, DataLoader | None]:
    """The loaders of training, validation and test data, with batches on `device`."""
    from ..data import DataError, DataLoader, ShuffleWarning, open_source, split
    from ..training import transforms

    train_rows, val_rows, val_source = None, None, data.train
    if isinstance(config.val, str):
        val_source = as_counts(open_source(config.val, config.image_size), config)
    else:
        try:
            train_rows, val_rows = split(data.train.n_samples, config.val, config.seed)
        except ValueError as error:
            raise ConfigError("val", str(error)) from error
    if config.likelihood == "bernoulli":
        for source in (data.train, val_source, data.test):
            if source is not None:
                _check_unit_interval(source)
    num_workers = workers(data.train, device.type != "cpu")
    loader = partial(DataLoader, seed=config.seed, num_workers=num_workers, device=device)
    evaluated = partial(loader, batch_size=EVALUATED, transform=transforms.of_evaluation(config))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShuffleWarning)  # its note is printed
            train = loader(
                data.train,
                config.batch_size,
                shuffle=True,
                indices=train_rows,
                transform=transforms.of_training(config),
            )
        val = evaluated(val_source, indices=val_rows)
        test = None if data.test is None else evaluated(data.test)
    except DataError:
        raise
    except ValueError as error:
        given = next(name for name in ("hflip", "crop_padding", "binarize") if getattr(config, name))
        raise ConfigError(given, str(error)) from error
    if val.item_shape != train.item_shape:
        raise ConfigError("val", f"got {config.val} with items of {_shape(val)}, expected {_shape(train)}")
    if config.model == "conv" and len(train.item_shape) != 3:
        expected = "channels x height x width; mlp takes any shape"
        raise ConfigError("model", f"got conv for items of {_shape(train)}, expected {expected}")
    return train, val, test


def _print_data(data: Dataset, train: DataLoader, val: DataLoader, test: DataLoader | None) -> None:
    from ..data import SparseSource

    if data.note:
        print(data.note)
    loaders = {"training": train, "validation": val} | ({} if test is None else {"test": test})
    sizes = ", ".join(f"{loader.n_samples:,} for {use}" for use, loader in loaders.items())
    print(f"data: {data.name}, items of {_shape(train)}, {sizes}")
    if train.note:
        print(f"data: {train.note}")
    if isinstance(data.train, SparseSource) and (data.train.target or data.train.log1p):
        steps = ["log1p"] if data.train.log1p else []
        steps = [f"brought to a sum of {data.train.target:g}", *steps] if data.train.target else steps
        print(f"counts: {', '.join(steps)}")


def _note_grey(config: TrainConfig, val: DataLoader) -> None:
    """Say what else there is for values between 0 and 1 under a likelihood of 0 and 1."""
    if config.likelihood != "bernoulli":
        return
    from ..inference.evaluate import x_of

    x = x_of(next(iter(val)))
    if not bool(((x == 0) | (x == 1)).all()):
        what = "bernoulli takes values between 0 and 1 for probabilities, and is no density of them"
        print(f"likelihood: {what}; --binarize draws 0 and 1 with them")


def _check_unit_interval(source: Source) -> None:
    low, high = source.value_range()
    if low < 0 or high > 1:
        found = f"{source.name} with values from {low:g} to {high:g}"
        raise ConfigError("likelihood", f"got bernoulli for {found}, expected values in [0, 1]")


def _shape(loader: DataLoader) -> str:
    return " x ".join(map(str, loader.item_shape))


def _losses(test: ELBOTerms | None, result: TrainResult) -> dict[str, float | None]:
    """test_* at beta = 1; val_loss at the beta of the training. Both with the weights of the best epoch."""
    terms = {f"test_{name}": float(term) for name, term in test._asdict().items()} if test else {}
    absent = dict.fromkeys(("test_loss", "test_recon", "test_kl"))
    return {**absent, **terms, "val_loss": result.best["val_loss"]}


def _versions() -> dict[str, str | None]:
    import torch

    # which says for what it was built, as its package does not always
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastvae", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _write_run(out: Path, model: nn.Module, val: DataLoader, summary: dict[str, Any]) -> None:
    """What a finished run leaves beside what the training has written."""
    from ..inference import evaluate, plots
    from ..models.files import write_json
    from ..training import images, run_folder

    device = next(model.parameters()).device
    drawn = images.draw_images(model, next(evaluate.inputs(val, device)), summary["seed"])
    plots.save(out / run_folder.RECONSTRUCTIONS_NAME, drawn["reconstructions"])
    plots.save(out / run_folder.SAMPLES_NAME, drawn["samples"])
    write_json(out / run_folder.SUMMARY_NAME, summary)


def _write_report(
    out: Path, model: nn.Module, val: DataLoader, config: TrainConfig, classes: Sequence[str] | None
) -> Path | None:
    """Draw the run's report, and say where: None where it fails, with a warning, for the run is whole."""
    from ..training.run_folder import REPORT_NAME

    path = out / REPORT_NAME
    try:
        from ..inference import report

        run = report.read_run(out)
        pictures = report.draw(model, val, seed=config.seed, kl_by_latent=run.kl_by_latent, classes=classes)
        report.write([replace(run, pictures=pictures)], path, version=metadata.version("fastvae"))
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        again = f"the run is whole; to draw it again: fastvae report {out}"
        print(f"fastvae: warning: no report: {what}; {again}", file=sys.stderr)
        return None
    return path


def _print_end(summary: dict[str, Any], out: Path, report: Path | None) -> None:
    print(f"validation loss {summary['val_loss']:.4f} nats, in epoch {summary['best_epoch']}")
    if summary["test_loss"] is not None:
        print(
            f"test loss {summary['test_loss']:.4f} nats: "
            f"recon {summary['test_recon']:.4f}, KL {summary['test_kl']:.4f}"
        )
    print(f"trained at {summary['samples_per_second']:,.0f} samples/s for {summary['seconds']:.1f} s")
    if report is not None:
        print(f"report: {report}")
    print(f"run: {out}")
