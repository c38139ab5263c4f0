"""The normal generator: a statistical suite at fixed seeds, and its transform word by word."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import fastvae
from fastvae import _native
from fastvae.ops import reference

TOLERANCE = 4e-6  # of a normal, absolute
LEAST_P = 1e-6
SEED = 20140501
COLUMNS = 1000  # a multiple of 4, so that four normals in a row come from one block of Philox
CHUNK = 32 * COLUMNS
# (seed, offset, first_row): neighbours, and some that differ in one high bit only
STREAMS = [
    (SEED, 0, 0),
    (SEED + 1, 0, 0),
    (SEED ^ 1 << 31, 0, 0),
    (SEED ^ 1 << 32, 0, 0),
    (SEED - 2**63, 0, 0),
    (SEED, 1, 0),
    (SEED, 1 << 32, 0),
    (SEED, 0, 1 << 40),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(rows: int) -> Tensor:
    """Native normals of each stream, [streams, rows * COLUMNS]."""
    zero = torch.zeros(1).expand(rows, COLUMNS)
    eps = torch.empty(len(STREAMS), rows, COLUMNS)
    for out, (seed, offset, first_row) in zip(eps, STREAMS, strict=True):
        out.copy_(fastvae.reparameterize(zero, zero, seed=seed, offset=offset, first_row=first_row))
    return eps.flatten(1)


def two_sided(z: float) -> float:
    """The p-value of a standard normal statistic."""
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square(counts: Tensor) -> float:
    """The two-sided p-value of counts in equiprobable cells: too even is wrong too."""
    expected = counts.sum().item() / len(counts)
    statistic = ((counts - expected) ** 2).sum().item() / expected
    law = stats.chi2(len(counts) - 1)
    return float(2 * min(law.cdf(statistic), law.sf(statistic)))


def joint_p_values(eps: Tensor) -> dict[str, float]:
    """Moments, correlations, cells of four normals and the largest radius, of draws [streams, n]."""
    streams, n = eps.shape
    lags = [*range(1, 9), COLUMNS]
    moments = torch.zeros(8, dtype=torch.float64)
    across = torch.zeros(2 * streams, 2 * streams, dtype=torch.float64)
    along = torch.zeros(2, len(lags), dtype=torch.float64)
    pairs = torch.zeros(len(lags), dtype=torch.float64)
    edges = torch.from_numpy(special.ndtri(np.arange(1, 8) / 8))
    cells = torch.zeros(2, 8**4, dtype=torch.int64)
    largest = 0.0
    for chunk in eps.split(CHUNK, dim=1):
        x = chunk.double()
        moments += torch.stack([(x**k).sum() for k in range(1, 9)])
        # values and squares, both of mean 0 and variance 1
        features = torch.cat([x, (x**2 - 1) / math.sqrt(2)])
        across += features @ features.T
        for i, lag in enumerate(lags):
            product = features[:, :-lag] * features[:, lag:]
            along[:, i] += product.view(2, -1).sum(1)
            pairs[i] += product.numel() / 2
        octiles = torch.bucketize(x, edges)
        for count, four in zip(cells, (octiles, octiles[:, 2:-2]), strict=True):
            place = four.reshape(-1, 4) @ torch.tensor([512, 64, 8, 1])
            count += torch.bincount(place, minlength=8**4)
        largest = max(largest, x.view(-1, 2).square().sum(1).max().item() / 2)

    p = {}
    for k, total in enumerate(moments.tolist(), start=1):
        mean = 0 if k % 2 else special.factorial2(k - 1)
        variance = special.factorial2(2 * k - 1) - mean**2
        p[f"moment {k}"] = two_sided((total / eps.numel() - mean) / math.sqrt(variance / eps.numel()))
    names = [f"{kind} of {stream}" for kind in ("values", "squares") for stream in STREAMS]
    for i, j in combinations(range(2 * streams), 2):
        if j - i != streams:  # a value and its own square are not independent
            p[f"{names[i]}, {names[j]}"] = two_sided(across[i, j].item() / math.sqrt(n))
    for kind, totals in zip(("values", "squares"), along, strict=True):
        for lag, z in zip(lags, (totals / pairs.sqrt()).tolist(), strict=True):
            p[f"{kind}, lag {lag}"] = two_sided(z)
    p["four of a block"], p["four of two blocks"] = map(chi_square, cells)
    # half the squared radius is exponential; the largest of many exponentials follows Gumbel's law
    law = stats.gumbel_r(loc=math.log(eps.numel() / 2))
    p["largest radius"] = float(2 * min(law.cdf(largest), law.sf(largest)))
    return p


def marginal_p_values(eps: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov, Anderson-Darling and equiprobable bins, of all draws in one sample; sorts them.

    The asymptotic law of A^2 is that of sum_j chi^2_1 / (j (j + 1)) (Anderson and Darling 1952); its tail is
    sqrt(3) P(chi^2_1 / 2 > A^2) (Zolotarev 1961), which is 2.4 % too small at p = 1e-6.
    """
    values = eps.view(-1)
    values.numpy().sort()
    n = len(values)
    a2, ks = -float(n), 0.0
    for start in range(0, n, CHUNK):
        x = values[start : start + CHUNK].double()
        i = torch.arange(start + 1, start + 1 + len(x), dtype=torch.float64)
        below, above = torch.special.log_ndtr(x), torch.special.log_ndtr(-x)
        a2 -= ((2 * i - 1) * below + (2 * (n - i) + 1) * above).sum().item() / n
        ks = max(ks, (below.exp() - (i - 0.5) / n).abs().max().item() + 0.5 / n)
    edges = torch.from_numpy(special.ndtri(np.arange(1, 1000) / 1000))
    ends = torch.searchsorted(values, edges.float())
    bins = torch.diff(ends, prepend=torch.tensor([0]), append=torch.tensor([n]))
    return {
        "Kolmogorov-Smirnov": float(special.kolmogorov(math.sqrt(n) * ks)),
        "Anderson-Darling": math.sqrt(3) * math.erfc(math.sqrt(a2)),
        "bins": chi_square(bins),
    }


