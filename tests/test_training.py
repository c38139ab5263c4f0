import json
import math
import platform
import re

import numpy as np
import pytest
import torch
from processes import run_python
from safetensors.torch import load_file

import fastvae
from fastvae import VAE, DataLoader, ELBOLoss
from fastvae.inference.evaluate import evaluate, negative_elbo
from fastvae.models.model import ModelError
from fastvae.training import device as device_module
from fastvae.training.adam import LOG_VARIANCE_LR_FACTOR
from fastvae.training.backward import Backward
from fastvae.training.checkpoint import load_newest_checkpoint, without_prefix
from fastvae.training.config import ConfigError, TrainConfig
from fastvae.training.device import choose_amp_dtype, choose_device
from fastvae.training.fused_adam import FusedAdam
from fastvae.training.native_adam import NativeAdam
from fastvae.training.optimizer import make_optimizer
from fastvae.training.schedules import capacity_factor, kl_factor, lr_factor
from fastvae.training.step import TrainStep
from fastvae.training.trainer import Trainer
from fastvae.training.weights import FlatWeights

NOISE = 0.3  # standard deviation of what two latents cannot explain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(seed):
    """[600, 16]: a plane in 16 dimensions, and noise."""
    rng = np.random.default_rng(seed)
    plane = rng.standard_normal((600, 2)) @ rng.standard_normal((2, 16))
    return (plane + NOISE * rng.standard_normal((600, 16))).astype(np.float32)


def _fit(data, model=None, val=True, **options):
    torch.manual_seed(options.get("seed", 0))
    model = VAE.mlp((16,), (32,), 2) if model is None else model
    train = DataLoader(data[:500], 64, shuffle=True, seed=options.get("seed", 0))
    options = {"epochs": 3, "device": "cpu"} | options
    validation = DataLoader(data[500:], 64) if val else None
    trainer = Trainer(model, train, validation, config=TrainConfig(**options))
    return trainer, trainer.fit()


def _newest_weights(run):
    return without_prefix("model", load_newest_checkpoint(run)[0].tensors)


def test_the_loss_falls_and_the_rows_say_so(data, tmp_path):
    trainer, result = _fit(data, epochs=8, lr=3e-3, out=str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows] == [8 * epoch for epoch in range(1, 9)]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_recon"] + row["train_kl"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(row["val_recon"] + row["val_kl"], rel=1e-4)
        assert row["samples_per_second"] > 0
    assert result.best["val_loss"] == min(row["val_loss"] for row in rows)
    assert result.steps == 64
    assert result.samples_per_second == pytest.approx(8 * 500 / result.seconds)
    assert trainer.config.replace(out=None) == TrainConfig.from_toml(tmp_path / "run" / "train.toml")


def test_the_model_ends_with_the_best_weights(data, tmp_path):
    # a learning rate at which the validation loss goes up and down
    trainer, result = _fit(data, epochs=12, lr=0.05, out=str(tmp_path))
    val = DataLoader(data[500:], 64)
    loss = evaluate(trainer.model, val, seed=0).loss.item()
    assert loss == pytest.approx(result.best["val_loss"], rel=1e-6)
    best = load_file(tmp_path / "checkpoints" / "best.safetensors")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, best[name])
    trainer.model.load_state_dict(_newest_weights(tmp_path))
    last = float(evaluate(trainer.model, val, seed=0).loss)
    assert last == pytest.approx(result.history[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(data, training):
    trainer, _ = _fit(data, VAE.mlp((16,), (8,), 2).train(training), epochs=1)
    assert all(module.training == training for module in trainer.model.modules())


def test_without_validation_the_last_weights_are_kept(data, tmp_path):
    trainer, result = _fit(data, val=False, out=str(tmp_path))
    assert result.best is result.history[-1]
    assert result.best["val_loss"] is None
    last = _newest_weights(tmp_path)
    assert all(torch.equal(w, last[name]) for name, w in trainer.model.state_dict().items())


def test_one_seed_gives_one_result(data):
    first, second, other = (_fit(data, seed=seed)[1].history for seed in (5, 5, 6))
    losses = [[row["val_loss"] for row in history] for history in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]


def test_without_a_folder_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _fit(data)
    assert list(tmp_path.iterdir()) == []


def test_a_learned_variance_comes_to_the_residual_variance(data):
    model = VAE.mlp((16,), (), 2, likelihood="gaussian", variance="learned")
    _fit(data, model, epochs=150, lr=1e-2)
    assert model.log_variance.exp().item() == pytest.approx(NOISE**2, rel=0.15)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "bernoulli"])
