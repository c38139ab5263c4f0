"""The Triton kernels on a real GPU: the interpreter's checks again, and what the interpreter cannot see."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from gpu import nothing_waits, profiled
from processes import run_checks
from torch import Tensor

from fastvae import ELBOLoss
from fastvae.ops.types import Extents, Forward, Gradients, Inputs, Likelihood, Needs, Spec

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.gpu
SHAPES = [(128, 784, 20), (1024, 784, 64), (256, 12288, 128), (64, 196608, 4096)]


@pytest.fixture
def launcher() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed")
    from fastvae.ops import triton

    return triton


class Call:
    """A fused ELBO, sampling included, with its inputs on the GPU."""

    def __init__(
        self, launcher: ModuleType, batch: int, features: int, latents: int,
        likelihood: Likelihood = "gaussian",
    ) -> None:  # fmt: skip
        self.launcher = launcher
        self.x_hat = torch.randn(batch, features, device="cuda")
        self.x = torch.rand(batch, features, device="cuda")
        self.seed = torch.tensor(11, device="cuda")
        self.inputs = Inputs(
            self.x_hat,
            self.x,
            *torch.randn(2, batch, latents, device="cuda"),
            beta=torch.tensor(0.5, device="cuda"),
            log_scale=torch.tensor(-0.3, device="cuda") if likelihood == "gaussian" else 0.0,
            seed=self.seed,
        )
        self.g_loss = torch.tensor(2.0, device="cuda")
        self.g_z = torch.randn(batch, latents, device="cuda")
        self.spec, self.extents = Spec(likelihood, sample=True), Extents(1, batch, features, latents)
        self.needs = Needs(True, True, True, False, likelihood == "gaussian")

    def forward(self) -> Forward:
        result: Forward = self.launcher.forward(self.inputs, self.spec, self.extents)
        return result

    def backward(self) -> Gradients:
        result: Gradients = self.launcher.backward(
            self.inputs, self.spec, self.extents, Forward(self.g_loss, z=self.g_z), self.needs
        )
        return result

    def both(self) -> list[Tensor]:
        return [t for t in (*self.forward(), *self.backward()) if t is not None]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    call.both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call.both()
    return graph, outputs


def device_events(run: Callable[[], object]) -> list[str]:
    """Names of what one run puts on the GPU."""
    run()
    torch.cuda.synchronize()
    return profiled(run)[1]


@pytest.mark.parametrize("checks", ["elbo_checks.py", "gather_checks.py", "rng_checks.py"])
def test_numbers_on_the_gpu(checks: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # each of some hundred kernels is compiled, which takes most of the time
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    run_checks(checks, *workers, TRITON_INTERPRET="0", FASTVAE_CHECK_DEVICE="cuda")


def test_one_launch_forward_and_one_backward(launcher: ModuleType) -> None:
    call = Call(launcher, 128, 784, 20)
    assert device_events(call.forward) == ["elbo_forward_kernel"]
    assert device_events(call.backward) == ["elbo_backward_kernel"]


def test_a_replay_launches_one_kernel_forward_and_one_backward() -> None:
    mu, logvar, x_hat = (torch.randn(128, n, device="cuda", requires_grad=True) for n in (20, 20, 784))
    x, g = torch.rand(128, 784, device="cuda"), torch.ones((), device="cuda")
    loss_fn = ELBOLoss()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_fn(x_hat, x, mu, logvar), (x_hat, mu, logvar), g)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = both()
    assert sorted(device_events(graph.replay)) == ["elbo_backward_kernel", "elbo_forward_kernel"]
    assert_equal(list(gradients), list(both()))


def test_nothing_waits_for_the_gpu(launcher: ModuleType) -> None:
    call = Call(launcher, 128, 784, 20)
    call.both()
    with nothing_waits():
        call.both()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_are_bit_equal(launcher: ModuleType, shape: tuple[int, int, int]) -> None:
    call = Call(launcher, *shape)
    expected = call.both()
    for _ in range(20):
        assert_equal(call.both(), expected)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_large_shapes_agree_with_float64(launcher: ModuleType, shape: tuple[int, int, int]) -> None:
    call = Call(launcher, *shape)
    values = call.forward()
    assert values.recon is not None
    scaled = (call.x_hat.double() - call.x.double()).square() * torch.exp(torch.tensor(0.3).double())
    recon = 0.5 * (scaled - 0.3 + 1.8378770664093453).sum(1).mean()
    torch.testing.assert_close(values.recon.double(), recon, rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "bernoulli"])
def test_graph_replays_are_bit_equal_and_read_the_seed(launcher: ModuleType, likelihood: Likelihood) -> None:
    call = Call(launcher, 256, 784, 20, likelihood)
    graph, outputs = capture(call)
    for seed in (11, 12, 11):
        call.seed.fill_(seed)
        graph.replay()
        replayed = [output.clone() for output in outputs]
        assert_equal(replayed, call.both())


def test_graphs_side_by_side(launcher: ModuleType) -> None:
    """Two graphs and eager calls on three streams at once do not share a ticket."""
    calls = [Call(launcher, 1024, 784, 64) for _ in range(3)]
    expected = [call.both() for call in calls]
    graphs = [capture(call) for call in calls[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            results.append(calls[2].both())
    torch.cuda.synchronize()
    for (_, outputs), values in zip(graphs, expected, strict=False):
        assert_equal(outputs, values)
    for result in results:
        assert_equal(result, expected[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_torch_compile_makes_graphs_of_it() -> None:
    """Where nothing that a call keeps may be from the memory of its graphs."""
    loss_fn = ELBOLoss(log_variance=torch.zeros((), device="cuda"), likelihood="gaussian")
    compiled = torch.compile(loss_fn, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        mu, logvar, x_hat = (torch.randn(128, n, device="cuda", requires_grad=True) for n in (20, 20, 784))
        x = torch.rand(128, 784, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(x_hat, x, mu, logvar), (x_hat, mu, logvar))
        assert_equal(
            list(found), list(torch.autograd.grad(loss_fn(x_hat, x, mu, logvar), (x_hat, mu, logvar)))
        )


def test_more_than_2_to_the_31_elements(launcher: ModuleType) -> None:
    batch, features = 3, 2**30
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x_hat = torch.zeros(batch, features, dtype=torch.bfloat16, device="cuda")
    x_hat[-1, -1] = 2
    x = torch.zeros(1, features, dtype=torch.bfloat16, device="cuda").expand(batch, features)
    spec, extents, kl = Spec("mse", "none", "none"), Extents(1, batch, features, 1), torch.zeros(3).cuda()
    inputs = Inputs(x_hat, x, kl=kl)
    values = launcher.forward(inputs, spec, extents)
    assert values.recon.tolist() == [0, 0, 4]
    upstream, needs = Forward(torch.ones(3, device="cuda")), Needs(True, False, False, False, False)
    gradient = launcher.backward(inputs, spec, extents, upstream, needs).x_hat
    assert gradient[-1, -1] == 4
    assert gradient.count_nonzero() == 1
