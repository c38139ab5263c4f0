"""The fused ELBO: one forward kernel and one backward kernel, whose stages are switched at compile time.

A stage runs where its pointers and constants say so: sampling where SAMPLE, KL where mu and logvar (or the
rows of KL themselves) are given, reconstruction where LIKELIHOOD is set. The mathematics of an element is in
`elements`, the noise in `rng`, sums over programs in `reduction`, the reading of tiles in `tiles`.

A program takes ROWS data at a time, from row group to row group along grid axis 0, and shares their features
and latents with the programs beside it along axis 1 (the splits). Offsets are int64 throughout. What changes
from batch to batch is not specialised, so that a last batch does not recompile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .elements import (
    clamp,
    exp,
    exp_minus_1_minus,
    expm1,
    inverse_scale,
    load_target,
    recon_element,
    recon_slope,
    scale_slope,
    times,
)
from .reduction import (
    TILE_ROWS,
    is_last_program,
    sum_of_programs,
    three_sums_of_programs,
    three_sums_of_splits,
)
from .tiles import noise, row_values, tile_at, weighted


@triton.jit
def scales(
    p, b_row, stride_row, b_col, stride_col, b_mask, log_scale, inverse,
    LIKELIHOOD: tl.constexpr, SCALE_FORM: tl.constexpr,
):  # fmt: skip
    """The log_scale of a tile's elements and its inverse: those of the call, or a tile of their own."""
    if SCALE_FORM == "scalar":
        return log_scale, inverse
    else:
        b_log_scale = tl.load(tile_at(p, b_row, stride_row, b_col, stride_col), mask=b_mask, other=0.0)
        b_log_scale = b_log_scale.to(tl.float32)  # [ROWS, BLOCK_D]
        return b_log_scale, inverse_scale(b_log_scale, LIKELIHOOD)


