"""A loss of tensors like those of an earlier one: never stale, whatever has changed between the two."""

from __future__ import annotations

import gc
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae.ops import native, repeat
from fastvae.ops.types import Inputs

BATCH, FEATURES, LATENTS = 6, 40, 8

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    repeat._known.clear()


def tensors(batch: int = BATCH, features: int = FEATURES, latents: int = LATENTS) -> dict[str, Tensor]:
    """Inputs made by others, as x_hat, mu and logvar are in training."""
    sizes = {"x_hat": features, "mu": latents, "logvar": latents}
    made = {name: torch.randn(batch, n, requires_grad=True) * 1.0 for name, n in sizes.items()}
    return {"x_hat": made["x_hat"], "x": torch.rand(batch, features), **made}


def evaluate(
    loss: Callable[..., Tensor], given: dict[str, Tensor], upstream: float | None = None
) -> list[Tensor]:
    """The value, and the gradients where there are any, of a loss that may be [B]."""
    value = loss(**given)
    wanted = [t for t in given.values() if t.requires_grad]
    if not (wanted and value.requires_grad):
        return [value]
    like = value.detach()
    g = None if upstream is None and value.ndim == 0 else torch.full_like(like, upstream or 1.0)
    return [like, *torch.autograd.grad(value, wanted, g)]


def check(loss: fastvae.ELBOLoss, given: dict[str, Tensor], upstream: float | None = None) -> None:
    """`loss` against the reference in float64."""
    spec = loss.spec
    truth = fastvae.ELBOLoss(
        spec.likelihood,
        beta=loss.beta.double() if isinstance(loss.beta, Tensor) else loss.beta,
        log_variance=loss.log_variance,
        recon_reduction=spec.recon_reduction,
        kl_reduction=spec.kl_reduction,
        free_bits=spec.free_bits,
        free_bits_form=spec.free_bits_form,
        capacity=loss.capacity,
        impl="reference",
    )
    exact = {
        n: (t / 255 if t.dtype == torch.uint8 else t).detach().double().requires_grad_(t.requires_grad)
        for n, t in given.items()
    }
    got, expected = evaluate(loss, given, upstream), evaluate(truth, exact, upstream)
    assert len(got) == len(expected)
    coarse = any(t.dtype == torch.bfloat16 for t in given.values())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-2 if coarse else 1e-5, atol=1e-2 if coarse else 1e-5
        )


def strided(t: Tensor) -> Tensor:
    """The same in the first half of wider rows, as a chunk of an encoder's output is."""
    return (
        torch.cat([t.detach(), torch.full_like(t, torch.nan)], 1)
        .requires_grad_(t.requires_grad)
        .chunk(2, 1)[0]
    )


def with_(**changes: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda given: {n: changes[n](t) if n in changes else t for n, t in given.items()}


INPUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "other values": lambda _: tensors(),
    "another batch size": lambda _: tensors(batch=3),
    "other features": lambda _: tensors(features=17),
    "other latents": lambda _: tensors(latents=5),
    "another trailing shape": with_(x=lambda t: t.reshape(BATCH, 4, 10)),
    "samples": with_(x_hat=lambda t: torch.stack([t, t + 1])),
    "chunks": with_(mu=strided, logvar=strided),
    "one chunk": with_(logvar=strided),
    "rows further apart": with_(x_hat=strided),
    "columns apart": with_(x=lambda t: t.t().contiguous().t()),
    "one datum for all": with_(x=lambda t: t[:1].expand(BATCH, -1)),
    "float64": lambda given: {n: t.double() for n, t in given.items()},
    "float64 of one": with_(mu=Tensor.double),
    "bfloat16": lambda given: {n: t.bfloat16() for n, t in given.items()},
    "bfloat16 of one": with_(x_hat=Tensor.bfloat16),
    "uint8": with_(x=lambda t: (t * 255).byte()),
    "no gradient of x_hat": with_(x_hat=Tensor.detach),
    "no gradient of mu": with_(mu=Tensor.detach),
    "no gradient": with_(x_hat=Tensor.detach, mu=Tensor.detach, logvar=Tensor.detach),
    "leaves": lambda given: {
        n: t.detach().requires_grad_(n != "x") if n != "mu" else torch.nn.Parameter(t.detach())
        for n, t in given.items()
    },
    "the gradient of x": with_(x=lambda t: t.clone().requires_grad_()),
    "weight": lambda given: {**given, "weight": torch.rand(BATCH)},
    "weight in float64": lambda given: {**given, "weight": torch.rand(BATCH).double()},
    "kl": lambda given: {
        "x_hat": given["x_hat"],
        "x": given["x"],
        "kl": torch.rand(BATCH, requires_grad=True),
    },
    "nothing": lambda _: tensors(batch=0),
}


