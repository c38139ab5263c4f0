"""Torch's elementary functions on CPUs, made safe for several threads.

On x86 torch computes them by oneMKL, which chooses a function's code at the first call. Where several threads
make that call together, as torch's do for a tensor of more than a few thousand numbers, one of them may get
code with relative errors of 3e-4, in silence and once (pytorch issue 188792, oneMKL 2024.2).
"""

from __future__ import annotations

import torch

_FUNCTIONS = (
    torch.cos,
    torch.erf,
    torch.exp,
    torch.expm1,
    torch.lgamma,
    torch.log,
    torch.log1p,
    torch.sin,
    torch.sqrt,
    torch.tan,
    torch.tanh,
)


def choose_code() -> None:
    """Call each function once, of one number in one thread, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(one)
