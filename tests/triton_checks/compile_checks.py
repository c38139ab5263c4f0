"""Checks of compiled kernels, collected only by the process of tests/test_triton_compile.py.

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
from cases import CASES, compile_case, elbo, gathered, sampling
from launches import Compiled, Launch, NoGPU, record, source
from triton.compiler import CompiledKernel
from triton.runtime import driver

import fastvae.launch
from fastvae.data import Transform
from fastvae.ops import triton as launcher

ALSO_ELSEWHERE = ("mse", "bf16 gaussian", "fused odd", "fused huge", "sample", "scale by element")
ALSO_ELSEWHERE += ("gather large", "gather all", "gather scaled")
IN_FLOAT64 = ("gather scaled",)  # as the host does it
TARGETS = [(name, 90) for name in CASES]
TARGETS += [(name, capability) for name in ALSO_ELSEWHERE for capability in (80, 100)]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], list[tuple[str, Compiled]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return dict(zip(TARGETS, pool.map(compile_case, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]} sm_{target[1]}")
def test_no_spills_and_no_float64(target: tuple[str, int], compiled: Any) -> None:
    assert compiled[target]
    for name, kernel in compiled[target]:
        print(f"{target[0]:16} sm_{target[1]:<4} {name:22} {kernel.registers:4} registers")
        assert kernel.local_bytes == 0, f"{name}: {kernel.local_bytes} bytes of local memory"
        assert kernel.stack_bytes == 0, f"{name}: {kernel.stack_bytes} bytes of stack"
        if target[0] not in IN_FLOAT64:
            assert ".f64" not in kernel.ptx, f"{name}: float64 in the PTX"


@pytest.mark.parametrize("name", ["mse small", "mse large", "mse huge", "bf16", "samples"])
def test_loads_and_stores_are_16_bytes_wide(name: str, compiled: Any) -> None:
    forward, backward = (kernel.ptx for _, kernel in compiled[name, 90])
    wide_load, wide_store = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
    assert len(re.findall(wide_load, forward)) >= 2
    assert len(re.findall(wide_load, backward)) >= 2
    assert re.search(wide_store, backward)


@pytest.mark.parametrize("name", ["together", "together bf16"])
def test_a_forward_with_the_gradient_is_as_wide(name: str, compiled: Any) -> None:
    kernel = [kernel for which, kernel in compiled[name, 90] if which == "elbo_forward_kernel"][-1]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.ptx)) >= 2
    assert re.search(r"st\.global\S*\.v4\.b32", kernel.ptx)
    assert kernel.registers <= 64


@pytest.mark.parametrize(
    ("name", "load"),
    [("gather", "b32"), ("gather bf16", "v2.b32"), ("gather bytes", "v4.b32"), ("gather floats", "v4.b32")],
)
def test_a_gather_writes_16_bytes_at_once(name: str, load: str, compiled: Any) -> None:
    ((_, kernel),) = compiled[name, 90]
    assert re.search(r"st\.global\S*\.v4\.b32", kernel.ptx)
    assert re.search(rf"ld\.global\.{load}", kernel.ptx)


def test_a_gather_rounds_as_the_host_does(compiled: Any) -> None:
    """To nearest even to 16 bits; a product and a sum in float64 apart."""
    for capability in (80, 90, 100):
        ((_, scaled),) = compiled["gather scaled", capability]
        assert "mul.rn.f64" in scaled.ptx
        assert "add.rn.f64" in scaled.ptx
        assert "fma.rn" not in scaled.ptx
    ((_, kernel),) = compiled["gather bf16", 90]
    assert "cvt.rn.bf16x2.f32" in kernel.ptx


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
    for transform in (None, Transform(binarize=True, hflip=True)):
        usual, last = (
            [_compiled_in(launch) for launch in record(gathered(1, 28, 28, transform=transform, **where))]
            for where in ({}, {"batch": batch, "first": 3 * batch})
        )
        assert usual == last
    usual = [_compiled_in(launch) for launch in record(sampling(128, 20))]
    assert usual == [_compiled_in(launch) for launch in record(sampling(batch, 20))]


def test_a_graph_s_own_tickets_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture is no place to compile in; each launch in one has another ticket."""
    build = elbo(128, 784, 20, likelihood="gaussian")
    usual = [_compiled_in(launch) for launch in record(build)]
    monkeypatch.setattr(launcher, "_ticket", launcher._graph_ticket)
    for _ in range(3):
        assert usual == [_compiled_in(launch) for launch in record(build)]


def test_triton_takes_what_it_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own way from the call to the driver, which looks at arguments as `source` does."""
    monkeypatch.setattr(driver, "_active", gpu := NoGPU())
    made = ["elbo_forward_kernel", "elbo_backward_kernel", "gather_kernel"]
    for batch in (128, 37, 1):
        elbo(batch, 784, 20, likelihood="gaussian", sample=True)()
        gathered(1, 28, 28, batch=batch, first=batch)()
        assert gpu.loaded == made
    assert gpu.launched[-3:] == [(1, 1, 1)] * 3


def test_launches_are_of_what_triton_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched again, and so not by Triton, for arguments that differ in what may be compiled in."""
    monkeypatch.setattr(driver, "_active", NoGPU())
    monkeypatch.setattr(fastvae.launch, "_compiled", {})
    used: list[CompiledKernel] = []
    get = CompiledKernel.__getitem__
    monkeypatch.setattr(
        CompiledKernel, "__getitem__", lambda self, grid: (used.append(self), get(self, grid))[1]
    )
    builds = [
        elbo(128, 784, 20),
        elbo(37, 784, 20, beta=0.3),
        elbo(128, 785, 20),
        elbo(128, 784, 20, dtype=torch.bfloat16),
        elbo(128, 784, 20, x_dtype=torch.uint8),
        elbo(128, 784, 20, beta=torch.ones(()), weighted=True),
        gathered(784),
        gathered(784, dtype=torch.bfloat16),
    ]
    launches = [record(build)[0] for build in builds]
    aligned = launches[0].arguments
    moved = torch.empty(128 * 784 + 1)[1:].view(128, 784)
    launches += [
        Launch(launches[0].kernel, launches[0].grid, {**aligned, name: moved}) for name in ("p_x", "p_x_hat")
    ]
    for _ in range(2):
        for launch in launches:
            fastvae.launch.launch(launch.kernel, torch.device("cpu"), launch.grid, launch.arguments)
    expected = [launch.kernel[launch.grid](**launch.arguments) for launch in launches]
    assert len(used) == len(launches) + 1  # at once for another batch and another beta
    assert all(one is other for one, other in zip(used[1:], expected, strict=True))
    assert len(set(map(id, expected))) == len(launches) - 1


def _odd_elbo(batch: int, features: int, latents: int, beta: float = 1.0) -> Callable[[], None]:
    return elbo(
        batch, features + 1, latents + 1, samples=3, beta=beta, likelihood="gaussian", sample=True,
        reduction="none", weighted=True,
    )  # fmt: skip
