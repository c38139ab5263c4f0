"""A recorded step is the step: with the same products, bit for bit what its code computes as written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae.inference.evaluate import negative_elbo
from fastvae.models.model import ModelError
from fastvae.ops.products import Product
from fastvae.training.backward import MOST_TAPES
from fastvae.training.distributed import Share
from fastvae.training.step import TrainStep
from fastvae.training.tape import is_recordable, record

ITEM = (1, 12, 12)


def sequential_vae(*, likelihood: str = "mse") -> fastvae.VAE:
    """With the layers that carry a state: dropout, batch norm."""
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(144, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 12)
    )
    decoder = nn.Sequential(
        nn.Linear(6, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 144), nn.Unflatten(1, ITEM)
    )
    return fastvae.VAE(Halves(encoder), decoder, likelihood=likelihood)


class Halves(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers(x).chunk(2, dim=1)


Halves.__module__ = "fastvae.models"  # as known as the models there

MODELS = {
    "mlp": lambda: fastvae.VAE.mlp(ITEM, (32,), 6),
    "mlp, bernoulli": lambda: fastvae.VAE.mlp(ITEM, (32, 24), 6, likelihood="bernoulli"),
    "mlp, learned variance": lambda: fastvae.VAE.mlp(ITEM, (32,), 6, likelihood="gaussian"),
    "conv": lambda: fastvae.VAE.conv(ITEM, 6),
    "with state": sequential_vae,
}
LOSSES = {
    "plain": {},
    "free bits of the batch": {"free_bits": 0.2},
    "free bits of an element": {"free_bits": 0.2, "free_bits_form": "element"},
    "clamp": {"logvar_clamp": (-0.1, 0.1)},
}


def trained(
    model: fastvae.VAE, loss_options: dict, batches: list[Tensor], *, tape: bool, **options
) -> dict[str, Tensor]:
    """What a training of a few steps leaves: weights, buffers, averages, the state of the generator."""
    torch.manual_seed(3)
    step = TrainStep(model, negative_elbo(model, 0.7, **loss_options), **options)
    if not tape:
        step.backward.tapes = None
    else:
        assert step.backward.tapes is not None
    for x in batches:
        step(x)
    averages = torch.tensor(step.averages())
    step.weights.release()
    return {**model.state_dict(), "averages": averages, "generator": torch.get_rng_state()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_are_the_steps(
    seed: int, name: str, loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float32:  # whose products are torch's to a rounding only
        monkeypatch.setattr(Product, "serves", lambda *_: False)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.rand(n, *ITEM, generator=generator) for n in (16, 16, 16, 7, 16, 7)]
    results = []
    for tape in (False, True):
        torch.manual_seed(seed)
        model = MODELS[name]().train()
        results.append(
            trained(
                model,
                LOSSES[loss],
                batches,
                tape=tape,
                amp_dtype=dtype,
                clip_norm=5.0,
                kl_factor=lambda step: 0.1 * step,
            )
        )
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_with_products_of_floats_lead_where_the_steps_do(seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.rand(n, *ITEM, generator=generator) for n in (16, 16, 16, 7, 16, 7)]
    results = []
    for tape in (False, True):
        torch.manual_seed(seed)
        results.append(trained(MODELS[name]().train(), {}, batches, tape=tape))
    torch.testing.assert_close(results[1]["averages"], results[0]["averages"], rtol=1e-4, atol=0)
    assert torch.equal(results[1]["generator"], results[0]["generator"])


def test_memory_of_outputs(seed: int) -> None:
    weight = torch.randn(30, 40)

    def terms(x: Tensor) -> tuple[Tensor, ...]:
        return x @ weight, x @ weight.mul(2), x.sum()

    inputs = torch.randn(3, 16, 30).unbind()
    for lasting, last in ((None, [True, True, True]), (1, [True, False, True])):
        _, tape = record(terms, inputs[0], lasting=lasting)
        assert tape is not None
        first, expected = tape(inputs[1]), terms(inputs[1])
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(tape(inputs[2]), terms(inputs[2]))
        kept = [torch.allclose(*pair) for pair in zip(first, expected, strict=True)]
        has_products = Product.serves(inputs[0], weight)
        assert kept == (last if has_products else [True, True, True])


def test_a_tape_reads_the_weights_as_they_are_then(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).square().sum(), layer.weight)

    _, tape = record(gradient, x)
    assert tape is not None
    with torch.no_grad():
        layer.weight.mul_(2)
    other = torch.randn(4, 5)
    assert torch.equal(tape(other)[0], gradient(other)[0])


def test_what_a_tape_gave_is_not_written_again(seed: int) -> None:
    """Here a view of z; the KL stays in the tape, whose calls make it where it was."""

    def half_of_z(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        z, kl = fastvae.sample_and_kl(mu, logvar)
        return z[:, :2], kl * 2

    torch.manual_seed(seed)
    given = torch.randn(2, 5, 4).unbind()
    outputs, tape = record(half_of_z, *given)
    assert tape is not None
    for last in (outputs, tape(*given)):
        before = [t.clone() for t in last]
        z, _ = tape(*given)
        assert not torch.equal(z, before[0])  # other noise
        assert all(map(torch.equal, last, before))


def test_no_tape_where_python_looks_into_a_tensor() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (x * 2 if x.sum() > 0 else x,)

    (output,), tape = record(function, torch.ones(3))
    assert tape is None
    assert output.tolist() == [2, 2, 2]


def test_batches_of_many_sizes_have_few_tapes(seed: int) -> None:
    torch.manual_seed(seed)
    step = TrainStep(fastvae.VAE.mlp(ITEM, (8,), 3), fastvae.ELBOLoss())
    for n in (*range(1, MOST_TAPES + 4), 1, MOST_TAPES + 2):
        step(torch.rand(n, *ITEM))
    assert len(step.backward.tapes or ()) == MOST_TAPES
    assert step.optimizer.steps == MOST_TAPES + 5


def test_a_step_without_a_tape_is_to_the_bit_one_with_a_tape(seed: int) -> None:
    x, results = torch.rand(40, *ITEM), []
    for sizes in ((), range(1, MOST_TAPES + 1)):
        torch.manual_seed(seed)
        model = fastvae.VAE.conv(ITEM, 6)
        step = TrainStep(model, fastvae.ELBOLoss(), lr=0.0)
        for n in sizes:
            step(x[:n])
        step(x), step.reset()
        torch.manual_seed(seed)
        step.backward(x, Share(0, len(x), len(x)))
        results.append([leaf.grad.clone() for leaf in step.backward.leaves])
    assert len(step.backward.tapes) == MOST_TAPES
    assert all(map(torch.equal, *results))


def test_another_number_of_threads_is_followed() -> None:
    """After a fork it is to be 1: OpenMP waits for ever for threads that were left behind."""
    step = TrainStep(fastvae.VAE.mlp(ITEM, (8,), 3), fastvae.ELBOLoss())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            step(torch.rand(4, *ITEM))
    finally:
        torch.set_num_threads(before)
    assert len(step.backward.tapes or ()) == 2


def test_no_tape_of_what_differs_without_autograd() -> None:
    layer = nn.LSTM(3, 4)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x)[0].sum(), layer.weight_ih_l0)

    assert record(gradient, torch.randn(5, 2, 3))[1] is None


def test_a_step_goes_on_as_written_where_it_has_no_tape(seed: int) -> None:
    class Deciding(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.mean() > 0.5 else x

    Deciding.__module__ = "fastvae.models"
    torch.manual_seed(seed)
    model = fastvae.VAE.mlp(ITEM, (8,), 3)
    model.encoder.layers.insert(0, Deciding())
    step = TrainStep(model, negative_elbo(model))
    for _ in range(2):
        step(torch.rand(4, *ITEM))
    assert step.backward.tapes is None
    assert all(torch.tensor(step.averages()).isfinite())


def drop_less(model: nn.Module) -> None:
    model.encoder.layers[4].p = 0.1


def replace(model: nn.Module) -> None:
    model.decoder[2] = nn.Tanh()


CHANGES = {
    "none": lambda model: model.eval().train(),
    "mode": nn.Module.eval,
    "option": drop_less,
    "layer": replace,
}


@pytest.mark.parametrize("change", CHANGES)
def test_tapes_last_until_the_model_is_changed(seed: int, change: str) -> None:
    batches, results = list(torch.rand(2, 16, *ITEM)), []
    for tape in (False, True):
        torch.manual_seed(seed)
        step = TrainStep(sequential_vae(), fastvae.ELBOLoss())
        for x in batches:
            step.backward.tapes = step.backward.tapes if tape else None
            step(x)
        before = dict(step.backward.tapes or {})
        CHANGES[change](step.model)
        step.reset()
        if tape:
            assert step.backward.tapes == (before if change == "none" else {})
        for x in batches:
            step.backward.tapes = step.backward.tapes if tape else None
            step(x)
        results.append(step.weights.flat.detach().clone())
    assert torch.equal(*results)


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class OwnWeight(nn.Module):
    """With a weight that no layer has, so that autocast casts it itself."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n) / n**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