def test_every_likelihood_trains(data, likelihood):
    low, high = data.min(), data.max()
    _, result = _fit((data - low) / (high - low), VAE.mlp((16,), (32,), 2, likelihood=likelihood), lr=3e-3)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_beta_weighs_the_kl(data):
    histories = [_fit(data, beta=beta, epochs=6, lr=3e-3)[1].history for beta in (0.1, 10.0)]
    assert histories[0][-1]["train_kl"] > histories[1][-1]["train_kl"]
    row = histories[1][-1]
    assert row["val_loss"] == pytest.approx(row["val_recon"] + 10 * row["val_kl"], rel=1e-4)


def test_an_interrupt_leaves_the_last_epoch(data, tmp_path):
    class Interrupted(DataLoader):
        def set_epoch(self, epoch, first_batch=0):
            if epoch == 2:
                raise KeyboardInterrupt
            super().set_epoch(epoch, first_batch)

    trainer = Trainer(
        VAE.mlp((16,), (8,), 2), Interrupted(data, 64), config=TrainConfig(epochs=5, out=str(tmp_path))
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    last = _newest_weights(tmp_path)
    assert all(torch.equal(w.cpu(), last[name]) for name, w in trainer.model.state_dict().items())


def test_an_earlier_run_is_replaced_and_other_files_stay(data, tmp_path):
    _fit(data, out=str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; give --overwrite"):
        _fit(data, out=str(tmp_path))
    _fit(data, out=str(tmp_path), overwrite=True, epochs=1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_items_that_the_model_is_not_made_for_are_refused(tmp_path, architecture, name):
    """Before an earlier run is replaced."""
    model = VAE.mlp((1, 8, 8), (4,), 2) if architecture == "mlp" else VAE.conv((1, 8, 8), 2)
    loaders = {"train": (1, 8, 8), "val": (1, 8, 8)} | {name: (3, 8, 8)}
    train, val = (DataLoader(torch.rand(4, *shape), 2) for shape in loaders.values())
    message = f"model: got a VAE for items of 1 x 8 x 8, expected 3 x 8 x 8, the items of {name}"
    with pytest.raises(ModelError, match=message):
        Trainer(model, train, val, config=TrainConfig(device="cpu", out=str(tmp_path)))


def test_small_data_get_more_epochs_by_default(data):
    epochs = [Trainer(VAE.mlp((16,)), DataLoader(data, batch)).config.epochs for batch in (1, 128, 600)]
    assert epochs == [10, 200, 1000]


def test_other_loaders_work(data):
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(data), torch.zeros(len(data)))
    loader = torch.utils.data.DataLoader(dataset, 100)
    assert Trainer(VAE.mlp((16,)), loader, config=TrainConfig(epochs=1)).fit().steps == 6


def test_empty_validation_data_are_refused_at_once(data):
    train, val = DataLoader(data[:100], 50), DataLoader(data[:9], 10, drop_last=True)
    for empty in (val, []):
        with pytest.raises(ValueError, match=r"^val: got no batches, expected at least one$"):
            Trainer(VAE.mlp((16,), (8,), 2), train, empty)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ELBOLoss(reduction="none"), 'got reduction "none", expected one that gives a scalar'),
        (torch.nn.MSELoss(), "got a MSELoss, expected a fastvae.ELBOLoss"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused(data, loss, message):
    with pytest.raises(ValueError, match=f"^loss: {message}$"):
        Trainer(VAE.mlp((16,), (8,), 2), DataLoader(data[:100], 50), loss=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 4.0}, "beta: got 4.0 beside a loss with 0.10000000149011612, expected it in the loss"),
        ({"free_bits": 0.5}, "free_bits: got 0.5 beside a loss with None, expected it in the loss"),
        ({"capacity": 5.0}, "capacity: got 5.0 beside a loss with None, expected it in the loss"),
        (
            {"logvar_clamp": (-5, 5)},
            "logvar_clamp: got (-5.0, 5.0) beside a loss with (-6.0, 2.0), expected it in the loss",
        ),
    ],
)
def test_an_option_that_a_given_loss_does_not_have_is_refused(data, options, message):
    loss = ELBOLoss(beta=torch.tensor(0.1), logvar_clamp=(-6, 2))
    given = VAE.mlp((16,), (8,), 2), DataLoader(data[:100], 50)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Trainer(*given, loss=loss, config=TrainConfig(**options))
    Trainer(*given, loss=loss, config=TrainConfig(beta=0.1, logvar_clamp=(-6, 2), kl_warmup="linear"))


