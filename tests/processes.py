"""Interpreters of their own, for what a running one cannot be made to do.

They start outside the repository's root, where `import fastvae` would find the sources and not the
installed package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
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
    path = os.pathsep.join(filter(None, [str(checks), os.environ.get("PYTHONPATH")]))
    _run(pytest, checks, {**environment, "PYTHONPATH": path})


@contextmanager
def ranks(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun in `folder`, with arguments from its own on; its ranks are gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                children = children_of(process.pid)
                process.kill()
                for child in children:
                    os.kill(child, signal.SIGKILL)


def run_ranks(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What torchrun came to in `folder`."""
    with ranks(folder, *arguments) as process:
        output, errors = process.communicate(timeout=TIME_LIMIT)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def n_threads() -> int:
    """Those of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def children_of(pid: int) -> dict[int, int]:
    """The processes that torchrun has started: their ids, and the rank of each."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (folder / "environ").read_text().split("\0") if int(parent) == pid else []
        except OSError:  # it has ended
            continue
        found |= {int(folder.name): int(v[5:]) for v in environment if v.startswith("RANK=")}
    return found


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
