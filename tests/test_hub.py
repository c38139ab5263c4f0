"""Models to share: folders for load and from_pretrained, their card, and a Hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvae import VAE, load
from fastvae.inference.generate import sample
from fastvae.models import ModelFilesError
from fastvae.models.hub import HubError

needs_hub = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('huggingface_hub')", reason="pip install huggingface_hub"
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    return train("--epochs 1 --hidden 16 --latent-dim 3 --beta 2 --no-report", "digits of mine")


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as a push and a download need; `files` by repository and path."""

    files: dict[str, dict[str, bytes]]
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            name = f"me/{name}" if "/" not in name else name
            self.files.setdefault(name, {})
            self._json({"url": f"{self._address()}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            sent = json.loads(body)["files"]
            self._json({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in sent]})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {
                    "success": True,
                    "commitOid": self.COMMIT,
                    "commitUrl": f"{self._address()}/{name}/commit/{self.COMMIT}",
                    "hookOutput": "",
                }
            )
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        name, _, path = self.path.lstrip("/").partition("/resolve/main/")
        content = self.files.get(name, {}).get(path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _json(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, bytes]]]:
    """A Hub on this machine in the place of the real one: the files it gets."""
    constants = pytest.importorskip("huggingface_hub.constants")
    FakeHub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield FakeHub.files
        server.shutdown()


def _equal(one: VAE, other: VAE) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _card(folder: Path) -> tuple[dict[str, Any], str]:
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


@needs_hub
@pytest.mark.parametrize(
    "model",
    [
        VAE.mlp((2, 3), (4,), 2),
        VAE.mlp((5,), (), 1, likelihood="gaussian", variance=0.1),
        VAE.conv((3, 8, 9), 2, likelihood="bernoulli"),
        VAE.mlp((4,), (3, 2), 2, likelihood="gaussian"),
    ],
    ids=["mse", "fixed variance", "bernoulli", "learned variance"],
)
def test_a_saved_folder_is_one_for_both(model: VAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    for loaded in (load(tmp_path / "saved"), VAE.from_pretrained(tmp_path / "saved")):
        assert _equal(loaded, model)
        assert loaded.config == model.config
        assert not loaded.training
    data, text = _card(tmp_path / "saved")
    assert data["library_name"] == "fastvae"
    assert data["license"] == "unknown"
    assert "Not evaluated." in text
    assert f"| Parameters | {sum(p.numel() for p in model.parameters()):,} |" in text


def test_a_run_is_a_folder_for_both(run: Path) -> None:
    model = VAE.from_pretrained(run)
    assert _equal(model, load(run))
    assert torch.equal(model.sample(5, seed=3), sample(model, 5, seed=3))


@needs_hub
def test_the_card_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    load(run).save_pretrained(tmp_path / "saved", license="mit")
    data, text = _card(tmp_path / "saved")
    summary = json.loads((run / "summary.json").read_text())
    assert data["license"] == "mit"
    assert data["tags"] == ["vae", "variational-autoencoder"]
    (result,) = (r for r in data["model-index"][0]["results"])
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics["val_loss"] == summary["val_loss"]
    assert f"| Validation loss | {summary['val_loss']:.4f} | nats a datum |" in text
    assert "| beta, the factor of the KL term | 2.0 |" in text
    assert "digits; 10 % of the training data kept for validation." in text
    assert "learned" in text  # the variance, of digits
    assert "![Draws from the prior, decoded](samples.png)" in text
    assert (tmp_path / "saved/samples.png").read_bytes() == (run / "samples.png").read_bytes()
    assert str(run.parent) not in text  # nor where anything lies


@needs_hub
def test_the_card_says_what_the_evaluation_says(run: Path, tmp_path: Path) -> None:
    evaluated = tmp_path / "run"
    shutil.copytree(run, evaluated)
    figures = {
        "elbo": -12.5, "log_likelihood": -11.25, "bits_per_dimension": None, "active_units": 2, "n_data": 180,
        "importance_samples": 50, "data": "digits (validation)", "notes": ["trained with beta 2"],
    }  # fmt: skip
    (evaluated / "evaluation.json").write_text(json.dumps(figures))
    load(evaluated).save_pretrained(tmp_path / "saved")
    data, text = _card(tmp_path / "saved")
    metrics = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"elbo": -12.5, "log_likelihood": -11.25, "active_units": 2}
    assert "| ELBO | -12.5000 | nats a datum |" in text
    assert "on 180 data (digits (validation)), with 50 importance samples a datum." in text
    assert "- trained with beta 2" in text


