"""The negative ELBO of a model on a data set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..loss import ELBOLoss
from ..models.model import as_model, likelihood_of, log_variance_of
from ..ops import ELBOTerms, sample_and_kl
from ..ops.reference import clamp_logvar
from ..ops.types import FreeBitsForm
from .latents import LatentStatistics

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


def inputs(batches: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
    """The x of each batch, which is x or (x, y), on `device`."""
    for batch in batches:
        x = batch if isinstance(batch, Tensor) else batch[0]
        yield x.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: ELBOLoss | None = None,
    seed: int = 0,
    latents: LatentStatistics | None = None,
) -> ELBOTerms:
    """The loss and its terms over all data, in nats a datum: eval mode, float32, one z a datum.

    model: one with `encode` and `decode`, as VAE.
    batches: x [B, *item] or (x, y) each. A datum's noise depends on `seed` and on its place among the data,
        not on the batch size.
    loss: its averages over batches are weighted by their sizes; None is the negative ELBO at beta = 1. Its
        clamp of logvar holds for z too. Its free bits are left out, for they are a means of training: the
        loss here is recon + beta * kl; with a capacity recon + beta * |kl - capacity|, of the KL of all data.
    latents: takes in the posteriors of all data.

    Returns float64 scalars. The model is left in the mode it was in. Raises ValueError for no data,
    ModelError for a model without encode and decode.
    """
    model = as_model(model)
    loss = negative_elbo(model) if loss is None else loss
    plain = _plain(loss)
    device = next(model.parameters()).device
    sums = torch.zeros(len(ELBOTerms._fields), dtype=torch.float64, device=device)
    count = 0
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            for x in inputs(batches, device):
                mu, logvar = model.encode(x)
                logvar = clamp_logvar(logvar, loss.spec)
                if latents is not None:
                    latents.update(mu, logvar)
                z, kl = sample_and_kl(mu, logvar, seed=seed, first_row=count)
                sums += torch.stack(plain.terms(model.decode(z), x, kl=kl)).double() * len(x)
                count += len(x)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("batches: got no data to evaluate on, expected at least one batch")
    total, recon, kl = (sums / count).cpu()
    if loss.capacity is not None:
        total = recon + float(loss.beta) * (kl - float(loss.capacity)).abs()
    return ELBOTerms(total, recon, kl)


def _plain(loss: ELBOLoss) -> ELBOLoss:
    """`loss` as recon + beta * kl."""
    if loss.spec.free_bits is None and loss.capacity is None:
        return loss
    plain = copy.copy(loss)  # with the same parameters, and the buffers in a dictionary of its own
    plain._buffers = dict(loss._buffers)
    plain.spec = replace(loss.spec, free_bits=None)
    plain.capacity = None
    return plain
