"""One command for a machine with a GPU: build, GPU tests, benchmarks, a short training; one JSON of it all.

    python bench/gpu_pass.py --out DIR

Ends within ten minutes: each step has a time limit, and one that fails or runs out is named in the JSON and
makes the exit status 1; the steps after it run all the same. DIR/gpu_pass.json has the commit, the GPU, the
versions, every figure and every failure; DIR/*.log what each step printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# seconds; together under ten minutes
BUILD_LIMIT, TEST_LIMIT, BENCH_LIMIT, TRAIN_LIMIT = 120, 180, 200, 80


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_pass.json and the logs")
    parser.add_argument("--data", default=None, help="what to train on (default: fastvae's own default)")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"commit": commit(), "failures": [], "seconds": {}}

    def step(name: str, command: list[str], limit: float, **environment: str) -> bool:
        began = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            try:
                status: int | str = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    env={**os.environ, **environment},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"over its limit of {limit:.0f} s"
        record["seconds"][name] = round(time.monotonic() - began, 1)
        if status != 0:
            record["failures"].append(f"{name}: exit status {status}; see {name}.log")
        print(
            f"{name}: {'passed' if status == 0 else f'FAILED ({status})'}, {record['seconds'][name]} s",
            flush=True,
        )
        return status == 0

    if importlib.util.find_spec("fastvae") is None:
        install = ["pip", "install", "--no-build-isolation", "--no-deps", "."]
        step("build", [sys.executable, "-m", *install], BUILD_LIMIT)
    step("environment", [sys.executable, "-c", DESCRIBE, str(out / "environment.json")], 60)
    record["environment"] = read_json(out / "environment.json")

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, "tests", "-m", "gpu", f"--junitxml={out / 'tests.xml'}"]
    step("tests", tests, TEST_LIMIT, FAIL_WITHOUT_CUDA="1")
    record["tests"] = read_junit(out / "tests.xml", record["failures"])

    step("bench", [*pytest, "bench", f"--results={out / 'bench.json'}"], BENCH_LIMIT)
    record["bench"] = read_json(out / "bench.json")

    run = out / "run"
    train = [sys.executable, "-m", "fastvae", "train", "--amp", "--device", "cuda", "--epochs", "3"]
    data = [] if arguments.data is None else ["--data", arguments.data]
    step("train", [*train, *data, "--out", str(run), "--overwrite"], TRAIN_LIMIT)
    record["train"] = read_json(run / "summary.json")

    (out / "gpu_pass.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(record['failures'])} failures; {out / 'gpu_pass.json'}")
    return 1 if record["failures"] else 0


# runs in a process of its own, so that this one needs neither torch nor a GPU
DESCRIBE = """
import json, pathlib, platform, sys
import torch
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
import triton
import fastvae
pathlib.Path(sys.argv[1]).write_text(json.dumps({
    "gpu": torch.cuda.get_device_name(),
    "capability": list(torch.cuda.get_device_capability()),
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
    "fastvae": fastvae.__version__,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "triton": triton.__version__,
    "python": platform.python_version(),
}))
"""


def commit() -> str | None:
    """The commit that is measured, marked where the tree has changed since."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def read_json(path: Path) -> Any:
    """The file's content, or None where a failed step left none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_junit(path: Path, failures: list[str]) -> dict[str, int] | None:
    """Counts of pytest's JUnit file; each failed test is added to `failures`."""
    if not path.exists():
        return None
    cases = list(ET.parse(path).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    failures.extend(f"tests: {c.get('classname')}::{c.get('name')}" for c in bad)
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {"passed": len(cases) - len(bad) - len(skipped), "failed": len(bad), "skipped": len(skipped)}


if __name__ == "__main__":
    sys.exit(main())
