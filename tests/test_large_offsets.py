"""More than 2^31 elements on a CPU. Memory that nobody wrote to is zero, and takes no memory to read."""

from __future__ import annotations

import pytest
import torch

import fastvae

MANY = 2**31 + 40

pytestmark = pytest.mark.slow


def test_more_than_2_31_features_with_their_gradient() -> None:
    """4 GiB are written, for the gradient."""
    x_hat = torch.empty(1, MANY, dtype=torch.float16)
    x_hat[0, [0, -1]] = torch.tensor([1.0, 2.0], dtype=torch.float16)
    x = torch.zeros(1, 1, dtype=torch.uint8).expand(1, MANY)
    loss = fastvae.elbo(x_hat.requires_grad_(), x, kl=torch.zeros(1), impl="native").loss
    assert loss == 5
    (gradient,) = torch.autograd.grad(loss, x_hat)
    assert gradient[0, 0] == 2
    assert gradient[0, -1] == 4
    assert gradient[0, 2**31 - 2 : 2**31 + 2].count_nonzero() == 0


def test_rows_beyond_2_31_elements() -> None:
    x = torch.empty(3, MANY // 2, dtype=torch.uint8)
    x[2, -1] = 255
    x_hat = torch.zeros(1, 1).expand(3, MANY // 2)
    recon = fastvae.elbo(x_hat, x, kl=torch.zeros(3), reduction="none", impl="native").recon
    assert recon.tolist() == [0, 0, 1]


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_noise_of_rows_beyond_2_31_elements(impl: str) -> None:
    """The last rows of a long batch draw what they draw alone, and no two places the same."""
    zero = torch.zeros(4, 1000)
    first_row = 2**32 // 1000
    rows = fastvae.reparameterize(zero, zero, seed=3, first_row=first_row, impl=impl)
    wrapped = fastvae.reparameterize(zero, zero, seed=3, first_row=first_row - 2**32 // 1000, impl=impl)
    assert not (rows == wrapped).any()
    again = fastvae.reparameterize(zero[:2], zero[:2], seed=3, first_row=first_row + 2, impl=impl)
    assert torch.equal(rows[2:], again)
