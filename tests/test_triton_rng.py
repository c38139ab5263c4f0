"""The Triton kernels' noise, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "triton_checks"


def test_noise_of_the_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {
        **os.environ, "PYTHONPATH": str(CHECKS), "TRITON_INTERPRET": "1", "FASTVAE_CHECK_DEVICE": "cpu"
    }  # fmt: skip
    # the interpreter computes with numpy, which warns where floats overflow or are NaN
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, str(CHECKS / "rng_checks.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
