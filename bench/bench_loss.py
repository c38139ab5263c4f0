"""The drop-in loss against what people write: the loss alone, and with the gradients of x_hat, mu, logvar.

x_hat, mu and logvar are no leaves, as in real training, where a decoder and an encoder made them. With the
gradients, memory is what one call takes beyond its inputs, and bandwidth counts the bytes that must move: of
tensors of x_hat's size, x_hat and x are read and the gradient is written, 3 passes, where the gradient is
made in the forward (the drop-in loss on a CPU, and the path without autograd); elsewhere the backward reads
the two again: 5. The copy beside it, 2 passes, is of x_hat into memory that has been touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from timing import memory_peak
from torch import Tensor

import fastvae
from fastvae.ops.types import Extents, Inputs, Needs, Spec

Shape = tuple[int, int, int]
SHAPES = [(128, 784, 20), (1024, 784, 64), (256, 12288, 128), (64, 196608, 4096)]
# x_hat of 256 MiB: beyond any cache of a GPU
LARGE = {torch.float32: (1024, 65536, 128), torch.bfloat16: (2048, 65536, 128)}
ROUNDS = {"cpu": 15, "cuda": 9}  # of a GPU they vary less
TURN_SECONDS = 0.03

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_hand(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    recon = ((x_hat - x) ** 2).sum()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    return (recon + kl) / x.shape[0]


def mse_loss(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(x_hat, x, reduction="sum") + kl) / x.shape[0]


def kernels_of(device: str) -> ModuleType:
    if device == "cpu":
        from fastvae.ops import native as kernels
    else:
        from fastvae.ops import triton as kernels
    return kernels


def cases() -> list[tuple[str, torch.dtype, Shape, bool]]:
    """(device, dtype, shape, gradient): on a GPU first what exceeds its caches, and also bfloat16."""
    f32, bf16 = torch.float32, torch.bfloat16

    def small(device: str) -> list[tuple[str, torch.dtype, Shape, bool]]:
        return [(device, f32, shape, gradient) for shape in SHAPES for gradient in (False, True)]

    if not torch.cuda.is_available():
        return small("cpu")
    large = [("cuda", dtype, shape, True) for dtype, shape in LARGE.items()]
    return [*large, *small("cuda"), ("cuda", bf16, SHAPES[1], True), *small("cpu")]


def label(value: object) -> str:
    if isinstance(value, bool):
        return "gradient" if value else "forward"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(("device", "dtype", "shape", "gradient"), cases(), ids=label)
def test_bench_loss(
    compare: Callable[..., None], device: str, dtype: torch.dtype, shape: Shape, gradient: bool
) -> None:
    batch, features, latents = shape
    like = {"dtype": dtype, "device": device}
    x = torch.rand(batch, features, **like)
    leaves = [torch.rand(batch, n, **like, requires_grad=gradient) for n in (features, latents, latents)]
    x_hat, mu, logvar = (leaf * 1.0 for leaf in leaves)
    torch.compiler.reset()
    losses: dict[str, Loss] = {
        "fastvae": fastvae.ELBOLoss(),
        "eager, by hand": by_hand,
        "eager, F.mse_loss(sum)": mse_loss,
        "torch.compile, by hand": torch.compile(by_hand, dynamic=False),
    }
    expected = by_hand(x_hat.double(), x.double(), mu.double(), logvar.double())
    for name, loss in losses.items():
        # what people write has sums in bfloat16 there
        rtol = 1e-5 if name == "fastvae" or dtype == torch.float32 else 2e-2
        torch.testing.assert_close(loss(x_hat, x, mu, logvar).double(), expected, rtol=rtol, atol=0)

    def operation(loss: Loss) -> Callable[[], object]:
        if not gradient:
            return lambda: loss(x_hat, x, mu, logvar)
        return lambda: torch.autograd.grad(loss(x_hat, x, mu, logvar), (x_hat, mu, logvar))

    operations = {name: operation(loss) for name, loss in losses.items()}
    memory = traffic = None
    if gradient:
        kernels, size = kernels_of(device), x_hat.nbytes
        passes = 3 if kernels.GRADIENTS_IN_FORWARD else 5
        traffic = {"fastvae": passes * size, "fastvae, without autograd": 3 * size, "copy": 2 * size}
        inputs = Inputs(*(t.detach() for t in (x_hat, x, mu, logvar)))
        needs = Needs(True, True, True, False, False)  # of x_hat, mu and logvar
        without_autograd = partial(
            kernels.forward_and_gradients, inputs, Spec("mse"), Extents(1, *shape), needs
        )
        values, gradients = without_autograd()
        torch.testing.assert_close(values.loss.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients.x_hat, 2 / batch * (x_hat - x))
        ours = {"fastvae": operations["fastvae"], "fastvae, without autograd": without_autograd}
        operations = ours | operations
        memory = {name: memory_peak(call, device) for name, call in operations.items()}
        source, target = x_hat.detach(), torch.zeros_like(x_hat)
        operations["copy"] = lambda: target.copy_(source)
    suffix = "" if dtype == torch.float32 else f", {str(dtype)[6:]}"
    compare(
        f"loss{' and gradient' if gradient else ''} (B, D, Z) = {shape} on {device}{suffix}",
        operations,
        rounds=ROUNDS[device],
        turn_seconds=TURN_SECONDS,
        synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
        memory=memory,
        traffic=traffic,
    )