def test_a_warmup_of_a_learned_beta_is_refused(data):
    """Which would hold it where the warm-up has it."""
    loss = ELBOLoss(beta=torch.nn.Parameter(torch.ones(())))
    given = VAE.mlp((16,), (8,), 2), DataLoader(data[:100], 50)
    message = "^kl_warmup: got linear beside a loss whose beta is learned, expected one of the two$"
    with pytest.raises(ConfigError, match=message):
        Trainer(*given, loss=loss, config=TrainConfig(kl_warmup="linear"))
    Trainer(*given, loss=loss, config=TrainConfig(epochs=1, device="cpu")).fit()
    assert loss.beta != 1


@pytest.mark.parametrize(
    ("likelihood", "loss", "given"),
    [
        ("mse", ELBOLoss("bernoulli"), "bernoulli"),
        ("bernoulli", ELBOLoss("bernoulli", from_logits=False), "probabilities"),
        ("bernoulli", ELBOLoss("gaussian"), "gaussian"),
    ],
)
def test_a_loss_of_logits_for_a_model_of_means_is_refused(data, likelihood, loss, given):
    message = f'^model: got VAE of likelihood "{likelihood}" with a loss of "{given}", expected "bernoulli"'
    with pytest.raises(ModelError, match=message):
        Trainer(VAE.mlp((16,), likelihood=likelihood), DataLoader(data[:100], 50), loss=loss)
    Trainer(VAE.mlp((16,), likelihood="bernoulli"), DataLoader(data, 50), loss=ELBOLoss("bernoulli"))
    Trainer(VAE.mlp((16,)), DataLoader(data, 50), loss=ELBOLoss("bernoulli", from_logits=False))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            lambda x: iter([*x, *x]),
            "got more batches in epoch 1 than its length, 3; give it the __len__ that it has, or no workers",
        ),
        (lambda x: iter(x[:2]), "got 2 batches in epoch 1, expected 3 in each, which is its length"),
        ("one pass", "got 0 batches in epoch 2, expected 3 in each, which is its length"),
    ],
)
def test_a_loader_with_another_number_of_batches_than_its_length(data, batches, message):
    """By which schedules and checkpoints count; an iterator gives all in one epoch and none in the next."""
    parts = torch.from_numpy(data[:300]).split(100)
    passes = iter(parts)

    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            return passes if batches == "one pass" else batches(parts)

    trainer = Trainer(VAE.mlp((16,), (8,), 2), Loader(), config=TrainConfig(epochs=2, device="cpu"))
    with pytest.raises(ValueError, match=f"^train: {message}$"):
        trainer.fit()


