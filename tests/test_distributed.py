"""Ranks that train together: the weights of one process, whatever becomes of a rank on the way."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import TIME_LIMIT, children_of, ranks, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from train_on_ranks import CASES, train_all

from fastvae.cli import main
from fastvae.training.checkpoint import checkpoints
from fastvae.training.distributed import Ranks
from fastvae.training.launch import _agree_on_start

SCRIPT = str(Path(__file__).parent / "train_on_ranks.py")
SMALL = ["--data", "digits", "--hidden", "32", "--latent-dim", "4", "--device", "cpu", "--seed", "2"]
SMALL += ["--no-report"]
TRAIN = ["-m", "fastvae", "train", *SMALL]
LONG = ["--epochs", "20", "--batch-size", "64", "--checkpoint-steps", "5"]
EPOCH = 26  # steps, of LONG
SHORT = ["--epochs", "2", "--batch-size", "125", "--checkpoint-steps", "7"]  # 26 steps

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).abs().max()
        assert error <= bound * tensor.double().abs().max(), (name, error)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def said(process: subprocess.CompletedProcess[str]) -> list[str]:
    """What the ranks wrote to standard error, without torchrun's own."""
    return [line for line in process.stderr.splitlines() if line.startswith("fastvae:")]


# ---- in plain Python


