"""Sums over all programs of a launch without atomics on floats: partial sums, and a ticket for the last one.

Partial sums are added in an order that does not depend on which program came first, so that two runs are
bit-equal.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

# partial sums of this many programs are added at a time
PROGRAMS = tl.constexpr(1024)
# the tile in which the rows' partial sums are added; where there are many splits, rows are few
TILE_ROWS = tl.constexpr(128)
TILE_SPLITS = tl.constexpr(8)


@triton.jit
def is_last_program(p_ticket, programs):
    """Whether all others have stored their partial sums; leaves the ticket ready for the next launch."""
    # the ticket's release covers what its own thread has seen: the barrier adds the other threads' stores
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(p_ticket, 0)
    return last


@triton.jit
def sum_of_programs(p_partial, programs):
    """The sum of one number from each program."""
    b_sum = tl.zeros([PROGRAMS], dtype=tl.float32)  # [PROGRAMS]
    for start in range(0, programs, PROGRAMS):
        b_program = start + tl.arange(0, PROGRAMS)  # [PROGRAMS]
        # from L2, because L1 does not see what other multiprocessors store
        b_sum += tl.load(p_partial + b_program, mask=b_program < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)


@triton.jit
def three_sums_of_programs(p_partial, programs):
    """The same for three numbers, [3, programs], read together: each read waits for L2."""
    b_sum_0 = tl.zeros([PROGRAMS], dtype=tl.float32)  # [PROGRAMS]
    b_sum_1 = tl.zeros([PROGRAMS], dtype=tl.float32)  # [PROGRAMS]
    b_sum_2 = tl.zeros([PROGRAMS], dtype=tl.float32)  # [PROGRAMS]
    for start in range(0, programs, PROGRAMS):
        b_program = start + tl.arange(0, PROGRAMS)  # [PROGRAMS]
        b_mask = b_program < programs
        p_tile = p_partial + b_program
        b_sum_0 += tl.load(p_tile, mask=b_mask, other=0.0, cache_modifier=".cg")
        b_sum_1 += tl.load(p_tile + programs, mask=b_mask, other=0.0, cache_modifier=".cg")
        b_sum_2 += tl.load(p_tile + 2 * programs, mask=b_mask, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum_0), tl.sum(b_sum_1), tl.sum(b_sum_2)


@triton.jit
def three_sums_of_splits(p_partial, b_row, batch, splits):
    """The sums of three numbers from each split, [3, splits, batch], for TILE_ROWS rows."""
    b_sum_0 = tl.zeros([TILE_ROWS, TILE_SPLITS], dtype=tl.float32)  # [TILE_ROWS, TILE_SPLITS]
    b_sum_1 = tl.zeros([TILE_ROWS, TILE_SPLITS], dtype=tl.float32)  # [TILE_ROWS, TILE_SPLITS]
    b_sum_2 = tl.zeros([TILE_ROWS, TILE_SPLITS], dtype=tl.float32)  # [TILE_ROWS, TILE_SPLITS]
    for start in range(0, splits, TILE_SPLITS):
        b_split = (start + tl.arange(0, TILE_SPLITS)).to(tl.int64)  # [TILE_SPLITS]
        b_mask = (b_row < batch)[:, None] & (b_split < splits)[None, :]
        p_tile = p_partial + b_split[None, :] * batch + b_row[:, None]  # [TILE_ROWS, TILE_SPLITS]
        b_sum_0 += tl.load(p_tile, mask=b_mask, other=0.0, cache_modifier=".cg")
        b_sum_1 += tl.load(p_tile + splits * batch, mask=b_mask, other=0.0, cache_modifier=".cg")
        b_sum_2 += tl.load(p_tile + 2 * splits * batch, mask=b_mask, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum_0, 1), tl.sum(b_sum_1, 1), tl.sum(b_sum_2, 1)
