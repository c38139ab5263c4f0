"""Checks of the kernels' noise, collected only by the process of tests/test_triton_interpreted.py."""

from __future__ import annotations

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from fastvae.kernels.rng import box_muller, normals_at, normals_of_groups, philox

from fastvae.ops import reference

DEVICE = os.environ["FASTVAE_CHECK_DEVICE"]
TOLERANCE = 4e-6
BLOCK = 1024  # words of a program: with many, a GPU's compiler takes minutes

# counter, key and words of Random123's known-answer file
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@triton.jit
def _philox_kernel(p_in, p_out):
    c0, c1, c2, c3 = philox(
        tl.load(p_in).to(tl.uint32), tl.load(p_in + 1).to(tl.uint32), tl.load(p_in + 2).to(tl.uint32),
        tl.load(p_in + 3).to(tl.uint32), tl.load(p_in + 4).to(tl.uint32), tl.load(p_in + 5).to(tl.uint32),
    )  # fmt: skip
    tl.store(p_out, c0.to(tl.int64))
    tl.store(p_out + 1, c1.to(tl.int64))
    tl.store(p_out + 2, c2.to(tl.int64))
    tl.store(p_out + 3, c3.to(tl.int64))


@triton.jit
def _box_muller_kernel(p_radius, p_angle, p_cos, p_sin, N: tl.constexpr):
    b_i = tl.program_id(0) * N + tl.arange(0, N)
    b_cos, b_sin = box_muller(tl.load(p_radius + b_i).to(tl.uint32), tl.load(p_angle + b_i).to(tl.uint32))
    tl.store(p_cos + b_i, b_cos)
    tl.store(p_sin + b_i, b_sin)


@triton.jit
def _normals_kernel(p_first, p_stream, p_seed, p_at, p_groups, N: tl.constexpr):
    first, stream, seed = tl.load(p_first), tl.load(p_stream), tl.load(p_seed)
    b_i = tl.arange(0, N)
    tl.store(p_at + b_i, normals_at(first + b_i, stream, seed))
    tl.store(p_groups + b_i, normals_of_groups((first >> 2) + tl.arange(0, N // 4), stream, seed))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    given = torch.tensor([int(word, 16) for word in (counter + " " + key).split()], device=DEVICE)
    got = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](given, got)
    assert [f"{word:08x}" for word in got.tolist()] == words.split()


def test_box_muller_over_the_whole_range() -> None:
    """Random words and every corner: the smallest and largest radius, each turn of the angle."""
    n = 1 << 14
    generator = torch.Generator().manual_seed(4)
    radius, angle = torch.randint(0, 2**32, (2, n), generator=generator)
    corners = torch.tensor([0, 1, 2**24, 2**29, 2**30, 2**31, 2**32 - 1])
    edges = (corners[:, None] + torch.arange(-64, 64)).clamp(0, 2**32 - 1).flatten()
    radius[: len(edges)] = edges
    angle[len(edges) : 2 * len(edges)] = edges
    radius, angle = radius.to(DEVICE), angle.to(DEVICE)
    cos, sin = torch.empty(2, n, device=DEVICE)
    _box_muller_kernel[(n // BLOCK,)](radius, angle, cos, sin, BLOCK)
    expected = reference.box_muller(radius, angle)
    assert (cos - expected[0]).abs().max() <= TOLERANCE
    assert (sin - expected[1]).abs().max() <= TOLERANCE
    assert torch.maximum(cos.abs(), sin.abs()).max() > 6.7


def test_box_muller_word_by_word() -> None:
    """Radii at both ends and at powers of two, and angles around each eighth of a turn, against float64."""
    powers = torch.tensor([2**k + step for k in range(1, 32) for step in (-1, 0, 1)])
    words = torch.cat([torch.arange(2**14), powers, torch.arange(2**32 - 2**14, 2**32)]).unique()
    turns = (torch.arange(9)[:, None] * 2**29 + torch.arange(-(2**10), 2**10)).flatten()
    angles = torch.cat([turns.clamp(0, 2**32 - 1), powers])
    # the radii at angle 0, then the angles at the largest radius
    n, r, a = 1 << 16, len(words), len(angles)
    radius_words, angle_words = torch.zeros(2, n, dtype=torch.int64)
    radius_words[:r], angle_words[r : r + a] = words, angles
    cos, sin = torch.empty(2, n, device=DEVICE)
    _box_muller_kernel[(n // BLOCK,)](radius_words.to(DEVICE), angle_words.to(DEVICE), cos, sin, BLOCK)
    u = (radius_words.float().double() * 2.0**-32 + 2.0**-33).float().double()
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * (angle_words.double() + 0.5) * 2.0**-32
    assert (cos.cpu() - radius * angle.cos()).abs().max() <= TOLERANCE
    assert (sin.cpu() - radius * angle.sin()).abs().max() <= TOLERANCE
    assert (cos[:r].diff() <= 1e-6).all()  # falling, but for the last bits of a GPU's approximate root
    assert cos[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("seed", "offset", "first"),
    [(0, 0, 0), (-5, 7, 4096), (2**62 + 12345, 2**40 + 3, 2**35 + 8), (123, 2**32 - 1, 2**34 - 64)],
)
def test_normals_are_those_of_the_reference(seed: int, offset: int, first: int) -> None:
    n = 1 << 12
    at, groups = torch.empty(2, n, device=DEVICE)
    place, stream, key = torch.tensor([[first], [offset], [seed]], device=DEVICE)
    _normals_kernel[(1,)](place, stream, key, at, groups, n)
    expected = reference.normal(1, n, 1, seed, offset=offset, first_row=first, device=DEVICE).flatten()
    assert (at - expected).abs().max() <= TOLERANCE
    assert (groups - expected).abs().max() <= TOLERANCE
