"""Checks that this machine can build and install fastvae, and says what is missing and how to get it.

Runs on the Python that will make the environment, with nothing installed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MIN_PYTHON = (3, 10)
GIGABYTE = 1e9
MIN_DISK = 3 * GIGABYTE  # with the CPU build of torch
CUDA_DISK = 10 * GIGABYTE  # with the default build of torch on Linux, which brings NVIDIA's libraries

CPP20 = """
#include <algorithm>
#include <array>
int main() { std::array<int, 2> a{2, 1}; std::ranges::sort(a); return a[0] - 1; }
"""


def python_problem() -> "str | None":
    if sys.version_info < MIN_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return (
            f"Python: found {found} ({sys.executable}), need 3.10 or newer; use PYTHON=python3.12 make train"
        )
    return None


def venv_problem() -> "str | None":
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        return "Python's venv module: not found; on Debian or Ubuntu: apt install python3-venv"
    return None


def headers_problem() -> "str | None":
    include = Path(sysconfig.get_paths()["include"])
    if (include / "Python.h").exists():
        return None
    return (
        f"Python headers: no Python.h in {include}; on Debian or Ubuntu: apt install python3-dev, "
        "on Fedora: dnf install python3-devel"
    )


def compiler_problem() -> "str | None":
    how = "on Debian or Ubuntu: apt install g++, on Fedora: dnf install gcc-c++; or set CXX to one"
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for name in candidates if (path := shutil.which(name))), None)
    if compiler is None:
        return f"C++ compiler: found none of {', '.join(candidates)}; {how}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "check.cpp")
        source.write_text(CPP20)
        command = [compiler, "-std=c++20", str(source), "-o", str(Path(folder, "check"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return f"C++ compiler: {compiler} cannot compile C++20 (need GCC 11 or Clang 14, or newer); {how}"
    return None


def disk_problem() -> "str | None":
    free = shutil.disk_usage(Path.cwd()).free
    if free < MIN_DISK:
        return f"disk: {free / GIGABYTE:.1f} GB free in {Path.cwd()}, need {MIN_DISK / GIGABYTE:.0f} GB"
    if free < CUDA_DISK:
        print(
            f"note: {free / GIGABYTE:.1f} GB free; enough for the CPU build of torch, but the default build "
            f"for NVIDIA GPUs needs {CUDA_DISK / GIGABYTE:.0f} GB (README: the small CPU build)"
        )
    return None


def main() -> int:
    checks = (python_problem, venv_problem, headers_problem, compiler_problem, disk_problem)
    problems = [problem for check in checks if (problem := check())]
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
