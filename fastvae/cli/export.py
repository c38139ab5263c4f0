"""`fastvae export`: a run's model for other runtimes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from ..training.config import ConfigError
from .arguments import add_model, add_run_command
from .runs import open_run


def add(commands: Any) -> None:
    """Add `export` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "export",
        run,
        "write encoder and decoder as ONNX",
        "Write encoder.onnx, x -> mu, logvar, and decoder.onnx, z -> the mean of p(x|z), for batches of any "
        "size, and check them against onnxruntime to 1e-4.",
    )
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="default: onnx")
    parser.add_argument("--out", metavar="DIR", help="default: the folder onnx in that of the run")
    add_model(parser)
    parser.set_defaults(device="cpu", seed=None)


def run(arguments: argparse.Namespace) -> None:
    """Export as the command line says."""
    from ..inference.export import export_onnx, missing_packages
    from ..models.model import likelihood_of
    from ..training.run_folder import ONNX_NAME

    missing = missing_packages()
    if missing is not None:
        raise ConfigError("format", f"got onnx, but {missing}")
    opened = open_run(arguments)
    folder = Path(arguments.out or opened.folder / ONNX_NAME)
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir():
        raise ConfigError("out", f"got '{folder}', but {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("out", f"got '{folder}', but {existing} is not writable")
    folder.mkdir(exist_ok=True)
    metadata = {
        "fastvae": importlib.metadata.version("fastvae"),
        "architecture": str(opened.config.model),
        "likelihood": likelihood_of(opened.model),
        "item_shape": json.dumps(opened.item_shape),
        "latent_shape": json.dumps(opened.latent_shape),
    }
    for part in export_onnx(
        opened.model, folder, opened.item_shape, opened.latent_shape, metadata=metadata, seed=opened.seed
    ):
        print(f"{part.path}: {part.input} -> {', '.join(part.outputs)}; within {part.error:.1e} of torch")
