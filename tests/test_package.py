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
