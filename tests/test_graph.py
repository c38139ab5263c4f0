"""The step as a graph, by a stand-in for CUDA's on a CPU: the same training, or eager where that is safer."""

from __future__ import annotations

import _thread
import contextlib
import gc
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from captures import CPUCapture, Watched, tensors_of
from gpu import nothing_waits, profiled
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import VAE
from fastvae.inference.evaluate import negative_elbo
from fastvae.training import graph as graph_module
from fastvae.training.config import TrainConfig
from fastvae.training.fused_adam import FusedAdam
from fastvae.training.graph import WARM_UPS, CaptureError, CUDACapture
from fastvae.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("seed")
STEPS = 14
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fastvae.training.optimizer.NativeAdam", FusedAdam)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.set_num_threads(threads)


def mlp() -> VAE:
    return VAE.mlp((12,), (8,), 4)


def gaussian() -> VAE:
    return VAE.mlp((12,), (8,), 4, likelihood="gaussian")


def conv() -> VAE:
    return VAE.conv((1, 8, 8), 2)


class Noisy(nn.Module):
    """Layers with a state and noise of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8))
        self.decoder = nn.Linear(4, 12)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def batches(*item: int, seed: int = 0) -> list[Tensor]:
    """Of two epochs and more, whose last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(20 if i % 3 else 7, *item, generator=generator) for i in range(1, STEPS + 1)]


def made_step(
    make: Callable[[], nn.Module],
    config: TrainConfig,
    amp_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    extra_loss: Callable[..., Tensor] | None = None,
) -> TrainStep:
    torch.manual_seed(0)
    model = make().to(device)
    loss = negative_elbo(
        model, config.beta, capacity=config.capacity, free_bits=config.free_bits,
        free_bits_form=config.free_bits_form,
    )  # fmt: skip
    return TrainStep.from_config(model, loss.to(device), config, STEPS, amp_dtype, extra_loss)


def trained(
    make: Callable[[], nn.Module],
    data: list[Tensor],
    config: TrainConfig,
    amp_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    captured: bool = True,
    capture: CPUCapture | None = None,
    extra_loss: Callable[..., Tensor] | None = None,
) -> TrainStep:
    """The step after a training on `data`: the same weights and noise each time, captured or not."""
    config = config if captured else config.replace(cuda_graph="never")
    step = made_step(make, config, amp_dtype, device, extra_loss)
    if captured and device == "cpu":
        step.use_graphs(CPUCapture() if capture is None else capture)
    torch.manual_seed(1)
    run(step, data)
    return step


def run(step: TrainStep, data: list[Tensor]) -> None:
    with Watched() if step.graphs is None and step.weights.flat.is_cpu else contextlib.nullcontext():
        for x in data:
            step(x.to(step.weights.flat.device))


def assert_same(one: TrainStep, other: TrainStep) -> None:
    """Both steps have left the same, bit for bit."""
    assert one.averages() == other.averages()
    assert one.skipped.total == other.skipped.total
    assert one.steps == other.steps
    tensors, others = one.tensors(), other.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for (name, tensor), expected in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.equal(one.weights.flat, other.weights.flat)


CASES = {
    "plain": (mlp, torch.bfloat16, {}),
    "lr": (mlp, torch.float32, {"lr_schedule": "cosine", "lr_warmup_steps": 5, "optimizer": "adamw"}),
    "beta": (
        mlp,
        torch.float32,
        {"kl_warmup": "cyclical", "kl_warmup_steps": 4, "beta": 3.0, "clip_norm": 1.0},
    ),
    "capacity": (Noisy, torch.float32, {"capacity": 5.0, "capacity_steps": 9, "ema_decay": 0.9}),
    "free bits": (mlp, torch.bfloat16, {"free_bits": 0.1, "kl_warmup": "linear", "ema_decay": 0.999}),
    "parts": (mlp, torch.float32, {"accumulate": 2, "free_bits": 0.2, "free_bits_form": "element"}),
    "learned variance": (gaussian, torch.float32, {"lr_warmup_steps": 20, "clip_norm": 10.0}),
    "float16": (gaussian, torch.float16, {"clip_norm": 1.0, "ema_decay": 0.9, "lr_schedule": "cosine"}),
    "conv": (conv, torch.bfloat16, {"channels_last": True, "optimizer": "adamw", "clip_norm": 1.0}),
    "noise": (Noisy, torch.float32, {"accumulate": 2, "kl_warmup": "linear"}),
}


