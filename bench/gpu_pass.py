"""One command for a machine with a GPU: build, tests, sanitizers, benchmarks, a training; one JSON of it all.

    python bench/gpu_pass.py --out DIR

Ends within ten minutes: each step has a time limit, and one that fails or runs out is named in the JSON and
makes the exit status 1; the steps after it run all the same, what matters most before the rest. Where Python
packages are missing it says which, and does nothing. DIR/gpu_pass.json has the commit, the GPU, the versions,
every figure, every goal beside what was found, and every failure, and is written anew after each step;
DIR/*.log what each step printed. NVIDIA's compute-sanitizer runs where it is installed, and else the JSON
says that it is not.
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
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import goals

ROOT = Path(__file__).resolve().parent.parent

# Seconds; together less than ten minutes, as the tests run at the same time, and so do the last two.
LIMITS = {
    "build": 60,
    "environment": 20,
    "tests": 120,
    "graphs": 120,
    "numbers": 120,
    "bench_loss": 120,
    "bench_train": 120,
    "bench_loader": 50,
    "train": 30,
    "memcheck": 55,
    "racecheck": 55,
}
ENDING = 5  # seconds for a step that is asked to end, to write what it has; part of its limit
# those of the GPU, by what they take their time for
TESTS = {
    "tests": "not graph and not numbers_on_the_gpu",
    "graphs": "graph",
    "numbers": "numbers_on_the_gpu",  # hundreds of kernels to compile
}
# the ELBO forward and backward, with sampling, many times, and batches of images that are shifted, mirrored
# and binarized: short enough for a tool that slows a kernel tenfold
SANITIZED = (
    "tests/test_triton_gpu.py::test_runs_are_bit_equal[(128, 784, 20)]",
    "tests/test_loader_gpu.py::test_kept_data_are_those_of_the_host[torch.float32-transform1]",
)
BENCHES = {
    "bench_loss": ["bench_loss.py"],
    "bench_train": [
        f"bench_train.py::test_bench_{name}" for name in ("step", "conv_step", "train", "checkpoints")
    ],
    "bench_loader": [f"bench_loader.py::test_bench_{name}" for name in ("kept_on_cuda", "streamed_to_cuda")],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_pass.json and the logs")
    parser.add_argument("--data", default=None, help="what to train on (default: fastvae's own default)")
    arguments = parser.parse_args()
    needs_build = importlib.util.find_spec("fastvae") is None
    if missing := missing_packages(needs_build):
        print(f"gpu_pass.py: nothing was run, as this Python has not: {', '.join(missing)}", file=sys.stderr)
        return 2
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = out / "run"
    # what an earlier pass left would stand for a step that fails now
    for old in ("gpu_pass.json", "environment.json", "run/summary.json", *(f"{b}.json" for b in BENCHES)):
        (out / old).unlink(missing_ok=True)
    record = Record(out)

    if needs_build:
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
        record.step("build", pip)
    record.step("environment", [sys.executable, "-c", DESCRIBE, str(out / "environment.json")])
    record.write(environment=read_json(out / "environment.json"))

    pytest = [sys.executable, "-m", "pytest", "-v", "-c", str(ROOT / "pyproject.toml")]
    pytest += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--continue-on-collection-errors"]
    tests = [*pytest, str(ROOT / "tests"), "-m", "gpu", "-k"]
    record.steps({name: [*tests, chosen] for name, chosen in TESTS.items()}, FAIL_WITHOUT_CUDA="1")
    outcomes = [o for name in TESTS for o in outcomes_of(out / f"{name}.log")]
    record.failures += [f"tests: {test}: {o}" for test, o in outcomes if o not in ("PASSED", "SKIPPED")]
    record.write(tests=dict(Counter(outcome.lower() for _, outcome in outcomes)))

    # the CPU of a GPU machine is not what the pass is for, and would take most of the time
    benches: dict[str, Any] = {"rows": []}
    for name, chosen in BENCHES.items():
        paths = [str(ROOT / "bench" / tests) for tests in chosen]
        record.step(name, [*pytest, *paths, "-k", "cuda", f"--results={out / name}.json"])
        new = read_json(out / f"{name}.json") or {"rows": []}
        benches |= new | {"rows": [*benches["rows"], *new["rows"]]}
        record.write(bench=benches, goals=goals.compared(benches["rows"]))

    train = [sys.executable, "-m", "fastvae", "train", "--amp", "--device", "cuda", "--epochs", "3"]
    data = [] if arguments.data is None else ["--data", str(arguments.data)]
    record.step("train", [*train, *data, "--out", str(run), "--overwrite"])
    record.write(train=read_json(run / "summary.json"))

    record.write(sanitizer="not installed")
    if tool := shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"):
        checks = {}
        for check in ("memcheck", "racecheck"):
            # errors of CUDA's interface are no errors of a kernel: torch tries calls that may fail
            options = ["--tool", check, "--error-exitcode", "1", "--target-processes", "application-only"]
            options += ["--report-api-errors", "no"] if check == "memcheck" else []
            checks[check] = [tool, *options, *pytest, *(str(ROOT / test) for test in SANITIZED)]
        # torch's cache of memory would hide what is read behind a tensor's end
        passed = record.steps(checks, FAIL_WITHOUT_CUDA="1", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        record.write(sanitizer={name: verdict(passed[name], out / f"{name}.log") for name in checks})

    print(*goals.lines(goals.compared(benches["rows"])), sep="\n")
    print(f"{len(record.failures)} failures; {out / 'gpu_pass.json'}")
    return 1 if record.failures else 0


class Record:
    """gpu_pass.json, and the steps that are written down in it."""

    def __init__(self, out: Path) -> None:
        self.failures: list[str] = []
        self._out = out
        self._seconds: dict[str, float] = {}
        self._content = {"commit": commit(), "failures": self.failures, "seconds": self._seconds}
        self._lock = threading.Lock()

    def write(self, **found: Any) -> None:
        """Take in what was found, and write the file, whole at any moment."""
        self._content |= found
        new = self._out / "gpu_pass.json.new"
        new.write_text(json.dumps(self._content, indent=2) + "\n")
        new.replace(self._out / "gpu_pass.json")

    def steps(self, commands: Mapping[str, list[str]], **environment: str) -> dict[str, bool]:
        """Run these at the same time; whether each has passed."""
        with ThreadPoolExecutor(len(commands)) as pool:
            running = {name: pool.submit(self.step, name, c, **environment) for name, c in commands.items()}
        return {name: step.result() for name, step in running.items()}

    def step(self, name: str, command: list[str], **environment: str) -> bool:
        """Run this, with what it prints in a log of its name; whether it has passed."""
        began = time.monotonic()
        failure = run_limited(command, LIMITS[name], self._out / f"{name}.log", environment)
        with self._lock:
            seconds = self._seconds[name] = round(time.monotonic() - began, 1)
            if failure:
                self.failures.append(f"{name}: {failure}; see {name}.log")
            print(f"{name}: {f'FAILED, {failure}' if failure else 'passed'}, {seconds} s", flush=True)
            self.write()
        return failure is None


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


def missing_packages(needs_build: bool) -> list[str]:
    """What pyproject.toml asks for, as far as it is used here, and this Python has not, or not new enough."""
    try:
        from packaging.requirements import Requirement  # which comes with pytest

        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError as error:
        return [str(error.name)]
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = [*asked["project"]["dependencies"], *asked["project"]["optional-dependencies"]["bench"]]
    if needs_build:
        names += [*asked["build-system"]["requires"], "cmake", "ninja"]
    missing = []
    for requirement in map(Requirement, names):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if shutil.which(requirement.name) is None:  # cmake and ninja may be the system's
                missing.append(str(requirement).partition(";")[0])
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} (but {version})")
    return missing


def run_limited(command: list[str], limit: float, log: Path, environment: Mapping[str, str]) -> str | None:
    """What went wrong with a command, in a few words, or None.

    It runs where its log is: among the sources, `import fastvae` would find them and not what is installed.
    At its limit it is asked to end, as by Ctrl-C, for pytest then writes what it has. What it started ends
    with it, and does not disturb the next.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            # what other packages warn of is not what the pass is for
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": "-W default", **environment},
            start_new_session=True,
        )
        try:
            status = process.wait(limit - ENDING)
            return f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
            return f"over its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcomes_of(log: Path) -> list[tuple[str, str]]:
    """Each test in what `pytest -v` has printed, and its outcome; "CUT OFF" where there is none."""
    found = []
    for part in re.split(r"^(?=\S+\.py::)", text_of(log), flags=re.MULTILINE)[1:]:
        # between a test and its outcome stands where its threads were, where that took long
        outcome = re.search(
            r" ?\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$", part, re.MULTILINE
        )
        test = part[: outcome.start()] if outcome else part
        test = test.partition("\n")[0].partition(" Timeout (")[0]
        # where the tests lie is no matter
        found.append((re.sub("^.*?(?=tests/)", "", test.strip()), outcome[1] if outcome else "CUT OFF"))
    return found


def verdict(passed: bool, log: Path) -> str:
    """What compute-sanitizer said: its summary, or that it came to none."""
    summary = re.findall(r"=+ (\w+ SUMMARY: .*)", text_of(log))
    return f"{'passed' if passed else 'FAILED'}: {summary[-1] if summary else 'no summary'}"


def text_of(log: Path) -> str:
    return log.read_text(errors="replace")


def commit() -> str | None:
    """The commit that is measured, marked where the tree has changed since; None where git knows of none."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def read_json(path: Path) -> Any:
    """The file's content, or None where a failed step left none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
