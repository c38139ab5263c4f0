"""bench/gpu_pass.py, as far as it goes without a GPU."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import goals
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
../tests/test_y.py::test_slow[a b] Timeout (0:01:00)!
Thread 0x00007f (most recent call first):
  File "/x/tests/test_y.py", line 3 in test_slow
PASSED                                                               [ 90%]
../tests/test_y.py::test_hangs """


def test_outcomes_are_those_of_a_log_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert gpu_pass.outcomes_of(tmp_path / "log") == [
        ("tests/test_x.py::test_one[(128, 784, 20)]", "PASSED"),
        ("tests/test_x.py::test_two[cuda-free bits]", "FAILED"),
        ("tests/test_x.py::test_three", "SKIPPED"),
        ("tests/test_y.py::test_four", "PASSED"),
        ("tests/test_y.py::test_four", "ERROR"),
        ("tests/test_y.py::test_slow[a b]", "PASSED"),
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
    seconds = gpu_pass.LIMITS.copy()
    for at_once in (gpu_pass.TESTS, ("memcheck", "racecheck")):
        seconds[", ".join(at_once)] = max(seconds.pop(name) for name in at_once)
    assert sum(seconds.values()) <= 590


@pytest.mark.parametrize("test", gpu_pass.SANITIZED)
def test_what_is_sanitized_exists(test: str, request: pytest.FixtureRequest) -> None:
    path, _, name = test.partition("::")
    found = pytest.Module.from_parent(request.session, path=gpu_pass.ROOT / path).collect()
    assert name in {item.name for item in found}


def test_goals_stand_beside_what_was_found() -> None:
    large = {
        "title": goals.LARGE[0],
        "median_s": {goals.WITHOUT_AUTOGRAD: 1.0, goals.BY_HAND: 3.3, goals.COMPILED: 1.4},
        "share_of_copy": {goals.WITHOUT_AUTOGRAD: 0.9},
    }
    compared = goals.compared([large])
    assert [goal["found"] for goal in compared] == [0.9, 3.3, 1.4] + [None] * (len(compared) - 3)
    lines = goals.lines(compared)
    assert [line.split()[0] for line in lines[:4]] == ["reached", "reached", "missed", "?"]
    assert lines[0].split()[1:4] == ["90%", "of", "85%"]


def test_goals_are_those_of_benchmarks() -> None:
    text = "".join(path.read_text() for path in (gpu_pass.ROOT / "bench").glob("bench_*.py"))
    for goal in goals.GOALS:
        assert f'"{goal.path}"' in text
        assert f'"{goal.opponent}"' in text
    names = {name for chosen in gpu_pass.BENCHES.values() for test in chosen for name in test.split("::")}
    assert all(name in text or (gpu_pass.ROOT / "bench" / name).is_file() for name in names)