@pytest.mark.parametrize(("make", "amp_dtype", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_training_is_the_eager_one(device: str, make, amp_dtype, options, seed: int) -> None:
    """With schedules, averages, clipping, uneven last batches, and a step that is not applied."""
    config = TrainConfig(lr=1e-2, non_finite="skip", cuda_graph="always", **options)
    data = batches(*((1, 8, 8) if make is conv else (12,)), seed=seed)
    data[9][0] = math.inf
    captured = trained(make, data, config, amp_dtype, device)
    assert len(captured.graphs.captured) == 2
    assert_same(captured, trained(make, data, config, amp_dtype, device, captured=False))
    assert captured.skipped.total > 0


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_fresh_at_each_replay_and_comes_back_with_the_seed(device: str) -> None:
    x = torch.rand(20, 12)
    step = trained(mlp, [x] * (WARM_UPS + 1), TrainConfig(lr=1e-30), device=device)
    recon = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        step.reset()
        run(step, [x])
        recon.append(step.averages()[1])
    assert len(step.graphs.captured) == 1
    assert recon[0] != recon[1]
    assert recon[0] == recon[2]


class Waits(Noisy):
    """Looks at a number on the device in the middle of backward, when there are gradients already."""

    def decode(self, z: Tensor) -> Tensor:
        z.register_hook(lambda g: g * (g.sum().item() == math.pi or 1))
        return super().decode(z)


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_that_fails_leaves_the_training_as_it_was(device, amp_dtype, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        graph_module, "_noting_waits", lambda _: contextlib.nullcontext()
    )  # which would see it
    config = TrainConfig(lr=1e-2, cuda_graph="always", clip_norm=1.0, ema_decay=0.9, non_finite="skip")
    data = batches(12)
    failed = trained(Waits, data, config, amp_dtype, device)
    assert failed.graphs.captured == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the step is not captured as a CUDA graph: it could not be captured: ")
    assert_same(failed, trained(Waits, data, config, amp_dtype, device, captured=False))
    # and others can be captured
    assert len(trained(mlp, data, config, amp_dtype, device).graphs.captured) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_waits_is_not_captured(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, data = TrainConfig(lr=1e-2, cuda_graph="always"), batches(12)
    step = trained(Waits, data, config, device=device, capture=CPUCapture(waits="net.py:7"))
    assert step.graphs.captured == {}
    assert_same(step, trained(Waits, data, config, device=device, captured=False))
    step.reset()  # which does not say it again
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the step is not captured as a CUDA graph: it waits for the GPU, in ")


def extra(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().mean()


@pytest.mark.parametrize(
    ("make", "options", "extra_loss", "why"),
    [
        (Noisy, {}, None, "the model has code that may do something else in the next step"),
        (mlp, {}, extra, "the extra loss has code that may do something else in the next step"),
        (mlp, {"checkpoint_activations": True}, None, "checkpointing of activations"),
        (mlp, {"checkpoint_activations": True, "cuda_graph": "always"}, None, "checkpointing of activations"),
    ],
)
def test_what_a_graph_might_get_wrong_stays_eager(make, options, extra_loss, why, capsys) -> None:
    config = TrainConfig(**options)
    step = trained(make, batches(12), config, extra_loss=extra_loss)
    assert step.graphs.captured == {}
    step.reset()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the step is not captured as a CUDA graph: {why}")


@pytest.mark.parametrize("device", DEVICES)
def test_an_extra_loss_of_ones_own_is_captured_on_request(device: str) -> None:
    config, data = TrainConfig(lr=1e-2, cuda_graph="always"), batches(12)
    captured, eager = (
        trained(mlp, data, config, device=device, extra_loss=extra, captured=on) for on in (True, False)
    )
    assert len(captured.graphs.captured) == 2
    assert_same(captured, eager)
    assert captured.extra_average() == eager.extra_average() != {"train_extra": 0.0}


def freeze(model: nn.Module) -> None:
    model.encoder[0].bias.requires_grad_(False)


def drop_less(model: nn.Module) -> None:
    model.encoder[2].p = 0.1


def hook(model: nn.Module) -> None:
    model.decoder.register_forward_hook(lambda module, inputs, output: 2 * output)


def evaluate(model: nn.Module) -> None:
    model.eval()


@pytest.mark.parametrize("change", [freeze, drop_less, hook, evaluate])
@pytest.mark.parametrize("device", DEVICES)
def test_an_owner_may_change_the_model_between_epochs(device: str, change) -> None:
    config, data = TrainConfig(lr=1e-2, cuda_graph="always"), batches(12)
    steps = [trained(Noisy, data, config, device=device, captured=on) for on in (True, False)]
    for step in steps:
        torch.manual_seed(2)
        change(step.model)
        step.reset()
        run(step, data)
    assert len(steps[0].graphs.captured) == 2
    assert_same(*steps)


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_frozen_meanwhile_stays(device: str, captured: bool, amp_dtype: torch.dtype) -> None:
    data, config = batches(12), TrainConfig(lr=1e-2, optimizer="adamw", clip_norm=1.0)
    step = trained(mlp, data, config, amp_dtype, device, captured)
    for frozen in (True, False):
        step.model.encoder.requires_grad_(not frozen)
        step.reset()
        before = parts_of(step)
        run(step, data)
        for name, changed in parts_of(step).items():
            assert torch.equal(changed, before[name]) == (frozen and "encoder" in name), name
    assert captured == (step.graphs is not None and len(step.graphs.captured) == 2)


def parts_of(step: TrainStep) -> dict[str, Tensor]:
    """Copies of each parameter and of its moments."""
    tensors = step.tensors()
    wholes = {"weight": step.weights.flat.detach()}
    wholes |= {name: tensors[f"optimizer.{name}"] for name in ("mean", "square")}
    return {
        f"{what} of {name}": part.clone()
        for what, whole in wholes.items()
        for name, part in zip(step.weights.names, step.weights.views(whole), strict=True)
    }


@pytest.mark.parametrize("device", DEVICES)
def test_an_unchanged_model_keeps_its_graphs_over_epochs(device: str) -> None:
    step = trained(mlp, batches(12), TrainConfig(), device=device)
    before = dict(step.graphs.captured)
    assert len(before) == 2
    for _ in range(3):
        step.model.eval()
        step.model.train()
        step.reset()
        run(step, batches(12))
    assert step.graphs.captured == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_training_goes_on_from_a_checkpoint(device: str) -> None:
    config = TrainConfig(lr=1e-2, kl_warmup="linear", kl_warmup_steps=20, ema_decay=0.9)
    data = batches(12)
    whole = trained(mlp, data + data, config, device=device)
    first = trained(mlp, data, config, device=device)
    generators = torch if device == "cpu" else torch.cuda
    noise = generators.get_rng_state()
    tensors = {name: t.clone() for name, t in first.tensors().items()}
    weights = {name: t.clone() for name, t in first.model.state_dict().items()}
    second = trained(mlp, data[::-1], config, device=device)  # whose graphs know other tensors
    second.model.load_state_dict(weights)
    second.load_tensors(tensors)
    generators.set_rng_state(noise)
    run(second, data)
    assert len(second.graphs.captured) == 2
    assert_same(whole, second)


def test_what_a_graph_reads_stays_alive() -> None:
    """A graph holds addresses: a tensor that nothing else holds would be gone when it is replayed."""
    config = TrainConfig(lr=1e-2, lr_schedule="cosine", ema_decay=0.9, clip_norm=1.0, free_bits=0.1)
    for amp_dtype in (torch.bfloat16, torch.float16):
        step = trained(gaussian, batches(12), config, amp_dtype, capture=(capture := CPUCapture()))
        read = [StorageWeakRef(t.untyped_storage()) for r in capture.recordings for t in r.given.values()]
        assert len(read) > 20
        for graph in step.graphs.captured.values():
            graph._replay = None  # which holds the recording
        capture.recordings.clear()
        gc.collect()
        assert not any(reference.expired() for reference in read)


def test_tickets_of_graphs_stay_when_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps the address of a ticket, and nothing else of it."""
    triton = pytest.importorskip("fastvae.ops.triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "_stream_tickets", {})
    monkeypatch.setattr(triton, "_graph_tickets", {})
    monkeypatch.setattr(triton, "_KEPT_FOR_GRAPHS", 2)
    device = torch.device("cpu")
    triton._ticket(device)
    addresses = [triton._graph_ticket(device).data_ptr() for _ in range(2)]
    assert addresses[0] != addresses[1]
    kept = StorageWeakRef(triton._graph_tickets[device][0].untyped_storage())
    for _ in range(3):
        assert triton._graph_ticket(device).data_ptr() not in addresses
    gc.collect()
    assert not kept.expired()


def test_tickets_are_made_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pool of memory the caller's thread has, they are not from it."""
    triton = pytest.importorskip("fastvae.ops.triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "_stream_tickets", {})
    monkeypatch.setattr(triton, "_graph_tickets", {})
    zeros, threads = torch.zeros, []

    def noted(*sizes: int, **options: object) -> Tensor:
        threads.append(threading.current_thread())
        return zeros(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", noted)
    for _ in range(2):
        triton._ticket(torch.device("cpu"))
    assert len(threads) == 2  # of the stream, and those of graphs
    assert threading.current_thread() not in threads


def test_kinds_of_batches_beyond_the_most_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_GRAPHS", 1)
    config, data = TrainConfig(lr=1e-2), batches(12)
    captured = trained(mlp, data, config)
    assert len(captured.graphs.captured) == 1
    assert_same(captured, trained(mlp, data, config, captured=False))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_nothing_in_a_step_waits_for_the_gpu(captured: bool) -> None:
    config = TrainConfig(
        lr_schedule="cosine", free_bits=0.1, clip_norm=1.0, ema_decay=0.9, kl_warmup="linear"
    )
    data = [torch.rand(20, 12, device="cuda")] * 10
    step = trained(gaussian, data, config, torch.bfloat16, "cuda", captured)
    with nothing_waits():
        for x in data:
            step(x)


@pytest.mark.gpu
def test_a_replay_is_one_launch_with_one_kernel_for_the_loss_and_its_gradients() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.rand(20, 12, device="cuda")
    step = trained(mlp, [x] * 10, TrainConfig(), torch.bfloat16, "cuda")
    asked, done = profiled(lambda: step(x))
    assert asked.count("cudaGraphLaunch") == 1
    assert done.count("elbo_forward_kernel") == 2  # of sample_and_kl, and of the loss
    assert done.count("elbo_backward_kernel") == 1  # of sample_and_kl


def test_a_warm_up_notes_the_lines_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it, by a warning; those of other threads and of other things are not it."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)

    done = threading.Event()
    places: list[str] = []
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with graph_module._noting_waits(places):
            wait()
            thread = threading.Thread(target=wait)  # of a loader, say
            thread.start()
            thread.join()
            _thread.start_new_thread(
                lambda: (wait(), done.set()), ()
            )  # one that is not Python's, of autograd
            assert done.wait(60)
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            wait()
    assert modes[-1] == "default"
    assert shown == ["something else"]
    assert places == [f"{__file__}:{wait.__code__.co_firstlineno + 2}"] * 3


@pytest.mark.parametrize("where", ["the function", "the end of the capture", "nowhere"])
def test_what_torch_is_asked_for_on_a_gpu(where: str) -> None:
    """With torch.cuda replaced by what takes the same arguments: nothing is computed here."""
    cuda, pool, noise = mock.create_autospec(torch.cuda), (0, 1), torch.arange(16, dtype=torch.uint8)
    cuda.graph_pool_handle.return_value, cuda.get_rng_state.return_value = pool, noise
    cuda.default_generators = [mock.Mock()]
    cuda.graph.return_value.__exit__.return_value = False
    if where == "the end of the capture":
        cuda.graph.return_value.__exit__.side_effect = RuntimeError("failed due to a previous error")
    made = (torch.ones(1),)

    def function() -> tuple[Tensor, ...]:
        if where != "nowhere":
            raise ValueError("not when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        return made

    with (
        mock.patch.object(torch, "cuda", cuda),
        mock.patch.object(graph_module, "_broken", broken := []),
        mock.patch.object(torch, "Generator") as generator,
        mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", create=True) as clear,
        mock.patch.object(torch._C, "_cuda_endAllocateToPool", create=True) as end,
    ):
        end.side_effect = RuntimeError("not allocating to it") if where == "the function" else None
        capture = CUDACapture(torch.device("cuda", 0))
        if where == "nowhere":
            assert capture.capture(function) == (made, cuda.CUDAGraph.return_value.replay)
            assert not generator.called
            assert capture.warm_up(lambda: made, []) == made
        else:
            with pytest.raises(CaptureError, match=r"^not when stream is capturing$"):
                capture.capture(function)
            generator.return_value.set_state.assert_called_once_with(noise)
            restored = cuda.default_generators[0].graphsafe_set_state
            restored.assert_called_once_with(generator.return_value)
            end.assert_called_once_with(0, pool)
    assert broken == ([] if where == "nowhere" else [cuda.CUDAGraph.return_value])
    clear.assert_called_once()
    assert cuda.graph.call_args.args[1] == pool


class NothingOfTheHost(TorchDispatchMode):
    """Notes operations with tensors on another device than meta, which has no numbers to look at either."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = None if func is torch.ops.aten._fused_adamw_.tensor_lr else func(*args, **(kwargs or {}))
        if not all(t.is_meta for t in tensors_of((args, kwargs, result))):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("options", [options for _, _, options in CASES.values()], ids=CASES)
def test_nothing_goes_between_host_and_device(options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not for meta
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda _: None)
    config = TrainConfig(cuda_graph="never", **options)
    step = made_step(gaussian, config, device="meta")
    x = torch.rand(20, 12, device="meta")
    with NothingOfTheHost() as mode:
        for _ in range(2):  # the first one makes the optimizer's state
            mode.found = []
            step(x)
    assert mode.found == []
    with pytest.raises((RuntimeError, NotImplementedError)):
        step.averages()  # which looks at numbers