OPTIONS = [
    ({}, True),
    ({"reduction": "none"}, True),
    ({"likelihood": "gaussian", "log_variance": -0.5}, True),
    ({"likelihood": "laplace"}, False),  # which is not written in C++
    ({"impl": "reference"}, False),
]


@pytest.mark.parametrize(("options", "is_native"), OPTIONS)
def test_inputs_of_another_kind_between_two(options: dict, is_native: bool) -> None:
    loss = fastvae.ELBOLoss(**options)
    for change in INPUTS.values():
        for _ in range(2):
            check(loss, tensors())
            check(loss, change(tensors()))
        assert bool(repeat._known) == is_native


def _beta(loss: fastvae.ELBOLoss, value: object) -> None:
    loss.beta = value


LOSSES: dict[str, Callable[[fastvae.ELBOLoss], object]] = {
    "beta": lambda loss: _beta(loss, 0.25),
    "beta of zero": lambda loss: _beta(loss, 0.0),
    "an integer for beta": lambda loss: _beta(loss, 3),
    "a tensor for beta": lambda loss: _beta(loss, torch.tensor(0.75)),
    "the value of that tensor": lambda loss: loss.beta.fill_(2.5),
    "one beta a latent": lambda loss: _beta(loss, torch.rand(LATENTS)),
    "beta once more": lambda loss: _beta(loss, 1.5),
    "log_variance": lambda loss: setattr(loss, "log_variance", 0.5),
    "log_variance once more": lambda loss: setattr(loss, "log_variance", 0.0),
    "a tensor for log_variance": lambda loss: setattr(loss, "log_variance", torch.tensor(-1.0)),
    "log_variance of the batch": lambda loss: setattr(loss, "log_variance", "batch"),
    "log_variance at last": lambda loss: setattr(loss, "log_variance", -0.5),
    "capacity": lambda loss: setattr(loss, "capacity", 2.0),
    "another capacity": lambda loss: setattr(loss, "capacity", 1000.0),
    "no capacity": lambda loss: setattr(loss, "capacity", None),
}


def test_a_loss_that_changes_between_two() -> None:
    loss = fastvae.ELBOLoss("gaussian")
    for change in LOSSES.values():
        check(loss, tensors())
        change(loss)
        for _ in range(2):
            check(loss, tensors())


@pytest.mark.parametrize("form", ["batch", "element"])
def test_losses_that_share_their_inputs(form: str) -> None:
    options = [
        {},
        {"beta": 2.0},
        {"reduction": "mean"},
        {"free_bits": 0.5, "free_bits_form": form},
        {"beta": 0.5},
    ]
    losses = [fastvae.ELBOLoss(**o) for o in options]
    for _ in range(3):
        given = tensors()
        for loss in losses:
            check(loss, given)


@pytest.mark.parametrize("form", ["batch", "element"])
def test_free_bits_in_a_tensor_that_changes(form: str) -> None:
    free_bits = torch.tensor(0.5)
    loss = fastvae.ELBOLoss(free_bits=free_bits, free_bits_form=form)
    for value in (0.5, 0.5, 2.0):
        free_bits.fill_(value)
        check(loss, tensors())


