"""Models of a user's own: any nn.Module with encode and decode, in Python and on the command line."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvae import VAE, DataLoader, _native, load
from fastvae.cli import main
from fastvae.inference.evaluate import evaluate, negative_elbo
from fastvae.inference.generate import reconstruct, sample
from fastvae.models import ModelError, ModelFilesError
from fastvae.models.model import check_batch
from fastvae.training.config import TrainConfig
from fastvae.training.signals import TrainingStopped
from fastvae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


class Net(nn.Module):
    """The layers of VAE.mlp((12,), (16,), latent_dim), and nothing of fastvae."""

    def __init__(self, item_shape=(12,), latent_dim=3) -> None:
        super().__init__()
        (n,) = item_shape
        self.encoder = nn.Sequential(nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 16), nn.ReLU(), nn.Linear(16, n))

    def encode(self, x):
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


class Spatial(nn.Module):
    """Latents of 2 x 3; with what acts otherwise in training: dropout and batch normalisation."""

    likelihood = "bernoulli"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(0.2))
        self.decoder = nn.Linear(6, 12)

    def encode(self, x):
        mu, logvar = self.encoder(x).view(-1, 4, 3).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z):
        return self.decoder(z.flatten(1))


@pytest.fixture
def data(seed):
    return np.random.default_rng(seed).random((200, 12), dtype=np.float32)


def _fit(model, data, train=None, **options):
    config = TrainConfig(**{"epochs": 3, "device": "cpu", "lr": 1e-2, **options})
    train = DataLoader(data[:150], 16, shuffle=True, seed=1) if train is None else train
    trainer = Trainer(model, train, DataLoader(data[150:], 50), config=config)
    return trainer, trainer.fit()


def _losses(result):
    return [{k: v for k, v in row.items() if k.startswith(("train_", "val_"))} for row in result.history]


@pytest.mark.parametrize("amp", [False, True])
def test_it_trains_as_a_vae_of_the_same_layers(data, amp):
    results = []
    for make in (Net, lambda: VAE.mlp((12,), (16,), 3)):
        torch.manual_seed(1)
        results.append(_losses(_fit(make(), data, amp=amp)[1]))
    assert results[0] == results[1]


def test_the_first_batch_of_another_loader_is_not_lost(data):
    """torch's loader draws its order from the generator of which the noise comes too."""

    class Seen(Net):
        def encode(self, x):
            if self.training:
                batches.append(x)
            return super().encode(x)

    batches, results = [], []
    for make in (Seen, lambda: VAE.mlp((12,), (16,), 3)):
        torch.manual_seed(1)
        loader = torch.utils.data.DataLoader(torch.from_numpy(data), 32, shuffle=True)
        results.append(_losses(_fit(make(), data, loader)[1]))
    assert results[0] == results[1]
    for epoch in range(3):
        rows = torch.cat(batches[7 * epoch : 7 * (epoch + 1)])
        assert rows.sum(0).tolist() == pytest.approx(data.sum(0).tolist(), rel=1e-4)
        assert len(rows) == 200


def test_a_fit_after_one_that_was_refused_begins_at_the_beginning(data):
    results = []
    for refused in (True, False):
        torch.manual_seed(1)
        model = Net()
        trainer = Trainer(
            model, DataLoader(data, 16, shuffle=True), config=TrainConfig(epochs=2, device="cpu")
        )
        if refused:
            model.decode = lambda z: z
            with pytest.raises(ModelError):
                trainer.fit()
            del model.decode
        results.append(_losses(trainer.fit()))
    assert results[0] == results[1]


def test_latents_of_any_shape_batch_norm_and_a_likelihood_of_its_own(data, tmp_path):
    trainer, result = _fit(Spatial(), data, out=str(tmp_path))
    assert trainer.loss.spec.likelihood == "bernoulli"
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    model = trainer.model
    drawn = sample(model, 5, latent_shape=(2, 3))
    assert drawn.shape == (5, 12)
    assert 0 < drawn.min() < drawn.max() < 1  # means, not logits
    x = torch.from_numpy(data[:9])
    model.train()
    whole = reconstruct(model, x)
    assert torch.allclose(whole[:1], reconstruct(model, x[:1]))  # no statistics of the batch
    assert model.training
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architecture": f"{__name__}:Spatial",
        "item_shape": [12],
        "latent_shape": [2, 3],
        "likelihood": "bernoulli",
        "variance": None,
    }
    with pytest.raises(ValueError, match="latent_shape: got None"):
        sample(model, 5)