@pytest.fixture(scope="module")
def data() -> Tensor:
    seed = int(os.environ.get("FASTVAE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FASTVAE_TEST_SEED={seed}")
    return torch.rand(200, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def alone(data: Tensor) -> dict[str, dict[str, Tensor]]:
    return train_all(data)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, data: Tensor, tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(data, folder / "data.pt")
    own = ["own"] if request.param == 4 else []
    done = run_ranks(folder, f"--nproc-per-node={request.param}", SCRIPT, str(folder), *own)
    assert (done.returncode, done.stderr) == (0, "")
    # not by lines, which ranks may write into each other
    assert done.stdout.count("a line of its own") == request.param  # only in training others are silent
    assert done.stdout.count("epoch 1/2 ") == len(CASES)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_one_process(alone, several, name: str) -> None:
    """After 20 steps: the weights, and the averages of training and validation. The ranks are bit-equal."""
    first = several[0][name]
    for other in several[1:]:
        for key, tensor in first.items():
            assert torch.equal(tensor, other[name][key]), key
    # each rank normalises by its own rows; gradients of bfloat16 are rounded before they are added
    bound = {"batch norm": 0.3, "batch norm, no validation": 0.3, "amp": 0.05}.get(name)
    if bound is None:
        assert_close(first, alone[name])
    else:
        assert_close({"rows": first["rows"]}, {"rows": alone[name]["rows"]}, bound)
    # in validation only the order of the sum differs
    if "best" in first:
        assert first["best"].item() == pytest.approx(first["alone"].item(), rel=1e-12)


def test_unused_weights_stay(several) -> None:
    assert torch.equal(several[0]["unused weights"]["encoder.extra"], torch.ones(3))


def test_all_ranks_know_what_one_has_found(several) -> None:
    """Of which the first tells."""
    for rank in several:
        assert "scale x, whose largest absolute value is 1e+30" in rank["problem"]


# ---- the command


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two ranks that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_ranks(folder, "--nproc-per-node=2", *TRAIN, *LONG, "--out", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "data:", "model:", "device:", "operators:", *["epoch"] * 20, "validation", "trained", "run:",
    ]  # fmt: skip
    return folder / "run"


def test_the_command_leaves_the_run_of_one_process(whole: Path, tmp_path: Path) -> None:
    assert main(["train", *SMALL, *LONG, "--out", str(tmp_path / "run")]) == 0
    names = {str(path.relative_to(whole)) for path in whole.rglob("*")}
    assert names == {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert_close(weights(whole), weights(tmp_path / "run"), 1e-3)  # after 520 steps
    for ours, theirs in zip(rows(whole), rows(tmp_path / "run"), strict=True):
        for name in ("epoch", "step", "train_loss", "train_recon", "val_loss", "val_recon"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def node_run(folders: list[Path], options: list[list[str]], *arguments: str) -> None:
    """A torchrun for each node, all on this machine."""
    first, second = (["--nnodes=2", "--nproc-per-node=1", *own, *arguments] for own in options)
    with ranks(folders[0], *first) as one, ranks(folders[1], *second) as other:
        outputs = [process.communicate(timeout=TIME_LIMIT) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), outputs
    assert sorted(output.count("run: run") for output, _ in outputs) == [0, 1]


def test_two_nodes_without_a_common_disk(tmp_path: Path) -> None:
    """They agree with one process, and leave nothing on the second node; also from a checkpoint."""
    assert main(["train", *SMALL, *SHORT, "--out", str(tmp_path / "alone")]) == 0
    alone = weights(tmp_path / "alone")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    rendezvous = f"--rdzv-endpoint=127.0.0.1:{random.randrange(20000, 60000)}"
    common = ["--rdzv-backend=c10d", "--rdzv-id=test", rendezvous]
    node_run(folders, [common, common], *TRAIN, *SHORT, "--out", "run")
    (left,) = [run for folder in folders for run in folder.iterdir()]
    assert_close(weights(left), alone)

    run = left.rename(folders[0] / "run")
    checkpoints(run)[0].unlink()
    (run / "model.safetensors").unlink()
    master = ["--master-addr=127.0.0.1", f"--master-port={random.randrange(20000, 60000)}"]
    nodes = [[*master, "--rdzv-backend=static", f"--node-rank={node}"] for node in range(2)]
    node_run(folders, nodes, "-m", "fastvae", "train", "--resume", "run")
    assert_close(weights(run), alone)
    assert list(folders[1].iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_by_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    """From the middle of an epoch; the last epoch's averages are over what was trained on before, too."""

    def run(ranks: int, *arguments: str) -> None:
        if ranks == 1:
            assert main(["train", *arguments]) == 0
        else:
            command = (f"--nproc-per-node={ranks}", "-m", "fastvae", "train", *arguments)
            assert run_ranks(tmp_path, *command).returncode == 0

    run(before, *SMALL, *SHORT, "--out", str(tmp_path / "cut"))
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    newest, kept = checkpoints(tmp_path / "cut")
    assert kept.name == "step-0000000021.safetensors"
    newest.unlink()
    run(after, "--resume", str(tmp_path / "cut"))
    assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    for ours, theirs in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        for name in ("epoch", "step", "train_loss", "train_recon", "val_loss", "val_recon"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


# ---- ranks that die


def after_step(run: Path, step: int) -> None:
    """Wait until there is a checkpoint of at least this step."""
    end = time.monotonic() + 120
    while not any(int(path.stem.removeprefix("step-")) >= step for path in checkpoints(run)):
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.002)


def signal_rank(process: subprocess.Popen[str], rank: int, number: int) -> None:
    (pid,) = [pid for pid, its in children_of(process.pid).items() if its == rank]
    os.kill(pid, number)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    output, errors = process.communicate(timeout=TIME_LIMIT)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_takes_the_job_down(tmp_path: Path, rank: int) -> None:
    with ranks(tmp_path, "--nproc-per-node=2", *TRAIN, *LONG, "--epochs", "10000", "--out", "run") as process:
        after_step(tmp_path / "run", 1)
        signal_rank(process, rank, signal.SIGKILL)
        done = finish(process)
    assert done.returncode != 0
    found = said(done)
    if rank == 0:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith("fastvae: error: another rank has ended or cannot be reached: ")
        assert "/gloo/" not in found[0]
    assert done.stderr.count("Traceback (most recent call last)") == 1  # torchrun's own


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_restarts_from_the_last_checkpoint(whole: Path, tmp_path: Path, rank: int) -> None:
    options = ["--nproc-per-node=2", "--max-restarts=1", *TRAIN, *LONG, "--out", "run"]
    with ranks(tmp_path, *options) as process:
        after_step(tmp_path / "run", EPOCH + 1)
        signal_rank(process, rank, signal.SIGKILL)
        done = finish(process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/20 ") == 1  # not begun again
    assert done.stdout.count("model: ") == 2
    assert_close(weights(tmp_path / "run"), weights(whole), 0)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_two_nodes_restart_from_the_last_checkpoint(whole: Path, tmp_path: Path, killed: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    rendezvous = f"--rdzv-endpoint=127.0.0.1:{random.randrange(20000, 60000)}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", rendezvous]
    command = [*options, *TRAIN, *LONG, "--out", "run"]
    with ranks(folders[0], *command) as one, ranks(folders[1], *command) as other:
        end = time.monotonic() + 120
        while not (written := [folder / "run" for folder in folders if checkpoints(folder / "run")]):
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.002)
        after_step(written[0], EPOCH + 1)
        (pid,) = children_of((one, other)[killed].pid)
        os.kill(pid, signal.SIGKILL)
        nodes = [finish(process) for process in (one, other)]
    assert [node.returncode for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert sum(node.stdout.count("epoch 1/20 ") for node in nodes) == 1
    (left,) = [run for folder in folders for run in folder.iterdir()]
    assert_close(weights(left), weights(whole), 0)


@pytest.mark.slow
def test_torchrun_begins_again_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    options = ["--nproc-per-node=2", "--max-restarts=1", *TRAIN, "--epochs", "1", "--batch-size", "1"]
    with ranks(tmp_path, *options, "--out", "run") as process:
        end = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < end:
            time.sleep(0.002)
        signal_rank(process, 1, signal.SIGKILL)
        done = finish(process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 2
    assert len(rows(tmp_path / "run")) == 1


def test_torchrun_s_restart_does_not_take_another_run_for_its_own(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    done = run_ranks(tmp_path, "--nproc-per-node=1", "--max-restarts=1", *TRAIN, "--out", "run")
    assert done.returncode != 0
    assert [line.partition(";")[0] for line in said(done)] == 2 * [
        "fastvae: error: --out: got 'run', which is not empty"
    ]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("to", [pytest.param("rank 0", marks=pytest.mark.slow), "rank 1", "torchrun"])
def test_sigterm_to_any_leaves_one_checkpoint(request, tmp_path: Path, to: str) -> None:
    with ranks(tmp_path, "--nproc-per-node=2", *TRAIN, *LONG, "--out", "run") as process:
        after_step(tmp_path / "run", 1)
        if to == "torchrun":
            process.terminate()
        else:
            signal_rank(process, int(to[-1]), signal.SIGTERM)
        done = finish(process)
    assert done.returncode != 0
    (line,) = said(done)
    step = int(checkpoints(tmp_path / "run")[0].stem.removeprefix("step-"))
    assert line.startswith(f"fastvae: stopped by SIGTERM after step {step}; the checkpoint is run/")
    if to == "rank 1":
        assert "exitcode  : 143" in done.stderr
        command = ("--nproc-per-node=2", "-m", "fastvae", "train", "--resume", "run")
        assert run_ranks(tmp_path, *command).returncode == 0
        assert_close(weights(tmp_path / "run"), weights(request.getfixturevalue("whole")), 0)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--lr", "1e30"], "step 2, in epoch 1, was not applied: "),
        (["--lr", "-1"], "--lr: got '-1', expected a number greater than 0"),
        (["--lrr", "1"], "--lrr: no such option; did you mean --lr?"),
        (["--out", "file/run"], "--out: got 'file/run', but file is not a folder"),
        (["--val", "absent.npy"], "absent.npy: No such file or directory; "),
    ],
)
def test_an_error_of_all_ranks_is_said_once(
    tmp_path: Path, arguments: list[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the one that says it is the last to know."""
    slow = "import os, time\ntime.sleep(os.environ.get('LOCAL_RANK') == '0')\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "file").touch()
    done = run_ranks(tmp_path, "--nproc-per-node=2", *TRAIN, "--epochs", "2", "--out", "run", *arguments)
    assert done.returncode != 0
    (line,) = said(done)
    assert line.startswith(f"fastvae: error: {found}")


@pytest.mark.parametrize(
    ("differs", "found"),
    [
        ("lr=0.1 * (1 + RANK)", "lr: got 0.2 on rank 1, expected 0.1, as on rank 0"),
        pytest.param(
            "out=None if RANK else 'run'",
            "out: got None on rank 1, expected run, as on rank 0",
            marks=pytest.mark.slow,
        ),
        ("train=rows[RANK:]", "data: got other data on rank 1 than on rank 0, expected the same batches"),
        pytest.param(
            "val=[rows[:2]] * (1 + RANK)",
            "val: got other batches on rank 1 than on rank 0, expected the same",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_differs_between_ranks_is_refused(tmp_path: Path, differs: str, found: str) -> None:
    """And not trained with by each."""
    (tmp_path / "train.py").write_text(f"""
import os
import torch
from fastvae import VAE, DataLoader
from fastvae.training.config import TrainConfig
from fastvae.training.trainer import Trainer

RANK, rows = int(os.environ["RANK"]), torch.arange(240.0).view(20, 12) / 240
options = dict({differs})
train, val = DataLoader(options.pop("train", rows), 4), options.pop("val", None)
Trainer(VAE.mlp((12,), (4,), 2), train, val, config=TrainConfig(epochs=1, device="cpu", **options)).fit()
""")
    done = run_ranks(tmp_path, "--nproc-per-node=2", "train.py")
    assert done.returncode != 0
    assert f"ConfigError: {found}" in done.stderr
    assert "1/1" not in done.stdout


def test_a_bug_in_all_ranks_has_one_traceback(tmp_path: Path) -> None:
    code = "from fastvae import VAE\nclass Net(VAE):\n    def __init__(self): raise ValueError('own')\n"
    (tmp_path / "nets.py").write_text(code)
    options = ["--data", "digits", "--device", "cpu", "--model", "nets:Net", "--out", "run"]
    done = run_ranks(tmp_path, "--nproc-per-node=2", "-m", "fastvae", "train", *options)
    assert done.returncode != 0
    assert done.stderr.count("ValueError: own") == 1


def test_restarts_need_a_folder_to_resume_from(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, "--nproc-per-node=1", "--max-restarts=1", *TRAIN)
    assert "--out: got none with --max-restarts of torchrun, expected a folder" in said(done)[0]
    assert list(tmp_path.iterdir()) == []


def test_other_commands_run_in_one_process(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, "--nproc-per-node=2", "-m", "fastvae", "data", "pack", "digits", "x.npy")
    message = (
        "fastvae: error: got WORLD_SIZE=2, as of torchrun, expected one process: only train runs on several"
    )
    assert said(done) == [message]
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


# ---- without torchrun


def test_a_restart_takes_no_old_answer() -> None:
    """Ranks that come in any order agree on a name that no start before has had."""
    store, names = dist.HashStore(), set()
    store.set("fastvae/word/2", "of a rank that died before it was answered")

    def start(rank: int) -> str:
        time.sleep(random.choice([0, 0.05]))
        return _agree_on_start(store, rank, 4)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            (name,) = set(pool.map(start, range(4)))
            assert name not in names
            names.add(name)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shares_are_those_of_the_loader(size: int) -> None:
    for batch in (0, 1, 6, 16, 39):
        shares = [Ranks(rank, size).share(batch) for rank in range(size)]
        assert shares[0].first == 0
        assert sum(share.rows for share in shares) == batch
        for one, next_one in itertools.pairwise(shares):
            assert one.first + one.rows == next_one.first
            assert one.rows >= next_one.rows - 1
        assert shares[0].rows == max(share.rows for share in shares)


def test_a_distributed_sampler_is_refused() -> None:
    from torch.utils.data import DataLoader, DistributedSampler

    from fastvae import VAE
    from fastvae.training.trainer import Trainer

    data = torch.zeros(10, 12)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="train: got a DistributedSampler, expected the same batches on all"):
        Trainer(VAE.mlp((12,), (4,), 2), loader)
    with pytest.raises(ValueError, match="val: got a DistributedSampler, expected the same batches on all"):
        Trainer(VAE.mlp((12,), (4,), 2), [data], loader)
