"""Sums over the rows of a batch, for each column: the KL of a latent, the gradient of a feature's log_scale.

The grid is [column blocks, row groups]; a program stores its part of the sum as [row groups, columns], and
the parts are added after the launch in fixed order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .elements import clamp, exp_minus_1_minus, inverse_scale, load_target, scale_slope, times
from .tiles import row_values, tile_at, weighted


@triton.jit(do_not_specialize=["batch"])
def latent_kl_kernel(
    p_mu, p_logvar, p_weight, p_out, clamp_low, clamp_high, batch: tl.int64, latents,
    stride_mu_row, stride_mu_col, stride_logvar_row, stride_logvar_col, stride_weight,
    CLAMP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(q(z_j | x) || p(z_j)) times the rows' weights, summed over the batch."""
    b_col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)  # [ROWS, BLOCK]
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, batch, tl.num_programs(1) * ROWS):
        b_row = (first + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
        b_mask = (b_row < batch)[:, None] & (b_col < latents)[None, :]
        p_tile = tile_at(p_mu, b_row, stride_mu_row, b_col, stride_mu_col)
        b_mu = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        p_tile = tile_at(p_logvar, b_row, stride_logvar_row, b_col, stride_logvar_col)
        b_logvar = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if CLAMP:
            b_logvar = clamp(b_logvar, clamp_low, clamp_high)
        b_element = 0.5 * b_mu * b_mu + 0.5 * exp_minus_1_minus(b_logvar)  # [ROWS, BLOCK]
        if p_weight is not None:
            b_weight = row_values(p_weight, stride_weight, b_row, b_row < batch)  # [ROWS]
            b_element = times(b_weight[:, None], b_element)
        b_sum += tl.where(b_mask, b_element, 0.0)
    tl.store(p_out + tl.program_id(1) * latents + b_col, tl.sum(b_sum, 0), mask=b_col < latents)


@triton.jit(do_not_specialize=["batch", "stride_x_hat_sample"])
def feature_scale_gradient_kernel(
    p_x_hat, p_x, p_log_scale, p_weight, p_g_loss, p_g_recon, p_out, recon_scale,
    samples, batch: tl.int64, features,
    stride_x_hat_sample: tl.int64, stride_x_hat_row, stride_x_hat_col, stride_x_row, stride_x_col,
    stride_log_scale, stride_weight, stride_g_loss, stride_g_recon,
    LIKELIHOOD: tl.constexpr, SAMPLE_UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d log_scale of each feature, over samples and batch."""
    b_col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_log_scale = row_values(p_log_scale, stride_log_scale, b_col, b_col < features)  # [BLOCK]
    b_inverse = inverse_scale(b_log_scale, LIKELIHOOD)[None, :]  # [1, BLOCK]
    b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)  # [ROWS, BLOCK]
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, batch, tl.num_programs(1) * ROWS):
        b_row = (first + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
        b_live = b_row < batch
        b_mask = b_live[:, None] & (b_col < features)[None, :]
        b_g = row_values(p_g_loss, stride_g_loss, b_row, b_live)  # [ROWS]
        b_g += row_values(p_g_recon, stride_g_recon, b_row, b_live)
        b_g = weighted(p_weight, stride_weight, b_row, b_live, b_g) * recon_scale  # [ROWS]
        b_x = load_target(tile_at(p_x, b_row, stride_x_row, b_col, stride_x_col), b_mask)  # [ROWS, BLOCK]
        p_sample = p_x_hat
        for _ in range(samples):
            p_tile = tile_at(p_sample, b_row, stride_x_hat_row, b_col, stride_x_hat_col)
            b_x_hat = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
            b_slope = times(b_g[:, None], scale_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD))
            b_sum += tl.where(b_mask, b_slope, 0.0)
            p_sample += stride_x_hat_sample * SAMPLE_UNIT
    tl.store(p_out + tl.program_id(1) * features + b_col, tl.sum(b_sum, 0), mask=b_col < features)
