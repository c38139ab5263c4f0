"""Checks of what comes into the operators: an error names the argument, what was got, what was expected."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from .types import (
    LIKELIHOODS,
    REDUCTIONS,
    Extents,
    FreeBitsForm,
    Inputs,
    Likelihood,
    Reduction,
    ScaleForm,
    Spec,
)

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that the kernels read


def make_spec(
    likelihood: Likelihood,
    reduction: Reduction,
    recon_reduction: Reduction | None,
    kl_reduction: Reduction | None,
    half: bool,
    full: bool,
    from_logits: bool,
    logvar_clamp: tuple[float, float] | None,
    free_bits: float | None,
    free_bits_form: FreeBitsForm,
) -> Spec:
    """Check the choices of `elbo`."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_choice("reduction", reduction, REDUCTIONS)
    recon_reduction = reduction if recon_reduction is None else recon_reduction
    kl_reduction = reduction if kl_reduction is None else kl_reduction
    for name, value in (("recon_reduction", recon_reduction), ("kl_reduction", kl_reduction)):
        check_choice(name, value, REDUCTIONS)
    if (recon_reduction == "none") != (kl_reduction == "none"):
        raise ValueError(
            f'recon_reduction and kl_reduction: got "{recon_reduction}" and "{kl_reduction}", expected '
            '"none" for both or for neither, since a [B] and a scalar term have no common sum'
        )
    for name, changed, meant in (
        ("half", half, ("mse",)),
        ("full", not full, ("gaussian", "laplace")),
        ("from_logits", not from_logits, ("bernoulli",)),
    ):
        if changed and likelihood not in meant:
            quoted = " or ".join(f'"{m}"' for m in meant)
            raise ValueError(
                f'{name}: got {name == "half"} with likelihood "{likelihood}", expected it with {quoted} only'
            )
    if logvar_clamp is not None:
        low, high = (float(bound) for bound in logvar_clamp)
        if not low <= high:
            raise ValueError(f"logvar_clamp: got ({low}, {high}), expected (low, high) with low <= high")
        logvar_clamp = (low, high)
    check_choice("free_bits_form", free_bits_form, ("batch", "element"))
    if free_bits is not None:
        check_number("free_bits", free_bits)
        if not 0 <= free_bits < math.inf:
            raise ValueError(f"free_bits: got {free_bits}, expected nats a latent, at least 0")
        if free_bits_form == "batch" and recon_reduction == "none":
            raise ValueError(
                'free_bits: the "batch" form floors the mean over the batch, which reduction "none" does not '
                'take; expected free_bits_form="element", or another reduction'
            )
    return Spec(
        "probabilities" if likelihood == "bernoulli" and not from_logits else likelihood,
        recon_reduction,
        kl_reduction,
        half,
        logvar_clamp,
        full=full,
        free_bits=free_bits,
        free_bits_form=free_bits_form,
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        _check_tensor(name, value)
    elif not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number or a tensor")


def check_scale(
    log_variance: float | Tensor | str, log_scale: float | Tensor | str, spec: Spec
) -> float | Tensor | Literal["batch"]:
    """The one of the two that the likelihood has, and that the other was not given."""
    for name, value, meant in (
        ("log_variance", log_variance, "gaussian"),
        ("log_scale", log_scale, "laplace"),
    ):
        if spec.likelihood != meant and (isinstance(value, (Tensor, str)) or value != 0):
            raise ValueError(
                f'{name}: given with likelihood "{spec.likelihood}", expected it with "{meant}" only'
            )
    if spec.likelihood == "laplace":
        if isinstance(log_scale, str):
            raise TypeError(
                f"log_scale: got {log_scale!r}, expected a number or a tensor; the optimum for a batch is "
                "log_variance's alone"
            )
        check_number("log_scale", log_scale)
        return log_scale
    if not isinstance(log_variance, str):
        check_number("log_variance", log_variance)
        return log_variance
    check_choice("log_variance", log_variance, ("a number", "a tensor", "batch"))
    if spec.per_sample:
        raise ValueError(
            'log_variance: got "batch", the optimum for a whole batch, with reduction "none"; '
            "expected another reduction, or a number or a tensor"
        )
    return "batch"


def check_capacity(capacity: float | Tensor | None, spec: Spec) -> None:
    if capacity is None:
        return
    if spec.per_sample:
        raise ValueError(
            'capacity: it is compared with the KL of a batch, which reduction "none" does not take; expected '
            "another reduction"
        )
    if spec.free_bits is not None:
        raise ValueError(f"capacity: given with free_bits {spec.free_bits}, expected one of the two")
    check_number("capacity", capacity)
    if isinstance(capacity, Tensor):
        if capacity.numel() != 1:
            raise ValueError(f"capacity: got shape {tuple(capacity.shape)}, expected a number or one element")
    elif not 0 <= capacity < math.inf:
        raise ValueError(f"capacity: got {capacity}, expected nats a datum, at least 0")


def scale_form(log_scale: float | Tensor, name: str, inputs: Inputs, extents: Extents) -> ScaleForm:
    """How log_scale is laid out, from its shape."""
    if not isinstance(log_scale, Tensor) or log_scale.numel() == 1:
        return "scalar"
    _check_floating(name, log_scale)
    if log_scale.device != inputs.like.device:
        raise ValueError(f"{name}: got device {log_scale.device}, expected {inputs.like.device} as for x_hat")
    samples, batch, features, _ = extents
    shape = tuple(log_scale.shape)
    if math.prod(shape) == features:
        return "features"
    if shape[0] == batch and _row(log_scale) == features:
        return "elements"
    if shape[:2] == (samples, batch) and math.prod(shape[2:]) == features:
        return "samples"
    expected = f"one element, [*features] with {features}, or [{batch}, *features]"
    if samples > 1:
        expected += f", or [{samples}, {batch}, *features]"
    raise ValueError(f"{name}: got shape {shape}, expected {expected}")


def _check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor, as of torch.as_tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor, as of .to_dense()")
    if value.is_complex():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected real numbers, as of .real")
    return value


def _check_floating(name: str, value: object) -> Tensor:
    tensor = _check_tensor(name, value)
    if tensor.dtype not in _FLOATING:
        kinds = "float32, float64, bfloat16 or float16"
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, expected a floating-point tensor ({kinds}); convert it by .to"
        )
    return tensor


