"""Checks of compiled kernels, collected only by the process that tests/test_triton_compile.py starts.

Kernels are compiled with the arguments that the launcher really hands over; no GPU is needed.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from launches import Compiled, Launch, compile_for, record, source

from fastvae.ops import triton as launcher
from fastvae.ops.types import Extents, Likelihood, Needs, Reduction, Spec

FP32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8


def elbo(
    batch: int, features: int, latents: int, *, samples: int = 1, dtype: torch.dtype = FP32,
    x_dtype: torch.dtype | None = None, likelihood: Likelihood = "mse", reduction: Reduction = "batchmean",
    sample: bool = False, beta: Any = 1.0, weighted: bool = False, clamp: Any = None, kl_given: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """A forward and a backward with reconstruction; memory is asked for and never touched."""

    def call() -> None:
        lead = () if samples == 1 else (samples,)
        x_hat = torch.empty(*lead, batch, features, dtype=dtype)
        x = torch.empty(batch, features, dtype=x_dtype or dtype)
        mu = None if kl_given else torch.empty(batch, latents, dtype=dtype)
        logvar = None if kl_given else torch.empty(batch, latents, dtype=dtype)
        kl = torch.empty(batch) if kl_given else None
        weight = torch.ones(batch) if weighted else None
        variance = torch.zeros(()) if likelihood == "gaussian" else 0.0
        seed = torch.zeros((), dtype=torch.int64) if sample else None
        spec = Spec(likelihood, reduction, reduction, logvar_clamp=clamp, sample=sample)
        extents = Extents(samples, batch, features, latents)
        launcher.forward(x_hat, x, mu, logvar, kl, weight, beta, variance, seed, spec, extents)
        g_loss = torch.ones(batch if reduction == "none" else ())
        g_z = torch.empty(samples, batch, latents, dtype=dtype) if sample else None
        needs = Needs(True, not kl_given, not kl_given, kl_given, likelihood == "gaussian")
        launcher.backward(
            x_hat, x, mu, logvar, weight, beta, variance, seed, spec, extents,
            g_loss, None, None, g_z, None, needs,
        )  # fmt: skip

    return call


def sampling(batch: int, latents: int, *, samples: int = 1, dtype: torch.dtype = FP32) -> Callable[[], None]:
    """A forward and a backward of sample_and_kl."""

    def call() -> None:
        mu, logvar = torch.empty(2, batch, latents, dtype=dtype)
        seed = torch.zeros((), dtype=torch.int64)
        spec, extents = Spec(sample=True), Extents(samples, batch, 0, latents)
        launcher.forward(None, None, mu, logvar, None, None, 1.0, 0.0, seed, spec, extents)
        g_z, g_kl = torch.empty(samples, batch, latents, dtype=dtype), torch.empty(batch)
        needs = Needs(False, True, True, False, False)
        launcher.backward(
            None, None, mu, logvar, None, 1.0, 0.0, seed, spec, extents, None, None, None, g_z, g_kl, needs
        )

    return call


CASES: dict[str, Callable[[], None]] = {
    "mse small": elbo(128, 784, 20),
    "mse": elbo(1024, 784, 64),
    "mse large": elbo(256, 12288, 128),
    "mse huge": elbo(64, 196608, 4096),
    "gaussian": elbo(256, 12288, 128, likelihood="gaussian"),
    "bernoulli": elbo(1024, 784, 64, likelihood="bernoulli"),
    "kl given": elbo(1024, 784, 64, kl_given=True),
    "bytes": elbo(128, 784, 20, x_dtype=UINT8, likelihood="bernoulli"),
    "bf16": elbo(256, 12288, 128, dtype=BF16, x_dtype=FP32),
    "bf16 gaussian": elbo(256, 12288, 128, dtype=BF16, likelihood="gaussian"),
    "bf16 bernoulli": elbo(256, 12288, 128, dtype=BF16, likelihood="bernoulli"),
    "samples": elbo(256, 784, 64, samples=8, reduction="none", weighted=True, beta=torch.ones(64)),
    "fused": elbo(128, 784, 20, likelihood="gaussian", sample=True),
    "fused odd": elbo(128, 7, 5, likelihood="bernoulli", sample=True, clamp=(-10.0, 10.0)),
    "fused one": elbo(128, 1, 1, sample=True),
    "fused huge": elbo(64, 196608, 4096, samples=4, likelihood="bernoulli", sample=True, reduction="none"),
    "sample": sampling(1024, 64),
    "sample small": sampling(128, 20),
    "sample huge": sampling(64, 4096, samples=4),
    "sample bf16": sampling(1024, 64, dtype=BF16),
    "sample odd": sampling(64, 7, dtype=BF16),
}
ALSO_ELSEWHERE = ("mse", "bf16 gaussian", "fused odd", "fused huge", "sample")
TARGETS = [(name, 90) for name in CASES]
TARGETS += [(name, capability) for name in ALSO_ELSEWHERE for capability in (80, 100)]


def compile_case(target: tuple[str, int]) -> list[tuple[str, Compiled]]:
    """Both kernels of a case, by name."""
    name, capability = target
    launches = record(CASES[name])
    return [(launch.kernel.__name__, compile_for(launch, capability)) for launch in launches]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], list[tuple[str, Compiled]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return dict(zip(TARGETS, pool.map(compile_case, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]} sm_{target[1]}")
def test_no_spills_and_no_float64(target: tuple[str, int], compiled: Any) -> None:
    assert len(compiled[target]) == 2
    for name, kernel in compiled[target]:
        print(f"{target[0]:16} sm_{target[1]:<4} {name:22} {kernel.registers:4} registers")
        assert kernel.local_bytes == 0, f"{name}: {kernel.local_bytes} bytes of local memory"
        assert kernel.stack_bytes == 0, f"{name}: {kernel.stack_bytes} bytes of stack"
        assert ".f64" not in kernel.ptx, f"{name}: float64 in the PTX"


@pytest.mark.parametrize("name", ["mse small", "mse large", "mse huge", "bf16", "samples"])
def test_loads_and_stores_are_16_bytes_wide(name: str, compiled: Any) -> None:
    forward, backward = (kernel.ptx for _, kernel in compiled[name, 90])
    wide_load, wide_store = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
    assert len(re.findall(wide_load, forward)) >= 2
    assert len(re.findall(wide_load, backward)) >= 2
    assert re.search(wide_store, backward)


def test_registers_leave_room_for_1024_threads(compiled: Any) -> None:
    for name in ("mse small", "mse", "mse large", "mse huge", "gaussian", "bernoulli"):
        for kernel_name, kernel in compiled[name, 90]:
            assert kernel.registers <= 64, f"{name}, {kernel_name}: {kernel.registers} registers"


def _compiled_in(launch: Launch) -> tuple[str, int]:
    return source(launch).hash(), launch.arguments["num_warps"]


@pytest.mark.parametrize("batch", [96, 37, 16, 1])
def test_a_last_batch_does_not_compile_again(batch: int) -> None:
    """Neither for its size, 1 and multiples of 16 included, nor for another beta."""
    for build in (elbo, _odd_elbo):
        usual = [_compiled_in(launch) for launch in record(build(128, 784, 20))]
        last = [_compiled_in(launch) for launch in record(build(batch, 784, 20, beta=2.5))]
        assert usual == last
    usual = [_compiled_in(launch) for launch in record(sampling(128, 20))]
    assert usual == [_compiled_in(launch) for launch in record(sampling(batch, 20))]


def _odd_elbo(batch: int, features: int, latents: int, beta: float = 1.0) -> Callable[[], None]:
    return elbo(
        batch, features + 1, latents + 1, samples=3, beta=beta, likelihood="gaussian", sample=True,
        reduction="none", weighted=True,
    )  # fmt: skip
