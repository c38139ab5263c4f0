"""bench/gpu_pass.py, as far as it goes without a GPU."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import gpu_pass
import pytest

LOG = """
=== test session starts ===
collecting ... collected 5 items

../tests/test_x.py::test_one[(128, 784, 20)] PASSED               [ 20%]
../tests/test_x.py::test_two[cuda-free bits] FAILED [ 40%]
../tests/test_x.py::test_three SKIPPED (needs more memory)            [ 60%]
../tests/test_y.py::test_four PASSED [ 80%]
../tests/test_y.py::test_four ERROR [ 80%]
../tests/test_y.py::test_hangs """


def test_outcomes_are_those_of_a_log_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert gpu_pass.outcomes_of(tmp_path / "log") == [
        ("tests/test_x.py::test_one[(128, 784, 20)]", "PASSED"),
        ("tests/test_x.py::test_two[cuda-free bits]", "FAILED"),
        ("tests/test_x.py::test_three", "SKIPPED"),
        ("tests/test_y.py::test_four", "PASSED"),
        ("tests/test_y.py::test_four", "ERROR"),
        ("tests/test_y.py::test_hangs", "CUT OFF"),
    ]


def test_what_is_missing_is_said_before_anything_is_run(tmp_path, monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if name == "tomli-w":
            raise metadata.PackageNotFoundError
        return "1.0" if name == "pydantic" else "999"

    monkeypatch.setattr(gpu_pass.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["gpu_pass.py", "--out", str(tmp_path / "out")])
    assert gpu_pass.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("this Python has not: pydantic>=2.7 (but 1.0), tomli-w>=1")
    assert not (tmp_path / "out").exists()


def test_the_limits_are_ten_minutes_together() -> None:
    at_once = (("tests", "numbers"), ("memcheck", "racecheck"))
    hidden = sum(min(gpu_pass.LIMITS[name] for name in names) for names in at_once)
    assert sum(gpu_pass.LIMITS.values()) - hidden <= 600


@pytest.mark.parametrize("test", gpu_pass.SANITIZED)
def test_what_is_sanitized_exists(test: str, request: pytest.FixtureRequest) -> None:
    path, _, name = test.partition("::")
    found = pytest.Module.from_parent(request.session, path=gpu_pass.ROOT / path).collect()
    assert name in {item.name for item in found}
