"""The examples, run as a user runs them: each shows what it says, and prints no warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIME_LIMIT = 600  # seconds
LOSS_OF_THE_MEAN_DIGIT = 4.69  # the squared error of digits / 16 with no encoder at all
# inside torch and lightning, whatever an example does
THIRD_PARTY = ("`torch.jit.script_method` is deprecated", "`isinstance(treespec, LeafSpec)` is deprecated")


def run(name: str) -> subprocess.CompletedProcess[str]:
    warnings = [f"-Wignore:{message}" for message in THIRD_PARTY]
    return subprocess.run(
        [sys.executable, "-Werror", *warnings, f"{name}.py"],
        cwd=EXAMPLES,
        # small data: threads would only wait for each other where the machine is busy
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def printed(name: str) -> list[str]:
    """The lines that an example prints."""
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.\d+(?:e[+-]\d+)?", line)]


def assert_learned(line: str) -> None:
    """The loss fell below what a decoder reaches that does not look at z."""
    first, last = numbers(line)
    assert first > LOSS_OF_THE_MEAN_DIGIT > last


def test_each_example_is_tested() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'("{path.stem}")' in tests, path.name


def test_plain_loop() -> None:
    (loss,) = printed("plain_loop")
    assert_learned(loss)


def test_compile() -> None:
    loss, same_seed = printed("compile")
    assert_learned(loss)
    eager, compiled = numbers(same_seed)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_autocast() -> None:
    dtypes, loss = printed("autocast")
    assert dtypes == "x_hat torch.bfloat16, loss torch.float32"
    assert_learned(loss)


def test_checkpointing() -> None:
    (line,) = printed("checkpointing")
    assert numbers(line) == [0.0]


def test_perceptual() -> None:
    *epochs, edges = printed("perceptual")
    assert len(epochs) == 30
    without, with_term = numbers(edges)
    assert with_term < 0.8 * without


def test_ddp() -> None:
    change, difference = (numbers(line)[0] for line in printed("ddp"))
    assert difference < 1e-5 < 1e-2 < change


@pytest.mark.gpu
def test_cuda_graph() -> None:
    fresh, repeated, loss = printed("cuda_graph")
    assert fresh == "two replays draw the same z: False"
    assert repeated == "two replays after the same seed: True"
    assert_learned(loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_graph_says_what_it_needs() -> None:
    done = run("cuda_graph")
    assert done.returncode == 1
    assert done.stderr == "cuda_graph.py: needs an NVIDIA GPU, and torch sees none\n"


@pytest.mark.integration
def test_lightning_module() -> None:
    pytest.importorskip("lightning")
    (loss,) = printed("lightning_module")
    assert_learned(loss)
