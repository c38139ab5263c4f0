"""docs/after-training.md runs as it stands, block after block, and prints what it says, but for numbers."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_training_doc import BLOCK, assert_printed

from fastvae.cli import main

DOC = Path(__file__).resolve().parent.parent / "docs/after-training.md"


pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_runs_as_it_stands(tmp_path: Path, monkeypatch, capsys) -> None:
    """In this process, where torch need not be imported for each command."""
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(DOC.read_text())
    assert len(blocks) > 7
    for kind, block in blocks:
        capsys.readouterr()
        if kind == "python":
            exec(compile(block, str(DOC), "exec"), {"__name__": "block"})
            continue
        assert kind == "sh"
        for part in block.removeprefix("$ ").split("\n$ "):
            line, _, told = part.partition("\n")
            program, *arguments = shlex.split(line)
            if program == "fastvae":
                status = main(arguments)
                done = capsys.readouterr()
                output = done.out + done.err
            else:
                shell = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
                status, output = shell.returncode, shell.stdout + shell.stderr
            assert status == (2 if "fastvae: error" in told else 0), output
            assert_printed(told, output)


def test_its_pictures_are_there_and_small() -> None:
    """Of scripts/gallery.py."""
    shown = {DOC.parent / picture for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", DOC.read_text())}
    assert shown == set((DOC.parent / "gallery").iterdir())
    assert sum(path.stat().st_size for path in shown) < 3e6
