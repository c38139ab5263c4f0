"""`fastvae train` as a user types it, on scikit-learn's digits."""

import argparse
import gzip
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys

import digits
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fastvae import VAE, DataLoader, load
from fastvae.cli import main
from fastvae.cli.runs import open_data, open_run
from fastvae.data import Transform, resolve, split
from fastvae.inference.evaluate import evaluate
from fastvae.inference.generate import reconstruct, sample
from fastvae.inference.plots import grid, pairs, save
from fastvae.training.checkpoint import load_checkpoint, without_prefix
from fastvae.training.config import TrainConfig

COMMAND = [sys.executable, "-m", "fastvae"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
OPTIONS = ["--data", "digits", "--epochs", "30", "--hidden", "128", "64"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("train")
    done = subprocess.run(
        [*COMMAND, "train", *OPTIONS, "--seed", "3", "--amp", "--out", "run"],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "run", done.stdout


@pytest.fixture
def validation():
    return digits.validation(3)


def _summary(run):
    return json.loads((run / "summary.json").read_text())


def test_the_run_folder_is_complete(finished):
    run, _ = finished
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == {
        "model.safetensors", "config.json", "train.toml", "metrics.jsonl", "summary.json",
        "reconstructions.png", "samples.png", "report.html", "checkpoints/best.safetensors",
        "checkpoints/step-0000000377.safetensors", "checkpoints/step-0000000390.safetensors",
    }  # fmt: skip


def test_the_summary(finished):
    run, _ = finished
    summary = _summary(run)
    assert [summary[f"test_{term}"] for term in ("loss", "recon", "kl")] == [None] * 3  # no test set here
    assert (summary["epochs"], summary["steps"], summary["seed"]) == (30, 30 * 13, 3)
    assert summary["samples_per_second"] == pytest.approx(30 * 1617 / summary["seconds"])
    assert summary["parameters"] == sum(w.numel() for w in load_file(run / "model.safetensors").values())
    assert summary["amp_dtype"] in ("bfloat16", "float16", "float32")
    assert summary["versions"].keys() == {"fastvae", "torch", "triton", "python"}
    assert summary["versions"]["torch"] == torch.__version__
    if summary["device"] == "cpu":
        assert summary["impl"] == "native"


def test_the_loss_is_below_that_of_the_mean_digit(finished, validation):
    run, _ = finished
    images = digits.images()
    variance = float((images - images.mean(0)).square().mean())
    mean_digit = 32 * (math.log(2 * math.pi * variance) + 1)  # nats, with the best variance for it
    assert _summary(run)["val_loss"] < mean_digit - 10
    losses = [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_loaded_model_is_the_one_that_was_validated(finished, validation, tmp_path):
    run, _ = finished
    model = load(run)
    loss = evaluate(model, DataLoader(validation, 128), seed=3).loss
    assert loss.item() == pytest.approx(_summary(run)["val_loss"], rel=1e-4)
    x = validation[:32]
    save(tmp_path / "reconstructions.png", pairs(x, reconstruct(model, x)))
    save(tmp_path / "samples.png", grid(sample(model, 64, seed=3)))
    for name in ("reconstructions.png", "samples.png"):
        with Image.open(run / name) as theirs, Image.open(tmp_path / name) as ours:
            assert theirs.size == ours.size
            assert np.abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1


def test_it_says_what_was_chosen_and_where_the_run_lies(finished):
    _, printed = finished
    lines = printed.splitlines()
    for start in (
        "data: digits, items of 1 x 8 x 8, 1,617 for training, 180 for validation",
        "model: mlp, ",
        "device: ",
        "operators: ",
        "epoch 1/30  loss ",
        "epoch 30/30  loss ",
        "validation loss ",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert lines[-1] == "run: run"


def test_train_toml_gives_the_same_run_again_in_another_folder(finished, tmp_path, monkeypatch):
    run, _ = finished
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--config", str(run / "train.toml")]) == 0
    (again,) = (tmp_path / "runs").iterdir()
    assert (again / "train.toml").read_text() == (run / "train.toml").read_text()
    assert _summary(again)["val_loss"] == _summary(run)["val_loss"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_replaced_another_does_not_replace_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "digits", "--epochs", "1", "--hidden", "16"]
    for _ in range(2):
        assert main(["train", *options, "--out", "first", "--overwrite"]) == 0
    first = _summary(tmp_path / "first")
    assert main(["train", "--config", "first/train.toml", "--seed", "1"]) == 0
    assert _summary(tmp_path / "first") == first
    (second,) = (tmp_path / "runs").iterdir()
    assert _summary(second)["seed"] == 1


def test_conv_on_idx_files_with_a_test_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = (load_digits().images * 15).astype(np.uint8)
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, part in (("train", pixels[:1500]), ("t10k", pixels[1500:])):
        content = struct.pack(">4I", 0x803, *part.shape) + part.tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    assert main(["train", "--data", "idx", "--model", "conv", "--epochs", "2", "--beta", "0.5"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"idx-conv-\d{8}-\d{6}", run.name)
    summary = _summary(run)
    assert summary["test_loss"] == pytest.approx(summary["test_recon"] + summary["test_kl"], rel=1e-6)
    test = DataLoader(pixels[1500:], 128)
    assert evaluate(load(run), test).loss.item() == pytest.approx(summary["test_loss"], rel=1e-4)
    assert "297 for test" in capsys.readouterr().out


def test_schedules_clipping_and_free_bits(tmp_path):
    options = (
        "--data digits --epochs 3 --hidden 32 --lr-schedule cosine --lr-warmup-steps 5 --optimizer adamw "
        "--weight-decay 0.02 --clip-norm 10 --kl-warmup cyclical --kl-warmup-steps 12 --free-bits 0.1 "
        "--free-bits-form element --logvar-clamp -1.05e1 10"
    )
    assert main(["train", *options.split(), "--out", str(tmp_path)]) == 0
    config = TrainConfig.from_toml(tmp_path / "train.toml")
    assert (config.lr_schedule, config.lr_warmup_steps) == ("cosine", 5)
    assert (config.optimizer, config.weight_decay, config.clip_norm) == ("adamw", 0.02, 10)
    assert (config.kl_warmup, config.kl_warmup_steps) == ("cyclical", 12)
    assert (config.free_bits, config.free_bits_form, config.logvar_clamp) == (0.1, "element", (-10.5, 10))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["val_loss"] == pytest.approx(row["val_recon"] + row["val_kl"], rel=1e-5)


def test_transforms_of_training_and_of_evaluation(tmp_path):
    options = "--data digits --epochs 2 --hidden 32 --device cpu --hflip --crop-padding 1 --binarize"
    assert main(["train", *options.split(), "--out", str(tmp_path)]) == 0
    config = TrainConfig.from_toml(tmp_path / "train.toml")
    assert (config.hflip, config.crop_padding, config.binarize) == (True, 1, True)
    assert config.likelihood == "bernoulli"
    # validation is the same in each pass, and what every later command sees of it
    source = resolve("digits").train
    _, rows = split(source.n_samples, 0.1, config.seed)
    static = DataLoader(source, 60, indices=rows, transform=Transform(binarize=True, fixed=True))
    losses = [evaluate(load(tmp_path), static).loss.item() for _ in range(2)]
    assert losses[0] == losses[1] == pytest.approx(_summary(tmp_path)["val_loss"], rel=1e-5)
    run = open_run(argparse.Namespace(folder=str(tmp_path), device="cpu", seed=None, model=None))
    opened = open_data(run, argparse.Namespace(data=None, split=None, batch_size=7))
    truth = torch.cat([x for x, _ in static])
    assert torch.equal(torch.cat([x for x, _ in opened.loader]), truth)
    assert torch.equal(opened.batches([7, 3])[0], truth[[7, 3]])
    few = opened.some(50, seed=1)
    assert torch.equal(torch.cat([x for x, _ in few.loader]), truth[np.searchsorted(rows, few.rows)])


@pytest.mark.parametrize("options", [[], ["--binarize"]])
def test_grey_data_under_bernoulli_may_be_binarized(options, typed, tmp_path):
    train = f"train --data digits --epochs 1 --hidden 8 --likelihood bernoulli --no-report --out {tmp_path}"
    assert ("--binarize draws 0 and 1" in typed(*train.split(), *options)) == (not options)


@pytest.mark.parametrize("option", ["--hflip", "--crop-padding=2"])
def test_features_cannot_be_flipped(tmp_path, option, capsys):
    path = _npy(tmp_path / "x.npy", np.zeros((50, 6), np.float32))
    assert main(["train", "--data", path, option, "--out", str(tmp_path / "run")]) == 2
    name = option.partition("=")[0]
    assert f"{name}: transform crops or flips, got items of [6]" in capsys.readouterr().err


def _npy(path, array):
    np.save(path, array)
    return str(path)


def _toml(path, content):
    path.write_text(content)
    return path.name


def _bad_data(tmp_path):
    """Options that cannot work, and what the error must name."""
    rng = np.random.default_rng(0)
    narrow = _npy(tmp_path / "narrow.npy", rng.random((9, 5)))
    good = _npy(tmp_path / "good.npy", rng.random((50, 6), dtype=np.float32))
    with_nan = rng.random((50, 6), dtype=np.float32)
    with_nan[7, 3] = np.nan
    (tmp_path / "magic-idx3-ubyte").write_bytes(struct.pack(">4I", 0x999, 1, 1, 1))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-100])
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps([1, 2, 3]))
    (tmp_path / "file").touch()
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    (tmp_path / "python").mkdir()
    _toml(tmp_path / "python" / "train.toml", "epochs = 3")
    return {
        "missing file": (["--data", "nowhere.npy"], "nowhere.npy"),
        "wrong magic number": (["--data", "magic-idx3-ubyte"], "magic"),
        "truncated file": (["--data", "cut.npy"], "truncated"),
        "NaN": (["--data", _npy(tmp_path / "nan.npy", with_nan)], "nan"),
        "empty array": (["--data", _npy(tmp_path / "empty.npy", np.zeros((0, 4), np.float32))], "empty"),
        "objects": (["--data", "objects.npy"], "objects.npy"),
        "pickle": (["--data", "pickled.npy"], "pickled.npy"),
        "unknown data": (["--data", "digit"], "digits"),
        "unknown model": (["--model", "rnn"], "--model: got 'rnn', expected 'mlp', 'conv' or package."),
        "unknown option": (["--epoch", "3"], "--epoch: no such option; did you mean --epochs?"),
        "no value": (["--epochs"], "--epochs"),
        "weight decay": (["--weight-decay", "0.1"], "--weight-decay: got 0.1 with optimizer adam, expected"),
        "one bound": (["--logvar-clamp", "-1"], "--logvar-clamp"),
        "bounds": (["--logvar-clamp", "1", "-1"], "--logvar-clamp: got ['1', '-1'], expected two numbers"),
        "KL warm-up": (["--kl-warmup", "sudden"], "--kl-warmup: got 'sudden', expected 'none', 'linear'"),
        "negative epochs": (["--epochs", "-1"], "--epochs: got '-1', expected"),
        "fraction": (["--val", "1.5"], "--val: got '1.5', expected a fraction between 0 and 1"),
        "too small a fraction": (["--data", good, "--val", "0.001"], "--val: "),
        "missing validation file": (["--data", good, "--val", "nowhere.npy"], "nowhere.npy"),
        "other items": (["--data", good, "--val", narrow], "with items of 5, expected 6"),
        "variance": (["--variance", "0.1", "--likelihood", "mse"], "--variance: got 0.1 with likelihood mse"),
        "conv": (["--data", good, "--model", "conv"], "--model: got conv for items of 6"),
        "bernoulli": (
            ["--data", _npy(tmp_path / "big.npy", 9 * np.ones((9, 5))), "--likelihood", "bernoulli"],
            "--likelihood: got bernoulli",
        ),
        "full folder": (["--data", good, "--out", "full"], "--out: got 'full', which is not empty"),
        "a file in the way": (["--data", good, "--out", "file/run"], "--out: got 'file/run', but file is"),
        "cuda": (["--device", "cuda"], "--device: got 'cuda'"),
        "no config": (["--config", "nowhere.toml"], "nowhere.toml: No such file or directory"),
        "not TOML": (["--config", "cut.npy"], "cut.npy: expected a TOML file: "),
        "typo in config": (
            ["--config", _toml(tmp_path / "typo.toml", "latent-dim = 3")],
            "typo.toml: latent-dim: no such option; did you mean latent_dim?",
        ),
        "type in config": (
            ["--config", _toml(tmp_path / "type.toml", 'epochs = "3"'), "--epochs", "3"],
            "type.toml: epochs: got '3', expected a valid integer",
        ),
        "value in config": (
            ["--config", _toml(tmp_path / "value.toml", "lr = 0")],
            "value.toml: lr: got 0, expected a number greater than 0",
        ),
        "config and resume": (["--resume", "full", "--config", "x.toml"], "--resume: given with --config,"),
        "resume of a run of Python": (
            ["--resume", "python"],
            "which does not say what it was trained on; expected a run of fastvae train",
        ),
        "config that does not go with a flag": (
            [
                "--config",
                _toml(tmp_path / "a.toml", 'kl_warmup = "linear"\nkl_warmup_steps = 9\n'),
                "--kl-warmup",
                "none",
            ],
            "a.toml: kl_warmup_steps: got 9 with kl_warmup none, expected it with linear, cosine or "
            "cyclical, or --no-kl-warmup-steps",
        ),
    }


BAD = [
    "missing file", "wrong magic number", "truncated file", "NaN", "empty array", "objects", "pickle",
    "unknown data", "unknown model", "unknown option", "no value", "weight decay", "one bound", "bounds",
    "KL warm-up", "negative epochs", "fraction",
    "too small a fraction", "missing validation file", "other items", "variance", "conv", "bernoulli",
    "full folder", "a file in the way", "no config", "not TOML", "typo in config", "type in config",
    "value in config", "config and resume", "resume of a run of Python",
    "config that does not go with a flag",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, named = _bad_data(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    try:
        status = main(["train", *options])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("fastvae: error: ")
    assert named in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_real_process_ends_with_status_2_and_one_line(tmp_path):
    done = subprocess.run(
        [*COMMAND, "train", "--data", "nowhere.npy"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"fastvae: error: .*nowhere\.npy.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--data", "nowhere.npy", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("fastvae: error: ")


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("fastvae.training.device.choose_device", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--data", "digits"])


def test_a_training_that_diverges(tmp_path, capsys):
    status = main(["train", "--data", "digits", "--lr", "1e30", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"fastvae: error: step \d+, in epoch 1, was not applied: .*\n", err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_says_how_to_go_on(number, tmp_path):
    with subprocess.Popen(
        [*COMMAND, "train", "--data", "digits", "--epochs", "1000000", "--out", "run"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    told = re.fullmatch(
        r"fastvae: stopped by (SIGINT|SIGTERM) after step \d+; the checkpoint is (run/checkpoints/\S+); "
        r"go on with: fastvae train --resume run\n",
        err,
    )
    assert told
    assert told[1] == number.name
    checkpoint = load_checkpoint(tmp_path / told[2])
    model = VAE.from_config(json.loads((tmp_path / "run" / "config.json").read_text()))
    model.load_state_dict(without_prefix("model", checkpoint.tensors))
    epochs = checkpoint.state["epoch"] + 1
    resumed = subprocess.run(
        [*COMMAND, "train", "--resume", "run", "--epochs", str(epochs)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == epochs
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(1, epochs + 1))


def test_a_live_bar_on_a_terminal(tmp_path):
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*COMMAND, "train", "--data", "digits", "--epochs", "3", "--out", "run"],
        cwd=tmp_path,
        stdout=theirs,
        env=ENVIRONMENT,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # how Linux says that the terminal's other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"epoch 3/3 .*loss .*recon .*KL .* samples/s", text)


def test_help_and_version(capsys):
    for arguments in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert re.search(r"^fastvae \d+\.\d+", out)
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in out


@pytest.mark.parametrize("command", [[], ["data"]])
def test_without_a_command_it_is_help(command, capsys):
    assert main(command) == 0
    assert "show this help message" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "nothing"])
    assert capsys.readouterr().err.startswith("fastvae: error: no such command: 'nothing' (choose from")
