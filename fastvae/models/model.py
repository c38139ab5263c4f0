"""What fastvae asks of a model: any nn.Module with `encode` and `decode` will do, and VAE is one.

A model may say more, as VAE does: `likelihood` ("mse" where it does not), `log_variance` of a gaussian one (a
number or a tensor; a parameter is learned), and `decode_mean`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops.types import Likelihood

LIKELIHOODS = ("mse", "gaussian", "bernoulli")


class ModelError(ValueError):
    """A model that cannot be trained; the message says what it has and what it should have."""


class Model(nn.Module):
    """An nn.Module with these two methods; the type checker's word for it, from which none need derive."""

    if TYPE_CHECKING:

        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """x [B, *item] -> (mu, logvar) of q(z|x), [B, *latent] each."""

        def decode(self, z: Tensor) -> Tensor:
            """z [B, *latent] -> the likelihood's parameters [B, *item]."""


def as_model(module: nn.Module) -> Model:
    """The same module. Raises ModelError unless it is one with encode and decode, of one argument each."""
    name = type(module).__name__
    expected = "expected an nn.Module with encode(x) -> (mu, logvar) and decode(z) -> x_hat"
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: got {name}, {expected}")
    absent = [method for method in ("encode", "decode") if not callable(getattr(module, method, None))]
    if absent:
        raise ModelError(f"model: got {name} without {' and '.join(absent)}, {expected}")
    for method in ("encode", "decode"):
        try:
            signature = inspect.signature(getattr(module, method))
        except ValueError:  # what is written in C has none
            continue
        try:
            signature.bind(None)
        except TypeError as error:
            got = f"{name} with {method}{signature}"
            asked = "one argument alone, for it is given no labels and no others"
            raise ModelError(f"model: got {got}, expected it to ask for {asked}") from error
    return cast(Model, module)


def check_parameters(model: nn.Module, are_written: bool = True) -> None:
    """Raise ModelError unless there is something to train, in float32 and with dense gradients.

    are_written: to files too, with the buffers, which are to be of a kind that these can hold.
    """
    name = type(model).__name__
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ModelError(
            f"model: got {name} with nothing to train, expected parameters that require gradients"
        )
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ModelError(f"model: got {name} on the meta device, expected weights; see nn.Module.to_empty")
    if any(is_lazy(p) for p in trained):
        raise ModelError(f"model: got {name} with lazy parameters; encode and decode one batch with it first")
    others = {p.dtype for p in trained} - {torch.float32}
    if others:
        raise ModelError(f"model: got {name} with parameters of {others.pop()}, expected torch.float32")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            got = f"{name} with {_described(value)} as {key}"
            raise ModelError(
                f"model: got {got}, expected get_extra_state to give a tensor, which checkpoints hold"
            )
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ModelError(
                f"model: got {name} with {key} from inference_mode, expected it made outside of it"
            )
        is_dense = tensor.layout == torch.strided
        if is_dense and not tensor.requires_grad and tensor.numel() > 1 and 0 in _strides(tensor):
            got = f"{name} with {key}, an expanded tensor"
            raise ModelError(f"model: got {got}, expected memory for each element, as clone() gives it")
        if are_written and not (is_dense and _is_of_safetensors(tensor.dtype)):
            got = f"{name} with {key} of {tensor.dtype}, {tensor.layout}"
            raise ModelError(
                f"model: got {got}, expected a dense tensor of a dtype that safetensors can hold"
            )
    places: dict[int, str] = {}
    for weight, p in model.named_parameters():
        address = p.data_ptr() if p.requires_grad else 0
        other = places.setdefault(address, weight)
        if address and other != weight:
            got = f"{name} with {other} and {weight} in one memory"
            raise ModelError(f"model: got {got}, expected one nn.Parameter, transposed where it is used")
    for layer, module in model.named_modules():
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and module.sparse and module.weight.requires_grad:
            got = f"{name} with sparse gradients of {layer}"
            raise ModelError(f"model: got {got}, expected sparse=False there")


