"""Fixtures of many tests: a fresh seed, printed; runs, commands; GPU tests that cannot vanish in silence."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.cli import main


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # for tests send it


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small data: threads would only wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains on the digits with these options; the folder of the run."""

    def train(options: str, name: str = "run") -> Path:
        folder = tmp_path_factory.mktemp("digits") / name
        assert main(["train", "--data", "digits", *options.split(), "--out", str(folder)]) == 0
        return folder

    return train


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of fastvae; what it prints, which is one line of an error where the status is not 0."""

    def typed(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (status != 0)
        return printed.err or printed.out

    return typed