def latent_extents(mu: Tensor, logvar: Tensor) -> tuple[int, int]:
    """(B, Z) of mu and logvar."""
    _check_floating("mu", mu)
    _check_floating("logvar", logvar)
    if mu.ndim == 0 or (
        mu.shape != logvar.shape
        and (logvar.ndim == 0 or mu.shape[0] != logvar.shape[0] or _row(mu) != _row(logvar))
    ):
        raise ValueError(
            f"mu, logvar: got shapes {tuple(mu.shape)} and {tuple(logvar.shape)}, expected [B, *latents] "
            "with the same number of latents"
        )
    if mu.device != logvar.device:
        raise ValueError(f"mu, logvar: got devices {mu.device} and {logvar.device}, expected the same")
    return mu.shape[0], _row(mu)


def check_integer(name: str, value: object) -> int:
    """An int, of what is one without rounding, such as NumPy's."""
    if isinstance(value, int) or isinstance(value, torch.SymInt):  # noqa: SIM101 -- the first is all, most often
        return value  # type: ignore[return-value]  # SymInt stands for one while a graph is made
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an int") from None


def check_noise(seed: int | Tensor, offset: int, first_row: int) -> tuple[int | Tensor, int, int]:
    """Seed, offset and first row; the first two as signed 64 bits where they are numbers."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            got = f"a tensor of {seed.dtype} and shape {tuple(seed.shape)}"
            raise TypeError(f"seed: got {got}, expected an int, or one torch.int64")
    else:
        seed = _signed("seed", seed)
    first_row = check_integer("first_row", first_row)
    if first_row < 0:
        raise ValueError(f"first_row: got {first_row}, expected at least 0")
    return seed, _signed("offset", offset), first_row


def _signed(name: str, value: int) -> int:
    value = check_integer(name, value)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: got {value}, expected 64 bits, from {-(2**63)} to {2**64 - 1}")
    return value if value < 2**63 else value - 2**64


def _row(tensor: Tensor) -> int:
    """Elements of one row of the leading dimension."""
    return math.prod(tensor.shape[1:])


def elbo_extents(inputs: Inputs) -> Extents:
    """The sizes of a call, after checking that its arguments agree."""
    _, _, mu, logvar, kl, weight, beta, _, _ = inputs
    x_hat, x = _check_floating("x_hat", inputs.x_hat), _check_tensor("x", inputs.x)
    if x.ndim == 0 or x_hat.ndim == 0:
        raise ValueError(
            f"x_hat, x: got shapes {tuple(x_hat.shape)} and {tuple(x.shape)}, expected [B, *features]"
        )
    if x.dtype not in _FLOATING and x.dtype != torch.uint8:
        raise TypeError(f"x: got dtype {x.dtype}, expected a floating-point tensor, or uint8 meaning x / 255")
    batch, features, samples = x.shape[0], _row(x), 1
    if x_hat.shape != x.shape and not (x_hat.shape[0] == batch and _row(x_hat) == features):
        if x_hat.ndim < 2 or x_hat.shape[1] != batch or math.prod(x_hat.shape[2:]) != features:
            raise ValueError(
                f"x_hat: got shape {tuple(x_hat.shape)} for x of shape {tuple(x.shape)}, expected "
                f"[{batch}, ...] or [K, {batch}, ...] with {features} features each"
            )
        samples = x_hat.shape[0]
        if samples == 0:
            raise ValueError("x_hat: got 0 samples (K = 0), expected at least 1")
    latents = 0
    if kl is not None:
        if mu is not None or logvar is not None:
            raise ValueError("kl: given beside mu or logvar, expected either kl or both of mu and logvar")
        _check_tensor("kl", kl)
        if kl.shape != (batch,):
            raise ValueError(f"kl: got shape {tuple(kl.shape)}, expected ({batch},), the KL of each datum")
        latents = 1
    elif mu is None or logvar is None:
        raise ValueError("mu, logvar: expected both, or kl instead of them")
    else:
        rows, latents = latent_extents(mu, logvar)
        if rows != batch:
            raise ValueError(f"mu: got batch size {rows}, expected {batch} as in x")
    if weight is not None:
        _check_tensor("weight", weight)
    for name, tensor in (("x", x), ("mu", mu), ("kl", kl), ("weight", weight)):
        if tensor is not None and tensor.device != x_hat.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x_hat.device} as for x_hat")
    if weight is not None and weight.shape != (batch,):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected ({batch},), one factor a datum")
    check_number("beta", beta)
    if isinstance(beta, Tensor) and beta.numel() != 1 and (kl is not None or beta.numel() != latents):
        expected = (
            "one value, since kl is given" if kl is not None else f"one value, or {latents}, one a latent"
        )
        raise ValueError(f"beta: got shape {tuple(beta.shape)}, expected {expected}")
    return Extents(samples, batch, features, latents)