def _strides(tensor: Tensor) -> list[int]:
    """Those that lead from one element to another."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _is_of_safetensors(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype, device="cpu")})
    except KeyError:
        return False
    return True


def check_batch(model: Model, x: Tensor) -> tuple[int, ...]:
    """The shape of a latent, found by encoding and decoding x [B, *item] in eval mode.

    Draws nothing from torch's generators and changes no buffer. Raises ModelError where mu, logvar or x_hat
    have a wrong shape.
    """
    name = type(model).__name__
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), evaluating(model), _buffers_kept(model), torch.no_grad():
        encoded: Any = model.encode(x)
        pair = isinstance(encoded, (tuple, list)) and len(encoded) == 2
        if not (pair and all(isinstance(t, Tensor) and t.is_floating_point() for t in encoded)):
            got = f"{_described(encoded)} of {name}.encode"
            raise ModelError(f"model: got {got}, expected two tensors: mu and logvar")
        mu, logvar = encoded
        if mu.shape != logvar.shape or mu.ndim < 2 or len(mu) != len(x):
            got = f"mu {_shape(mu)} and logvar {_shape(logvar)} of {name}.encode"
            raise ModelError(
                f"model: got {got} for x {_shape(x)}, expected one shape that begins with {len(x)}, the data "
                "in the batch"
            )
        x_hat: Any = model.decode(mu)
        fits = isinstance(x_hat, Tensor) and len(x_hat) == len(x) and x_hat.numel() == x.numel()
        if not fits or (x_hat.ndim == x.ndim and x_hat.shape != x.shape):
            got = f"{_described(x_hat)} of {name}.decode for z {_shape(mu)}"
            raise ModelError(f"model: got {got}, expected x_hat {_shape(x)}, as x")
    return tuple(mu.shape[1:])


def check_one_datum(model: Model, x: Tensor) -> None:
    """Raise ModelError where the model, as it trains, takes no x [1, *item]: one datum has no variance.

    Draws nothing from torch's generators and changes no buffer.
    """
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), _buffers_kept(model), torch.no_grad():
        try:
            model.decode(model.encode(x)[0])
        except ValueError as error:
            raise ModelError(
                f"model: got ValueError of {type(model).__name__} for one datum, of which the last batch of "
                f"an epoch is made: {error}; choose another batch size"
            ) from error


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers that are written or replaced meanwhile."""
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(b, b.clone()) for _, buffers in kept for b in buffers.values() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for module, buffers in kept:
            module._buffers.update(buffers)


def likelihood_of(model: nn.Module) -> Likelihood:
    """p(x|z): the model's `likelihood`, "mse" where it has none. Raises ModelError for an unknown one."""
    likelihood = getattr(model, "likelihood", "mse")
    if likelihood not in LIKELIHOODS:
        raise ModelError(f"model: got likelihood {likelihood!r}, expected one of {', '.join(LIKELIHOODS)}")
    return cast(Likelihood, likelihood)


def log_variance_of(model: nn.Module) -> Tensor | float:
    """ln of the variance of a gaussian p(x|z): the model's `log_variance`; 0 under other likelihoods.

    Raises ModelError where it is no number and no tensor.
    """
    if likelihood_of(model) != "gaussian":
        return 0.0
    value = getattr(model, "log_variance", None)
    if not isinstance(value, (Tensor, float, int)):
        name = type(model).__name__
        got = "no log_variance" if value is None else f"log_variance {_described(value)}"
        raise ModelError(
            f"model: got {name} with {got} under the gaussian likelihood, expected a number or a tensor; an "
            "nn.Parameter is learned"
        )
    return value


def set_likelihood(
    model: nn.Module, likelihood: Likelihood, variance: float | Literal["learned"] | None = None
) -> None:
    """Give `likelihood` to a model that says nothing of it, and with "gaussian" a `log_variance`.

    variance: of a gaussian p(x|z), > 0, or "learned" (also what None means): a parameter, which starts at 0.
    """
    model.likelihood = likelihood  # type: ignore[assignment]
    if likelihood != "gaussian":
        return
    if getattr(model, "log_variance", None) is not None:
        log_variance_of(model)
    elif variance in (None, "learned"):
        device = next(model.parameters()).device
        model.log_variance = nn.Parameter(torch.zeros((), device=device))
    else:
        log_variance = torch.tensor(float(variance or 0)).log()
        model.register_buffer("log_variance", log_variance, persistent=False)  # moves with the model


def decode_mean(model: nn.Module, z: Tensor) -> Tensor:
    """z [B, *latent] -> the mean of p(x|z), [B, *item]."""
    own = getattr(model, "decode_mean", None)
    if own is not None:
        mean: Tensor = own(z)
        return mean
    x_hat = cast(Model, model).decode(z)
    return x_hat.sigmoid() if likelihood_of(model) == "bernoulli" else x_hat


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is in eval mode."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts the model, and each part of it, back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # which may be the model's own
        for module, training in modes:
            module.training = training


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "of no dimension"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {_shape(value)} of {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
