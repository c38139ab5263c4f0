"""A safetensors file in memory, laid out once, then filled and written any number of times."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

_DIRECT = getattr(os, "O_DIRECT", 0)  # systems other than Linux have none


class FileImage:
    """The bytes of a safetensors file of tensors with the names, shapes and dtypes of those given.

    They are written past the page cache, where the file system can: copying them there takes several times as
    long, of a core that a training on a CPU computes with.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # what safetensors calls the dtypes, from tensors of the same dtypes without elements
        empty = {name: torch.empty(0, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
        contents = safetensors.torch.save(empty)
        entries = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])

        places, end = {}, 0
        # those of the largest elements first, so that all are aligned
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            places[name], end = end, end + tensor.numel() * tensor.element_size()
            entries[name] |= {"shape": list(tensor.shape), "data_offsets": [places[name], end]}
        header = json.dumps(entries).encode()
        header = header.ljust(-(-len(header) // mmap.PAGESIZE) * mmap.PAGESIZE - 8)

        self.size = 8 + len(header) + end
        self._memory = mmap.mmap(-1, -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._memory[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
        self.tensors = {
            name: self._view(8 + len(header) + places[name], tensor) for name, tensor in tensors.items()
        }

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these have the names, shapes and dtypes that it was laid out for."""
        return self.tensors.keys() == tensors.keys() and all(
            self.tensors[name].shape == t.shape and self.tensors[name].dtype == t.dtype
            for name, t in tensors.items()
        )

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors to where they are in the file."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor.detach())

    def write(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        with open(path, "wb", buffering=0) as file:
            try:
                self._write(file.fileno(), _DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._write(file.fileno(), 0)  # a file system without O_DIRECT
            file.truncate(self.size)

    def _write(self, file: int, flags: int) -> None:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        done = 0
        with memoryview(self._memory) as contents:
            while done < len(contents):
                done += os.pwrite(file, contents[done:], done)

    def _view(self, start: int, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")
        return torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=start).view(
            like.shape
        )