@needs_hub
@pytest.mark.parametrize("summary", [None, "{", "[]"])
def test_a_run_without_figures_has_a_card(run: Path, tmp_path: Path, summary: str | None) -> None:
    """As where its summary.json is missing or damaged."""
    bare = tmp_path / "run"
    shutil.copytree(run, bare)
    (bare / "summary.json").unlink()
    if summary is not None:
        (bare / "summary.json").write_text(summary)
    load(bare).save_pretrained(tmp_path / "saved")
    data, text = _card(tmp_path / "saved")
    assert "model-index" not in data
    assert "Not evaluated." in text
    assert "trained with fastvae on digits." in text


@needs_hub
def test_a_model_that_has_changed_has_no_results(run: Path, tmp_path: Path) -> None:
    model = load(run)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "saved")
    data, text = _card(tmp_path / "saved")
    assert "model-index" not in data
    assert "Not evaluated." in text
    assert not (tmp_path / "saved/samples.png").exists()


@needs_hub
def test_the_example_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(run).save_pretrained(tmp_path / "saved")
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "saved/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["x"].shape == (16, 1, 8, 8)
    assert names["mu"].shape == (16, 3)


@needs_hub
def test_a_card_of_ones_own_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    load(run).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@needs_hub
def test_push_and_pull(run: Path, hub: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    model = load(run)
    address = model.push_to_hub("me/digits-vae", license="cc-by-4.0", private=True, token="hf_test")
    assert address.endswith(f"/me/digits-vae/commit/{FakeHub.COMMIT}")
    assert hub.keys() == {"me/digits-vae"}
    files = hub["me/digits-vae"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert b"license: cc-by-4.0" in files["README.md"]
    assert b'from_pretrained("me/digits-vae")' in files["README.md"]
    pulled = VAE.from_pretrained("me/digits-vae", cache_dir=tmp_path / "cache", token=False)
    assert isinstance(pulled, VAE)
    assert _equal(pulled, model)
    assert (
        load_file(next((tmp_path / "cache").rglob("model.safetensors"))).keys() == model.state_dict().keys()
    )


@needs_hub
def test_what_is_not_a_model_of_fastvae(hub: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """Code and pickles are neither fetched nor run."""
    hub["you/other"] = {
        "config.json": b'{"architecture": "evil:Model", "auto_map": "evil.py"}',
        "model.safetensors": b"",
        "pytorch_model.bin": b"cos\nsystem\n(S'false'\ntR.",
    }
    with pytest.raises(ModelFilesError, match="imports no code"):
        VAE.from_pretrained("you/other", cache_dir=tmp_path, token=False)
    assert not list(tmp_path.rglob("*.bin"))
    with pytest.raises(ModelFilesError, match="no such file"):
        VAE.from_pretrained(tmp_path)


def test_a_model_of_ones_own_is_not_shared_half(tmp_path: Path) -> None:
    model = VAE(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    (tmp_path / "config.json").write_text("mine")
    for share in (lambda: model.save_pretrained(tmp_path), lambda: model.push_to_hub("me/own")):
        with pytest.raises(ValueError, match=r"expected VAE\.mlp or VAE\.conv; share .* with config\.json"):
            share()
    assert (tmp_path / "config.json").read_text() == "mine"
    with pytest.raises(ValueError, match=r"expected VAE\.mlp or VAE\.conv"):
        model.sample(1)


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.models import hub as module

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    module._mixin.cache_clear()
    model = VAE.mlp((2,), (3,), 1)
    for share in (lambda: model.save_pretrained(tmp_path), lambda: VAE.from_pretrained("me/model")):
        with pytest.raises(HubError, match="pip install huggingface_hub"):
            share()
    assert not list(tmp_path.iterdir())


def test_samples_are_of_the_prior(seed: int) -> None:
    model = VAE.mlp((2, 3), (4,), 2, likelihood="bernoulli").train()
    x = model.sample(7)
    assert x.shape == (7, 2, 3)
    assert not x.requires_grad
    assert model.training
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        model.sample(7, temperature=0.5, seed=seed), model.decode_mean(0.5 * z).detach()
    )
    assert torch.equal(model.sample(4, seed=1), model.sample(4, seed=1))
    assert not torch.equal(model.sample(4), model.sample(4))
