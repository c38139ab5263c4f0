"""One command for a machine with a GPU: build, tests, sanitizers, benchmarks, a training; one JSON of it all.

    python bench/gpu_pass.py --out DIR

Ends within ten minutes: each step has a time limit, and one that fails or runs out is named in the JSON and
makes the exit status 1; the steps after it run all the same. DIR/gpu_pass.json has the commit, the GPU, the
versions, every figure and every failure; DIR/*.log what each step printed. NVIDIA's compute-sanitizer runs
where it is installed, and else the JSON says that it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# seconds; together ten minutes
LIMITS = {
    "build": 90,
    "environment": 20,
    "tests": 170,
    "memcheck": 45,
    "racecheck": 45,
    "bench": 170,
    "train": 60,
}
# the ELBO forward and backward, with sampling, many times, and batches of images that are shifted, mirrored
# and binarized: short enough for a tool that slows a kernel tenfold
SANITIZED = (
    "tests/test_triton_gpu.py::test_runs_are_bit_equal[(128, 784, 20)]",
    "tests/test_loader_gpu.py::test_kept_data_are_those_of_the_host[torch.float32-transform1]",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_pass.json and the logs")
    parser.add_argument("--data", default=None, help="what to train on (default: fastvae's own default)")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = out / "run"
    # what an earlier pass left would stand for a step that fails now
    for old in ("gpu_pass.json", "environment.json", "tests.xml", "bench.json", "run/summary.json"):
        (out / old).unlink(missing_ok=True)
    record: dict[str, Any] = {"commit": commit(), "failures": [], "seconds": {}}
    failures: list[str] = record["failures"]

    def step(name: str, command: list[str], **environment: str) -> bool:
        began = time.monotonic()
        failure = run_limited(command, LIMITS[name], out / f"{name}.log", environment)
        seconds = record["seconds"][name] = round(time.monotonic() - began, 1)
        if failure:
            failures.append(f"{name}: {failure}; see {name}.log")
        print(f"{name}: {f'FAILED, {failure}' if failure else 'passed'}, {seconds} s", flush=True)
        (out / "gpu_pass.json").write_text(json.dumps(record, indent=2) + "\n")
        return failure is None

    if importlib.util.find_spec("fastvae") is None:
        step(
            "build", [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
        )
    step("environment", [sys.executable, "-c", DESCRIBE, str(out / "environment.json")])
    record["environment"] = read_json(out / "environment.json")

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    tests = [*pytest, str(ROOT / "tests"), "-m", "gpu", f"--junitxml={out / 'tests.xml'}"]
    step("tests", tests, FAIL_WITHOUT_CUDA="1")
    record["tests"] = read_junit(out / "tests.xml", failures)

    record["sanitizer"] = "not installed"
    if tool := shutil.which("compute-sanitizer"):
        record["sanitizer"] = {}
        for check in ("memcheck", "racecheck"):
            # errors of CUDA's interface are no errors of a kernel: torch tries calls that may fail
            options = ["--tool", check, "--error-exitcode", "1", "--target-processes", "application-only"]
            options += ["--report-api-errors", "no"] if check == "memcheck" else []
            command = [tool, *options, *pytest, *(str(ROOT / test) for test in SANITIZED)]
            # torch's cache of memory would hide what is read behind a tensor's end
            passed = step(check, command, FAIL_WITHOUT_CUDA="1", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            record["sanitizer"][check] = verdict(passed, out / f"{check}.log")

    # the CPU of a GPU machine is not what the pass is for, and would take most of the time
    step("bench", [*pytest, str(ROOT / "bench"), "-k", "cuda", f"--results={out / 'bench.json'}"])
    record["bench"] = read_json(out / "bench.json")

    train = [sys.executable, "-m", "fastvae", "train", "--amp", "--device", "cuda", "--epochs", "3"]
    data = [] if arguments.data is None else ["--data", arguments.data]
    step("train", [*train, *data, "--out", str(run), "--overwrite"])
    record["train"] = read_json(run / "summary.json")

    (out / "gpu_pass.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(failures)} failures; {out / 'gpu_pass.json'}")
    return 1 if failures else 0


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


def run_limited(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> str | None:
    """What went wrong with a command, in a few words, or None.

    It runs where its log is: among the sources, `import fastvae` would find them and not what is installed.
    What it started ends with it, and does not disturb the next.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            return f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            return f"over its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def verdict(passed: bool, log: Path) -> str:
    """What compute-sanitizer said: its summary, or that it came to none."""
    summary = re.findall(r"=+ (\w+ SUMMARY: .*)", log.read_text(errors="replace"))
    return f"{'passed' if passed else 'FAILED'}: {summary[-1] if summary else 'no summary'}"


def commit() -> str | None:
    """The commit that is measured, marked where the tree has changed since."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def read_json(path: Path) -> Any:
    """The file's content, or None where a failed step left none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def read_junit(path: Path, failures: list[str]) -> dict[str, int] | None:
    """Counts of pytest's JUnit file; each failed test is added to `failures`. None as in read_json."""
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (FileNotFoundError, ET.ParseError):
        return None
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    failures.extend(f"tests: {c.get('classname')}::{c.get('name')}" for c in bad)
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {"passed": len(cases) - len(bad) - len(skipped), "failed": len(bad), "skipped": len(skipped)}


if __name__ == "__main__":
    sys.exit(main())
