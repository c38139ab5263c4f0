"""Launches of kernels/gather.py: batches of data that lie on a GPU.

Imported when it is first needed, as it imports triton. Under Triton's interpreter it runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import _native
from ..kernels.gather import gather_kernel
from ..launch import launch
from .transform import Transform

_WARPS = 8  # of a program at the most
_WRITTEN = 16  # bytes that a thread writes at once
_LEAST_PIXELS = 256  # which sixteen Philox blocks serve


class Gather:
    """What batches of uint8 or float32 samples are to be like: `DataLoader`'s, to the last bit.

    item_shape: of a sample as it lies, [C, H, W] for images. dtype: of x in the batches. transform: what is
    done to the samples, or None; floats that it binarises are in [0, 1].
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        dtype: torch.dtype,
        transform: Transform | None,
        *,
        is_uint8: bool,
        device: torch.device,
    ) -> None:
        transform = transform or Transform()
        if transform.moves:
            planes, height, width = item_shape
            crop_height, crop_width = transform.crop or (height, width)
            self.item_shape: tuple[int, ...] = (planes, crop_height, crop_width)
        else:
            planes, height, width = 1, 1, torch.Size(item_shape).numel()
            crop_height, crop_width = height, width
            self.item_shape = item_shape
        self.dtype, self._fixed = dtype, transform.fixed
        affine = transform.affine(is_uint8)
        self._affine = None if affine is None else torch.tensor(affine, dtype=torch.float64, device=device)
        features = planes * crop_height * crop_width
        # a thread has what it writes at once, or the pixels that one Philox block serves
        each = 16 if transform.binarize else _WRITTEN // dtype.itemsize
        block = min(max(triton.next_power_of_2(features), _LEAST_PIXELS), _WARPS * 32 * each)
        self._pieces = triton.cdiv(features, block)
        self._constants = {
            "PLANES": planes, "HEIGHT": height, "WIDTH": width,
            "CROP_HEIGHT": crop_height, "CROP_WIDTH": crop_width, "PADDING": int(transform.padding),
            "CENTER": transform.crop_at == "center", "HFLIP": bool(transform.hflip),
            "BINARIZE": bool(transform.binarize), "BLOCK": block, "num_warps": max(1, block // (32 * each)),
            # a product and a sum in float64 round as two, as they do on the host
            "enable_fp_fusion": False,
        }  # fmt: skip

    def key(self, seed: int, epoch: int) -> int:
        """What `__call__` draws by in an epoch."""
        key = _native.transform_key(seed, epoch, self._fixed)
        return key - 2**64 if key >= 2**63 else key  # as the int64 that the kernel takes

    def __call__(
        self,
        data: Tensor,
        out: Tensor,
        *,
        rows: Tensor | None = None,
        first: int = 0,
        key: int = 0,
        numbers: Tensor | None = None,
        labels: Tensor | None = None,
        labels_out: Tensor | None = None,
    ) -> None:
        """Write a batch to `out`, [B, *item_shape], in one launch on the current stream. All are contiguous.

        data: [N, *item_shape of a sample].
        rows: int64; the batch are data[rows[first + b]], or without them data[first + b].
        key: of the draws. numbers: int64 [N], the samples' numbers, which they draw by; None is 0, 1, ...
        labels: int64 [N], of which those of the batch go to `labels_out`, [B].
        """
        if len(out) == 0:
            return
        arguments = {
            "p_data": data, "p_rows": rows, "p_numbers": numbers, "p_affine": self._affine,
            "p_labels": labels, "p_out": out, "p_labels_out": labels_out,
            "first": first, "key": key, **self._constants,
        }  # fmt: skip
        launch(gather_kernel, out.device, (len(out) * self._pieces,), arguments)
