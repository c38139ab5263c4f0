"""What kernels read: tiles of matrices, one number a row, and the noise that belongs to a tile."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .elements import times
from .rng import normals_at, normals_of_groups


@triton.jit
def row_values(p, stride, b_row, b_live):
    """One number a row, in float32; zero beyond the last row and where there is no such input."""
    if p is None:
        return tl.zeros_like(b_row).to(tl.float32)  # [ROWS]
    else:
        return tl.load(p + b_row * stride, mask=b_live, other=0).to(tl.float32)  # [ROWS]


@triton.jit
def weighted(p_weight, stride_weight, b_row, b_live, b_term):
    """The rows' terms times the rows' weights."""
    if p_weight is None:
        return b_term
    else:
        return times(row_values(p_weight, stride_weight, b_row, b_live), b_term)


@triton.jit
def tile_at(p, b_row, stride_row, b_col, stride_col):
    """Pointers to a tile of a matrix."""
    return p + b_row[:, None] * stride_row + b_col[None, :] * stride_col  # [ROWS, BLOCK]


@triton.jit
def noise(b_row, start, latents, stream, seed, GROUPED: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Standard normals of a tile of latents, a function of the place in the global batch and nothing else."""
    b_first = (b_row * latents + start)[:, None]  # [ROWS, 1]
    if GROUPED:
        # rows begin at a multiple of 4, so that one Philox block serves four neighbours
        return normals_of_groups((b_first >> 2) + tl.arange(0, BLOCK_Z // 4)[None, :], stream, seed)
    else:
        # a row may begin inside a Philox block: each element draws its own and keeps one normal of four
        return normals_at(b_first + tl.arange(0, BLOCK_Z)[None, :], stream, seed)