def test_plain_lines_one_an_epoch(data, capsys):
    _fit(data, epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("recon" in line and "KL" in line and "samples/s" in line for line in lines)


def test_evaluate_does_not_depend_on_the_batch_size_nor_on_the_callers_modes(data, seed):
    torch.manual_seed(seed)
    model = VAE.mlp((16,), (32,), 2)
    whole = evaluate(model, DataLoader(data, 600), seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        parts = evaluate(model, DataLoader(data, 77), seed=seed)
    assert model.training
    for one, other in zip(whole, parts, strict=True):
        assert one.dtype == torch.float64
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    assert evaluate(model, DataLoader(data, 600), seed=seed + 1).recon != whole.recon


def test_evaluate_is_the_average_of_the_elbo(data, seed):
    model = VAE.mlp((16,), (32,), 2, likelihood="gaussian", variance=0.3)
    x = torch.from_numpy(data)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        x_hat = model.decode(fastvae.reparameterize(mu, logvar, seed=seed))
        loss = ELBOLoss("gaussian", log_variance=math.log(0.3))(x_hat, x, mu, logvar)
    evaluated = evaluate(model, DataLoader(data, 50), seed=seed).loss
    assert evaluated.item() == pytest.approx(loss.item(), rel=1e-5)


def test_evaluate_of_nothing(data):
    with pytest.raises(ValueError, match="no data"):
        evaluate(VAE.mlp((16,)), [])


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_low_precision_follows_float32(data, amp_dtype, seed):
    x = torch.from_numpy(data[:64])
    losses = {}
    for dtype in (torch.float32, amp_dtype):
        torch.manual_seed(seed)
        model = VAE.mlp((16,), (32,), 2)
        loss = ELBOLoss()
        step = TrainStep(model, loss, lr=1e-2, amp_dtype=dtype)
        for _ in range(150):
            step(x)
        step.reset()
        step(x)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses[dtype] = step.averages()[0]
    assert losses[amp_dtype] == pytest.approx(losses[torch.float32], rel=0.1)


def test_amp_is_float32_on_a_cpu_that_is_not_made_for_bf16(monkeypatch):
    cpu = torch.device("cpu")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device_module._native, "prefers_bf16", lambda s=supported: s)
        assert choose_amp_dtype(cpu, amp=True)[0] == expected
        assert choose_amp_dtype(cpu, amp=False)[0] == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none():
    assert choose_device("auto")[0].type == "cpu"
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")


def _weights_after(steps, name, dtype, make, seed, **options):
    """The weights of a small model after steps on fixed gradients, by an optimizer of `make`."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(300, 41), torch.nn.Linear(41, 7, bias=False))
    learned = [torch.nn.Parameter(torch.zeros(()))]
    weights = FlatWeights(model, dtype)
    optimizer = make(weights, learned, name, 1e-2, **options)
    for step in range(steps):
        optimizer.set_lr(1e-2 / (step + 1))
        for leaf in (*weights.leaves, *learned):
            leaf.grad = (torch.rand(()) * torch.randn(leaf.shape)).to(leaf.dtype)
        optimizer.step()
        assert all(leaf.grad is None for leaf in weights.leaves)
    copies = None if weights.copies is None else weights.copies.clone()
    return weights.flat.detach().clone(), copies, learned[0].item()


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 50.0])  # of norms from 0 to about 110
def test_native_adam_is_torch_s(name, dtype, clip_norm, seed):
    def torch_s(weights, learned, name, lr, clip_norm):
        return FusedAdam(weights, learned, lr, 0.01 if name == "adamw" else 0.0, clip_norm)

    ours, copies, variance = _weights_after(20, name, dtype, make_optimizer, seed, clip_norm=clip_norm)
    theirs, their_copies, their_variance = _weights_after(20, name, dtype, torch_s, seed, clip_norm=clip_norm)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # without decay, which would shrink it; and ten times as fast as a weight
    assert variance == pytest.approx(their_variance, rel=1e-5, abs=1e-6)
    if copies is not None:
        assert torch.equal(copies, ours.to(dtype))
        torch.testing.assert_close(copies.float(), their_copies.float(), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kinds", [(NativeAdam, FusedAdam), (FusedAdam, NativeAdam)])
def test_adam_goes_on_where_the_other_one_was(kinds, seed):
    """As in a training that a GPU began and a CPU resumes."""

    def run(optimizer, learned, steps):
        for step in steps:
            torch.manual_seed(seed + step)
            for leaf in (*optimizer.weights.leaves, *learned):
                leaf.grad = torch.randn(leaf.shape)
            optimizer.step()

    def make(kind):
        torch.manual_seed(seed)
        learned = [torch.nn.Parameter(torch.tensor(0.5))]
        weights = FlatWeights(torch.nn.Linear(5, 7), torch.float32)
        return kind(weights, learned, 1e-2, 0.01, ema_decay=0.9), learned

    (first, of_first), (second, of_second) = map(make, kinds)
    run(first, of_first, range(5))
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    with torch.no_grad():
        for to, of in zip((second.weights.flat, *of_second), (first.weights.flat, *of_first), strict=True):
            to.copy_(of)
    run(first, of_first, range(5, 9))
    run(second, of_second, range(5, 9))
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(second.tensors()[name], tensor, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second.weights.flat, first.weights.flat, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_second, of_first, rtol=1e-5, atol=1e-7)


def test_native_adam_does_not_depend_on_threads(seed):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_weights_after(3, "adam", torch.bfloat16, make_optimizer, seed, clip_norm=10.0)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86")
def test_moments_of_what_gets_no_gradient_do_not_stay_subnormal():
    """Which would make each update four times as long."""
    smallest = torch.finfo(torch.float32).tiny
    layer = torch.nn.Linear(100, 1000)
    optimizer = make_optimizer(FlatWeights(layer), [], "adam", 1e-3)
    for size in (100 * smallest, 0.5 * smallest):
        optimizer.mean.fill_(size)
        optimizer.square.fill_(size)
        before = layer.weight.detach().clone()
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = size > smallest
        for moment, decay in ((optimizer.mean, 0.9), (optimizer.square, 0.999)):
            expected = torch.full((1000,), kept * decay * size)
            torch.testing.assert_close(moment[:1000], expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0)
    assert torch.tensor(0.5 * smallest) > 0  # everything else goes on as before


def test_a_parameter_without_gradient_stays():
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    weights = FlatWeights(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(weights, [], "adamw", 0.1)
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[1].weight, before[2])


def test_flat_weights_lend_copies_and_give_memory_back(seed):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    original = [p.detach().clone() for p in model.parameters()]
    weights = FlatWeights(model, torch.bfloat16)
    with weights.lent():
        assert model[0].weight.dtype == torch.bfloat16
        assert model[1].weight.dtype == torch.float32
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), original, strict=True))
    assert model[0].weight.untyped_storage().nbytes() == weights.flat.untyped_storage().nbytes()
    weights.release()
    assert model[0].weight.untyped_storage().nbytes() == 4 * 5 * 4
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), original, strict=True))


@pytest.mark.parametrize("most_kept", [3, 1000])
def test_averages_weigh_each_step_by_its_data(data, monkeypatch, seed, most_kept):
    monkeypatch.setattr("fastvae.training.sums.MOST_KEPT", most_kept)
    step = TrainStep(VAE.mlp((16,), (8,), 2), ELBOLoss())
    total, sizes, plain = 0.0, [10, 200, 30, 400, 50], Backward.__call__

    def record(self, x, share):
        nonlocal total
        terms = plain(self, x, share)
        total += terms.loss.item() * len(x)
        return terms

    monkeypatch.setattr(Backward, "__call__", record)
    for size in sizes:
        step(torch.from_numpy(data[:size]))
    assert step.averages()[0] == pytest.approx(total / sum(sizes), rel=1e-6)
    step.reset()
    assert all(map(math.isnan, step.averages()))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e25, math.inf, math.nan])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_clip_factor_is_torch_s(size, threads, seed):
    gradients = [size * torch.randn(n) for n in (1, 5, 0, 4096, 100_003)]
    parameters = [torch.nn.Parameter(torch.zeros(len(g))) for g in gradients]
    places, at = [], [(gradient.data_ptr(), 0) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
        weight = parameter.data_ptr()  # only the gradients are read
        places.append((len(gradient), weight, weight, weight, 0, 0, 0, 1.0, 0.0))
    ours = fastvae._native.AdamParts(places).clip_factor(at, 2.0, threads)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert ours == pytest.approx(
        min(2 / (norm + 1e-6), 1.0) if norm == norm else math.nan, rel=1e-12, nan_ok=True
    )
    if size <= 1e3:  # above, their squares overflow
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(ours * gradient, parameter.grad, rtol=1e-5, atol=0)


def test_gradients_are_clipped_together_with_those_of_the_loss(seed):
    """The factor is not seen in Adam's first step, which has the size of lr, but in the moments."""
    weight, variance = torch.nn.Linear(1, 1, bias=False), torch.nn.Parameter(torch.zeros(()))
    optimizer = make_optimizer(FlatWeights(weight), [variance], "adam", 0.1, clip_norm=1.0)
    weight.weight.grad, variance.grad = torch.full((1, 1), 3.0), torch.tensor(4.0)
    optimizer.step()
    assert optimizer.mean[0].item() == pytest.approx(0.1 * 3 / 5, rel=1e-5)
    assert optimizer._moments[0][0].item() == pytest.approx(0.1 * 4 / 5, rel=1e-5)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, [0.3, 0.4]), (0.1, [0.06, 0.08])])
