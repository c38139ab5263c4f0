"""What the options of a training say of how its data are transformed."""

from __future__ import annotations

from ..data import Transform
from .config import TrainConfig


def of_training(config: TrainConfig) -> Transform | None:
    """For the training data, drawn anew in each epoch; None where nothing is asked for."""
    transform = Transform(hflip=config.hflip, padding=config.crop_padding or 0, binarize=config.binarize)
    return None if transform == Transform() else transform


def of_evaluation(config: TrainConfig) -> Transform | None:
    """For data that are evaluated: binarised as in training, but the same in each pass."""
    return Transform(binarize=True, fixed=True) if config.binarize else None
