"""The Triton kernels' numbers and noise, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import pytest
from processes import run_checks


@pytest.mark.parametrize("checks", ["elbo_checks.py", "gather_checks.py", "rng_checks.py"])
def test_the_kernels_in_the_interpreter(checks: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # the interpreter computes with numpy, which warns where floats overflow or are NaN
    ignore = ("-W", "ignore::RuntimeWarning")
    run_checks(checks, *ignore, TRITON_INTERPRET="1", FASTVAE_CHECK_DEVICE="cpu")