@triton.jit
def store_rows(
    p_loss, p_recon, p_kl, p_kl_rows, p_weight, stride_weight, b_row, b_live,
    b_recon, b_kl, b_weighted_kl, recon_scale, kl_scale, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """The outputs that have one number a row."""
    if p_kl_rows is not None:
        tl.store(p_kl_rows + b_row, b_kl, mask=b_live)
    if PER_SAMPLE:
        b_recon = weighted(p_weight, stride_weight, b_row, b_live, b_recon) * recon_scale
        b_kl = weighted(p_weight, stride_weight, b_row, b_live, b_kl) * kl_scale
        b_weighted_kl = weighted(p_weight, stride_weight, b_row, b_live, b_weighted_kl) * kl_scale
        if p_recon is not None:
            tl.store(p_recon + b_row, b_recon, mask=b_live)
            tl.store(p_kl + b_row, b_kl, mask=b_live)
        tl.store(p_loss + b_row, b_recon + b_weighted_kl, mask=b_live)


@triton.jit(do_not_specialize=["seed", "batch", "first_row", "offset", "stride_x_hat_sample"])
def elbo_forward_kernel(
    p_x_hat, p_x, p_mu, p_logvar, p_kl_given, p_weight, p_beta, p_log_scale, p_seed,
    p_loss, p_recon, p_kl, p_z, p_kl_rows, p_d_x_hat, p_d_kl, p_partial, p_ticket,
    beta, log_scale, constant, free_bits, seed: tl.int64, recon_scale, kl_scale, clamp_low, clamp_high,
    samples, batch: tl.int64, features, latents, first_row: tl.int64, offset: tl.int64,
    stride_x_hat_sample: tl.int64, stride_x_hat_row, stride_x_hat_col, stride_x_row, stride_x_col,
    stride_mu_row, stride_mu_col, stride_logvar_row, stride_logvar_col,
    stride_kl_given, stride_weight, stride_beta,
    stride_log_scale_sample: tl.int64, stride_log_scale_row, stride_log_scale_col,
    LIKELIHOOD: tl.constexpr, SAMPLE: tl.constexpr, PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr,
    BETA_BY_LATENT: tl.constexpr, FREE_BITS: tl.constexpr, SCALE_FORM: tl.constexpr, GROUPED: tl.constexpr,
    SAMPLE_UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """z, KL and reconstruction term, as far as the stages go, and their sums.

    x_hat is [samples, batch, features] (its first stride in units of SAMPLE_UNIT), x [batch, features], mu
    and logvar [batch, latents], all with any strides; z is contiguous [samples, batch, latents]. The
    gradients of the loss itself, where asked for here, are contiguous as well.
    """
    SCALARS: tl.constexpr = LIKELIHOOD is not None and not PER_SAMPLE
    BY_ROW: tl.constexpr = PER_SAMPLE or SAMPLE
    split = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    programs = tl.num_programs(0) * splits
    p_row_partial = p_partial + 3 * programs

    if p_seed is not None:
        seed = tl.load(p_seed)
    if p_beta is not None and not BETA_BY_LATENT:
        beta = tl.load(p_beta).to(tl.float32)
    if p_log_scale is not None and SCALE_FORM == "scalar":
        log_scale = tl.load(p_log_scale).to(tl.float32)
    inverse = inverse_scale(log_scale, LIKELIHOOD)

    b_recon_total = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
    b_kl_total = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
    b_weighted_total = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, batch, tl.num_programs(0) * ROWS):
        b_row = (first + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
        b_live = b_row < batch
        b_weight = weighted(
            p_weight, stride_weight, b_row, b_live, tl.full([ROWS], 1.0, tl.float32)
        )  # [ROWS]

        # -log p(x | z), summed over samples and features
        b_recon = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
        if LIKELIHOOD is not None:
            b_sum = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)  # [ROWS, BLOCK_D]
            for start in range(split * BLOCK_D, features, splits * BLOCK_D):
                b_col = (start + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BLOCK_D]
                b_mask = b_live[:, None] & (b_col < features)[None, :]
                b_x = load_target(tile_at(p_x, b_row, stride_x_row, b_col, stride_x_col), b_mask)
                p_sample = p_x_hat
                p_d_sample = p_d_x_hat
                p_scale = p_log_scale
                for _ in range(samples):
                    p_tile = tile_at(p_sample, b_row, stride_x_hat_row, b_col, stride_x_hat_col)
                    b_x_hat = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
                    b_log_scale, b_inverse = scales(
                        p_scale, b_row, stride_log_scale_row, b_col, stride_log_scale_col, b_mask,
                        log_scale, inverse, LIKELIHOOD, SCALE_FORM,
                    )  # fmt: skip
                    b_element = recon_element(b_x_hat, b_x, b_log_scale, b_inverse, constant, LIKELIHOOD)
                    b_sum += tl.where(b_mask, b_element, 0.0)
                    if p_d_x_hat is not None:
                        b_slope = recon_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD)
                        b_d = times((b_weight * recon_scale)[:, None], b_slope)  # [ROWS, BLOCK_D]
                        p_tile = tile_at(p_d_sample, b_row, features, b_col, 1)
                        tl.store(p_tile, b_d.to(p_d_x_hat.dtype.element_ty), mask=b_mask)
                        p_d_sample += batch * features
                    p_sample += stride_x_hat_sample * SAMPLE_UNIT
                    if SCALE_FORM == "samples":
                        p_scale += stride_log_scale_sample
            b_recon = tl.sum(b_sum, 1)

        # KL(q(z | x) || p(z)), summed over latents, and z on the way
        if p_mu is None:
            b_own = tl.where(split == 0, b_live, False)  # [ROWS]
            b_kl = row_values(p_kl_given, stride_kl_given, b_row, b_own)  # [ROWS]
            if p_d_kl is not None:
                b_d = times(b_weight, beta + tl.zeros([ROWS], dtype=tl.float32)) * kl_scale  # [ROWS]
                tl.store(p_d_kl + b_row, b_d, mask=b_own)
        else:
            b_sum = tl.zeros([ROWS, BLOCK_Z], dtype=tl.float32)  # [ROWS, BLOCK_Z]
            b_weighted_sum = tl.zeros([ROWS, BLOCK_Z], dtype=tl.float32)  # [ROWS, BLOCK_Z]
            for start in range(split * BLOCK_Z, latents, splits * BLOCK_Z):
                b_col = (start + tl.arange(0, BLOCK_Z)).to(tl.int64)  # [BLOCK_Z]
                b_mask = b_live[:, None] & (b_col < latents)[None, :]
                p_tile = tile_at(p_mu, b_row, stride_mu_row, b_col, stride_mu_col)
                b_mu = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_Z]
                p_tile = tile_at(p_logvar, b_row, stride_logvar_row, b_col, stride_logvar_col)
                b_logvar = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_Z]
                if CLAMP:
                    b_logvar = clamp(b_logvar, clamp_low, clamp_high)
                b_element = 0.5 * b_mu * b_mu + 0.5 * exp_minus_1_minus(b_logvar)  # [ROWS, BLOCK_Z]
                b_element = tl.where(b_mask, b_element, 0.0)
                b_sum += b_element
                if FREE_BITS:
                    b_element = tl.where(b_mask & (b_element <= free_bits), free_bits, b_element)
                if BETA_BY_LATENT:
                    b_beta = row_values(p_beta, stride_beta, b_col, b_col < latents)  # [BLOCK_Z]
                    b_weighted_sum += times(b_beta[None, :], b_element)
                elif FREE_BITS:
                    b_weighted_sum += times(beta, b_element)
                if SAMPLE:
                    b_sigma = exp(0.5 * b_logvar)  # [ROWS, BLOCK_Z]
                    p_tile = tile_at(p_z, b_row, latents, b_col, 1)
                    stream = offset
                    for _ in range(samples):
                        b_eps = noise(first_row + b_row, start, latents, stream, seed, GROUPED, BLOCK_Z)
                        b_z = b_mu + b_sigma * b_eps  # [ROWS, BLOCK_Z]
                        tl.store(p_tile, b_z.to(p_z.dtype.element_ty), mask=b_mask)
                        p_tile += batch * latents
                        stream += 1
            b_kl = tl.sum(b_sum, 1)  # [ROWS]
        BY_LATENT: tl.constexpr = BETA_BY_LATENT or FREE_BITS
        b_weighted_kl = tl.sum(b_weighted_sum, 1) if BY_LATENT else times(beta, b_kl)  # [ROWS]

        if SCALARS:
            b_recon_total += weighted(p_weight, stride_weight, b_row, b_live, b_recon)
            b_kl_total += weighted(p_weight, stride_weight, b_row, b_live, b_kl)
            b_weighted_total += weighted(p_weight, stride_weight, b_row, b_live, b_weighted_kl)
        if BY_ROW:
            if splits == 1:
                store_rows(
                    p_loss, p_recon, p_kl, p_kl_rows, p_weight, stride_weight, b_row, b_live,
                    b_recon, b_kl, b_weighted_kl, recon_scale, kl_scale, PER_SAMPLE,
                )  # fmt: skip
            else:
                p_tile = p_row_partial + split * batch + b_row
                tl.store(p_tile, b_recon, mask=b_live)
                tl.store(p_tile + splits * batch, b_kl, mask=b_live)
                tl.store(p_tile + 2 * splits * batch, b_weighted_kl, mask=b_live)

    if SCALARS:
        p_program = p_partial + tl.program_id(0) * splits + split
        tl.store(p_program, tl.sum(b_recon_total))
        tl.store(p_program + programs, tl.sum(b_kl_total))
        tl.store(p_program + 2 * programs, tl.sum(b_weighted_total))
        last = is_last_program(p_ticket, programs)
        if last:
            recon, kl, weighted_kl = three_sums_of_programs(p_partial, programs)
            if p_recon is not None:
                tl.store(p_recon, recon * recon_scale)
                tl.store(p_kl, kl * kl_scale)
            tl.store(p_loss, recon * recon_scale + weighted_kl * kl_scale)
    elif splits > 1:
        last = is_last_program(p_ticket, programs)
    else:
        last = False
    if BY_ROW and last & (splits > 1):
        for first in range(0, batch, TILE_ROWS):
            b_row = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)  # [TILE_ROWS]
            b_recon, b_kl, b_weighted_kl = three_sums_of_splits(p_row_partial, b_row, batch, splits)
            store_rows(
                p_loss, p_recon, p_kl, p_kl_rows, p_weight, stride_weight, b_row, b_row < batch,
                b_recon, b_kl, b_weighted_kl, recon_scale, kl_scale, PER_SAMPLE,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["seed", "batch", "first_row", "offset", "stride_x_hat_sample", "stride_g_z_sample"]
)
def elbo_backward_kernel(
    p_x_hat, p_x, p_mu, p_logvar, p_weight, p_beta, p_log_scale, p_seed,
    p_g_loss, p_g_recon, p_g_kl, p_g_z, p_g_kl_rows,
    p_d_x_hat, p_d_mu, p_d_logvar, p_d_kl, p_d_log_scale, p_partial, p_ticket,
    beta, log_scale, free_bits, seed: tl.int64, recon_scale, kl_scale, clamp_low, clamp_high,
    samples, batch: tl.int64, features, latents, first_row: tl.int64, offset: tl.int64,
    stride_x_hat_sample: tl.int64, stride_x_hat_row, stride_x_hat_col, stride_x_row, stride_x_col,
    stride_mu_row, stride_mu_col, stride_logvar_row, stride_logvar_col, stride_weight, stride_beta,
    stride_log_scale_sample: tl.int64, stride_log_scale_row, stride_log_scale_col,
    stride_g_loss, stride_g_recon, stride_g_kl, stride_g_kl_rows,
    stride_g_z_sample: tl.int64, stride_g_z_row, stride_g_z_col,
    LIKELIHOOD: tl.constexpr, CLAMP: tl.constexpr, BETA_BY_LATENT: tl.constexpr, FREE_BITS: tl.constexpr,
    SCALE_FORM: tl.constexpr, GROUPED: tl.constexpr, SAMPLE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """The gradients whose pointers are given, from the upstream gradients whose pointers are given.

    Shapes and strides as in the forward kernel; gradients are contiguous, upstream ones have any strides.
    """
    split = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    programs = tl.num_programs(0) * splits

    if p_seed is not None:
        seed = tl.load(p_seed)
    if p_beta is not None and not BETA_BY_LATENT:
        beta = tl.load(p_beta).to(tl.float32)
    if p_log_scale is not None and SCALE_FORM == "scalar":
        log_scale = tl.load(p_log_scale).to(tl.float32)
    inverse = inverse_scale(log_scale, LIKELIHOOD)

    # through the reconstruction term
    if p_d_x_hat is not None or p_d_log_scale is not None:
        b_scale_total = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
        for first in range(tl.program_id(0).to(tl.int64) * ROWS, batch, tl.num_programs(0) * ROWS):
            b_row = (first + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
            b_live = b_row < batch
            b_g = row_values(p_g_loss, stride_g_loss, b_row, b_live)  # [ROWS]
            b_g += row_values(p_g_recon, stride_g_recon, b_row, b_live)
            b_g = weighted(p_weight, stride_weight, b_row, b_live, b_g) * recon_scale  # [ROWS]
            b_sum = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)  # [ROWS, BLOCK_D]
            for start in range(split * BLOCK_D, features, splits * BLOCK_D):
                b_col = (start + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BLOCK_D]
                b_mask = b_live[:, None] & (b_col < features)[None, :]
                b_x = load_target(tile_at(p_x, b_row, stride_x_row, b_col, stride_x_col), b_mask)
                b_of_samples = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)  # [ROWS, BLOCK_D]
                p_sample = p_x_hat
                p_d_sample = p_d_x_hat
                p_scale = p_log_scale
                p_d_scale = p_d_log_scale
                for _ in range(samples):
                    p_tile = tile_at(p_sample, b_row, stride_x_hat_row, b_col, stride_x_hat_col)
                    b_x_hat = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
                    _, b_inverse = scales(
                        p_scale, b_row, stride_log_scale_row, b_col, stride_log_scale_col, b_mask,
                        log_scale, inverse, LIKELIHOOD, SCALE_FORM,
                    )  # fmt: skip
                    if p_d_x_hat is not None:
                        b_d = times(b_g[:, None], recon_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD))
                        p_tile = tile_at(p_d_sample, b_row, features, b_col, 1)
                        tl.store(p_tile, b_d.to(p_d_x_hat.dtype.element_ty), mask=b_mask)
                        p_d_sample += batch * features
                    if p_d_log_scale is not None:
                        b_slope = tl.where(b_mask, scale_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD), 0.0)
                        if SCALE_FORM == "scalar":
                            b_sum += b_slope
                        elif SCALE_FORM == "elements":
                            b_of_samples += b_slope
                        else:
                            p_tile = tile_at(p_d_scale, b_row, features, b_col, 1)
                            b_d = times(b_g[:, None], b_slope).to(p_d_log_scale.dtype.element_ty)
                            tl.store(p_tile, b_d, mask=b_mask)
                            p_d_scale += batch * features
                    p_sample += stride_x_hat_sample * SAMPLE_UNIT
                    if SCALE_FORM == "samples":
                        p_scale += stride_log_scale_sample
                if p_d_log_scale is not None and SCALE_FORM == "elements":
                    p_tile = tile_at(p_d_log_scale, b_row, features, b_col, 1)
                    b_d = times(b_g[:, None], b_of_samples).to(p_d_log_scale.dtype.element_ty)
                    tl.store(p_tile, b_d, mask=b_mask)
            if p_d_log_scale is not None and SCALE_FORM == "scalar":
                b_scale_total += times(b_g, tl.sum(b_sum, 1))

        if p_d_log_scale is not None and SCALE_FORM == "scalar":
            tl.store(p_partial + tl.program_id(0) * splits + split, tl.sum(b_scale_total))
            if is_last_program(p_ticket, programs):
                d_log_scale = sum_of_programs(p_partial, programs)
                tl.store(p_d_log_scale, d_log_scale.to(p_d_log_scale.dtype.element_ty))

    # through the KL term and through z
    if p_d_mu is not None or p_d_logvar is not None or p_d_kl is not None:
        for first in range(tl.program_id(0).to(tl.int64) * ROWS, batch, tl.num_programs(0) * ROWS):
            b_row = (first + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
            b_live = b_row < batch
            b_g_loss = row_values(p_g_loss, stride_g_loss, b_row, b_live)  # [ROWS]
            b_g_kl = row_values(p_g_kl, stride_g_kl, b_row, b_live)  # [ROWS]
            b_g_kl_rows = row_values(p_g_kl_rows, stride_g_kl_rows, b_row, b_live)  # [ROWS]
            if p_d_kl is not None:
                b_d = times(beta, b_g_loss) + b_g_kl  # [ROWS]
                b_d = weighted(p_weight, stride_weight, b_row, b_live, b_d)
                tl.store(p_d_kl + b_row, b_d * kl_scale, mask=tl.where(split == 0, b_live, False))
            else:
                for start in range(split * BLOCK_Z, latents, splits * BLOCK_Z):
                    b_col = (start + tl.arange(0, BLOCK_Z)).to(tl.int64)  # [BLOCK_Z]
                    b_mask = b_live[:, None] & (b_col < latents)[None, :]
                    # d / d z, and the same times the noise itself, which is drawn again: (z - mu) / sigma has
                    # lost it where sigma is small
                    b_g_z = tl.zeros([ROWS, BLOCK_Z], dtype=tl.float32)  # [ROWS, BLOCK_Z]
                    b_g_sigma = tl.zeros([ROWS, BLOCK_Z], dtype=tl.float32)  # [ROWS, BLOCK_Z]
                    if p_g_z is not None:
                        p_sample = p_g_z
                        stream = offset
                        for _ in range(samples):
                            p_tile = tile_at(p_sample, b_row, stride_g_z_row, b_col, stride_g_z_col)
                            b_g = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_Z]
                            b_eps = noise(first_row + b_row, start, latents, stream, seed, GROUPED, BLOCK_Z)
                            b_g_z += b_g
                            b_g_sigma += b_g * b_eps
                            p_sample += stride_g_z_sample
                            stream += 1
                    if p_d_mu is not None or FREE_BITS:
                        p_tile = tile_at(p_mu, b_row, stride_mu_row, b_col, stride_mu_col)
                        b_mu = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_Z]
                    if p_d_logvar is not None or FREE_BITS:
                        p_tile = tile_at(p_logvar, b_row, stride_logvar_row, b_col, stride_logvar_col)
                        b_logvar = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_Z]
                    # d / d KL
                    if BETA_BY_LATENT:
                        b_beta = row_values(p_beta, stride_beta, b_col, b_col < latents)  # [BLOCK_Z]
                        b_g_kl_tile = times(b_beta[None, :], b_g_loss[:, None])  # [ROWS, BLOCK_Z]
                    else:
                        b_g_kl_tile = times(beta, b_g_loss)[:, None]  # [ROWS, 1]
                    if FREE_BITS:
                        b_v = clamp(b_logvar, clamp_low, clamp_high) if CLAMP else b_logvar
                        b_element = 0.5 * b_mu * b_mu + 0.5 * exp_minus_1_minus(b_v)  # [ROWS, BLOCK_Z]
                        b_g_kl_tile = tl.where(b_element <= free_bits, 0.0, b_g_kl_tile)  # [ROWS, BLOCK_Z]
                    b_g_kl_tile += b_g_kl[:, None]
                    if p_weight is not None:
                        b_weight = row_values(p_weight, stride_weight, b_row, b_live)  # [ROWS]
                        b_g_kl_tile = times(b_weight[:, None], b_g_kl_tile)
                    b_g_kl_tile = b_g_kl_tile * kl_scale + b_g_kl_rows[:, None]  # [ROWS, BLOCK_Z]

                    if p_d_mu is not None:
                        b_d = times(b_g_kl_tile, b_mu) + b_g_z  # [ROWS, BLOCK_Z]
                        p_tile = tile_at(p_d_mu, b_row, latents, b_col, 1)
                        tl.store(p_tile, b_d.to(p_d_mu.dtype.element_ty), mask=b_mask)
                    if p_d_logvar is not None:
                        b_d = times(b_g_kl_tile, 0.5 * expm1(b_logvar))  # [ROWS, BLOCK_Z]
                        if p_g_z is not None:
                            b_d += times(b_g_sigma, 0.5 * exp(0.5 * b_logvar))
                        if CLAMP:
                            # what the clamp changed has no gradient, so that nothing needs clamping here
                            b_d = tl.where((b_logvar >= clamp_low) & (b_logvar <= clamp_high), b_d, 0.0)
                        p_tile = tile_at(p_d_logvar, b_row, latents, b_col, 1)
                        tl.store(p_tile, b_d.to(p_d_logvar.dtype.element_ty), mask=b_mask)
