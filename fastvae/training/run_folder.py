"""The folder that a run leaves: which names in it are the run's, and when they may be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..models.files import CONFIG_NAME, WEIGHTS_NAME
from .config import ConfigError

CHECKPOINTS_NAME = "checkpoints"
METRICS_NAME = "metrics.jsonl"
OPTIONS_NAME = "train.toml"
SUMMARY_NAME = "summary.json"
EVALUATION_NAME = "evaluation.json"  # of fastvae evaluate
RECONSTRUCTIONS_NAME = "reconstructions.png"
SAMPLES_NAME = "samples.png"
IMAGES_NAME = "images"
REPORT_NAME = "report.html"
ONNX_NAME = "onnx"
EVENTS_NAME = "events.out.tfevents.*"  # TensorBoard's

# of the commands that look at a run
PICTURES = [
    f"{name}.{kind}"
    for name in ("sample", "reconstruct", "traverse", "grid", "interpolate", "latents")
    for kind in ("png", "gif", "npy")
]

OWN_NAMES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CHECKPOINTS_NAME,
    METRICS_NAME,
    OPTIONS_NAME,
    SUMMARY_NAME,
    EVALUATION_NAME,
    RECONSTRUCTIONS_NAME,
    SAMPLES_NAME,
    IMAGES_NAME,
    REPORT_NAME,
    ONNX_NAME,
    EVENTS_NAME,
    *PICTURES,
)


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """Raise ConfigError unless a run may be written to `folder`; writes nothing.

    It must be absent or empty, or `overwrite` given, and it or the folder it will be made in must be
    writable.
    """
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError("out", f"got '{folder}', but {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("out", f"got '{folder}', but {existing} is not writable")
    if existing == folder and not overwrite and any(folder.iterdir()):
        raise ConfigError("out", f"got '{folder}', which is not empty; give --overwrite to replace its run")


def prepare_run_folder(folder: Path) -> None:
    """Make the folder, and take away what an earlier run has left in it; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (path for name in OWN_NAMES for path in folder.glob(name)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
