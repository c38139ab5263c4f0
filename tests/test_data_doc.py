"""docs/data.md runs as it stands, block after block, and prints what it says, but for the numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_training_doc import BLOCK, assert_printed, run

DOC = Path(__file__).resolve().parent.parent / "docs/data.md"


@pytest.mark.slow
def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    kinds = []
    for kind, block in BLOCK.findall(DOC.read_text()):
        kinds.append(kind)
        if kind == "python":
            done = run([sys.executable, "-Werror", "-c", block], tmp_path)
            assert done.returncode == 0, done.stdout
            continue
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, told = part.partition("\n")
            done = run(["bash", "-c", command], tmp_path)
            assert done.returncode == 0, done.stdout
            assert_printed(told, done.stdout)
    assert {kind: kinds.count(kind) for kind in kinds} == {"python": 3, "sh": 4}
