"""`fastvae export`: what onnxruntime makes of the files is what the model makes."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastvae
from fastvae.cli import main
from fastvae.inference import export
from fastvae.inference.export import ExportError, export_onnx
from fastvae.models import save

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

MLP = fastvae.VAE.mlp((1, 5, 4), (8,), 3, likelihood="bernoulli")
CONV = fastvae.VAE.conv((3, 9, 8), 2, likelihood="gaussian")


def _run_folder(model: fastvae.VAE, folder: Path) -> Path:
    folder.mkdir()
    save(model, folder)
    (folder / "train.toml").write_text(f"model = '{(model.config or {})['architecture']}'\n")
    return folder


def _call(path: Path, inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return [torch.from_numpy(output) for output in session.run(None, {name: inputs.numpy()})]


@pytest.mark.parametrize(
    "model", [pytest.param(MLP, id="mlp"), pytest.param(CONV, id="conv", marks=pytest.mark.slow)]
)
def test_a_run_is_exported(
    model: fastvae.VAE, tmp_path: Path, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    """As a user types it: two files, two lines, no noise; any batch; metadata."""
    run = _run_folder(model, tmp_path / "run")
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["export", str(run), "--format", "onnx"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    latents = f"[batch, {model.config['latent_dim']}]"
    item = "[batch, " + ", ".join(map(str, model.config["item_shape"])) + "]"
    first, second = captured.out.splitlines()
    assert first.startswith(f"{run}/onnx/encoder.onnx: x {item} -> mu {latents}, logvar {latents}; within ")
    assert second.startswith(f"{run}/onnx/decoder.onnx: z {latents} -> x_mean {item}; within ")
    assert {path.name for path in (run / "onnx").iterdir()} == {"encoder.onnx", "decoder.onnx"}
    for rows in (1, 2, 7):
        x, z = torch.rand(rows, *model.config["item_shape"]), torch.randn(rows, model.config["latent_dim"])
        with torch.no_grad():
            expected = (*model.eval().encode(x), model.decode_mean(z))
        got = (*_call(run / "onnx/encoder.onnx", x), *_call(run / "onnx/decoder.onnx", z))
        for ours, theirs in zip(expected, got, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    for part in ("encoder", "decoder"):
        found = onnx.load(run / f"onnx/{part}.onnx")
        onnx.checker.check_model(found)
        metadata = {entry.key: entry.value for entry in found.metadata_props}
        assert metadata["part"] == part
        assert metadata["fastvae"] == fastvae.__version__
        assert metadata["likelihood"] == model.likelihood
        assert json.loads(metadata["item_shape"]) == model.config["item_shape"]
        assert found.producer_name == "fastvae"


class Own(nn.Module):
    """Latents that are a picture, dropout, and no decode_mean."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5))
        self.up = nn.ConvTranspose2d(2, 1, 2, 2)
        self.likelihood = "bernoulli"

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar = self.down(x).chunk(2, 1)
        return mu, logvar

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.up(z)


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path: Path, seed: int) -> None:
    model = Own().train()
    level = logging.getLogger("torch.onnx").level
    encoder, decoder = export_onnx(model, tmp_path, (1, 6, 4), (2, 3, 2), seed=seed)
    assert logging.getLogger("torch.onnx").level == level
    assert model.training
    assert encoder.outputs == ("mu [batch, 2, 3, 2]", "logvar [batch, 2, 3, 2]")
    assert max(encoder.error, decoder.error) <= 1e-4
    z = torch.randn(3, 2, 3, 2)
    (x,) = _call(decoder.path, z)
    torch.testing.assert_close(x, model.up(z).sigmoid().detach(), rtol=1e-4, atol=1e-4)


class Branching(Own):
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().encode(-x if x.sum() > 0 else x)


def test_what_torch_cannot_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"model: torch\.onnx cannot export the encoder: .*data-dependent"
    ) as error:
        export_onnx(Branching(), tmp_path, (1, 6, 4), (2, 3, 2))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["values", "shape"])
def test_the_check_would_tell(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime computes otherwise is not left there."""

    class Session:
        def __init__(self, path: Path, **options: object) -> None:
            pass

        def get_outputs(self) -> list[object]:
            return [type("Output", (), {"name": "mu"})] * 2

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            mu, logvar = (t.numpy() for t in MLP.encode(torch.from_numpy(inputs["x"])))
            return [mu + 1e-3 if wrong == "values" else mu[:, :1], logvar]

    monkeypatch.setattr(export, "_write", lambda part, path, *arguments: path.touch())
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    expected = (
        "mu is 0.001 from torch's" if wrong == "values" else r"mu \(1, 1\) for 1 data, expected \(1, 3\)"
    )
    with pytest.raises(ExportError, match=expected):
        export_onnx(MLP, tmp_path, (1, 5, 4), (3,))
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_folder(MLP, tmp_path / "run")
    (tmp_path / "file").touch()
    for arguments, expected in (
        ([tmp_path / "absent"], "absent"),
        ([run, "--out", tmp_path / "file"], "file is not a folder"),
        ([run, "--out", tmp_path / "absent/onnx"], "absent is not a folder"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    found = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name)
    )
    assert main(["export", str(run)]) == 2
    absent = "onnx, onnxscript, onnxruntime are not installed"
    install = "install with: pip install onnx onnxscript onnxruntime"
    assert capsys.readouterr().err == f"fastvae: error: --format: got onnx, but {absent}; {install}\n"
