"""Pictures along the way, as PNG, in callbacks and in TensorBoard's event files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastvae
from fastvae import VAE, DataLoader
from fastvae.cli import main
from fastvae.inference.generate import reconstruct
from fastvae.training import trainer as trainer_module
from fastvae.training.config import ConfigError, TrainConfig
from fastvae.training.trainer import Trainer

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


class Gallery(fastvae.Callback):
    """Keeps the pictures, and the reports; fails in the report after step `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.images: dict[int, dict[str, torch.Tensor]] = {}
        self.reports: dict[int, dict[str, float]] = {}
        self.fail_at = fail_at

    def on_report(self, step, metrics):
        self.reports[step] = metrics
        if step == self.fail_at:
            raise LookupError

    def on_images(self, step, images):
        assert step not in self.images
        self.images[step] = images


@pytest.fixture
def x(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((90, 1, 6, 6), dtype=np.float32)


def make(x, *callbacks, model=None, val=True, torch_loaders=False, resume=False, **options) -> Trainer:
    """4 epochs of 3 steps."""
    torch.manual_seed(0)
    model = VAE.mlp((1, 6, 6), (8,), 2) if model is None else model

    def loader(rows: np.ndarray, shuffle: bool):
        if torch_loaders:
            return torch.utils.data.DataLoader(torch.from_numpy(rows), 20, shuffle=shuffle)
        return DataLoader(rows, 20, shuffle=shuffle)

    config = TrainConfig(**{"epochs": 4, "device": "cpu"} | options)
    train, validation = loader(x[:60], True), loader(x[60:], False) if val else None
    return Trainer(model, train, validation, config=config, resume=resume, callbacks=callbacks)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_same_pictures_for_the_folder_and_for_callbacks(x, tmp_path) -> None:
    gallery = Gallery()
    trainer = make(x, gallery, image_epochs=2, out=str(tmp_path))
    trainer.fit()
    assert sorted(gallery.images) == [6, 12]
    names = ["reconstructions-0002.png", "reconstructions-0004.png", "samples-0002.png", "samples-0004.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    for name in names:
        kind, epoch = name.removesuffix(".png").split("-")
        image = gallery.images[3 * int(epoch)][kind]
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(pixels(tmp_path / "images" / name), image[0])
    for one, other in zip(*(images.values() for images in gallery.images.values()), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_reconstructions_are_of_the_first_validation_data_by_the_weights_of_then(
    x, tmp_path, options
) -> None:
    trainer = make(x, image_epochs=4, out=str(tmp_path), lr=1e-2, **options)
    result = trainer.fit()
    assert result.best["epoch"] == 4  # the model has its weights
    tiles = reconstruct(trainer.model, torch.from_numpy(x[60:80])).clamp(0, 1)
    picture = pixels(tmp_path / "images" / "reconstructions-0004.png")
    for i, rows in ((0, x[60:68]), (1, tiles[:8])):
        shown = picture[3 + 87 * i + 42 : 87 * i + 87 : 84, 3 + 42 :: 87][0]  # the centres of a row of tiles
        centres = np.asarray(rows)[:, 0, 3, 3]
        np.testing.assert_allclose(shown / 255, centres, atol=0.51 / 255)


def test_a_run_that_ends_after_a_checkpoint_has_the_pictures_before_it(x, tmp_path) -> None:
    class Broken(fastvae.Callback):
        def on_epoch(self, row):
            raise LookupError

    with pytest.raises(LookupError):
        make(x, Broken(), image_epochs=1, out=str(tmp_path)).fit()
    make(x, image_epochs=1, out=str(tmp_path), resume=True).fit()
    names = [f"{kind}-000{epoch}.png" for kind in ("reconstructions", "samples") for epoch in (1, 2, 3, 4)]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names


def test_no_pictures_unless_asked_for(x, tmp_path) -> None:
    gallery = Gallery()
    make(x, gallery, out=str(tmp_path)).fit()
    make(x, gallery, image_epochs=5).fit()
    assert gallery.images == {}
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "train.toml"
    }  # fmt: skip


class OwnEncoder(nn.Module):
    """With running statistics, which a look at pictures must leave alone, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Dropout(0.2), nn.Linear(36, 4))

    def forward(self, x):
        return self.layers(x).chunk(2, 1)


@pytest.mark.parametrize("torch_loaders", [False, True])
@pytest.mark.parametrize("val", [False, True])
def test_pictures_change_nothing(x, torch_loaders: bool, val: bool) -> None:
    states = []
    for options in ({}, {"image_epochs": 1}):
        torch.manual_seed(3)
        decoder = nn.Sequential(nn.Linear(2, 36), nn.Unflatten(1, (1, 6, 6)))
        gallery = Gallery()
        trainer = make(
            x, gallery, model=VAE(OwnEncoder(), decoder), torch_loaders=torch_loaders, val=val, **options
        )
        trainer.fit()
        states.append(trainer.model.state_dict())
    for (name, one), other in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(one, other), name
    assert [list(images) for images in gallery.images.values()] == [["reconstructions", "samples"]] * 4 * val


def test_without_validation_there_are_samples(x) -> None:
    gallery = Gallery()
    make(x, gallery, val=False, image_epochs=4).fit()
    assert [list(images) for images in gallery.images.values()] == [["samples"]]


def test_the_command_makes_pictures_and_takes_those_of_an_earlier_run_away(tmp_path) -> None:
    options = ["train", "--data", "digits", "--device", "cpu", "--hidden", "8", "--out", str(tmp_path)]
    options += ["--no-report"]
    assert main([*options, "--epochs", "3", "--image-epochs", "1"]) == 0
    assert len(list((tmp_path / "images").iterdir())) == 6
    (tmp_path / "events.out.tfevents.1.host.2.0").touch()
    (tmp_path / "events.txt").touch()
    assert main([*options, "--epochs", "2", "--overwrite"]) == 0
    assert not (tmp_path / "images").exists()
    assert [path.name for path in tmp_path.glob("events*")] == ["events.txt"]


def test_a_missing_package_and_a_missing_folder_are_named(x, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard: got true without out, expected a run folder"):
        make(x, tensorboard=True)
    with pytest.raises(ConfigError, match="not installed; install it with: pip install tensorboard"):
        make(x, tensorboard=True, out=str(tmp_path / "run"))
    assert main(["train", "--data", "digits", "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "fastvae: error: --tensorboard: got true, but the package tensorboard is not installed"
    )
    assert not (tmp_path / "run").exists()


def events(folder: Path):
    """What TensorBoard itself reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return found.Reload()


@needs_tensorboard
def test_event_files_have_the_row_of_an_epoch_whose_callback_raises(x, tmp_path) -> None:
    class Failing(fastvae.Callback):
        def on_epoch(self, row) -> None:
            raise RuntimeError("disk of a server")

    with pytest.raises(RuntimeError, match="disk of a server"):
        make(x, Failing(), tensorboard=True, out=str(tmp_path)).fit()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [event.step for event in events(tmp_path).Scalars("val/loss")] == [row["step"]]


@needs_tensorboard
def test_event_files_have_reports_rows_and_pictures(x, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "REPORT_SECONDS", 0.0)
    gallery = Gallery()
    result = make(x, gallery, image_epochs=2, tensorboard=True, out=str(tmp_path)).fit()
    found = events(tmp_path)
    for name in ("loss", "recon", "kl"):
        val = [(event.step, event.value) for event in found.Scalars(f"val/{name}")]
        assert val == [(row["step"], pytest.approx(row[f"val_{name}"])) for row in result.history]
        train = {event.step: event.value for event in found.Scalars(f"train/{name}")}
        assert train.keys() == set(range(1, 13))
        assert train[5] == pytest.approx(gallery.reports[5][f"train_{name}"])
        assert train[12] == pytest.approx(result.history[3][f"train_{name}"])
    assert [event.value for event in found.Scalars("run/active_units")] == [
        row["active_units"] for row in result.history
    ]
    histograms = found.Histograms("run/kl_by_latent")
    assert [event.histogram_value.num for event in histograms] == [2] * 4
    assert histograms[0].histogram_value.sum == pytest.approx(sum(result.history[0]["kl_by_latent"]))
    assert not [tag for tag in found.Tags()["scalars"] if "gpu" in tag or "epoch" in tag]
    for name in ("reconstructions", "samples"):
        images = found.Images(name)
        assert [event.step for event in images] == [6, 12]
        (tmp_path / "event.png").write_bytes(images[1].encoded_image_string)
        shown = pixels(tmp_path / "event.png")
        np.testing.assert_array_equal(
            shown[..., 0] if shown.ndim == 3 else shown, pixels(tmp_path / "images" / f"{name}-0004.png")
        )


@needs_tensorboard
def test_a_resumed_run_shows_each_step_once(x, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "REPORT_SECONDS", 0.0)
    with pytest.raises(LookupError):
        make(x, Gallery(fail_at=9), tensorboard=True, out=str(tmp_path)).fit()
    assert [event.step for event in events(tmp_path).Scalars("run/data_wait_share")][-1] == 9
    gallery = Gallery()
    make(x, gallery, out=str(tmp_path), tensorboard=True, resume=True).fit()
    assert min(gallery.reports) == 7
    steps = [event.step for event in events(tmp_path).Scalars("train/loss")]
    assert sorted(set(steps)) == list(range(1, 13))
    # once by the report, and once more by the row at the end of an epoch
    assert steps == sorted([*range(1, 13), 3, 6, 9, 12])
