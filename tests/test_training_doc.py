"""docs/training.md runs as it stands, block after block, and prints what it says, but for the numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).resolve().parent.parent / "docs/training.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.\w+)\n")
NUMBER = re.compile(r"-?\d[\d.,]*(e[+-]\d+)?")
TIME_LIMIT = 600  # seconds


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        # small data: threads would only wait for each other where the machine is busy
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def assert_printed(told: str, output: str) -> None:
    """The output is what is told, where "..." stands for anything and a number for any."""
    pieces = [re.escape(NUMBER.sub("#", piece)) for piece in told.strip().split("...")]
    assert re.fullmatch("(?s:.*)".join(pieces), NUMBER.sub("#", output.strip())), output


def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    kinds = []
    for kind, block in BLOCK.findall(DOC.read_text()):
        named = FILE.match(block)
        kinds.append("file" if named else kind)
        if named:
            (tmp_path / named[1]).write_text(block)
        elif kind == "python":
            done = run([sys.executable, "-Werror", "-c", block], tmp_path)
            assert done.returncode == 0, done.stdout
        else:
            assert kind == "sh"
            for part in block.removeprefix("$ ").split("\n$ "):
                command, _, told = part.partition("\n")
                done = run(["bash", "-c", command], tmp_path)
                assert done.returncode == (2 if "fastvae: error" in told else 0), done.stdout
                assert_printed(told, done.stdout)
    assert [kinds.count(kind) for kind in ("sh", "python", "file")] == [11, 6, 2]