def test_looking_at_a_batch_leaves_no_trace(data):
    model = Spatial()
    model.encode = lambda x: (torch.randn(len(x), 2, 3), torch.randn(len(x), 2, 3))
    before, generator = {n: w.clone() for n, w in model.state_dict().items()}, torch.get_rng_state()
    assert check_batch(model, torch.from_numpy(data)) == (2, 3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert model.training


def test_load(data, tmp_path):
    run = tmp_path / "run"
    trainer, _ = _fit(Net(), data, out=str(run))
    with pytest.raises(ModelFilesError) as error:
        load(run)
    assert str(error.value) == (
        f"{run / 'config.json'}: the model is {__name__}:Net, and fastvae imports no code that a file names; "
        f"expected that class, or a model of it: fastvae.load({str(run)!r}, model=Net)"
    )
    mine = Net()
    assert load(run, mine) is mine
    for model in (mine, load(run, model=Net)):
        assert not model.training
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])
    with pytest.raises(
        ModelFilesError, match=r"model\.safetensors: does not fit config\.json: size mismatch"
    ):
        load(run, Net(latent_dim=4))
    with pytest.raises(ModelError, match="without encode and decode"):
        load(run, nn.Linear(1, 1))


def test_a_vae_that_the_trainer_has_trained_is_loaded(data, tmp_path):
    trainer, _ = _fit(VAE.mlp((12,), (16,), 3, likelihood="gaussian"), data, out=str(tmp_path))
    model = load(tmp_path)
    assert isinstance(model, VAE)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in trainer.model.state_dict().items())


def test_tied_weights(data, tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.encoder.append(nn.Linear(6, 6, bias=False))
            self.again = nn.Linear(6, 6, bias=False)
            self.again.weight = self.encoder[3].weight

    trainer, _ = _fit(Tied(), data, out=str(tmp_path), amp=True, weights_epochs=1)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["again.weight"], weights["encoder.3.weight"])
    assert torch.equal(load(tmp_path, Tied).again.weight, trainer.model.again.weight)


def test_stopped_and_resumed_is_bit_equal(data, tmp_path):
    class Stopping(DataLoader):
        stop_at = None

        def __iter__(self):
            for i, x in enumerate(super().__iter__()):
                if i == self.stop_at:
                    self.stop_at = None
                    os.kill(os.getpid(), signal.SIGTERM)
                yield x

    models = []
    for stop_at in (None, 4):
        out = tmp_path / str(stop_at)
        train = Stopping(data, 16, shuffle=True, seed=3)
        train.stop_at = stop_at
        config = TrainConfig(epochs=3, device="cpu", out=str(out))
        for resume in (False, True)[: 1 if stop_at is None else 2]:
            torch.manual_seed(4)
            trainer = Trainer(Spatial(), train, config=config, resume=resume)
            if stop_at is not None and not resume:
                with pytest.raises(TrainingStopped):
                    trainer.fit()
            else:
                trainer.fit()
        models.append(trainer.model.state_dict())
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name]), name


def test_a_variance_of_its_own_is_learned(data):
    class Gaussian(Net):
        likelihood = "gaussian"

        def __init__(self):
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(()))

    trainer, _ = _fit(Gaussian(), data, epochs=60, lr=3e-3)
    loss = negative_elbo(trainer.model)
    assert loss.log_variance is trainer.model.log_variance
    x = torch.from_numpy(data)
    residual = (reconstruct(trainer.model, x) - x).square().mean().item()
    assert trainer.model.log_variance.exp().item() == pytest.approx(residual, rel=0.3)


def test_a_layer_may_be_called_log_variance(data):
    class Layers(Net):
        def __init__(self):
            super().__init__()
            self.log_variance = nn.Linear(16, 3)

    _fit(Layers(), data, epochs=1)
    Layers.likelihood = "gaussian"
    expected = (
        "got Layers with log_variance a Linear under the gaussian likelihood, expected a number or a tensor"
    )
    with pytest.raises(ModelError, match=expected):
        negative_elbo(Layers())


def _with(**methods):
    """A class like Net with other methods."""
    return type("Other", (Net,), methods)()


