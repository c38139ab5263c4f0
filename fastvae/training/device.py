"""Where a training computes, and in which precision."""

from __future__ import annotations

import torch

from .. import _native
from .config import ConfigError


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device that "auto", "cpu" or "cuda" means, and why, in a few words.

    Raises ConfigError for "cuda" where there is none.
    """
    if name == "cpu":
        return torch.device("cpu"), "as asked"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return device, torch.cuda.get_device_name(device)
    if name == "cuda":
        raise ConfigError("device", "got 'cuda', but torch finds no CUDA device; expected cpu or auto here")
    return torch.device("cpu"), "torch finds no CUDA device"


def choose_amp_dtype(device: torch.device, amp: bool) -> tuple[torch.dtype, str]:
    """The dtype of the matrix products on `device`, and why, in a few words.

    bfloat16 where the device computes in it, else float16 on a GPU (with a gradient scaler), else float32.
    """
    if not amp:
        return torch.float32, "without --amp"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bf16"
        return torch.float16, "this GPU does not compute in bf16"
    if _native.prefers_bf16():
        return torch.bfloat16, "this CPU computes in bf16"
    return torch.float32, "this CPU multiplies bf16 no faster than float32"
