"""The README says what the committed figures say."""

from __future__ import annotations

import json
from pathlib import Path

from table import table

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_that_of_the_committed_results() -> None:
    results = json.loads((ROOT / "bench/results/cpu.json").read_text())
    assert table(results) in (ROOT / "README.md").read_text()


def test_the_gpu_table_is_that_of_the_newest_pass_or_says_there_is_none() -> None:
    readme = (ROOT / "README.md").read_text()
    passes = sorted((ROOT / "bench/results").glob("gpu_pass*.json"))
    if not passes:
        assert "not yet\nmeasured on a GPU" in readme
        return
    assert table(json.loads(passes[-1].read_text())["bench"]) in readme
