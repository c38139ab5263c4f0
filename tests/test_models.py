import json
import stat

import pytest
import torch
from torch import nn

from fastvae import VAE, load
from fastvae.models import ModelFilesError, save
from fastvae.models.files import write_json

CONV_SHAPES = [(1, 8, 8), (1, 28, 20), (3, 64, 64), (1, 5, 7), (2, 1, 9), (1, 1, 1), (4, 3, 2)]


@pytest.mark.parametrize("item_shape", [(1, 28, 28), (64,), (3, 5, 2)])
@pytest.mark.parametrize("hidden", [(), (30,), (30, 10)])
def test_mlp_gives_back_the_shape_of_its_items(item_shape, hidden, seed):
    torch.manual_seed(seed)
    model = VAE.mlp(item_shape, hidden, latent_dim=6)
    x = torch.rand(4, *item_shape)
    x_hat, mu, logvar = model(x)
    assert x_hat.shape == x.shape
    assert mu.shape == logvar.shape == (4, 6)


def test_mlp_is_784_400_20_400_784_by_default():
    shapes = [tuple(p.shape) for p in VAE.mlp().parameters() if p.ndim == 2]
    assert shapes == [(400, 784), (40, 400), (400, 20), (784, 400)]


@pytest.mark.parametrize("item_shape", CONV_SHAPES)
def test_conv_gives_back_the_shape_of_its_items_and_a_gradient_to_every_weight(item_shape, seed):
    torch.manual_seed(seed)
    model = VAE.conv(item_shape, latent_dim=5)
    x = torch.rand(3, *item_shape)
    x_hat, mu, logvar = model(x)
    assert x_hat.shape == x.shape
    assert mu.shape == logvar.shape == (3, 5)
    (x_hat.square().sum() + mu.square().sum() + logvar.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "model",
    [
        VAE.mlp((1, 8, 8), (12, 7), 3),
        VAE.mlp((10,), latent_dim=2, likelihood="gaussian", variance=0.25),
        VAE.conv((1, 8, 8), 3, likelihood="bernoulli"),
        VAE.conv((2, 9, 6), 3, likelihood="gaussian", variance="learned"),
    ],
    ids=["mlp", "fixed variance", "conv", "learned variance"],
)
def test_save_and_load_give_the_same_model(model, tmp_path, seed):
    torch.manual_seed(seed)
    assert json.loads(json.dumps(model.config)) == model.config
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    x = torch.rand(5, *model.config["item_shape"])
    for ours, theirs in zip(model.encode(x), loaded.encode(x), strict=True):
        assert torch.equal(ours, theirs)
    z = torch.randn(5, model.config["latent_dim"])
    assert torch.equal(model.decode_mean(z), loaded.decode_mean(z))
    assert torch.as_tensor(loaded.log_variance).item() == torch.as_tensor(model.log_variance).item()


def test_weights_are_for_those_that_other_files_are_for(tmp_path):
    """Which safetensors makes readable by their owner alone."""
    save(VAE.mlp((4,), (3,), 2), tmp_path)
    modes = {stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {stat.filemode((tmp_path / "new").stat().st_mode)}


def _remove(name):
    return lambda run: (run / name).unlink()


def _replace(name, content):
    return lambda run: (run / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_remove("config.json"), "config.json: no such file"),
        (_remove("model.safetensors"), "model.safetensors: no such file"),
        (_replace("config.json", b"{"), "config.json: expected"),
        (_replace("config.json", b"[1]"), "config.json: expected"),
        (_replace("config.json", b'{"architecture": "transformer"}'), "got 'transformer', expected"),
        (_replace("config.json", b'{"architecture": "mlp", "depth": 3}'), "depth"),
        (_replace("config.json", b'{"architecture": "mlp"}'), "does not fit config.json"),
        (_replace("model.safetensors", b"not this"), "expected a safetensors file"),
    ],
)
def test_load_names_what_is_wrong(damage, named, tmp_path):
    save(VAE.mlp((4,), (3,), 2), tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelFilesError, match=named) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_of_no_folder(tmp_path):
    with pytest.raises(ModelFilesError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_decode_keeps_leading_dimensions(seed):
    torch.manual_seed(seed)
    for model in (VAE.mlp((1, 4, 4), (8,), 3), VAE.conv((1, 6, 6), 3)):
        z = torch.randn(2, 5, 3)
        x_hat = model.decode(z)
        assert x_hat.shape[:2] == (2, 5)
        torch.testing.assert_close(x_hat[1], model.decode(z[1]))


def test_decode_mean_is_a_probability_under_bernoulli(seed):
    torch.manual_seed(seed)
    model = VAE.mlp((4,), (8,), 2, likelihood="bernoulli")
    z = torch.randn(3, 2)
    assert torch.equal(model.decode_mean(z), torch.sigmoid(model.decode(z)))


def test_log_variance():
    assert VAE.mlp((4,)).log_variance == 0.0
    fixed = VAE.mlp((4,), likelihood="gaussian", variance=0.25)
    assert float(fixed.log_variance) == pytest.approx(-1.3862944)
    assert "log_variance" not in dict(fixed.named_parameters())
    for variance in (None, "learned"):
        learned = VAE.mlp((4,), likelihood="gaussian", variance=variance)
        assert isinstance(learned.log_variance, nn.Parameter)


def test_own_encoder_and_decoder(tmp_path, seed):
    class Encoder(nn.Linear):
        def forward(self, x):
            return super().forward(x).chunk(2, -1)

    torch.manual_seed(seed)
    model = VAE(Encoder(6, 4), nn.Linear(2, 6), likelihood="gaussian", log_variance=-1.0)
    x_hat, mu, _ = model(torch.rand(3, 6))
    assert x_hat.shape == (3, 6)
    assert mu.shape == (3, 2)
    assert model.config is None
    with pytest.raises(ValueError, match="encoder and a decoder of its own"):
        save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAE.mlp((4,), likelihood="poisson"), "likelihood: got 'poisson'"),
        (lambda: VAE.mlp((4,), variance=0.5), "expected None under 'mse'"),
        (lambda: VAE.mlp((4,), likelihood="gaussian", variance=-1.0), "variance: got -1.0"),
        (lambda: VAE.conv((28, 28)), r"item_shape: got \(28, 28\)"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
