"""The memory that data may take."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

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


def memory_limit() -> int:
    """Bytes that this process may have at the most: the machine's, or those of its control groups."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [int(text) for text in map(_text, (*_CGROUPS, *_own_cgroups())) if text.strip().isdigit()]
    return min(limits)


def _own_cgroups() -> list[str]:
    """The files with the limits of this process's control groups and of those around them."""
    files = []
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, file = ("", "memory.max") if controllers == "" else ("/memory", "memory.limit_in_bytes")
        groups = [PurePosixPath(path), *PurePosixPath(path).parents]
        files += [f"/sys/fs/cgroup{root}{group}/{file}" for group in groups]
    return files


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