OwnWeight.__module__ = "fastvae.models"
AROUND = {
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "float64": float64_by_default,
    "device": partial(torch.device, "meta"),
}


@pytest.mark.parametrize("options", [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("around", AROUND)
def test_a_step_goes_its_way_whatever_is_set_around_it(seed: int, around: str, options: dict) -> None:
    results = []
    for setting, tape in ((nullcontext, False), (AROUND[around], False), (AROUND[around], True)):
        torch.manual_seed(seed)
        model, x = fastvae.VAE.mlp(ITEM, (32,), 6), torch.rand(16, *ITEM)
        model.decoder = nn.Sequential(OwnWeight(6), model.decoder)
        with setting():
            step = TrainStep(model, fastvae.ELBOLoss(), **options)
            step.backward.tapes = step.backward.tapes if tape else None
            for _ in range(3):
                step(x)
            averages = step.averages()
        results.append(torch.cat((step.weights.flat.detach(), torch.tensor(averages))))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tape", [True, False])
def test_what_is_frozen_meanwhile_stays(seed: int, tape: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = fastvae.VAE.mlp(ITEM, (8,), 3)
    step = TrainStep(model, fastvae.ELBOLoss(), amp_dtype=dtype)
    for frozen in (False, True, False):
        model.encoder.requires_grad_(not frozen)
        step.reset()
        step.backward.tapes = step.backward.tapes if tape else None
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(torch.rand(4, *ITEM))
        step(torch.rand(4, *ITEM))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (frozen and name.startswith("encoder")), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["copy_", "data"])
def test_weights_written_between_epochs_are_taken_up(seed: int, by: str, dtype: torch.dtype) -> None:
    """As by p.data.clamp_(-1, 1), or p.data = p.data.clamp(-1, 1)."""
    torch.manual_seed(seed)
    model = fastvae.VAE.mlp(ITEM, (8,), 3, likelihood="gaussian")
    step, x = TrainStep(model, negative_elbo(model), amp_dtype=dtype), torch.rand(4, *ITEM)
    step(x)
    for p in model.parameters():
        if by == "data":
            p.data = torch.full_like(p, 0.125)
        else:
            p.data.fill_(0.125)
    step.reset()
    for p in model.parameters():
        assert (p == 0.125).all()
    step(x)
    for p in model.parameters():
        assert ((p - 0.125).abs() < 0.1).all()
        assert (p != 0.125).any()
    if step.weights.copies is not None:
        assert torch.equal(step.weights.copies, step.weights.flat.bfloat16())


def test_weights_may_move_into_shared_memory(seed: int) -> None:
    """As share_memory() moves them, and a torch.multiprocessing.Queue that is given a state_dict."""
    results, x = [], torch.rand(4, *ITEM)
    for moves in (False, True):
        torch.manual_seed(seed)
        model = fastvae.VAE.mlp(ITEM, (8,), 3, likelihood="gaussian")
        step = TrainStep(model, negative_elbo(model))
        step(x)
        if moves:
            model.share_memory()
        step(x)
        results.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*results)


def test_parameters_in_the_place_of_others_are_refused() -> None:
    model = fastvae.VAE.mlp(ITEM, (8,), 3)
    step = TrainStep(model, fastvae.ELBOLoss())
    model.decoder.layers[0] = nn.Linear(3, 8)
    with pytest.raises(ModelError, match=r"another parameter as decoder\.layers\.0\.weight in the training"):
        step.reset()


def test_what_was_frozen_at_first_cannot_be_trained_later() -> None:
    model = fastvae.VAE.mlp(ITEM, (8,), 3)
    model.encoder.requires_grad_(False)
    step = TrainStep(model, fastvae.ELBOLoss())
    step.reset()
    model.requires_grad_(True)
    with pytest.raises(ModelError, match=r"encoder\.layers\.0\.weight unfrozen"):
        step.reset()


def test_only_known_layers_are_recorded() -> None:
    class Own(nn.Module):
        pass

    assert is_recordable(fastvae.VAE.conv(ITEM, 3), fastvae.ELBOLoss())
    assert not is_recordable(nn.Sequential(Own()))
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hooked = nn.Sequential(nn.Linear(2, 2))
        getattr(hooked[0], f"register_{register}")(lambda *_: None)
        assert not is_recordable(hooked)
    for method in ("encode", "decode", "forward"):
        changed = fastvae.VAE.mlp(ITEM, (8,), 3)
        setattr(changed, method, lambda x: x)
        assert not is_recordable(changed)
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled[0]._compiled_call_impl = compiled[0]._call_impl  # as by compile(), which takes seconds
    assert not is_recordable(compiled)


def test_a_learned_beta_is_trained(seed: int) -> None:
    torch.manual_seed(seed)
    beta = nn.Parameter(torch.tensor(1.0))
    step = TrainStep(fastvae.VAE.mlp(ITEM, (8,), 3), fastvae.ELBOLoss(beta=beta))
    step(torch.rand(4, *ITEM))
    assert beta.item() != 1


@pytest.mark.parametrize("given", ["x", "weight", "beta", "mu"])
def test_gradients_under_a_dispatch_mode(seed: int, given: str) -> None:
    """As under torch's FlopCounterMode, which sees all operations."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(5, 3) for name in ("x_hat", "x", "mu", "logvar")}
    tensors |= {"weight": torch.rand(5), "beta": torch.rand(())}
    tensors[given].requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(fastvae.elbo(**tensors).loss, tensors[given])[0]

    with FlopCounterMode(display=False):
        watched = gradient()
    torch.testing.assert_close(watched, gradient())


def test_a_sum_is_not_kept_in_the_shape_of_another(seed: int) -> None:
    """Sums that keep their dimension, with views after them of which only some take that away."""

    def sums(x: Tensor) -> tuple[Tensor, ...]:
        kept = x.sum(0, keepdim=True)
        row = kept.sum(-1, keepdim=True).view(3)
        return kept.view(12), x.sum([1], keepdim=True).view(2, 4), row, kept * 2

    x, other = torch.randn(2, 2, 3, 4).unbind()
    outputs, tape = record(sums, x)
    assert tape is not None
    for given, expected in ((x, outputs), (other, sums(other))):
        for output, right in zip(tape(given), expected, strict=True):
            assert torch.equal(output, right)
