"""A safetensors file that is laid out once and written many times, as the library reads it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvae.training.file_image import FileImage

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def some_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Of each dtype, by one to five thousand elements, and with shapes and strides of all kinds."""
    tensors = {}
    for dtype in DTYPES:
        n = int(torch.randint(1, 5000, (), generator=generator))
        tensors[f"of {dtype}"] = torch.randint(0, 2, (n,), generator=generator).to(dtype)
    tensors["scalar"] = torch.rand((), generator=generator)
    tensors["nothing"] = torch.empty(3, 0, 2)
    tensors["transposed"] = torch.rand(7, 13, generator=generator).t()
    tensors["parameter"] = torch.nn.Parameter(torch.rand(5, generator=generator))
    return tensors


def assert_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor.detach()), name


def test_as_safetensors_reads_it(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = some_tensors(generator)
    image = FileImage(first)
    image.fill(first)
    image.write(tmp_path / "first")
    assert_holds(tmp_path / "first", first)
    second = {name: torch.rand(t.shape, generator=generator).gt(0.5).to(t.dtype) for name, t in first.items()}
    assert image.holds(second)
    image.fill(second)
    image.write(tmp_path / "second")
    assert_holds(tmp_path / "second", second)


def test_others_do_not_fit() -> None:
    image = FileImage({"a": torch.zeros(3), "b": torch.zeros(2, 2)})
    assert image.holds({"b": torch.ones(2, 2), "a": torch.ones(3)})
    assert not image.holds({"a": torch.zeros(3)})
    assert not image.holds({"a": torch.zeros(3), "c": torch.zeros(2, 2)})
    assert not image.holds({"a": torch.zeros(3), "b": torch.zeros(4)})
    assert not image.holds({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int32)})


@pytest.mark.parametrize("most", [4096, 1000], ids=["pages", "parts of pages"])
def test_a_file_system_that_takes_less_at_once(tmp_path: Path, seed: int, monkeypatch, most: int) -> None:
    tensors, write = some_tensors(torch.Generator().manual_seed(seed)), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: write(file, content[:most], at))
    image = FileImage(tensors)
    image.fill(tensors)
    image.write(tmp_path / "file")
    assert_holds(tmp_path / "file", tensors)


def test_a_file_system_without_direct_writes(tmp_path: Path, seed: int, monkeypatch) -> None:
    tensors, write, refused = some_tensors(torch.Generator().manual_seed(seed)), os.pwrite, []

    def pwrite(file: int, content: memoryview, at: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, content, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    image = FileImage(tensors)
    image.fill(tensors)
    image.write(tmp_path / "file")
    assert refused == [0]
    assert_holds(tmp_path / "file", tensors)


def test_what_else_goes_wrong_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        FileImage({"a": torch.zeros(3)}).write(tmp_path / "no folder" / "file")