def test_gradients_in_float16_are_clipped_without_their_scale(clip_norm, expected):
    layer = torch.nn.Linear(2, 1, bias=False)
    weights = FlatWeights(layer, torch.float16)
    optimizer = make_optimizer(weights, [], "adam", 0.1, clip_norm=clip_norm)
    with weights.lent():
        out = layer(torch.tensor([[1.2, 1.6]], dtype=torch.float16))
        optimizer.backward(0.25 * out.float().sum())  # the scale is 65536, which float16 has not
    optimizer.step()
    mean = optimizer.adam.state[weights.flat]["exp_avg"]
    assert (mean[:2] / 0.1).tolist() == pytest.approx(expected, rel=2e-3)


TOTAL = 12  # steps of the trainings below

SCHEDULED = [
    {"lr_schedule": "cosine", "lr_warmup_steps": 3},
    {"lr_warmup_steps": 20, "likelihood": "gaussian"},
    {"kl_warmup": "linear", "kl_warmup_steps": 7, "beta": 3.0},
    {"kl_warmup": "cyclical", "kl_warmup_steps": 4, "likelihood": "gaussian"},
    {"clip_norm": 2.0, "likelihood": "gaussian"},
    {"optimizer": "adamw", "weight_decay": 0.5, "lr_schedule": "cosine"},
    {"free_bits": 0.7, "kl_warmup": "cosine"},
    {"free_bits": 0.7, "free_bits_form": "element", "logvar_clamp": (-0.05, 0.1)},
    {"logvar_clamp": (-0.05, 0.1), "clip_norm": 0.1},
    {"capacity": 3.0, "capacity_steps": 8, "beta": 5.0, "kl_warmup": "linear"},
    {"capacity": 0.01, "likelihood": "gaussian"},
]


