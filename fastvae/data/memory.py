"""The memory that data may take."""

from __future__ import annotations

import os
from pathlib import Path

TOO_LARGE = "save it as .npy, C-contiguous, of uint8 or float32, which is read where it lies"
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory() -> int:
    """Bytes that this machine, and the container, have for what is not yet in memory."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    free += [int(limit) for limit in map(_text, _CGROUPS) if limit.strip().isdigit()]
    return min(free)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
