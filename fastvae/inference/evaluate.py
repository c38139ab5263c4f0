"""The negative ELBO of a model on a data set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import DataLoader
from ..loss import ELBOLoss
from ..models.model import as_model, evaluating, likelihood_of, log_variance_of
from ..ops import ELBOTerms, sample_and_kl
from ..ops.reference import clamp_logvar
from ..ops.types import Extents, FreeBitsForm
from .latents import LatentStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = Tensor | Sequence[Tensor]


def negative_elbo(
    model: nn.Module,
    beta: float = 1.0,
    *,
    logvar_clamp: tuple[float, float] | None = None,
    free_bits: float | None = None,
    free_bits_form: FreeBitsForm = "batch",
    capacity: float | None = None,
) -> ELBOLoss:
    """The loss of `model`: -log p(x|z) under its likelihood, with its variance, plus beta times the KL.

    The other arguments are those of `fastvae.ELBOLoss`.
    """
    return ELBOLoss(
        likelihood_of(model),
        beta=beta,
        log_variance=log_variance_of(model),
        logvar_clamp=logvar_clamp,
        free_bits=free_bits,
        free_bits_form=free_bits_form,
        capacity=capacity,
    )


def x_of(batch: object) -> Tensor:
    """The x of a batch that is x or (x, y). Raises ValueError for another."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        got = f"{type(batch).__name__} of {type(x).__name__}" if x is not batch else type(batch).__name__
        raise ValueError(f"batches: got a {got}, expected tensors: x, or (x, y); a collate_fn can give these")
    if x.ndim < 2:
        got = f"x of shape {list(x.shape)}"
        raise ValueError(
            f"batches: got {got}, expected [B, *item]; a loader with batch_size=None gives no batches"
        )
    return x


def moved(x: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """x as `dtype` on `device`; uint8 and bool are pixels there: x / 255, and 0 and 1.

    Raises ValueError for other integers and complex numbers.
    """
    if not (x.is_floating_point() or x.dtype in (torch.uint8, torch.bool)):
        expected = "floating point, or uint8 for x / 255"
        raise ValueError(f"batches: got x of {str(x.dtype).removeprefix('torch.')}, expected {expected}")
    is_pixels = x.dtype == torch.uint8
    # a copy to the CPU that nobody waits for would be read before it is there
    x = x.to(device, non_blocking=device.type != "cpu").to(dtype)
    return x / 255 if is_pixels else x


def inputs(
    batches: Iterable[Batch], device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """The x of each batch, which is x or (x, y), as `dtype` on `device`. Raises ValueError for others."""
    for batch in batches:
        yield moved(x_of(batch), device, dtype)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: ELBOLoss | None = None,
    seed: int = 0,
    latents: LatentStatistics | None = None,
    process_group: ProcessGroup | None = None,
) -> ELBOTerms:
    """The loss and its terms over all data, in nats a datum: eval mode, float32, one z a datum.

    model: one with `encode` and `decode`, as VAE.
    batches: x [B, *item] or (x, y) each, of any loader; uint8 is x / 255. A datum's noise depends on `seed`
        and on its place among the data, not on the batch size.
    loss: its averages over batches are weighted by their sizes; None is the negative ELBO at beta = 1. Its
        clamp of logvar holds for z too. Its free bits are left out, for they are a means of training: the
        loss here is recon + beta * kl; with a capacity recon + beta * |kl - capacity|, of the KL of all data.
    latents: takes in the posteriors of all data.
    process_group: its ranks have the same model and the same batches, take some of the batches each, and all
        get the terms of all of them.

    Returns float64 scalars. The model is left in the mode it was in. Raises ValueError for no data,
    ModelError for a model without encode and decode.
    """
    model = as_model(model)
    loss = negative_elbo(model) if loss is None else loss
    plain = _plain(loss)
    device = next(model.parameters()).device
    sums = torch.zeros(len(ELBOTerms._fields), dtype=torch.float64, device=device)
    count, nats = 0, 0.0  # data, and what one nat of each would add to the KL term, counted as the terms are
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for first_row, batch in _share(batches, process_group):
            (x,) = inputs([batch], device)
            mu, logvar = model.encode(x)
            logvar = clamp_logvar(logvar, loss.spec)
            if latents is not None:
                latents.update(mu, logvar)
            z, kl = sample_and_kl(mu, logvar, seed=seed, first_row=first_row)
            posterior = {"mu": mu, "logvar": logvar} if plain.is_by_latent else {"kl": kl}
            sums += torch.stack(plain.terms(model.decode(z), x, **posterior)).double() * len(x)
            count += len(x)
            extents = Extents(1, len(x), 0, math.prod(mu.shape[1:]))
            nats += len(x) * len(x) * loss.spec.kl_scale(extents)
    if process_group is not None:
        totals = torch.cat((sums, sums.new_tensor([count, nats])))
        dist.all_reduce(totals, group=process_group)
        sums, count, nats = totals[:-2], int(totals[-2]), float(totals[-1])
        if latents is not None:
            latents.gather(process_group)
    if count == 0:
        raise ValueError("batches: got no data to evaluate on, expected at least one batch")
    total, recon, kl = (sums / count).cpu()
    if loss.capacity is not None:
        total = recon + float(loss.beta) * (kl - float(loss.capacity) * nats / count).abs()
    return ELBOTerms(total, recon, kl)


def _share(batches: Iterable[Batch], process_group: ProcessGroup | None) -> Iterator[tuple[int, Batch]]:
    """This rank's part of the batches, and where among all data each of them begins."""
    rank, ranks = (0, 1) if process_group is None else (dist.get_rank(process_group), process_group.size())
    if isinstance(batches, DataLoader) and ranks > 1:  # which reads only what is asked for
        first, end = (r * len(batches) // ranks for r in (rank, rank + 1))
        batches.set_epoch(batches.epoch, first)
        before = batches.rank, batches.world_size
        batches.set_rank(0, 1)  # batches are dealt out here, and not their rows
        try:
            yield from with_places(islice(batches, end - first), first * batches.batch_size)
        finally:
            batches.set_rank(*before)
        return
    for i, (first_row, batch) in enumerate(with_places(batches)):
        if i % ranks == rank:
            yield first_row, batch


def with_places(batches: Iterable[Batch], first_row: int = 0) -> Iterator[tuple[int, Batch]]:
    """The batches, each with the place of its first row."""
    for batch in batches:
        yield first_row, batch
        first_row += len(x_of(batch))


def _plain(loss: ELBOLoss) -> ELBOLoss:
    """`loss` as recon + beta * kl, of batches that no other rank has a part of."""
    if loss.spec.free_bits is None and loss.capacity is None and loss.process_group is None:
        return loss
    plain = copy.copy(loss)  # with the same parameters, and the buffers in a dictionary of its own
    plain._buffers = dict(loss._buffers)
    plain.spec = replace(loss.spec, free_bits=None)
    plain.capacity = None
    plain.process_group = None
    return plain
