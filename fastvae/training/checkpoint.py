"""The weights of a training that is under way, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..models.files import save_weights
from .run_folder import CHECKPOINTS_NAME

LAST_NAME = "last.safetensors"
BEST_NAME = "best.safetensors"


def save_checkpoint(run: Path, weights: Mapping[str, Tensor], *, is_best: bool) -> None:
    """Replace checkpoints/last.safetensors of the run, and best.safetensors too if `is_best`.

    Each file is whole at any moment. Raises OSError where writing fails, and the earlier file stays.
    """
    folder = run / CHECKPOINTS_NAME
    folder.mkdir(exist_ok=True)
    save_weights(folder / LAST_NAME, weights)
    if is_best:
        save_weights(folder / BEST_NAME, weights)
