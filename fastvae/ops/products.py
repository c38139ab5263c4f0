"""Products of matrices on the CPU, prepared to be made again and again: csrc/product.cpp."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _native

# Up to here they are faster than torch's, in bfloat16 the same to the bit; beyond, the arithmetic is all.
_MOST_INNER = 1024
_MOST_ELEMENTS = 1 << 21
_MOST_SMALL = 16**3  # m n k up to which torch does not ask oneDNN, but adds up in another order
_DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")  # which need not be torch's default


class Product:
    """a b, or bias + a b, for matrices like those given: in nothing but their memory others.

    a, b: [m, k] and [k, n], both float32 or bfloat16.
    bias: [n].
    memory: to work in, which products that are not made at once may share.
    """

    __name__ = "product"  # a function has one, and so has what torch.fx calls

    def __init__(self, a: Tensor, b: Tensor, memory: _native.ProductMemory) -> None:
        self._extents = a.shape[0], b.shape[1], a.shape[1]
        self._strides = a.stride(), b.stride()
        self._dtype = a.dtype
        self._memory = memory
        self._kept: Tensor | None = None
        self._prepare(relu=False)

    @staticmethod
    def serves(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
        """Whether it is better than torch's product of these, and gives the same, of floats to a rounding."""
        (m, k), n = a.shape, b.shape[1]
        if b.shape[0] != k:  # which torch refuses
            return False
        if a.dtype not in _DTYPES or not _native.products_supported(a.dtype == torch.bfloat16):
            return False
        if max(m, n) * k > _MOST_ELEMENTS or m * n * k <= _MOST_SMALL:
            return False
        if a.dtype == torch.float32 and _may_be_rounded():
            return False
        given = (a, b) if bias is None else (a, b, bias)
        return (
            all(t.dtype == a.dtype and t.device.type == "cpu" and 1 in t.stride() for t in given)
            and k <= _MOST_INNER
            and (bias is None or bias.shape == b.shape[1:])
        )

    def then_relu(self) -> None:
        """Give the ReLU of it from now on."""
        self._prepare(relu=True)

    def reuse(self, are_free: Iterable[bool]) -> None:
        """Make it in the same memory each time if nobody needs it at the next call; as of ops.native.Plan."""
        (is_free,) = are_free
        self._kept = self._empty() if is_free else None

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        """The product, [m, n].

        a, b: or views of them, such as their transposes, that begin where they do.
        where: [m, n], contiguous; where it is at most 0, so is the product (the backward of a ReLU).
        """
        product = self._empty() if self._kept is None else self._kept
        self._call.run(
            a.data_ptr(),
            b.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if where is None else where.data_ptr(),
            product.data_ptr(),
        )
        return product

    def _prepare(self, *, relu: bool) -> None:
        threads = torch.get_num_threads()
        bf16 = self._dtype == torch.bfloat16
        self._call = _native.ProductCall(bf16, self._extents, *self._strides, relu, threads, self._memory)

    def _empty(self) -> Tensor:
        return torch.empty(self._extents[:2], dtype=self._dtype, device=_CPU)


def _may_be_rounded() -> bool:
    """Whether somebody has allowed torch to multiply float32 as bfloat16, and this CPU gains by it."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # of a made-up module
    return _native.prefers_bf16() and precision not in ("none", "ieee")
