"""Records what the launcher would launch, and compiles just that for a GPU that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.data import gather
from fastvae.ops import triton as launcher

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}


OPTIONS = ("num_warps", "enable_fp_fusion")  # of a launch, which are no arguments of the kernel


@dataclass
class Launch:
    """One launch: the kernel, its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass
class Compiled:
    """What the assembler says of a kernel, and the PTX it was made from."""

    registers: int
    local_bytes: int
    stack_bytes: int
    ptx: str


def record(call: Any) -> list[Launch]:
    """The launches of `call()`, which runs nothing."""
    launches: list[Launch] = []

    def launch(kernel: Any, _: torch.device, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append(Launch(kernel, grid, arguments))

    with mock.patch.object(launcher, "launch", launch), mock.patch.object(gather, "launch", launch):
        call()
    return launches


class NoGPU:
    """In the place of Triton's driver: kernels are compiled as for a GPU, and handed to nobody."""

    def __init__(self, capability: int = 90) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.loaded: list[str] = []  # names, one for each kernel that was compiled or found in the cache
        self.launched: list[tuple[int, ...]] = []  # grids
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 48 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded.append(name)
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads at the most

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda x, y, z, *_: self.launched.append((x, y, z))


def source(launch: Launch) -> ASTSource:
    """The launch as Triton specialises it: by type, None, 1, and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = parameter.annotation_type
        elif value == 1:
            signature[name], constants[(place,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch for one compute capability, and ask the cubin for its resources."""
    target = GPUTarget("cuda", capability, 32)
    options = {name: launch.arguments[name] for name in OPTIONS if name in launch.arguments}
    kernel = triton.compile(source(launch), target=target, options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["LOCAL"], found["STACK"], kernel.asm["ptx"])
