"""README and docs say what the committed figures say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table import full, summary, table

ROOT = Path(__file__).resolve().parent.parent


def results_on_cpus() -> list[dict[str, Any]]:
    files = sorted((ROOT / "bench/results").glob("*.json"))
    return [json.loads(file.read_text()) for file in files if not file.name.startswith("gpu_pass")]


def test_the_tables_are_those_of_the_committed_results() -> None:
    assert summary(results_on_cpus()) in (ROOT / "README.md").read_text()
    benchmarks = (ROOT / "docs/benchmarks.md").read_text()
    for results in results_on_cpus():
        assert full(results) in benchmarks


def test_the_table_has_memory_and_bandwidth_where_they_were_measured() -> None:
    rate = {
        "title": "loader",
        "samples": 10,
        "median_s": {"fastvae": 1.0, "torch": 2.0},
        "ratio": {"torch": 2.0},
    }
    seconds = {"fastvae": 1e-3, "fastvae, without autograd": 5e-4, "eager": 4e-3, "compiled": 2e-3}
    loss = {
        "title": "loss and gradient",
        "samples": None,
        "median_s": seconds,
        "ratio": {"eager": 4.0, "compiled": 2.0},
        "memory_bytes": dict.fromkeys(seconds, 2**20) | {"eager": 3 * 2**20},
        "share_of_copy": {"fastvae": 0.45, "fastvae, without autograd": 0.9},
    }
    assert table({"rows": [rate, loss]}).splitlines() == [
        "| | fastvae | opponent | times as fast | MiB: fastvae, opponent |",
        "|---|---|---|---|---|",
        "| loader | 10 samples/s | torch | 2.0 |  |",
        "| loss and gradient | 1.00 ms, 45% of copy | eager | 4.0 | 1.0, 3.0 |",
        "|  | 500 us without autograd, 90% of copy | compiled | 2.0 | 1.0, 1.0 |",
    ]


def test_the_gpu_table_is_that_of_the_newest_pass_or_says_there_is_none() -> None:
    readme = (ROOT / "README.md").read_text()
    passes = sorted((ROOT / "bench/results").glob("gpu_pass*.json"))
    if not passes:
        assert "not yet\nmeasured on a GPU" in readme
        return
    assert table(json.loads(passes[-1].read_text())["bench"]) in readme