def _by_hand(model, x, config, seed):
    """TOTAL steps in plain torch, and the operators' reference."""
    variance = [model.log_variance] if config.likelihood == "gaussian" else []
    weights = [p for name, p in model.named_parameters() if name != "log_variance"]
    decay = 0.0 if config.optimizer == "adam" else config.weight_decay
    adam = torch.optim.AdamW([{"params": weights, "weight_decay": decay}])
    if variance:
        adam.add_param_group({"params": variance, "weight_decay": 0.0})
    torch.manual_seed(seed)
    for step in range(TOTAL):
        lr = config.lr * lr_factor(step, TOTAL, config.lr_schedule, config.lr_warmup_steps)
        for group, factor in zip(adam.param_groups, (1, LOG_VARIANCE_LR_FACTOR), strict=False):
            group["lr"] = lr * factor
        mu, logvar = model.encode(x)
        if config.logvar_clamp is not None:
            logvar = logvar.clamp(*config.logvar_clamp)
        x_hat = model.decode(fastvae.reparameterize(mu, logvar))
        recon = (x_hat - x).square()
        if variance:
            recon = 0.5 * (recon / variance[0].exp() + variance[0] + math.log(2 * math.pi))
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1)
        if config.free_bits is not None:
            kl = (kl.mean(0) if config.free_bits_form == "batch" else kl).clamp(min=config.free_bits)
        kl = kl.sum() if kl.ndim == 1 else kl.sum(1).mean()
        if config.capacity is not None:
            kl = (kl - config.capacity * capacity_factor(step, TOTAL, config.capacity_steps)).abs()
        beta = config.beta * kl_factor(step, TOTAL, config.kl_warmup, config.kl_warmup_steps)
        loss = recon.sum(1).mean() + beta * kl
        adam.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights + variance, config.clip_norm)
        adam.step()
    return loss.item()


def _loss(model, config):
    return negative_elbo(
        model,
        config.beta,
        logvar_clamp=config.logvar_clamp,
        free_bits=config.free_bits,
        free_bits_form=config.free_bits_form,
        capacity=config.capacity,
    )


