"""scikit-learn's digits, as fastvae reads and divides them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fastvae.data import split


def images() -> Tensor:
    """All of them, in [0, 1]: float32 [1797, 1, 8, 8]."""
    return torch.from_numpy(load_digits().images[:, None] / 16).float()


def validation(seed: int) -> Tensor:
    """Those that a run of this seed validates on: [180, 1, 8, 8]."""
    x = images()
    return x[split(len(x), 0.1, seed)[1]]