def test_terms_and_the_loss_alone() -> None:
    loss = fastvae.ELBOLoss(beta=0.5)
    for _ in range(3):
        given = tensors()
        terms = loss.terms(**given)
        assert torch.equal(terms.loss, loss(**given))
        torch.testing.assert_close(terms.loss, terms.recon + 0.5 * terms.kl)
        wanted = [given[n] for n in ("x_hat", "mu", "logvar")]
        of_terms = torch.autograd.grad(terms.recon + 0.5 * terms.kl, wanted)
        for a, b in zip(of_terms, torch.autograd.grad(loss(**given), wanted), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("upstream", [1.0, 0.0, -65536.0])
def test_upstream_gradients(upstream: float) -> None:
    loss = fastvae.ELBOLoss()
    for _ in range(3):
        check(loss, tensors(), upstream)


def test_backward_again_and_backward_of_backward() -> None:
    loss = fastvae.ELBOLoss()
    for _ in range(3):
        given = tensors()
        wanted = [given[n] for n in ("x_hat", "mu", "logvar")]
        value = loss(**given)
        first = torch.autograd.grad(value, wanted, retain_graph=True)
        second = torch.autograd.grad(value, wanted, retain_graph=True)
        made = torch.autograd.grad(value, wanted, create_graph=True)
        for a, b, c in zip(first, second, made, strict=True):
            assert a.data_ptr() != b.data_ptr()
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)
        (twice,) = torch.autograd.grad(made[0].sum(), given["x_hat"])
        torch.testing.assert_close(twice, torch.full_like(twice, 2 / BATCH))


def test_values_and_gradients_of_earlier_calls_stay() -> None:
    loss, kept = fastvae.ELBOLoss(), []
    for _ in range(5):
        got = evaluate(loss, tensors())
        kept.append((got, [t.clone() for t in got]))
    for got, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(got, copies, strict=True))


def test_modes_between_two() -> None:
    loss = fastvae.ELBOLoss()
    given = tensors()
    x_hat, *others = plain = [t.detach() for t in given.values()]

    def of_one(*one: Tensor) -> Tensor:
        return loss(*(t[None] for t in one))

    for _ in range(2):
        value, *gradients = expected = evaluate(loss, given)
        with torch.no_grad():
            got = loss(**given)
        assert not got.requires_grad
        assert torch.equal(got, value)
        with torch.inference_mode():
            got = loss(**given)
        assert got.is_inference()
        assert torch.equal(got, value)
        for around in (torch.autocast("cpu"), torch.device("meta"), torch.autograd.set_detect_anomaly(True)):
            with around:
                again = evaluate(loss, given)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        torch.testing.assert_close(torch.func.grad(loss)(x_hat, *others), gradients[0])
        torch.testing.assert_close(torch.func.vmap(of_one)(*plain).mean(), value)
        with FakeTensorMode() as mode:
            assert loss(*(mode.from_tensor(t) for t in plain)).shape == ()


def test_threads_between_two() -> None:
    """Whose number is a part of the kind; the results are the same to the bit."""
    loss, given = fastvae.ELBOLoss(), tensors(batch=300, features=300)
    before, first = torch.get_num_threads(), evaluate(loss, given)
    try:
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(evaluate(loss, given), first, strict=True))
    finally:
        torch.set_num_threads(before)
    assert len(repeat._known) >= 3


def test_compiled_between_two() -> None:
    torch.compiler.reset()
    loss = fastvae.ELBOLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        leaves = {n: t.detach().requires_grad_(n != "x") for n, t in tensors().items()}
        for a, b in zip(evaluate(compiled, leaves), evaluate(loss, leaves), strict=True):
            torch.testing.assert_close(a, b)


class Subclass(Tensor):
    pass