@pytest.mark.parametrize("options", SCHEDULED, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("resumed", [False, True])
def test_the_options_do_what_plain_torch_does(data, options, resumed, seed):
    config = TrainConfig(lr=1e-2, **options)
    x = torch.from_numpy(data[:100])
    models, losses = [], []
    for run in ("ours", "by hand"):
        torch.manual_seed(seed)
        model = VAE.mlp((16,), (8,), 2, likelihood=config.likelihood or "mse")
        models.append(model)
        if run == "by hand":
            losses.append(_by_hand(model, x, config, seed))
            continue
        step = TrainStep.from_config(model, _loss(model, config), config, TOTAL, torch.float32)
        torch.manual_seed(seed)
        for n in range(TOTAL):
            if resumed and n == 5:
                state = step.tensors()
                step = TrainStep.from_config(model, _loss(model, config), config, TOTAL, torch.float32)
                step.load_tensors(state)
            step.reset()
            step(x)
        losses.append(step.averages()[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_the_options_train_in_low_precision(data, amp_dtype, seed):
    config = TrainConfig(
        lr=1e-2, lr_schedule="cosine", lr_warmup_steps=10, clip_norm=20.0, kl_warmup="linear", free_bits=0.1
    )
    x = torch.from_numpy(data[:64])
    losses = []
    for dtype in (torch.float32, amp_dtype):
        torch.manual_seed(seed)
        model = VAE.mlp((16,), (32,), 2)
        step = TrainStep.from_config(model, _loss(model, config), config, 500, dtype)
        for n in range(500):  # enough for float16, which leaves out the first, to catch up
            if n == 400:  # one step alone is as uncertain as its noise
                step.reset()
            step(x)
        losses.append(step.averages()[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cyclical"])
def test_the_first_step_of_a_kl_warmup_has_no_kl(data, schedule, monkeypatch, seed):
    config = TrainConfig(kl_warmup=schedule, beta=5.0)
    model = VAE.mlp((16,), (8,), 2)
    x = torch.from_numpy(data[:50])
    torch.manual_seed(seed)
    mu, logvar = model.encode(x)
    recon = (model.decode(fastvae.reparameterize(mu, logvar)) - x).square().sum(1).mean()
    expected = torch.autograd.grad(recon, list(model.parameters()))

    loss = _loss(model, config)
    step = TrainStep.from_config(model, loss, config, 100, torch.float32)
    found = []

    def look(terms):
        found.extend(p.grad for p in model.parameters())
        return terms

    monkeypatch.setattr(step.optimizer, "step", look)
    torch.manual_seed(seed)
    step(x)
    total, recon_term, kl = step.averages()
    assert total == recon_term
    assert kl > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert loss.beta == 5.0


def test_a_kl_warmup_keeps_the_beta_of_each_latent(data):
    loss = ELBOLoss(free_bits=0.0, beta=torch.tensor([2.0, 0.5]))
    step = TrainStep(VAE.mlp((16,), (8,), 2), loss, kl_factor=lambda step: step / 4)
    for _ in range(4):
        step(torch.from_numpy(data[:50]))
    assert step.loss.beta.tolist() == [1.5, 0.375]
    assert loss.beta.tolist() == [2.0, 0.5]


def test_validation_has_the_full_beta_and_no_free_bits(data):
    options = {"kl_warmup": "linear", "kl_warmup_steps": 1000, "free_bits": 3.0, "beta": 2.0}
    trainer, result = _fit(data, epochs=2, lr=3e-3, **options)
    row = result.history[-1]
    assert row["val_loss"] == pytest.approx(row["val_recon"] + 2 * row["val_kl"], rel=1e-5)
    # in training, the floor of both latents, times the mean of the factors of steps 8 to 15
    floor = 2 * 2 * 3.0 * (sum(range(8, 16)) / 8 / 1000)
    assert row["train_loss"] == pytest.approx(row["train_recon"] + floor, rel=2e-3)
    plain = evaluate(trainer.model, DataLoader(data[500:], 64), loss=ELBOLoss(beta=2.0))
    assert result.best["val_loss"] == pytest.approx(plain.loss.item(), rel=1e-6)


def test_the_capacity_of_a_given_loss_is_as_it_is(data):
    loss = ELBOLoss(capacity=2.5)
    for config, expected in ((TrainConfig(), 2.5), (TrainConfig(capacity=1.0, capacity_steps=5), 0.5)):
        step = TrainStep.from_config(VAE.mlp((16,), (8,), 2), loss, config, 100, torch.float32)
        for _ in range(2):
            step(torch.from_numpy(data[:50]))
        assert float(step.loss.capacity) == expected
    assert loss.capacity == 2.5


def test_capacity_holds_the_kl_where_it_is(data):
    """And validation, with the full capacity and the KL of all data, says so."""
    trainer, result = _fit(
        data, epochs=30, lr=3e-3, lr_schedule="cosine", beta=50.0, capacity=2.5, capacity_steps=100
    )
    row = result.history[-1]
    assert row["train_kl"] == pytest.approx(2.5, abs=0.3)
    assert row["val_loss"] == pytest.approx(row["val_recon"] + 50 * abs(row["val_kl"] - 2.5), rel=1e-5)
    assert trainer.loss.capacity == 2.5
    parts = evaluate(trainer.model, DataLoader(data[500:], 7), loss=trainer.loss)
    assert parts.loss.item() == pytest.approx(result.best["val_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean"},
        {"kl_reduction": "mean", "beta": 0.3},
        {"beta": torch.tensor([2.0, 0.5])},
        {"reduction": "mean", "capacity": 0.7},
        {"reduction": "sum", "capacity": 0.7},
    ],
)
def test_a_given_loss_is_trained_and_evaluated_in_its_own_convention(data, seed, options):
    """Also where the KL of each datum would not do, or a nat of it does not count as one nat."""
    torch.manual_seed(seed)
    model, loss, x = VAE.mlp((16,), (32,), 2), ELBOLoss(**options), torch.from_numpy(data[:500])

    def by_hand(**noise):
        with torch.no_grad():
            mu, logvar = model.encode(x)
            x_hat = model.decode(fastvae.reparameterize(mu, logvar, **noise))
            return pytest.approx([term.item() for term in loss.terms(x_hat, x, mu, logvar)], rel=1e-5)

    assert [term.item() for term in evaluate(model, [x], loss=loss, seed=seed)] == by_hand(seed=seed)
    torch.manual_seed(seed)
    expected = by_hand()
    config = TrainConfig(epochs=1, seed=seed, device="cpu")
    row = Trainer(model, DataLoader(x, 500), loss=loss, config=config).fit().history[0]
    assert [row["train_loss"], row["train_recon"], row["train_kl"]] == expected


def test_validation_clamps_as_training_does(data, seed):
    torch.manual_seed(seed)
    model = VAE.mlp((16,), (32,), 2)
    x = torch.from_numpy(data)
    clamped = evaluate(model, [x], loss=ELBOLoss(logvar_clamp=(1.0, 1.0)), seed=seed)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        logvar = torch.ones_like(logvar)
        x_hat = model.decode(fastvae.reparameterize(mu, logvar, seed=seed))
        expected = ELBOLoss().terms(x_hat, x, mu, logvar)
    for ours, theirs in zip(clamped, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_free_bits_keep_latents_in_use(data):
    kept, lost = (
        _fit(data, epochs=15, lr=3e-3, beta=100.0, **options)[1].history[-1]["train_kl"]
        for options in ({"free_bits": 0.5}, {})
    )
    assert lost < 0.1
    assert kept > 0.3  # about 2 * 0.5


def test_all_options_through_the_trainer(data, tmp_path):
    options = {
        "lr_schedule": "cosine", "lr_warmup_steps": 4, "kl_warmup": "cyclical", "clip_norm": 5.0,
        "optimizer": "adamw", "weight_decay": 0.1, "logvar_clamp": (-8, 8), "free_bits": 0.1,
        "free_bits_form": "element",
    }  # fmt: skip
    trainer, result = _fit(data, epochs=8, lr=1e-2, out=str(tmp_path / "run"), **options)
    assert result.history[-1]["val_loss"] < 0.8 * result.history[0]["val_loss"]
    spec = trainer.loss.spec
    assert (spec.free_bits, spec.free_bits_form, spec.logvar_clamp) == (0.1, "element", (-8, 8))
    assert trainer.config.replace(out=None) == TrainConfig.from_toml(tmp_path / "run" / "train.toml")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_training_where_there_are_no_gradients(mode) -> None:
    trainer = fastvae.Trainer(VAE.mlp((12,), (8,), 2), [torch.rand(5, 12)], config=TrainConfig(epochs=1))
    with mode(), pytest.raises(RuntimeError, match="expected gradients to be enabled"):
        trainer.fit()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_is_kept_from_step_to_step() -> None:
    """Without that each of the ten steps would fetch the pages of its activations, 30 MB and more."""
    faults = run_python(
        """
        import resource
        import torch
        from fastvae import VAE, ELBOLoss
        from fastvae.training.step import TrainStep

        step, x = TrainStep(VAE.conv((1, 28, 28), 2), ELBOLoss()), torch.rand(100, 1, 28, 28)
        for _ in range(3):
            step(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            step(x)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """
    )
    assert int(faults) < 10_000
