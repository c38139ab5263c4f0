"""Runs and their data, as all commands after training open them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastvae.cli import main
from fastvae.cli.arguments import add_run_command, add_run_options
from fastvae.cli.output import add_output_options, output_path
from fastvae.cli.runs import open_data, open_run, track
from fastvae.data import split
from fastvae.models import ModelFilesError
from fastvae.training.config import ConfigError


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    return train("--epochs 1 --hidden 8 --latent-dim 3 --seed 5 --val 0.2 --no-report")


def parse(*options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command = add_run_command(parser.add_subparsers(), "look", print, "", "")
    add_run_options(command, data=True)
    add_output_options(command, ("png", "gif", "npy"))
    return parser.parse_args(["look", *map(str, options)])


def test_a_run_and_what_it_kept_for_validation(run: Path) -> None:
    arguments = parse(run, "--batch-size", 50)
    opened = open_run(arguments)
    assert (opened.item_shape, opened.latent_shape, opened.seed) == ((1, 8, 8), (3,), 5)
    assert (opened.model.training, opened.config.epochs, opened.summary["epochs"]) == (False, 1, 1)
    data = open_data(opened, arguments)
    _, rows = split(1797, 0.2, 5)
    digits = load_digits()
    images = torch.from_numpy(digits.images[rows, None] / 16).float()
    x, y = (torch.cat(parts) for parts in zip(*track(data.loader, "reading"), strict=True))
    assert torch.equal(x, images)
    np.testing.assert_array_equal(data.labels, digits.target[rows])
    np.testing.assert_array_equal(y, data.labels)
    assert len(data.loader) == 8
    assert torch.equal(torch.cat(data.batches([7, 0])), images[[7, 0]])
    assert data.name == "digits (validation)"


@pytest.mark.parametrize(
    ("options", "n"),
    [
        (["--data", "digits"], 359),
        (["--split", "train"], 1438),
        (["--data", "digits", "--split", "all"], 1797),
        (["--data", "own.npy"], 7),
        (["--data", "own.npy", "--split", "train"], 7),
    ],
)
def test_parts_of_the_data(run: Path, options: list[str], n: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("own.npy", np.random.default_rng(0).random((7, 8, 8)))
    arguments = parse(run, *options, "--seed", 9)
    opened = open_run(arguments)
    data = open_data(opened, arguments)
    assert opened.seed == 9
    assert data.loader.n_samples == n
    assert (data.labels is None) == ("own.npy" in options)


def test_what_does_not_fit(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("other.npy", np.zeros((7, 5)))
    opened = open_run(parse(run))
    for options, problem in (
        (["--data", "other.npy"], "data: got other with items of 5, expected 1 x 8 x 8"),
        (["--split", "test"], "split: got test, but digits has none; expected val, train or all"),
    ):
        with pytest.raises(ConfigError, match=problem):
            open_data(opened, parse(run, *options))
    with pytest.raises(ConfigError, match="index: got 359, expected 0 to 358, of digits"):
        open_data(opened, parse(run)).batches([359])
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "checkpoints" / "step-0000000001.safetensors").touch()
    with pytest.raises(ModelFilesError, match=r"not finished.*; fastvae train --resume .* goes on with"):
        open_run(parse(unfinished))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "train.toml").touch()
    with pytest.raises(ModelFilesError, match=rf"not finished.* --out {begun} --overwrite begins one again"):
        open_run(parse(begun))
    with pytest.raises(ModelFilesError, match="no such folder"):
        open_run(parse("nowhere"))


def test_a_class_of_the_users_own_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets_of_runs.py").write_text(
        "import fastvae\n"
        "def net(item_shape, latent_dim):\n"
        "    model = fastvae.VAE.mlp(item_shape, (8,), latent_dim)\n"
        "    return fastvae.VAE(model.encoder, model.decoder, likelihood='gaussian')\n"
    )
    options = [
        "--data",
        "digits",
        "--epochs",
        "1",
        "--latent-dim",
        "2",
        "--model",
        "nets_of_runs:net",
        "--no-report",
    ]
    assert main(["train", *options, "--out", "run"]) == 0
    with pytest.raises(ModelFilesError, match="a class of your own; name it with --model nets_of_runs:net"):
        open_run(parse("run"))
    opened = open_run(parse("run", "--model", "nets_of_runs:net"))
    assert (opened.item_shape, opened.latent_shape) == ((1, 8, 8), (2,))
    with pytest.raises(ConfigError, match="model: got 'net'"):
        open_run(parse("run", "--model", "net"))


def test_the_output(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = open_run(parse(run))

    def output(*options: str) -> tuple[Path, str]:
        return output_path(opened, parse(run, *options), "look")

    assert output() == (run / "look.png", "png")
    assert output("--format", "npy") == (run / "look.npy", "npy")
    assert output("--out", "a.GIF") == (Path("a.GIF"), "gif")
    assert output("--out", "a.b", "--format", "npy") == (Path("a.b"), "npy")
    for options, problem in (
        (["--out", "a.jpg"], "out: got 'a.jpg', expected a name that ends with .png or .gif or .npy"),
        (["--out", "no/a.png"], "out: got 'no/a.png', but there is no folder no"),
        (["--out", "a.png", "--format", "npy"], "format: got npy with --out a.png"),
    ):
        with pytest.raises(ConfigError, match=problem):
            output(*options)
