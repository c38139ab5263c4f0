"""The host's memory as malloc gives it, from one step of many to the next."""

from __future__ import annotations

import torch

_BYTES = 31 << 20  # glibc learns nothing from a block of 32 MiB or more


def keep_pages() -> None:
    """Let malloc keep the memory of what is freed, for the tensors of the next step.

    That of glibc maps fresh pages for what is larger than any block that it has seen freed, and gives back
    what is free at the end of its heap beyond twice that (mallopt(3), M_MMAP_THRESHOLD). The pages of
    convolutions may take as long as their arithmetic.
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")