UNUSUAL: list[Callable[[Tensor], object]] = [
    lambda t: t.as_subclass(Subclass),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.to_sparse_csr(),
    lambda t: t.to_mkldnn(),
    lambda t: t.numpy(),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("place", range(7))
def test_what_is_no_plain_tensor_is_of_no_kind(place: int) -> None:
    spec = fastvae.ELBOLoss().spec
    plain = [torch.ones(2, 2)] * 7
    assert repeat.kind_of(Inputs(*plain), 0.0, 0.0, spec, "auto") is not None
    for change in UNUSUAL:
        inputs = Inputs(*(change(t) if i == place else t for i, t in enumerate(plain)))
        assert repeat.kind_of(inputs, 0.0, 0.0, spec, "auto") is None


def test_a_subclass_after_a_plain_tensor() -> None:
    loss, given = fastvae.ELBOLoss(), tensors()
    expected = evaluate(loss, given)
    for name in given:
        got = evaluate(loss, {**given, name: given[name].as_subclass(Subclass)})
        assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(got, expected, strict=True))


WRONG = [
    ({"logvar": torch.zeros(BATCH, 3)}, ValueError, "mu, logvar: got shapes"),
    ({"x": torch.zeros(BATCH, FEATURES, dtype=torch.int32)}, TypeError, "x: got dtype torch.int32"),
    ({"x": torch.zeros(BATCH, FEATURES, device="meta")}, ValueError, "x: got device meta"),
    ({"x_hat": torch.zeros(BATCH, FEATURES, dtype=torch.int64)}, TypeError, "x_hat: got dtype torch.int64"),
    ({"weight": torch.ones(3)}, ValueError, "weight: got shape"),
    ({"kl": torch.ones(BATCH)}, ValueError, "kl: given beside mu or logvar"),
    ({"kl": 1.0}, ValueError, "kl: given beside mu or logvar"),
    ({"mu": None}, ValueError, "mu, logvar: expected both"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_errors_are_those_of_a_first_call(arguments: dict, error: type[Exception], message: str) -> None:
    loss = fastvae.ELBOLoss()
    for _ in range(2):
        check(loss, tensors())
        with pytest.raises(error, match=re.escape(message)):
            loss(**{**tensors(), **arguments})
    for name in ("log_scale", "log_variance"):
        setattr(loss, name, 1.0)
        with pytest.raises(ValueError, match=f"{name}: given with likelihood"):
            loss(**tensors())
        setattr(loss, name, 0.0)
    loss.beta = torch.ones(3)
    with pytest.raises(ValueError, match="beta: got shape"):
        loss(**tensors())


def test_inputs_changed_in_place_are_noticed() -> None:
    loss = fastvae.ELBOLoss()
    for _ in range(2):
        given = tensors()
        value = loss(**given)
        torch.autograd.grad(value, given["mu"], retain_graph=True)
        given["x_hat"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, given["mu"])


def test_nothing_is_kept_alive() -> None:
    loss = fastvae.ELBOLoss(beta=torch.tensor(0.5))
    for _ in range(3):
        given = {**tensors(), "weight": torch.rand(BATCH)}
        made = evaluate(loss, given)
        alive = [weakref.ref(t) for t in (*given.values(), *made)]
        del given, made
        gc.collect()
        assert not any(ref() is not None for ref in alive)
    assert any(isinstance(k.kernels, native.Repeated) for k in repeat._known.values())


def test_few_kinds_are_remembered() -> None:
    loss = fastvae.ELBOLoss()
    for features in range(1, 3 * repeat._KINDS):
        loss(**tensors(features=features))
        assert 1 <= len(repeat._known) <= repeat._KINDS
    check(loss, tensors())


@pytest.fixture
def _eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_switches")
def test_threads_that_call_one_loss() -> None:
    loss = fastvae.ELBOLoss()
    failures: list[BaseException] = []

    def work(batches: tuple[int, ...]) -> None:
        try:
            for i in range(60):
                check(loss, tensors(batch=batches[i % len(batches)]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(batches,)) for batches in ((4, 9), (9, 4), (4, 5, 6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
