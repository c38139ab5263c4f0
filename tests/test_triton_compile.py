"""The Triton kernels compiled for GPUs that need not be there, in a process without the interpreter."""

from __future__ import annotations

import pytest
from processes import run_checks


def test_compiled_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_checks("compile_checks.py", TRITON_INTERPRET="0")
