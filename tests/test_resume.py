"""A training that is stopped, killed or damaged goes on, and ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvae import VAE, DataLoader, ELBOLoss
from fastvae.cli import main
from fastvae.data import Transform
from fastvae.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
)
from fastvae.training.config import TrainConfig
from fastvae.training.signals import StopSignal, TrainingStopped
from fastvae.training.trainer import Trainer
from fastvae.training.usage import GPU_NAMES

COMMAND = [sys.executable, "-m", "fastvae", "train"]
CLOCKED = {"seconds", "samples_per_second", "data_wait_share", *GPU_NAMES}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


class Stopping(DataLoader):
    """Sends SIGTERM when batch `at` of all passes is asked for."""

    def __init__(self, data: np.ndarray, at: int | None, transform: Transform | None = None) -> None:
        super().__init__(data, 16, shuffle=True, seed=3, transform=transform)
        self.at, self.asked = at, 0

    def __iter__(self):
        for x in super().__iter__():
            if self.asked == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.asked += 1
            yield x


@pytest.fixture
def data(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((200, 12), dtype=np.float32)


def fit(
    data: np.ndarray, out: Path, *, stop_at: int | None = None, resume: bool = False, **options
) -> Trainer:
    torch.manual_seed(1)
    model = VAE.mlp((12,), (64,), 3, likelihood="gaussian")
    options = {"epochs": 4, "device": "cpu", "seed": 5} | options
    config = TrainConfig(out=str(out), **options)
    train, val = Stopping(data[:150], stop_at), DataLoader(data[150:], 50)
    trainer = Trainer(model, train, val, config=config, resume=resume)
    trainer.fit()
    return trainer


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock; lists as one number."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: sum(v) if isinstance(v, list) else v for k, v in row.items()} for row in found]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in numbers]


def assert_same(one: VAE, other: VAE) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("stop_at", [0, 3, 10, 17, 39])
@pytest.mark.parametrize(
    "options",
    [{}, {"amp": True}, {"optimizer": "adamw"}, {"ema_decay": 0.9}, {"accumulate": 3}],
    ids=["fp32", "amp", "adamw", "ema", "accumulate"],
)
def test_stopped_anywhere_and_resumed_is_bit_equal(data, tmp_path, stop_at, options) -> None:
    """40 steps, 10 an epoch: in the first step, within an epoch, at its beginning, in the last step."""
    whole = fit(data, tmp_path / "whole", **options)
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM after step") as stopped:
        fit(data, tmp_path / "cut", stop_at=stop_at, **options)
    assert stopped.value.exit_status == 143
    assert stopped.value.step == stop_at + 1
    resumed = fit(data, tmp_path / "cut", resume=True, **options)
    assert_same(whole.model, resumed.model)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "cut"), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("stop_at", [3, 10])
def test_what_is_drawn_for_the_data_is_drawn_again(data, tmp_path, stop_at) -> None:
    """150 images of 3 x 4, binarised, shifted and flipped; stopped within an epoch, and at the end of one."""
    transform = Transform(binarize=True, hflip=True, padding=1)

    def run(out: Path, stop_at: int | None, resume: bool) -> VAE:
        torch.manual_seed(1)
        train = Stopping(data[:150].reshape(150, 3, 4), stop_at, transform)
        config = TrainConfig(epochs=3, device="cpu", out=str(out))
        model = VAE.mlp((1, 3, 4), (16,), 3, likelihood="bernoulli")
        Trainer(model, train, config=config, resume=resume).fit()
        return model

    whole = run(tmp_path / "whole", None, False)
    with pytest.raises(TrainingStopped):
        run(tmp_path / "cut", stop_at, False)
    assert_same(whole, run(tmp_path / "cut", None, True))


def test_stopped_twice_and_a_learned_variance_of_the_loss(data, tmp_path) -> None:
    def run(out: Path, stop_at: int | None, resume: bool) -> Trainer:
        torch.manual_seed(1)
        loss = ELBOLoss("gaussian", log_variance=torch.nn.Parameter(torch.zeros(())))
        train = Stopping(data[:150], stop_at)
        config = TrainConfig(epochs=4, device="cpu", out=str(out))
        trainer = Trainer(VAE.mlp((12,), (16,), 3), train, loss=loss, config=config, resume=resume)
        trainer.fit()
        return trainer

    whole = run(tmp_path / "whole", None, False)
    for stop_at, resume in ((4, False), (13, True)):
        with pytest.raises(TrainingStopped):
            run(tmp_path / "cut", stop_at, resume)
    resumed = run(tmp_path / "cut", None, True)
    assert_same(whole.model, resumed.model)
    assert torch.equal(whole.loss.log_variance, resumed.loss.log_variance)


def test_a_finished_run_resumed_has_nothing_to_do_and_more_epochs_can_be_asked_for(data, tmp_path) -> None:
    whole = fit(data, tmp_path / "whole", epochs=6)
    short = fit(data, tmp_path / "short", epochs=4)
    again = fit(data, tmp_path / "short", epochs=4, resume=True)
    assert_same(short.model, again.model)
    assert_same(whole.model, fit(data, tmp_path / "short", epochs=6, resume=True).model)


def test_two_checkpoints_are_kept_and_a_damaged_newest_is_named(data, tmp_path, capsys) -> None:
    whole = fit(data, tmp_path / "whole", checkpoint_steps=3)
    with pytest.raises(TrainingStopped):
        fit(data, tmp_path / "cut", stop_at=16, checkpoint_steps=3)
    newest, before = checkpoints(tmp_path / "cut")
    assert [path.name for path in (newest, before)] == [
        "step-0000000017.safetensors",
        "step-0000000015.safetensors",
    ]
    content = bytearray(newest.read_bytes())
    content[random.randrange(len(content) // 2, len(content))] ^= 1 << random.randrange(8)
    newest.write_bytes(content)
    resumed = fit(data, tmp_path / "cut", resume=True, checkpoint_steps=3)
    assert f"{newest}: " in capsys.readouterr().out
    assert_same(whole.model, resumed.model)


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit of the header", "other bytes"])
def test_every_damage_is_found(data, tmp_path, damage: str) -> None:
    fit(data, tmp_path, epochs=1)
    (path,) = checkpoints(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) - 7]
    elif damage == "empty":
        content = bytearray()
    elif damage == "a bit of the header":
        content[random.randrange(8, 200)] ^= 1 << random.randrange(7)
    else:
        content = bytearray(random.randbytes(1000))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="expected a run that has made one; fastvae train --out "):
        load_newest_checkpoint(tmp_path)


def test_other_data_and_another_model_are_refused(data, tmp_path) -> None:
    fit(data, tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="of epochs of 10 batches, got 5; expected the same data"):
        Trainer(
            VAE.mlp((12,), (64,), 3, likelihood="gaussian"),
            DataLoader(data[:75], 16),
            config=TrainConfig(out=str(tmp_path), device="cpu"),
            resume=True,
        ).fit()
    with pytest.raises(CheckpointError, match="of another model"):
        Trainer(
            VAE.mlp((12,), (17,), 3, likelihood="gaussian"),
            DataLoader(data[:150], 16, shuffle=True, seed=3),
            config=TrainConfig(out=str(tmp_path), device="cpu"),
            resume=True,
        ).fit()
    for train, differs in (
        (DataLoader(data[:150] + 1, 16, shuffle=True, seed=3), "other data"),
        (DataLoader(data[:150], 16, shuffle=True, seed=4), "seed: it is of 3, this loader of 4"),
    ):
        with pytest.raises(CheckpointError, match=f"of other data or options: state: {differs}"):
            Trainer(
                VAE.mlp((12,), (64,), 3, likelihood="gaussian"),
                train,
                config=TrainConfig(out=str(tmp_path), device="cpu"),
                resume=True,
            ).fit()


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("an average", r"optimizer.average.0: got none, expected \[\d+\]"),
        ("a frozen weight", r"optimizer.mean: got \[\d+\], expected \[\d+\]"),
        ("no variance", r"log_variance: got \[\], expected none"),
    ],
)
def test_other_options_are_refused(data, tmp_path, case: str, what: str) -> None:
    """Those without which a training cannot go on."""

    def train(resume: bool) -> None:
        torch.manual_seed(1)
        model, options, variance = VAE.mlp((12,), (8,), 3), {}, torch.nn.Parameter(torch.zeros(()))
        if resume and case == "an average":
            options = {"ema_decay": 0.9}
        elif resume and case == "a frozen weight":
            model.encoder.layers[0].weight.requires_grad_(False)
        loss = ELBOLoss("gaussian", log_variance=0.0 if resume and case == "no variance" else variance)
        config = TrainConfig(out=str(tmp_path), epochs=2 if resume else 1, device="cpu", **options)
        Trainer(model, DataLoader(data[:150], 16), loss=loss, config=config, resume=resume).fit()

    train(resume=False)
    with pytest.raises(CheckpointError, match=f"another loss or other options: {what}$"):
        train(resume=True)


def test_a_checkpoint_without_the_loader_s_state_is_resumed(data, tmp_path, monkeypatch) -> None:
    """As older versions have left them."""
    whole = fit(data, tmp_path / "whole", epochs=2)
    with monkeypatch.context() as older:
        older.setattr("fastvae.training.state.DataLoader", type("Other", (), {}))
        fit(data, tmp_path / "run", epochs=1)
    (_, state), _ = load_newest_checkpoint(tmp_path / "run")
    assert "loader" not in state
    resumed = fit(data, tmp_path / "run", epochs=2, resume=True)
    assert_same(whole.model, resumed.model)


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(data, tmp_path) -> None:
    """A limit to the size of files, which the checkpoint that has the best weights, 9 kB, too exceeds."""
    trainer = fit(data, tmp_path / "whole", epochs=1)
    room = checkpoints(tmp_path / "whole")[0].stat().st_size
    first_without_best = room - sum(w.nbytes for w in trainer.model.state_dict().values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((room + first_without_best) // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*") as error:
            fit(data, tmp_path / "cut", checkpoint_steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "cut" / "checkpoints" / "step-0000000010.safetensors")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name[0] == "."] == []
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-0000000006.safetensors"]
    assert_same(fit(data, tmp_path / "cut", resume=True).model, fit(data, tmp_path / "all").model)


def test_a_full_disk_leaves_the_options_and_the_metrics(data, tmp_path) -> None:
    """Where a resumed run writes them again."""
    fit(data, tmp_path, epochs=2)
    kept = [(tmp_path / name).read_bytes() for name in ("train.toml", "metrics.jsonl")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fit(data, tmp_path, epochs=3, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(tmp_path / name).read_bytes() for name in ("train.toml", "metrics.jsonl")] == kept


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for the files of a run and for its first checkpoint, but not for two of them."""
    size = 1_000_000
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_tmpfs(small_disk, tmp_path, capfd) -> None:
    """As a user sees it: the command fails in one line, and what it had saved goes on where there is room."""
    size = ["--hidden", "300", "--latent-dim", "2", "--batch-size", "64"]  # 45,000 parameters: 540 kB
    options = ["--data", "digits", "--epochs", "1", "--device", "cpu", "--checkpoint-steps", "10", *size]
    run = small_disk / "run"
    assert main(["train", *options, "--out", str(run)]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"fastvae: error: {run / 'checkpoints' / 'step-'}")
    assert error.splitlines()[-1].endswith("No space left on device")
    assert [path.name for path in checkpoints(run)] == ["step-0000000010.safetensors"]
    assert [path for path in (run / "checkpoints").iterdir() if path.name[0] == "."] == []
    shutil.copytree(run, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_second_signal_acts_as_it_always_did() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_writer_copies_before_it_returns(tmp_path) -> None:
    weights, others = torch.ones(1000), torch.ones(20, 50).t()
    with CheckpointWriter(tmp_path) as writer:
        path = writer.save(1, {"w": weights}, {"a": 1})
        weights.zero_()
        second = writer.save(2, {"w": weights, "v": others}, {})
        writer.wait()
        assert load_checkpoint(path).tensors["w"].sum() == 1000
        assert load_checkpoint(path).state == {"a": 1}
        weights.fill_(5)
        third = writer.save(3, {"w": others}, {})
        others.zero_()
    assert load_checkpoint(second).tensors["w"].sum() == 0
    assert load_checkpoint(third).tensors["w"].equal(torch.ones(50, 20))


def test_the_history_is_encoded_once(tmp_path) -> None:
    class Row(dict):
        asked = 0

        def items(self):
            self.asked += 1
            return super().items()

    history = []
    with CheckpointWriter(tmp_path) as writer:
        for epoch in range(1, 4):
            history.append(Row(epoch=epoch, kl_by_latent=[0.5, epoch]))
            path = writer.save(epoch, {}, {"history": history, "epoch": epoch})
            writer.wait()
            assert load_checkpoint(path).state == {"history": history, "epoch": epoch}
    assert [row.asked for row in history] == [1, 1, 1]


def test_the_writer_copies_to_the_cpu_whatever_is_torchs_default_device(tmp_path) -> None:
    weights = torch.ones(3)
    with torch.device("meta"), CheckpointWriter(tmp_path) as writer:
        path = writer.save(1, {"w": weights}, {})
    assert load_checkpoint(path).tensors["w"].equal(weights)


def test_killed_at_random_moments_and_resumed(tmp_path) -> None:
    """SIGKILL, as often as it takes: at most the steps since the last checkpoint are lost, never the run."""
    options = ["--data", "digits", "--epochs", "30", "--checkpoint-steps", "5", "--device", "cpu"]
    small = ["--hidden", "16", "--latent-dim", "2", "--batch-size", "64"]

    def command(*arguments: str) -> list[str]:
        return [*COMMAND, *arguments]

    def run(arguments: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            arguments, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, check=False
        )

    whole = run(command(*options, *small, "--out", "whole"))
    assert whole.returncode == 0, whole.stderr
    arguments, kills = command(*options, *small, "--out", "cut"), 0
    while kills < 3:
        with subprocess.Popen(
            arguments, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            began = time.monotonic()
            while not checkpoints(tmp_path / "cut") and time.monotonic() - began < 60:
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.3) + (2.5 if kills else 0))
            process.kill()
            process.wait()
        kills += 1
        load_newest_checkpoint(tmp_path / "cut")
        arguments = command("--resume", "cut")
    last = run(command("--resume", "cut"))
    assert last.returncode == 0, last.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    assert [row["epoch"] for row in rows(tmp_path / "cut")] == list(range(1, 31))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resume", "absent"],
            "--resume: got 'absent', which has no train.toml; expected a run of fastvae train",
        ),
        (["--resume", ".", "--lr", "0.1"], "--resume: given with --lr, expected the run's own options"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
