"""The package as a whole: what it offers, and what importing it must not need."""

from __future__ import annotations

import pytest
from processes import run_python

import fastvae


def test_public_names() -> None:
    for name in fastvae.__all__:
        assert getattr(fastvae, name).__doc__, name
    assert set(fastvae.__all__) <= set(dir(fastvae))
    with pytest.raises(AttributeError, match="no attribute 'elb'"):
        fastvae.elb  # noqa: B018


def test_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fastvae
t = torch.rand(4, 3)
print(fastvae.elbo(t, t, t, t).loss.item() > 0)
from fastvae.ops import resolve_impl
print(resolve_impl("auto", torch.device("cuda"))[0])
"""
    assert run_python(code).split() == ["True", "reference"]


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from fastvae.cli import main
try:
    main(["train", "--help"])
except SystemExit as done:
    assert done.code == 0
print("torch" in sys.modules)
"""
    assert run_python(code).split()[-1] == "False"


def test_the_kernels_live_inside_the_package() -> None:
    """Top-level kernels/ is installed as fastvae.kernels: that is the one module to import."""
    assert run_python("import fastvae.kernels; print(fastvae.kernels.__name__)").strip() == "fastvae.kernels"


def test_elementary_functions_are_called_once_before_several_threads_do() -> None:
    """In both precisions, all that the reference calls: see fastvae/ops/vector_math.py."""
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ELEMENTARY = set("cos erf exp expm1 lgamma log log1p sin sqrt tan tanh".split())

class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ELEMENTARY:
            self.made.add((name, args[0].dtype, args[0].numel() > 1))
        return function(*args, **(kwargs or {}))

with Calls() as at_import:
    import fastvae.ops
assert not any(several for _, _, several in at_import.made)

with Calls() as by_reference:
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.rand(3, 4, dtype=dtype) for _ in range(4)]
        fastvae.ops.elbo(*tensors, impl="reference")
        fastvae.ops.elbo(*tensors, likelihood="gaussian", log_variance=tensors[0], impl="reference")
        fastvae.ops.reparameterize(*tensors[:2], seed=1, impl="reference")
called = {(name, dtype) for name, dtype, several in by_reference.made}
missing = called - {(name, dtype) for name, dtype, _ in at_import.made}
print(len(called), "called,", len(missing), "missing")
"""
    called, _, missing, _ = run_python(code).split()
    assert int(called) >= 4
    assert missing == "0"
