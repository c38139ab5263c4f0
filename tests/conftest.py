"""Fixtures of every test: a fresh seed, printed; GPU tests that cannot vanish in silence."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA"):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _gpu_or_fail(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("FAIL_WITHOUT_CUDA is set, and torch sees no CUDA device")


@pytest.fixture
def seed() -> int:
    """New random inputs each run; FASTVAE_TEST_SEED repeats a run."""
    value = int(os.environ.get("FASTVAE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FASTVAE_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    return value