def _frozen():
    return Net().requires_grad_(False)


def _lazy():
    net = Net()
    net.decoder = nn.LazyLinear(12)
    return net


def _in_one_memory():
    net = Net()
    net.decoder[0].weight.data = net.encoder[2].weight.data[:3].t()
    return net


def _sparse():
    net = Net()
    net.classes = nn.Embedding(5, 3, sparse=True)
    return net


def _on_meta():
    with torch.device("meta"):
        return Net()


def _having(make):
    """A class like Net with a buffer `noise`."""

    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("noise", make(), persistent=False)

    return Noisy()


WRONG = {
    "nothing": (lambda: nn.Linear(1, 1), "got Linear without encode and decode, expected an nn.Module with"),
    "no decode": (lambda: _with(decode=None), "got Other without decode"),
    "labels": (
        lambda: _with(encode=lambda self, x, y: self.encoder(x).chunk(2, 1)),
        "got Other with encode(x, y), expected it to ask for one argument alone, for it is given no labels",
    ),
    "no module": (lambda: "Net", "got str, expected an nn.Module"),
    "frozen": (_frozen, "got Net with nothing to train"),
    "lazy": (_lazy, "got Net with lazy parameters; encode and decode one batch with it first"),
    "double": (lambda: Net().double(), "got Net with parameters of torch.float64, expected torch.float32"),
    "in one memory": (
        _in_one_memory,
        "got Net with encoder.2.weight and decoder.0.weight in one memory, expected one nn.Parameter,",
    ),
    "sparse": (_sparse, "got Net with sparse gradients of classes, expected sparse=False there"),
    "meta": (_on_meta, "got Net on the meta device, expected weights"),
    "buffer on meta": (
        lambda: _having(lambda: torch.zeros(3, device="meta")),
        "got Noisy on the meta device, expected weights",
    ),
    "complex128": (
        lambda: _having(lambda: torch.zeros(3, dtype=torch.complex128)),
        "got Noisy with noise of torch.complex128, torch.strided, expected a dense tensor of a dtype that",
    ),
    "sparse buffer": (
        lambda: _having(lambda: torch.eye(3).to_sparse()),
        "got Noisy with noise of torch.float32, torch.sparse_coo, expected a dense tensor",
    ),
    "expanded": (
        lambda: _having(lambda: torch.ones(1, 3).expand(5, 3)),
        "got Noisy with noise, an expanded tensor, expected memory for each element, as clone() gives it",
    ),
    "inference": (
        torch.inference_mode()(lambda: Net()),
        "got Net with encoder.0.weight from inference_mode, expected it made outside of it",
    ),
    "extra state": (
        lambda: _with(get_extra_state=lambda self: {"a": 1}),
        "got Other with a dict as _extra_state, expected get_extra_state to give a tensor",
    ),
    "likelihood": (lambda: _with(likelihood="poisson"), "got likelihood 'poisson', expected one of mse,"),
    "one tensor": (
        lambda: _with(encode=lambda self, x: self.encoder(x)),
        "got a tensor 16 x 6 of torch.float32 of Other.encode, expected two tensors: mu and logvar",
    ),
    "three": (
        lambda: _with(encode=lambda self, x: self.encoder(x).chunk(3, 1)),
        "got a tuple of 3 of Other.encode, expected two tensors: mu and logvar",
    ),
    "two shapes": (
        lambda: _with(encode=lambda self, x: self.encoder(x).split((2, 4), 1)),
        "got mu 16 x 2 and logvar 16 x 4 of Other.encode for x 16 x 12, expected one shape that begins with",
    ),
    "no batch": (
        lambda: _with(encode=lambda self, x: self.encoder(x).mean(0).chunk(2)),
        "got mu 3 and logvar 3 of Other.encode for x 16 x 12",
    ),
    "x_hat": (
        lambda: _with(decode=lambda self, z: self.decoder(z)[:, :-1]),
        "got a tensor 16 x 11 of torch.float32 of Other.decode for z 16 x 3, expected x_hat 16 x 12, as x",
    ),
    "batch of x_hat": (
        lambda: _with(decode=lambda self, z: self.decoder(z).view(8, 24)),
        "got a tensor 8 x 24 of torch.float32 of Other.decode",
    ),
    "x_hat and more": (
        lambda: _with(decode=lambda self, z: (self.decoder(z), z)),
        "got a tuple of 2 of Other.decode for z 16 x 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_written(case, data, tmp_path):
    make, message = WRONG[case]
    with pytest.raises(ModelError) as error:
        _fit(make(), data, out=str(tmp_path))
    assert str(error.value).startswith(f"model: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(3, dtype=torch.complex128), lambda: torch.eye(3).to_sparse()]
)
def test_buffers_that_files_cannot_hold_do_without_a_folder(data, make):
    _fit(_having(make), data, epochs=1)


def test_images_in_another_order_are_refused():
    """Of as many numbers, but other pixels; flat ones are in order."""

    class Images(Net):
        def encode(self, x):
            return super().encode(x.flatten(1))

        def decode(self, z):
            return super().decode(z).view(self.shape)

    model, x = Images(), torch.rand(5, 3, 2, 2)
    for model.shape in (x.shape, (5, 12)):
        assert check_batch(model, x) == (3,)
    model.shape = (5, 2, 2, 3)
    with pytest.raises(ModelError, match=r"got a tensor 5 x 2 x 2 x 3 .* expected x_hat 5 x 3 x 2 x 2, as x"):
        check_batch(model, x)


@pytest.mark.skipif(not _native.prefers_bf16(), reason="needs a CPU that computes in bf16")
def test_a_model_that_cannot_be_trained_with_amp_is_refused_before_anything_is_written(data, tmp_path):
    class Squared(Net):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(6, 6, 6)  # which autocast does not know

        def encode(self, x):
            h = self.encoder(x)
            return self.bilinear(h, h).chunk(2, dim=1)

    message = r"model: got RuntimeError of Squared with amp, in bfloat16, and none without: .* without amp"
    with pytest.raises(ModelError, match=message):
        _fit(Squared(), data, amp=True, out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    _fit(Squared(), data, epochs=1)


def test_evaluate_takes_frozen_models(data):
    assert evaluate(_frozen(), DataLoader(data, 50)).loss > 0


MODULE = """
    import torch
    from torch import nn
    from helpers_of_{name} import width

    class Net(nn.Module):
        def __init__(self, latent_dim=5, *, item_shape, width=width):
            super().__init__()
            self.item_shape = item_shape
            n = torch.Size(item_shape).numel()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(n, width), nn.ReLU())
            self.mu, self.logvar = nn.Linear(width, latent_dim), nn.Linear(width, latent_dim)
            self.decoder = nn.Sequential(nn.Linear(latent_dim, n), nn.Unflatten(1, item_shape))

        def encode(self, x):
            h = self.encoder(x)
            return self.mu(h), self.logvar(h)

        def decode(self, z):
            return self.decoder(z)

    class Fixed(Net):
        likelihood = "mse"

        def __init__(self):
            super().__init__(2, item_shape=(1, 8, 8))

    class Deep(Net):
        def __init__(self, item_shape, depth):
            pass

    class Transposed(Net):
        def decode(self, z):
            return super().decode(z)[:, :, :, 1:]

    class Half(Net):
        def __init__(self, item_shape):
            super().__init__(item_shape=item_shape)
            self.log_variance = torch.tensor(-1.0)

    number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current folder, which is on no path."""
    name = f"nets_{os.urandom(6).hex()}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE.replace("{name}", name)))
    (tmp_path / f"helpers_of_{name}.py").write_text("width = 24\n")
    (tmp_path / f"broken_{name}.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield name
    for found in [found for found in sys.modules if name in found]:
        del sys.modules[found]
    importlib.invalidate_caches()


def _train(*options):
    common = ["--data", "digits", "--epochs", "2", "--batch-size", "512", "--no-report"]
    return main(["train", *common, *options])


def test_a_class_on_the_command_line(module, tmp_path, capsys):
    assert _train("--model", f"{module}:Net", "--latent-dim", "7", "--variance", "0.1") == 0
    assert f"model: {module}:Net, 7 latents" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-Net-")
    for name in ("model.safetensors", "samples.png", "reconstructions.png", "summary.json"):
        assert (run / name).is_file()
    with pytest.raises(ModelFilesError, match=rf"the model is {module}:Net"):
        load(run)
    Net = sys.modules[module].Net
    model = load(run, Net)
    assert (model.item_shape, model.mu.out_features) == ((1, 8, 8), 7)
    # with the likelihood that the run gave it
    assert (model.likelihood, model.log_variance.exp().item()) == ("gaussian", pytest.approx(0.1))
    assert "log_variance" in dict(model.named_buffers())
    assert "log_variance" not in model.state_dict()
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3
    assert TrainConfig.from_toml(run / "train.toml").model == f"{module}:Net"
    assert main(["train", "--config", str(run / "train.toml"), "--out", "again"]) == 0
    again = load("again", Net)
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in load(run, Net).state_dict().items())


def test_a_learned_variance_of_a_class_without_one(module, tmp_path):
    assert _train("--model", f"{module}:Net", "--out", "run") == 0
    Net = sys.modules[module].Net
    model = load("run", Net)
    assert model.likelihood == "gaussian"  # the default on digits
    assert isinstance(model.log_variance, nn.Parameter)
    assert model.log_variance.item() != 0
    assert "log_variance" not in Net(item_shape=(1, 8, 8)).state_dict()


def test_a_class_without_arguments_says_its_latents_and_its_likelihood(module, capsys):
    assert _train("--model", f"{module}:Fixed", "--out", "run") == 0
    assert f"model: {module}:Fixed, 2 latents" in capsys.readouterr().out
    config = TrainConfig.from_toml("run/train.toml")
    assert (config.latent_dim, config.likelihood) == (2, "mse")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["no_such_module:Net"],
            "--model: got 'no_such_module:Net', but there is no module no_such_module in",
        ),
        (["MODULE.part:Net"], "--model: got 'MODULE.part:Net', but there is no module MODULE.part in the"),
        (["MODULE:net"], "--model: got 'MODULE:net', but MODULE has no net; did you mean Net?"),
        (["MODULE:number"], "--model: got 'MODULE:number', which is of type int, expected a class"),
        (["MODULE:width.real"], "--model: got 'MODULE:width.real', which is of type int, expected a class"),
        (
            ["MODULE:Deep"],
            "--model: got Deep, which asks for depth, expected arguments item_shape and latent_dim",
        ),
        (["MODULE:nn.Linear"], "--model: got Linear, which asks for in_features, expected"),
        (["MODULE:nn.Identity"], "--model: got Identity without encode and decode, expected"),
        (["MODULE:torch.Size"], "--model: got Size, expected an nn.Module"),
        (["builtins:dict"], "--model: got dict, expected a class of nn.Module"),
        (
            ["MODULE:Transposed"],
            "--model: got a tensor 180 x 1 x 8 x 7 of torch.float32 of Transposed.decode for",
        ),
        (["MODULE:Net", "--hidden", "3"], "--hidden: got 3 with model MODULE:Net, expected it with mlp only"),
        (["MODULE:Fixed", "--latent-dim", "3"], "--latent-dim: got 3, but MODULE:Fixed makes 2 latents"),
        (
            ["MODULE:Fixed", "--likelihood", "gaussian"],
            "--likelihood: got gaussian, but MODULE:Fixed has 'mse'",
        ),
        (
            ["MODULE:Half", "--variance", "0.2"],
            "--variance: got 0.2, but MODULE:Half has its own log_variance",
        ),
        (["MODULE:Net:x"], "--model: got 'MODULE:Net:x', expected 'mlp', 'conv' or package.module:Class"),
        (["MODULE:"], "--model: got 'MODULE:', expected 'mlp', 'conv' or package.module:Class"),
    ],
)
def test_a_class_that_will_not_do_is_one_line(options, message, module, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    status = _train("--model", *(option.replace("MODULE", module) for option in options))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("fastvae: error: " + message.replace("MODULE", module))
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_inside_the_module_is_shown(module):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        _train("--model", f"broken_{module}:Net")


def test_a_last_batch_of_one_datum_is_looked_at_before_the_first_step(data) -> None:
    """BatchNorm of one datum has no variance, and an epoch of 150 ends with one in batches of 149."""
    model = Spatial()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"of Spatial for one datum, .* choose another batch size"):
        _fit(model, data, DataLoader(data[:150], 149))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for train in (DataLoader(data[:150], 149, drop_last=True), DataLoader(data[:150], 50)):
        _fit(Spatial(), data, train, epochs=1)
    _fit(Net(), data, DataLoader(data[:150], 149), epochs=1)
