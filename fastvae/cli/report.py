"""`fastvae report`: runs as one page for a browser."""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError, ConfigFileError, TrainConfig
from .output import check_out
from .runs import Run, open_data

if TYPE_CHECKING:
    from ..inference.report import RunRecord

BATCH = 256  # data at a time; no result depends on it


def add(commands: Any) -> None:
    """Add `report` to argparse's subcommands."""
    parser = commands.add_parser(
        "report",
        help="draw a run, or several overlaid, as a page for a browser",
        description="Draw runs as one HTML file that holds all it shows: curves, pictures, results, options. "
        "Several are overlaid and compared. A run that has not ended is shown as far as it has come.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="RUN", nargs="+", help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html, in the folder of a single run, else in this one",
    )
    parser.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="data for the pictures, as of fastvae train (default: what each run has validated on)",
    )
    parser.add_argument(
        "--model",
        metavar="MODULE:CLASS",
        help="the class of runs with a model of your own, as for fastvae train",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, options=parser._option_string_actions)


def run(arguments: argparse.Namespace) -> None:
    """Draw the runs as the command line says."""
    from ..inference import report
    from ..training.run_folder import REPORT_NAME

    folders = [Path(folder) for folder in arguments.folders]
    out = Path(arguments.out or (folders[0] / REPORT_NAME if len(folders) == 1 else REPORT_NAME))
    records = [report.read_run(folder) for folder in folders]
    check_out(out)
    drawn = [_with_pictures(*pair, arguments) for pair in zip(records, folders, strict=True)]
    report.write(drawn, out, version=importlib.metadata.version("fastvae"))
    print(f"report: {out}")


def _with_pictures(record: RunRecord, folder: Path, arguments: argparse.Namespace) -> RunRecord:
    """The run with pictures of its model, or with those that it has left and why there are no others."""
    from ..data import DataError
    from ..inference import report
    from ..models import ModelError, ModelFilesError

    split = "val" if arguments.data is None else None
    try:
        opened = _open(folder, arguments)
        data = open_data(opened, argparse.Namespace(data=arguments.data, split=split, batch_size=BATCH))
        pictures = report.draw(
            opened.model,
            data.loader,
            seed=opened.seed,
            kl_by_latent=record.kl_by_latent,
            classes=data.classes,
        )
    except (ConfigError, ConfigFileError, DataError, ModelError, ModelFilesError) as error:
        if arguments.data is not None or arguments.model is not None:  # a person waits for just this
            raise
        return replace(record, notes=(*record.notes, f"No new pictures: {error}"))
    return replace(record, pictures=pictures)


def _open(folder: Path, arguments: argparse.Namespace) -> Run:
    """The run with the weights that it would end with now."""
    from ..models import ModelFilesError
    from ..models.files import CONFIG_NAME, WEIGHTS_NAME, read, read_config
    from ..training.checkpoint import BEST_NAME
    from ..training.device import choose_device
    from ..training.run_folder import CHECKPOINTS_NAME, OPTIONS_NAME
    from .model import own_class

    config_path = folder / CONFIG_NAME
    config = TrainConfig.from_toml(folder / OPTIONS_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        weights = folder / CHECKPOINTS_NAME / BEST_NAME
    of_model = read_config(config_path)
    own = None
    if ":" in str(of_model.get("architecture")):
        if arguments.model is None:
            raise ModelFilesError(f"the model is a class of your own; name it with --model {config.model}")
        own = own_class(TrainConfig(model=arguments.model))
    device, _ = choose_device(arguments.device)
    return Run(
        folder,
        read(config_path, weights, own).to(device),
        config,
        device,
        config.seed,
        tuple(of_model["item_shape"]),
        tuple(of_model.get("latent_shape") or (of_model["latent_dim"],)),
        {},
    )