@pytest.mark.parametrize("rows", [500, pytest.param(16_800, marks=pytest.mark.slow)])
def test_draws_are_independent_standard_normals(rows: int) -> None:
    """4 million draws, or 134 million: every p-value of the suite above one in a million."""
    eps = draw(rows)
    p = joint_p_values(eps) | marginal_p_values(eps)
    print(sorted(p.items(), key=lambda item: item[1])[:5])
    assert not {name: value for name, value in p.items() if not value > LEAST_P}


def native_box_muller(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.box_muller` by the native transform."""
    words = (w.numpy().astype(np.uint32) for w in (radius_words, angle_words))
    cos, sin = map(torch.from_numpy, _native.box_muller(*words))
    return cos, sin


Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
TRANSFORMS = pytest.mark.parametrize(
    "box_muller", [reference.box_muller, native_box_muller], ids=["reference", "native"]
)
POWERS = torch.tensor([2**k + step for k in range(1, 32) for step in (-1, 0, 1)])


def assert_radii(radius: Tensor, words: Tensor) -> None:
    """Radii of increasing words never grow, and are those of float64 (u is in float32 by the contract)."""
    u = (words.float().double() * 2.0**-32 + 2.0**-33).float().double()
    assert (radius - (-2 * u.log()).sqrt()).abs().max() <= TOLERANCE
    assert (radius.diff() <= 0).all()


@TRANSFORMS
def test_radius_at_the_ends_and_at_powers_of_two(box_muller: Transform) -> None:
    """The 2^20 largest radii, the 2^16 smallest, and those where the exponent changes."""
    words = torch.cat([torch.arange(2**20 + 1), POWERS, torch.arange(2**32 - 2**16, 2**32)]).unique()
    radius, _ = box_muller(words, torch.zeros_like(words))
    assert_radii(radius, words)
    assert radius[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), abs=1e-6)


@pytest.mark.slow
@TRANSFORMS
def test_every_radius(box_muller: Transform) -> None:
    """All radii that differ: every word up to 2^24, and above one word for each float32."""
    for first in range(0, 2**24, 2**22):
        for step in [2**k for k in range(9)] if first >= 2**23 else [1]:
            words = torch.arange(first, first + 2**22) * step
            radius, _ = box_muller(words, torch.zeros_like(words))
            assert_radii(radius, words)


@TRANSFORMS
def test_angle_at_the_turns_and_all_around(box_muller: Transform) -> None:
    """Angles around each eighth of a turn, at powers of two and on a grid, at the largest radius."""
    turns = (torch.arange(9)[:, None] * 2**29 + torch.arange(-(2**16), 2**16)).flatten()
    words = torch.cat([turns.clamp(0, 2**32 - 1), POWERS, torch.arange(0, 2**32, 4099)])
    cos, sin = box_muller(torch.zeros_like(words), words)
    angle = 2 * math.pi * (words.double() + 0.5) * 2.0**-32
    radius = math.sqrt(66 * math.log(2))
    assert (cos - radius * angle.cos()).abs().max() <= TOLERANCE
    assert (sin - radius * angle.sin()).abs().max() <= TOLERANCE
