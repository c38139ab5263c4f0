"""Products of matrices: exact to one rounding, and of bfloat16 to the bit what torch's are."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastvae import _native
from fastvae.ops.products import Product
from fastvae.training.tape import record

SIZES = [1, 2, 7, 8, 9, 16, 17, 31, 33, 40, 64, 100, 130]
INNER = [1, 2, 3, 16, 17, 31, 128, 400, 511, 512, 513, 784, 1023, 1024]
NEEDS = {torch.float32: "AVX512", torch.bfloat16: "AVX512_BF16 and without AMX"}
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                not _native.products_supported(dtype == torch.bfloat16), reason=f"needs a CPU with {needed}"
            ),
        )
        for dtype, needed in NEEDS.items()
    ],
    ids=str,
)


def matrix(rows: int, columns: int, dtype: torch.dtype, *, transposed: bool, padding: int = 0) -> Tensor:
    """Of normals, with gaps between its rows, or between its columns."""
    if transposed:
        return matrix(columns, rows, dtype, transposed=False, padding=padding).t()
    return torch.randn(rows, columns + padding).to(dtype)[:, :columns]


def some(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, k = random.choice(SIZES), random.choice(SIZES), random.choice(INNER)
    a, b = (
        matrix(*shape, dtype, transposed=random.random() < 0.5, padding=random.choice([0, 0, 3, 8]))
        for shape in ((m, k), (k, n))
    )
    return a, b


@dtypes
def test_against_float64(dtype: torch.dtype, seed: int) -> None:
    memory = _native.ProductMemory()
    for _ in range(100):
        a, b = some(dtype)
        bias, where = torch.randn(b.shape[1]).to(dtype), torch.randn(len(a), b.shape[1]).to(dtype)
        product = Product(a, b, memory)
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        rounding = torch.finfo(dtype).eps
        # a rounding to dtype, and those of a sum in float32
        bound = rounding * exact.abs() + 2**-18 * size + 1e-30
        assert ((product(a, b).double() - exact).abs() <= bound).all()
        assert torch.equal(product(a, b, None, where), product(a, b) * (where > 0))
        product.then_relu()
        with_bias = (exact + bias.double()).relu()
        bound += rounding * with_bias + 2**-22 * bias.double().abs()
        assert ((product(a, b, bias).double() - with_bias).abs() <= bound).all()


@dtypes
def test_the_same_as_torch(dtype: torch.dtype, seed: int) -> None:
    memory = _native.ProductMemory()
    rtol, atol = (0, 0) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    for _ in range(100):
        a, b = some(dtype)
        bias = torch.randn(b.shape[1]).to(dtype)
        if not Product.serves(a, b, bias):  # small ones, which torch adds up in another order
            continue
        product = Product(a, b, memory)
        torch.testing.assert_close(product(a, b), torch.mm(a, b), rtol=rtol, atol=atol)
        torch.testing.assert_close(product(a, b, bias), torch.addmm(bias, a, b), rtol=rtol, atol=atol)


@dtypes
def test_the_same_at_any_number_of_threads(dtype: torch.dtype, seed: int) -> None:
    a, b = some(dtype)
    bf16 = dtype == torch.bfloat16
    made = []
    for threads in (1, 2, 3, 8):
        out = torch.empty(len(a), b.shape[1], dtype=dtype)
        call = _native.ProductCall(
            bf16, (*out.shape, len(b)), a.stride(), b.stride(), False, threads, _native.ProductMemory()
        )
        call.run(a.data_ptr(), b.data_ptr(), 0, 0, out.data_ptr())
        made.append(out)
    assert all(torch.equal(out, made[0]) for out in made)


@dtypes
def test_what_is_not_finite_stays_in_its_row_and_column(dtype: torch.dtype, seed: int) -> None:
    a, b = torch.randn(20, 33).to(dtype), torch.randn(33, 50).to(dtype)
    a[3, 32], b[5, 49] = float("nan"), float("inf")
    product = Product(a, b, _native.ProductMemory())
    assert product(a, b).isfinite().logical_not().nonzero().tolist() == [
        [i, j] for i in range(20) for j in range(50) if i == 3 or j == 49
    ]
    product.then_relu()
    torch.testing.assert_close(product(a, b), torch.relu(a @ b), equal_nan=True)


@dtypes
def test_nothing_but_the_product_is_written(dtype: torch.dtype, seed: int) -> None:
    a, b = matrix(9, 31, dtype, transposed=False), matrix(31, 20, dtype, transposed=True)
    around = torch.full((9 * 20 + 64,), 7.0, dtype=dtype)
    bf16 = dtype == torch.bfloat16
    call = _native.ProductCall(bf16, (9, 20, 31), a.stride(), b.stride(), False, 2, _native.ProductMemory())
    call.run(a.data_ptr(), b.data_ptr(), 0, 0, around[32:].data_ptr())
    torch.testing.assert_close(around[32:-32].view(9, 20), a @ b)
    assert (around[:32] == 7).all()
    assert (around[-32:] == 7).all()


@pytest.mark.parametrize("dtype", NEEDS, ids=str)
def test_serves(dtype: torch.dtype) -> None:
    a, b = torch.zeros(40, 60).to(dtype), torch.zeros(60, 80).to(dtype)
    supported = _native.products_supported(dtype == torch.bfloat16)
    assert Product.serves(a, b) == supported
    assert Product.serves(a, b, torch.zeros(80).to(dtype)) == supported
    assert not Product.serves(a.double(), b.double())
    assert not Product.serves(a[:, ::2], b[:30])
    assert not Product.serves(a, b[:-1])  # of which torch tells, and C++ would read what is not there
    assert not Product.serves(a, b, torch.zeros(40, 80).to(dtype))
    assert not Product.serves(a, b, torch.zeros(80).half())
    assert not Product.serves(a, b, torch.zeros(160).to(dtype)[::2])
    assert not Product.serves(a[:, :0], b[:0])
    wide = torch.zeros(3, 2000).to(dtype)
    assert not Product.serves(wide, wide.t())
    assert Product.serves(a[:17, :16], b[:16, :16]) == supported
    assert not Product.serves(a[:16, :16], b[:16, :16])


@pytest.mark.parametrize("prefers_bf16", [True, False])
def test_float32_is_left_to_torch_where_it_may_round_and_gains_by_it(
    prefers_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "prefers_bf16", lambda: prefers_bf16)
    a, precision = torch.zeros(40, 40), torch.backends.mkldnn.matmul
    served, before = Product.serves(a, a), precision.fp32_precision
    try:
        precision.fp32_precision = "bf16"
        assert Product.serves(a, a) == (served and not prefers_bf16)
        assert Product.serves(a.bfloat16(), a.bfloat16()) == _native.products_supported(True)
    finally:
        precision.fp32_precision = before


@pytest.mark.parametrize("dtype", NEEDS, ids=str)
def test_misuse(dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    if not _native.products_supported(bf16):
        with pytest.raises(RuntimeError, match=f"expected a CPU with {NEEDS[dtype]}"):
            _native.ProductCall(bf16, (1, 1, 1), (1, 1), (1, 1), False, 1, _native.ProductMemory())
        return
    for extents, strides, threads, message in (
        ((1, 1, -1), (1, 1), 1, "extents: got a negative size"),
        ((4, 4, 4), (8, 2), 1, "a: got strides 8, 2, expected one of them to be 1"),
        ((4, 4, 4), (4, 1), 0, "threads: got 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.ProductCall(bf16, extents, strides, (4, 1), False, threads, _native.ProductMemory())


@dtypes
def test_a_tape_takes_relu_and_its_backward_with_the_products(dtype: torch.dtype, seed: int) -> None:
    weights = [torch.randn(n, m).to(dtype).requires_grad_() for n, m in ((24, 40), (20, 24))]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        loss = torch.relu(x @ weights[0].t()) @ weights[1].t()
        return torch.autograd.grad(loss, weights, loss.detach())

    x, other = torch.randn(2, 16, 40).to(dtype).unbind()
    outputs, tape = record(gradients, x)
    assert tape is not None
    names = [node.name for node in tape.graph.nodes if node.op == "call_function"]
    assert len(names) == 5, names
    assert all(name.startswith("product") for name in names), names
    for given, expected in ((x, outputs), (other, gradients(other))):
        torch.testing.assert_close(
            tape(given), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
        )
