"""Launches of the Triton kernels: one for a forward, one for a backward, and no host synchronisation.

The one module here that imports triton; `ops.dispatch` imports it when first needed. Under Triton's
interpreter (TRITON_INTERPRET=1 before triton is imported) the same launches run on CPU tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels.columns import feature_scale_gradient_kernel, latent_kl_kernel
from ..kernels.elbo import elbo_backward_kernel, elbo_forward_kernel
from ..launch import launch
from .types import Extents, Forward, Gradients, Inputs, Needs, Spec

# Autograd's backward has the upstream scalar, and a forward that made the gradients would wait to read it.
GRADIENTS_IN_FORWARD = False

# Products and sums round as one: what Triton does where nothing is said changes with its version 3.10.
_FUSED = {"enable_fp_fusion": True}


class Plan(NamedTuple):
    """How one launch is cut; rows, block_d, block_z and warps are compiled in and do not depend on B."""

    rows: int
    block_d: int
    block_z: int
    warps: int
    row_programs: int
    splits: int


@functools.lru_cache(maxsize=4096)
def plan(batch: int, features: int, latents: int, multiprocessors: int, *, scaled: bool = False) -> Plan:
    """The cut of a launch over [batch, features] and [batch, latents]; 0 for a stage that does not run.

    A thread holds 8 features (4 where each is `scaled` by its own log_scale) or 4 latents (1 where each draws
    a Philox block of its own): 16-byte accesses, several in flight, and few enough registers for 1024 threads
    a multiprocessor. The grid fills the GPU once, and its programs walk over what is left, so that the
    tickets of a large batch stay few; rows are split where else some would walk while others have ended.
    """
    warps = 8 if features > 0 else 4
    tile_d, tile_z = (4 if scaled else 8) * 32 * warps, (4 if latents % 4 == 0 else 1) * 32 * warps
    block_d = min(max(triton.next_power_of_2(features), 16), tile_d)
    block_z = min(max(triton.next_power_of_2(latents), 16), tile_z)
    rows = min(tile_d // block_d, tile_z // block_z)
    resident = multiprocessors * 32 // warps
    groups = max(triton.cdiv(batch, rows), 1)
    chunks = max(triton.cdiv(features, block_d), triton.cdiv(latents, block_z), 1)

    def longest_walk(splits: int) -> int:
        """In chunks, with so many programs to a row group."""
        walk: int = triton.cdiv(groups, max(resident // splits, 1)) * triton.cdiv(chunks, splits)
        return walk

    choices = range(1, min(chunks, resident) + 1)
    # few splits, which have to be added up
    enough = 1.1 * min(map(longest_walk, choices))
    splits = next(n for n in choices if longest_walk(n) <= enough)
    return Plan(rows, block_d, block_z, warps, min(groups, resident // splits), splits)


def forward(inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
    """All stages that `spec` and the given tensors ask for, in one launch.

    A replayed CUDA graph reads tensors anew, and numbers are frozen into it.

    Raises:
        TypeError: an input is float64, which the kernels do not compute in.
    """
    return _forward(inputs, spec, extents, Gradients())


def forward_and_gradients(
    inputs: Inputs, spec: Spec, extents: Extents, needs: Needs
) -> tuple[Forward, Gradients]:
    """`forward` of a scalar loss, and the gradients of the loss itself.

    Those of x_hat and kl are made in the same launch, and what else is needed in one of `backward`.
    """
    d_kl = inputs.like.new_empty(extents.batch, dtype=torch.float32) if needs.kl else None
    gradients = Gradients(x_hat=_contiguous_like(inputs.x_hat) if needs.x_hat else None, kl=d_kl)
    result = _forward(inputs, spec, extents, gradients)
    others = needs._replace(x_hat=False, kl=False)
    if any(others):
        assert result.loss is not None
        found = backward(inputs, spec, extents, Forward(torch.ones_like(result.loss)), others)
        gradients = found._replace(x_hat=gradients.x_hat, kl=d_kl)
    return result, gradients


def _forward(inputs: Inputs, spec: Spec, extents: Extents, gradients: Gradients) -> Forward:
    """`forward`, which also fills the gradients of x_hat and kl that are given."""
    _refuse_float64(inputs)
    device = inputs.like.device
    samples, batch, features, latents = extents
    reconstructs = spec.likelihood is not None
    cut = plan(
        batch, features if reconstructs else 0, latents if inputs.mu is not None else 0, _processors(device),
        scaled=spec.scale_form != "scalar",
    )  # fmt: skip
    programs = cut.row_programs * cut.splits

    loss = recon = kl_term = z = kl_rows = None
    if reconstructs:
        shape = (batch,) if spec.per_sample else ()
        loss = torch.empty(shape, dtype=torch.float32, device=device)
        if spec.terms:
            recon, kl_term = torch.empty_like(loss), torch.empty_like(loss)
    if spec.sample:
        mu = inputs.mu
        assert mu is not None
        z_shape = mu.shape if samples == 1 else (samples, *mu.shape)
        z = torch.empty(z_shape, dtype=mu.dtype, device=device)
        kl_rows = torch.empty(batch, dtype=torch.float32, device=device)
    by_row = cut.splits > 1 and (spec.per_sample or spec.sample)
    row_partials = 3 * cut.splits * batch if by_row else 0
    partial = torch.empty(3 * programs + row_partials, dtype=torch.float32, device=device)

    arguments = _shared_arguments(inputs, spec, extents, cut)
    arguments.update(
        p_kl_given=inputs.kl, p_loss=loss, p_recon=recon, p_kl=kl_term, p_z=z, p_kl_rows=kl_rows,
        p_d_x_hat=gradients.x_hat, p_d_kl=gradients.kl, p_partial=partial, p_ticket=_ticket(device),
        stride_kl_given=_row_stride(inputs.kl), constant=spec.constant,
        SAMPLE=spec.sample, PER_SAMPLE=reconstructs and spec.per_sample,
    )  # fmt: skip
    launch(elbo_forward_kernel, device, (cut.row_programs, cut.splits), arguments)
    return Forward(loss, recon, kl_term, z, kl_rows)


def backward(inputs: Inputs, spec: Spec, extents: Extents, upstream: Forward, needs: Needs) -> Gradients:
    """The gradients that `needs` names, in one launch; inputs as in `forward`.

    That of a log_scale by feature is a sum over the batch, and takes a launch more and a sum.

    The upstream gradients belong to the fields of `Forward` and may be None, expanded or strided. Neither
    they nor the inputs are written to.

    Raises:
        TypeError: an input is float64, which the kernels do not compute in.
    """
    _refuse_float64(inputs)
    device = inputs.like.device
    samples, batch, features, latents = extents
    by_feature = spec.scale_form == "features"
    of_features = needs.x_hat or (needs.log_scale and not by_feature)
    of_latents = needs.mu or needs.logvar
    cut = plan(
        batch, features if of_features else 0, latents if of_latents else 0, _processors(device),
        scaled=spec.scale_form != "scalar",
    )  # fmt: skip

    d_kl = d_log_scale = partial = ticket = None
    d_x_hat = _contiguous_like(inputs.x_hat) if needs.x_hat else None
    d_mu = _contiguous_like(inputs.mu) if needs.mu else None
    d_logvar = _contiguous_like(inputs.logvar) if needs.logvar else None
    if needs.kl:
        d_kl = torch.empty(batch, dtype=torch.float32, device=device)
    if needs.log_scale and not by_feature:
        assert isinstance(inputs.log_scale, Tensor)
        d_log_scale = _contiguous_like(inputs.log_scale)
        if spec.scale_form == "scalar":
            partial = torch.empty(cut.row_programs * cut.splits, dtype=torch.float32, device=device)
            ticket = _ticket(device)
    g_loss, g_recon, g_kl, g_z, g_kl_rows = upstream
    g_z_strides: tuple[int, ...] = (0, 0, 0)
    if g_z is not None:
        g_z = g_z.reshape(samples, batch, latents)
        g_z_strides = g_z.stride()

    arguments = _shared_arguments(inputs, spec, extents, cut)
    arguments.update(
        p_g_loss=g_loss, p_g_recon=g_recon, p_g_kl=g_kl, p_g_z=g_z, p_g_kl_rows=g_kl_rows,
        p_d_x_hat=d_x_hat, p_d_mu=d_mu, p_d_logvar=d_logvar, p_d_kl=d_kl, p_d_log_scale=d_log_scale,
        p_partial=partial, p_ticket=ticket,
        stride_g_loss=_row_stride(g_loss), stride_g_recon=_row_stride(g_recon), stride_g_kl=_row_stride(g_kl),
        stride_g_kl_rows=_row_stride(g_kl_rows),
        stride_g_z_sample=g_z_strides[0], stride_g_z_row=g_z_strides[1], stride_g_z_col=g_z_strides[2],
    )  # fmt: skip
    if of_features or of_latents or needs.kl:
        launch(elbo_backward_kernel, device, (cut.row_programs, cut.splits), arguments)
    if needs.log_scale and by_feature:
        d_log_scale = _feature_scale_gradient(inputs, spec, extents, arguments)
    return Gradients(d_x_hat, d_mu, d_logvar, d_kl, d_log_scale)


def latent_kl_sums(inputs: Inputs, spec: Spec, extents: Extents) -> Tensor:
    """The KL of each latent, float32 [Z], summed over the batch with its weights."""
    device = inputs.like.device
    _, batch, _, latents = extents
    rows, block, grid = _columns(batch, latents, _processors(device))
    out = torch.empty((grid[1], latents), dtype=torch.float32, device=device)
    mu, (mu_row, mu_col) = _matrix(inputs.mu, batch, latents)
    logvar, (logvar_row, logvar_col) = _matrix(inputs.logvar, batch, latents)
    low, high = spec.logvar_clamp or (0.0, 0.0)
    arguments = {
        "p_mu": mu, "p_logvar": logvar, "p_weight": inputs.weight, "p_out": out,
        "clamp_low": float(low), "clamp_high": float(high), "batch": batch, "latents": latents,
        "stride_mu_row": mu_row, "stride_mu_col": mu_col,
        "stride_logvar_row": logvar_row, "stride_logvar_col": logvar_col,
        "stride_weight": _row_stride(inputs.weight), "CLAMP": spec.logvar_clamp is not None,
        "ROWS": rows, "BLOCK": block, "num_warps": 4, **_FUSED,
    }  # fmt: skip
    launch(latent_kl_kernel, device, grid, arguments)
    return out.sum(0)


def _feature_scale_gradient(
    inputs: Inputs, spec: Spec, extents: Extents, of_backward: dict[str, Any]
) -> Tensor:
    """d loss / d log_scale by feature; `of_backward` is what the backward kernel was given."""
    log_scale, device = inputs.log_scale, inputs.like.device
    assert isinstance(log_scale, Tensor)
    rows, block, grid = _columns(extents.batch, extents.features, _processors(device))
    out = torch.empty((grid[1], extents.features), dtype=torch.float32, device=device)
    shared = {name: of_backward.get(name) for name in feature_scale_gradient_kernel.arg_names}
    flat = log_scale.reshape(-1)
    own = {
        "p_log_scale": flat, "stride_log_scale": flat.stride(0), "p_out": out,
        "ROWS": rows, "BLOCK": block, "num_warps": 4, **_FUSED,
    }  # fmt: skip
    launch(feature_scale_gradient_kernel, device, grid, {**shared, **own})
    return out.sum(0).reshape(log_scale.shape).to(log_scale.dtype)


def _columns(rows: int, columns: int, multiprocessors: int) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns of a tile for kernels that sum over rows, and the grid [column blocks, row groups]."""
    block = min(max(triton.next_power_of_2(columns), 16), 128)
    tile_rows = 1024 // block
    blocks = max(triton.cdiv(columns, block), 1)
    groups = min(triton.cdiv(max(rows, 1), tile_rows), max(4 * multiprocessors // blocks, 1))
    return tile_rows, block, (blocks, groups)


def _shared_arguments(inputs: Inputs, spec: Spec, extents: Extents, cut: Plan) -> dict[str, Any]:
    """What the two kernels have in common: inputs with their strides, choices, and how the launch is cut."""
    samples, batch, features, latents = extents
    device, weight = inputs.like.device, inputs.weight
    p_beta, beta_number = _tensor_or_number(inputs.beta, device)
    p_log_scale, log_scale_number = _tensor_or_number(inputs.log_scale, device)
    p_log_scale, scale_strides = _scale_matrix(p_log_scale, spec, extents)
    p_seed, seed_number = _tensor_or_number(0 if inputs.seed is None else inputs.seed, device)
    by_latent = p_beta is not None and p_beta.numel() != 1
    if p_beta is not None and by_latent:
        p_beta = p_beta.reshape(-1)
    low, high = spec.logvar_clamp or (0.0, 0.0)
    recon_scale = spec.recon_scale(extents)
    if spec.half and spec.likelihood == "mse":
        recon_scale *= 0.5
    x_hat, x_hat_stride, unit, (x_hat_row, x_hat_col) = _samples_of_matrix(
        inputs.x_hat, samples, batch, features
    )
    x, (x_row, x_col) = _matrix(inputs.x, batch, features)
    mu, (mu_row, mu_col) = _matrix(inputs.mu, batch, latents)
    logvar, (logvar_row, logvar_col) = _matrix(inputs.logvar, batch, latents)
    return {
        "p_x_hat": x_hat, "p_x": x, "p_mu": mu, "p_logvar": logvar, "p_weight": weight,
        "p_beta": p_beta, "p_log_scale": p_log_scale, "p_seed": p_seed,
        # float(), because an int of 1 would be compiled in
        "beta": float(beta_number), "log_scale": float(log_scale_number), "seed": int(seed_number),
        "free_bits": float(spec.free_bits or 0),
        "recon_scale": recon_scale, "kl_scale": spec.kl_scale(extents),
        "clamp_low": float(low), "clamp_high": float(high),
        "samples": samples, "batch": batch, "features": features, "latents": latents,
        "first_row": spec.first_row, "offset": spec.offset,
        "stride_x_hat_sample": x_hat_stride // unit,
        "stride_x_hat_row": x_hat_row, "stride_x_hat_col": x_hat_col,
        "stride_x_row": x_row, "stride_x_col": x_col,
        "stride_mu_row": mu_row, "stride_mu_col": mu_col,
        "stride_logvar_row": logvar_row, "stride_logvar_col": logvar_col,
        "stride_weight": _row_stride(weight), "stride_beta": _row_stride(p_beta) if by_latent else 0,
        "stride_log_scale_sample": scale_strides[0],
        "stride_log_scale_row": scale_strides[1], "stride_log_scale_col": scale_strides[2],
        "LIKELIHOOD": spec.likelihood, "SCALE_FORM": spec.scale_form,
        "FREE_BITS": spec.free_bits is not None, "CLAMP": spec.logvar_clamp is not None,
        "BETA_BY_LATENT": by_latent,
        # rows then begin at a multiple of 4, and four neighbours share a Philox block
        "GROUPED": latents % 4 == 0, "SAMPLE_UNIT": unit,
        "ROWS": cut.rows, "BLOCK_D": cut.block_d, "BLOCK_Z": cut.block_z, "num_warps": cut.warps, **_FUSED,
    }  # fmt: skip


def _matrix(tensor: Tensor | None, rows: int, columns: int) -> tuple[Tensor | None, tuple[int, int]]:
    """The tensor as [rows, columns] and its strides; a copy only where its trailing shape has no view."""
    if tensor is None:
        return None, (0, 0)
    if tensor.is_contiguous():
        return tensor, (columns, 1)
    if tensor.shape != (rows, columns):
        tensor = tensor.reshape(rows, columns)
    return tensor, (tensor.stride(0), tensor.stride(1))


def _samples_of_matrix(
    tensor: Tensor | None, samples: int, rows: int, columns: int
) -> tuple[Tensor | None, int, int, tuple[int, int]]:
    """`_matrix` with samples in front: tensor, sample stride, a divisor of it, row and column stride.

    The sample stride depends on the batch and so is not specialised; the divisor is, and lets loads be wide.
    """
    if samples == 1 or tensor is None:
        tensor, strides = _matrix(tensor, rows, columns)
        return tensor, 0, 16, strides
    if tensor.is_contiguous():
        stride, strides = rows * columns, (columns, 1)
    else:
        tensor = tensor.reshape(samples, rows, columns)
        stride, strides = tensor.stride(0), (tensor.stride(1), tensor.stride(2))
    unit = 16 if columns % 16 == 0 and stride % 16 == 0 else 1
    return tensor, stride, unit, strides


def _scale_matrix(
    log_scale: Tensor | None, spec: Spec, extents: Extents
) -> tuple[Tensor | None, tuple[int, ...]]:
    """log_scale as [samples, rows, columns], and its strides; 0 where one value serves all."""
    if log_scale is None or spec.scale_form == "scalar":
        return log_scale, (0, 0, 0)
    log_scale = log_scale.reshape(spec.scale_shape(extents))
    pairs = zip(log_scale.shape, log_scale.stride(), strict=True)
    return log_scale, tuple(0 if size == 1 else stride for size, stride in pairs)


def _tensor_or_number(value: Tensor | float, device: torch.device) -> tuple[Tensor | None, float]:
    """A tensor for the kernel to read, or a number to hand over: a 0-d CPU tensor serves CUDA tensors too."""
    if not isinstance(value, Tensor):
        return None, value
    return (value, 0) if value.device == device else (None, value.item())


def _row_stride(tensor: Tensor | None) -> int:
    """The stride of one number a row; 0 where one number serves all rows."""
    return tensor.stride(0) if tensor is not None and tensor.dim() > 0 else 0


def _contiguous_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _refuse_float64(inputs: Inputs) -> None:
    for name in ("x_hat", "x", "mu", "logvar"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype == torch.float64:
            raise TypeError(
                f"{name}: the Triton kernels compute in float32; got float64, expected float32, bfloat16 or "
                'float16 (impl="reference" computes in float64)'
            )


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; an H100's where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# Integer tickets, all zero between launches. Launches on one stream follow each other and share one; a launch
# recorded into a CUDA graph may be replayed on any stream beside others, and keeps one for itself.
_stream_tickets: dict[tuple[torch.device, int], Tensor] = {}
_graph_tickets: dict[torch.device, tuple[Tensor, Iterator[int]]] = {}  # and the places that are free
_KEPT_FOR_GRAPHS = 4096
_APART = 4  # places of 16 bytes: kernels are compiled for addresses like that of any other ticket


def _ticket(device: torch.device) -> Tensor:
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _graph_ticket(device)
        stream = torch.cuda.current_stream(device).cuda_stream
    ticket = _stream_tickets.get((device, stream))
    if ticket is None:
        ticket = _stream_tickets[device, stream] = _lasting_zeros(1, device)
        if device not in _graph_tickets:
            kept = _lasting_zeros(_KEPT_FOR_GRAPHS * _APART, device)
            _graph_tickets[device] = kept, iter(range(0, len(kept), _APART))
    return ticket


def _lasting_zeros(n: int, device: torch.device) -> Tensor:
    """Zeros that stay, made on the current stream.

    And in a thread of their own: what this one makes while torch.compile(mode="reduce-overhead") warms up is
    from its pool of memory, where it is an error to keep any.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def make() -> Tensor:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return torch.zeros(n, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _graph_ticket(device: torch.device) -> Tensor:
    if device in _graph_tickets:
        kept, free = _graph_tickets[device]
        for i in free:
            return kept[i : i + 1]
    # One made during the capture is set to zero by each replay: right, and one more node in the graph. It
    # comes to this where no launch went before the capture, or where all that were kept are taken.
    return torch.zeros(1, dtype=torch.int32, device=device)
