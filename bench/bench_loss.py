"""The drop-in loss against what people write: the loss alone, and with the gradients of x_hat, mu, logvar.

x_hat, mu and logvar are no leaves, as in real training, where a decoder and an encoder made them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

SHAPES = [(128, 784, 20), (1024, 784, 64), (256, 12288, 128), (64, 196608, 4096)]
ROUNDS = 15
ROUND_SECONDS = 0.03
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_hand(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    recon = ((x_hat - x) ** 2).sum()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    return (recon + kl) / x.shape[0]


def mse_loss(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(x_hat, x, reduction="sum") + kl) / x.shape[0]


def repeated(call: Callable[[], object], calls: int, device: str) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("device", DEVICES)
def test_bench_loss(
    compare: Callable[..., None], device: str, shape: tuple[int, int, int], gradient: bool
) -> None:
    batch, features, latents = shape
    x = torch.rand(batch, features, device=device)
    leaves = [
        torch.rand(batch, n, device=device, requires_grad=gradient) for n in (features, latents, latents)
    ]
    x_hat, mu, logvar = (leaf * 1.0 for leaf in leaves)
    torch.compiler.reset()
    losses: dict[str, Loss] = {
        "fastvae": fastvae.ELBOLoss(),
        "eager, by hand": by_hand,
        "eager, F.mse_loss(sum)": mse_loss,
        "torch.compile, by hand": torch.compile(by_hand, dynamic=False),
    }

    def call(loss: Loss) -> Callable[[], object]:
        if not gradient:
            return lambda: loss(x_hat, x, mu, logvar)
        return lambda: torch.autograd.grad(loss(x_hat, x, mu, logvar), (x_hat, mu, logvar))

    expected = by_hand(x_hat.double(), x.double(), mu.double(), logvar.double())
    for loss in losses.values():
        torch.testing.assert_close(loss(x_hat, x, mu, logvar).double(), expected, rtol=1e-5, atol=0)
    # about as long a round for every shape
    calls = max(1, round(ROUND_SECONDS / (2e-4 + 1e-9 * batch * features)))
    compare(
        f"loss{' and gradient' if gradient else ''} (B, D, Z) = {shape} on {device}",
        {name: repeated(call(loss), calls, device) for name, loss in losses.items()},
        rounds=ROUNDS,
        calls=calls,
    )
