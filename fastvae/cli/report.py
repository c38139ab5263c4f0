"""`fastvae report`: runs as one page for a browser."""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError, ConfigFileError
from .arguments import add_command, add_run_options
from .output import check_none_of, check_out
from .runs import open_data, open_run

if TYPE_CHECKING:
    from ..inference.report import RunRecord


def add(commands: Any) -> None:
    """Add `report` to argparse's subcommands."""
    parser = add_command(
        commands,
        "report",
        run,
        "draw a run, or several overlaid, as a page for a browser",
        "Draw runs as one HTML file that holds all it shows: curves, pictures, results, options. Several are "
        "overlaid and compared. A run that has not ended is shown as far as it has come.",
    )
    parser.usage = "%(prog)s RUN [RUN ...] [options]"
    parser.add_argument("folders", metavar="RUN", nargs="+", help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html, in the folder of a single run, else in this one",
    )
    add_run_options(parser, data="for the pictures", part="what each run has validated on")


def run(arguments: argparse.Namespace) -> None:
    """Draw the runs as the command line says."""
    from ..inference import report
    from ..training.run_folder import REPORT_NAME

    folders = [Path(folder) for folder in arguments.folders]
    out = Path(arguments.out or (folders[0] / REPORT_NAME if len(folders) == 1 else REPORT_NAME))
    records = [report.read_run(folder) for folder in folders]
    check_out(out)
    check_none_of(out, folders)
    drawn = [_with_pictures(*pair, arguments) for pair in zip(records, folders, strict=True)]
    report.write(drawn, out, version=importlib.metadata.version("fastvae"))
    print(f"report: {out}")


def _with_pictures(record: RunRecord, folder: Path, arguments: argparse.Namespace) -> RunRecord:
    """The run with pictures of its model, or with those that it has left and why there are no others."""
    from ..data import DataError
    from ..inference import report
    from ..models import ModelError, ModelFilesError

    part = "val" if arguments.data is None else None
    asked = arguments.data is not None or arguments.split is not None
    try:
        opened = open_run(arguments, folder, finished=False)
        data = open_data(opened, arguments, part)
        pictures = report.draw(
            opened.model,
            data.loader,
            seed=opened.seed,
            kl_by_latent=record.kl_by_latent,
            classes=data.classes,
        )
    except (ConfigError, ConfigFileError, DataError, ModelError, ModelFilesError) as error:
        if asked or arguments.model is not None:  # a person waits for just this
            raise
        return replace(record, notes=(*record.notes, f"No new pictures: {error}"))
    return replace(record, pictures=replace(pictures, data=data.name) if asked else pictures)
