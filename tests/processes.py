"""Interpreters of their own, for what a running one cannot be made to do.

They start outside the repository's root, where `import fastvae` would find the sources and not the
installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TIME_LIMIT = 600  # seconds


def run_python(code: str) -> str:
    """What a fresh interpreter prints; fails with its error output."""
    return _run(["-c", textwrap.dedent(code)], TESTS, {})


def run_checks(name: str, *options: str, **environment: str) -> None:
    """Run a file of tests/triton_checks with pytest; fails with its output."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, name]
    checks = TESTS / "triton_checks"
    # processes that the checks start need to find their modules too
    _run(pytest, checks, {**environment, "PYTHONPATH": str(checks)})


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
