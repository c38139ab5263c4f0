"""`compare` times opponents in turn; the ratios go into a JSON file as they come, and a table ends it all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_pass import commit
from timing import interleaved, median, ratio, spread

import fastvae

ROWS = pytest.StashKey[list[dict[str, Any]]]()
Compare = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        default=Path("bench-results.json"),
        help="where the figures are written as JSON (default: bench-results.json)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """compare(title, callables, rounds=, ...): time callables in turn, as `timing.interleaved` says.

    Those whose names begin with "fastvae" are not opponents; ratios are to the first of them. `samples` is
    how many data a call handles, for a rate. `memory` is the peak of each operation in bytes. Of `traffic`,
    bytes that an operation has to move, "copy" names a plain copy: it is timed in turn too, and the others
    are given as shares of its bandwidth.
    """

    def run(
        title: str,
        callables: dict[str, Callable[[], object]],
        *,
        rounds: int,
        turn_seconds: float = 0.0,
        synchronize: Callable[[], None] = lambda: None,
        samples: int | None = None,
        memory: dict[str, int] | None = None,
        traffic: dict[str, int] | None = None,
    ) -> None:
        seconds = interleaved(callables, rounds, turn_seconds=turn_seconds, synchronize=synchronize)
        bandwidth = {name: n / median(seconds[name]) for name, n in (traffic or {}).items()}
        copy = bandwidth.pop("copy", None)
        seconds.pop("copy", None)
        ours = next(iter(seconds))
        opponents = [name for name in seconds if not name.startswith("fastvae")]
        row = {
            "title": title,
            "samples": samples,
            "median_s": {name: median(times) for name, times in seconds.items()},
            "spread": {name: spread(times) for name, times in seconds.items()},
            "ratio": {name: ratio(seconds[name], seconds[ours]) for name in opponents},
            "rounds": rounds,
        }
        if memory:
            row["memory_bytes"] = memory
        if copy:
            row["copy_bytes_per_s"] = copy
            row["share_of_copy"] = {name: rate / copy for name, rate in bandwidth.items()}
        request.config.stash[ROWS].append(row)
        _write(request.config)
        benchmark.extra_info.update(row)
        benchmark.pedantic(callables[ours], rounds=3)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("ratios: how many times as fast fastvae is (medians over runs in turn)")
    for row in rows:
        copy = f"; a copy moves {row['copy_bytes_per_s'] / 1e9:.1f} GB/s" if "copy_bytes_per_s" in row else ""
        terminalreporter.write_line(f"{row['title']}{copy}")
        for name in row["median_s"]:
            ratio = f"{row['ratio'][name]:6.2f} x" if name in row["ratio"] else " " * 8
            terminalreporter.write_line(f"  {ratio}  {name:39s} {_show(row, name)}")
    terminalreporter.write_line(f"figures: {config.getoption('--results')}")


def _write(config: pytest.Config) -> None:
    """The rows so far, for a run may be cut off."""
    path: Path = config.getoption("--results")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_environment(), "rows": config.stash[ROWS]}, indent=2) + "\n")


def _show(row: dict[str, Any], name: str) -> str:
    seconds, relative = row["median_s"][name], row["spread"][name]
    if row["samples"] is not None:
        return f"{row['samples'] / seconds:12,.0f} samples/s  +-{relative:4.0%}"
    shown = f"{seconds * 1e6:10.1f} us  +-{relative:4.0%}"
    if "memory_bytes" in row:
        shown += f"  {row['memory_bytes'][name] / 2**20:8.1f} MiB"
    if name in row.get("share_of_copy", {}):
        shown += f"  {row['share_of_copy'][name]:4.0%} of a copy's bandwidth"
    return shown


def _environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "fastvae": fastvae.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
