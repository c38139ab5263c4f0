"""What is compiled: every use of the stages, at sizes of every class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from launches import Compiled, compile_for, record

from fastvae.data import Transform
from fastvae.data.gather import Gather
from fastvae.ops import triton as launcher
from fastvae.ops.types import Extents, Forward, Inputs, Needs, Reduction, ScaleForm, Spec

FP32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8


def elbo(
    batch: int, features: int, latents: int, *, samples: int = 1, dtype: torch.dtype = FP32,
    x_dtype: torch.dtype | None = None, likelihood: Any = "mse", reduction: Reduction = "batchmean",
    sample: bool = False, beta: Any = 1.0, weighted: bool = False, clamp: Any = None, kl_given: bool = False,
    scale_form: ScaleForm = "scalar", free_bits: float | None = None, together: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """A forward and a backward with reconstruction, and both `together`; memory is never touched."""

    def call() -> None:
        lead = () if samples == 1 else (samples,)
        x_hat = torch.empty(*lead, batch, features, dtype=dtype)
        x = torch.empty(batch, features, dtype=x_dtype or dtype)
        mu = None if kl_given else torch.empty(batch, latents, dtype=dtype)
        logvar = None if kl_given else torch.empty(batch, latents, dtype=dtype)
        kl = torch.empty(batch) if kl_given else None
        weight = torch.ones(batch) if weighted else None
        seed = torch.zeros((), dtype=torch.int64) if sample else None
        spec = Spec(
            likelihood, reduction, reduction, logvar_clamp=clamp, sample=sample, scale_form=scale_form,
            free_bits=free_bits,
        )  # fmt: skip
        extents = Extents(samples, batch, features, latents)
        scaled = likelihood in ("gaussian", "laplace")
        log_scale = torch.empty(spec.scale_shape(extents)) if scaled else 0.0
        inputs = Inputs(x_hat, x, mu, logvar, kl, weight, beta, log_scale, seed)
        launcher.forward(inputs, spec, extents)
        g_loss = torch.ones(batch if reduction == "none" else ())
        g_z = torch.empty(samples, batch, latents, dtype=dtype) if sample else None
        needs = Needs(True, not kl_given, not kl_given, kl_given, scaled)
        launcher.backward(inputs, spec, extents, Forward(g_loss, z=g_z), needs)
        if together:
            launcher.forward_and_gradients(inputs, spec, extents, needs)

    return call


def latent_kl(batch: int, latents: int) -> Callable[[], None]:
    """The sums of batch-form free bits."""

    def call() -> None:
        mu, logvar = torch.empty(2, batch, latents)
        launcher.latent_kl_sums(Inputs(mu=mu, logvar=logvar), Spec(), Extents(1, batch, 0, latents))

    return call


def sampling(batch: int, latents: int, *, samples: int = 1, dtype: torch.dtype = FP32) -> Callable[[], None]:
    """A forward and a backward of sample_and_kl."""

    def call() -> None:
        mu, logvar = torch.empty(2, batch, latents, dtype=dtype)
        seed = torch.zeros((), dtype=torch.int64)
        spec, extents = Spec(sample=True), Extents(samples, batch, 0, latents)
        inputs = Inputs(mu=mu, logvar=logvar, seed=seed)
        launcher.forward(inputs, spec, extents)
        g_z, g_kl = torch.empty(samples, batch, latents, dtype=dtype), torch.empty(batch)
        needs = Needs(False, True, True, False, False)
        launcher.backward(inputs, spec, extents, Forward(z=g_z, kl_rows=g_kl), needs)

    return call


def gathered(
    *item_shape: int,
    dtype: torch.dtype = FP32,
    x_dtype: torch.dtype = UINT8,
    transform: Transform | None = None,
    batch: int = 128,
    first: int = 0,
) -> Callable[[], None]:
    """A batch of data on the device, with labels, of some samples of a source."""

    def call() -> None:
        form = Gather(item_shape, dtype, transform, is_uint8=x_dtype == UINT8, device=torch.device("cpu"))
        rows, numbers, labels = torch.zeros(3, 1024, dtype=torch.int64)
        out = torch.empty(batch, *form.item_shape, dtype=dtype)
        data, labels_out = (
            torch.empty(1024, *item_shape, dtype=x_dtype),
            torch.empty(batch, dtype=torch.int64),
        )
        form(
            data, out, rows=rows, first=first, key=form.key(3, 4), numbers=numbers, labels=labels,
            labels_out=labels_out,
        )  # fmt: skip

    return call


CASES: dict[str, Callable[[], None]] = {
    "mse small": elbo(128, 784, 20),
    "mse": elbo(1024, 784, 64),
    "mse large": elbo(256, 12288, 128),
    "mse huge": elbo(64, 196608, 4096),
    "gaussian": elbo(256, 12288, 128, likelihood="gaussian"),
    "bernoulli": elbo(1024, 784, 64, likelihood="bernoulli"),
    "kl given": elbo(1024, 784, 64, kl_given=True),
    "together": elbo(1024, 65536, 128, together=True),
    "together bf16": elbo(2048, 65536, 128, dtype=BF16, together=True),
    "together by kl": elbo(128, 784, 20, kl_given=True, weighted=True, likelihood="bernoulli", together=True),
    "bytes": elbo(128, 784, 20, x_dtype=UINT8, likelihood="bernoulli"),
    "bf16": elbo(256, 12288, 128, dtype=BF16, x_dtype=FP32),
    "bf16 gaussian": elbo(256, 12288, 128, dtype=BF16, likelihood="gaussian"),
    "bf16 bernoulli": elbo(256, 12288, 128, dtype=BF16, likelihood="bernoulli"),
    "samples": elbo(256, 784, 64, samples=8, reduction="none", weighted=True, beta=torch.ones(64)),
    "fused": elbo(128, 784, 20, likelihood="gaussian", sample=True),
    "fused odd": elbo(128, 7, 5, likelihood="bernoulli", sample=True, clamp=(-10.0, 10.0)),
    "fused one": elbo(128, 1, 1, sample=True),
    "fused huge": elbo(64, 196608, 4096, samples=4, likelihood="bernoulli", sample=True, reduction="none"),
    "laplace": elbo(1024, 784, 64, likelihood="laplace"),
    "probabilities": elbo(1024, 784, 64, likelihood="probabilities"),
    "scale by feature": elbo(1024, 784, 64, likelihood="gaussian", scale_form="features"),
    "scale by element": elbo(256, 784, 64, samples=4, likelihood="laplace", scale_form="elements"),
    "scale by sample": elbo(256, 784, 64, samples=4, dtype=BF16, likelihood="gaussian", scale_form="samples"),
    "free bits": elbo(1024, 784, 64, free_bits=0.5),
    "latent kl": latent_kl(1024, 64),
    "sample": sampling(1024, 64),
    "sample small": sampling(128, 20),
    "sample huge": sampling(64, 4096, samples=4),
    "sample bf16": sampling(1024, 64, dtype=BF16),
    "gather": gathered(1, 28, 28),
    "gather bf16": gathered(784, dtype=BF16),
    "gather large": gathered(3, 64, 64),
    "gather bytes": gathered(3, 64, 64, dtype=UINT8),
    "gather floats": gathered(3072, dtype=BF16, x_dtype=FP32),
    "gather odd": gathered(7),
    "gather moved": gathered(3, 64, 64, transform=Transform(hflip=True, padding=4)),
    "gather binarized": gathered(1, 28, 28, transform=Transform(binarize=True)),
    "gather all": gathered(
        3,
        32,
        32,
        dtype=BF16,
        x_dtype=FP32,
        transform=Transform(hflip=True, padding=2, crop=(28, 28), binarize=True),
    ),
    "gather scaled": gathered(3, 64, 64, transform=Transform(scale=1 / 127.5, shift=-1.0)),
    "sample odd": sampling(64, 7, dtype=BF16),
}


def compile_case(target: tuple[str, int]) -> list[tuple[str, Compiled]]:
    """Both kernels of a case, by name."""
    name, capability = target
    launches = record(CASES[name])
    return [(launch.kernel.__name__, compile_for(launch, capability)) for launch in launches]
