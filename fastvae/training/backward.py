"""The loss of a batch and its gradients: as written, in parts, or replayed from a tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..loss import ELBOLoss
from ..models import Model
from ..models.model import ModelError, check_batch, evaluating
from ..ops import ELBOTerms, sample_and_kl
from ..ops.library import random_bits
from ..ops.reference import clamp_logvar
from .buffers import computed_again
from .distributed import Share
from .extra import ExtraLoss
from .gradient_sum import part_of, parts
from .graph import likeness_of
from .tape import Tape, TapeProducts, is_recordable, record
from .weights import FlatWeights

MOST_TAPES = 16  # each of which has memory of its own for a batch and gradients; mostly there are two


class Backward:
    """The terms of the loss of x, or a rank's part of them; their gradients arrive at `leaves`.

    backward: of the optimizer, which may scale the loss.
    accumulate, checkpoint_activations, channels_last: see `TrainStep`.
    records: whether the operations on a batch may be recorded and replayed; they are where model and loss
        allow it, and nothing of the above asks for them as they are written.
    leaves: the weights as the step uses them, then the parameters of the loss.
    tapes: of the first batches of MOST_TAPES kinds, by what they looked like and how many threads there were;
        None where nothing is recorded.
    """

    def __init__(
        self,
        model: Model,
        loss: ELBOLoss,
        weights: FlatWeights,
        learned_by_loss: list[nn.Parameter],
        backward: Callable[[Tensor], None],
        *,
        amp_dtype: torch.dtype,
        accumulate: int,
        checkpoint_activations: bool,
        channels_last: bool,
        extra: ExtraLoss | None,
        records: bool,
    ) -> None:
        self.model = model
        self.loss = loss
        self.weights = weights
        self.accumulate = accumulate
        self.checkpoint_activations = checkpoint_activations
        self.channels_last = channels_last
        self.extra = extra
        self.leaves = [*weights.leaves, *learned_by_loss]
        self._backward = backward
        device = weights.flat.device.type
        self._autocast = torch.autocast(device, amp_dtype, enabled=amp_dtype != torch.float32)
        self._no_autocast = torch.autocast(device, enabled=False)  # but the step's own, whatever is around it
        learns_beta = isinstance(loss.beta, Tensor) and loss.beta.requires_grad  # by the reference's formula
        as_written = accumulate > 1 or checkpoint_activations or extra is not None or learns_beta
        self._records = records and not as_written
        self.tapes: dict[Any, Tape] | None = None
        self._likeness: list[Any] = []  # of the modules when the tapes were begun
        self._products: Callable[[], AbstractContextManager[Any]]
        self.reset()

    def __call__(self, x: Tensor, share: Share) -> ELBOTerms:
        """The loss and its terms, or this rank's part of them; their gradients arrive at the leaves."""
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.accumulate > 1:
            with self._unrecorded():
                return self._by_parts(x, share)
        kind = x.shape, x.stride(), x.dtype, share, torch.get_num_threads()  # of which calls are prepared
        if self.tapes is None or (kind not in self.tapes and len(self.tapes) == MOST_TAPES):
            with self._unrecorded(), self._products():
                return self._as_written(x, share)
        if kind in self.tapes:
            outputs = self.tapes[kind](x)
        else:
            with self.weights.lent(), self._no_autocast:
                terms_and_gradients = partial(self._terms_and_gradients, share=share)
                outputs, tape = record(terms_and_gradients, x, lasting=len(ELBOTerms._fields))
            if tape is None:
                self.tapes = None
            else:
                self.tapes[kind] = tape
        loss, recon, kl, *gradients = outputs
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        return ELBOTerms(loss, recon, kl)

    @torch.no_grad()
    def add_nothing(self, x: Tensor) -> None:
        """Take part in the totals of a batch of which this rank has no rows: x is [0, *item].

        The model gets a row that counts nowhere, since one that reshapes to [B, -1] does not take none.
        """
        with torch.random.fork_rng([x.device] if x.is_cuda else []), evaluating(self.model):
            mu, logvar = self.model.encode(x.new_zeros(1, *x.shape[1:]))
            x_hat, mu, logvar = self.model.decode(mu)[:0], mu[:0], clamp_logvar(logvar[:0], self.loss.spec)
        if self.loss.spec.free_bits is None:
            self.loss.terms(x_hat, x, kl=x.new_zeros(0))
        else:
            self.loss.terms(x_hat, x, mu, logvar)

    def check(self, x: Tensor) -> tuple[int, ...]:
        """The shape of a latent, as of `check_batch`, of a model that takes x in the step's precision too."""
        latent_shape = check_batch(self.model, x)
        if self.weights.copies is None:
            return latent_shape
        try:
            with self.weights.lent(), self._autocast:
                check_batch(self.model, x)
        except ModelError:
            raise
        except Exception as error:
            name, dtype = type(self.model).__name__, str(self.weights.copies.dtype).removeprefix("torch.")
            got = f"{type(error).__name__} of {name} with amp, in {dtype}, and none without"
            what = str(error).partition("\n")[0]
            raise ModelError(
                f"model: got {got}: {what}; train without amp, or compute that part from x.float() under "
                f"torch.autocast({x.device.type!r}, enabled=False)"
            ) from error
        return latent_shape

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """For the model's own code: no gradients are there before, and what it did to weights is taken up."""
        for leaf in self.leaves:
            leaf.grad = None  # which a callback's backward may have left
        with self.weights.lent(), self._no_autocast:
            yield
        self.weights.take_up()

    def _as_written(self, x: Tensor, share: Share) -> ELBOTerms:
        """`__call__` by autograd, from the loss on or from what its gradients are made of with it."""
        scaled = self.weights.is_half or parts(self.loss.spec, share) != (1, 1)
        if scaled or self.extra is not None:
            terms = self.terms(x, share)
            self._backward(terms.loss)
            return terms
        arguments, _ = self.loss_arguments(x, share)
        terms, roots = self.loss.terms_and_gradients(**arguments)
        tensors, gradients = zip(*roots, strict=True)
        torch.autograd.backward(tensors, gradients)
        return terms

    def _by_parts(self, x: Tensor, share: Share) -> ELBOTerms:
        """`__call__` with the activations of one part of x at a time."""
        seed = random_bits(x.device)
        summed = x.new_zeros(len(ELBOTerms._fields))
        first = share.first
        for part in x.chunk(self.accumulate):
            terms = self.terms(part, Share(first, len(part), share.batch), seed)
            self._backward(terms.loss)
            summed += torch.stack(terms).detach()
            first += len(part)
        return ELBOTerms(*summed)

    def terms(self, x: Tensor, share: Share, seed: Tensor | None = None) -> ELBOTerms:
        """What x adds to the loss, with the extra loss, and to its terms."""
        spec = self.loss.spec
        arguments, extra = self.loss_arguments(x, share, seed)
        terms = part_of(self.loss.terms(**arguments), spec, share)
        if extra is None:
            return terms
        # a value for these rows, whatever the loss does with its own
        return terms._replace(loss=terms.loss + extra * (share.rows / share.batch))

    def loss_arguments(
        self, x: Tensor, share: Share, seed: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the loss of x is computed from, these rows of a batch, and the extra loss.

        seed: of the batch's noise.
        """
        with self._autocast:
            torch.clear_autocast_cache()  # which an autocast around would keep, with casts of earlier weights
            mu, logvar = self._run(self.model.encode, x)
            logvar = clamp_logvar(logvar, self.loss.spec)
            z, kl = sample_and_kl(mu, logvar, seed=seed, first_row=share.first)
            x_hat = self._run(self.model.decode, z)
            extra = None
            if self.extra is not None and share.rows > 0:
                extra = self.extra(x_hat, x, z=z, mu=mu, logvar=logvar)
        if self.channels_last:
            x_hat, x = _in_one_order(x_hat, x, self.loss)
        if self.loss.is_by_latent:
            return {"x_hat": x_hat, "x": x, "mu": mu, "logvar": logvar}, extra
        return {"x_hat": x_hat, "x": x, "kl": kl}, extra

    def _run(self, part: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Encoder or decoder."""
        if not self.checkpoint_activations:
            return part(x)
        return checkpoint(part, x, use_reentrant=False, context_fn=partial(computed_again, self.model))

    def _terms_and_gradients(self, x: Tensor, share: Share) -> tuple[Tensor | None, ...]:
        part, kl_part = parts(self.loss.spec, share)
        if part == kl_part:
            arguments, _ = self.loss_arguments(x, share)  # recorded without an extra loss only
            terms, roots = self.loss.terms_and_gradients(**arguments)
            if part != 1:
                terms, roots = ELBOTerms(*(t * part for t in terms)), [(t, g * part) for t, g in roots]
        else:
            terms = self.terms(x, share)
            roots = [(terms.loss, torch.ones_like(terms.loss))]
        tensors, gradients = zip(*roots, strict=True)
        trained = [leaf for leaf in self.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(tensors, trained, gradients, allow_unused=True))
        return (*terms, *(next(found) if leaf.requires_grad else None for leaf in self.leaves))

    def reset(self) -> None:
        """Follow what the model's owner has frozen and written, and forget the tapes if it was changed."""
        self.weights.follow(self.model)
        if not self._records or not is_recordable(self.model, self.loss):
            self.tapes, self._products = None, nullcontext
            return
        self._products = TapeProducts  # of steps without a tape too, as another run may have one for them
        likeness = likeness_of([self.model, self.loss])
        if self.tapes is None or likeness != self._likeness:
            self.tapes, self._likeness = {}, likeness


def _in_one_order(x_hat: Tensor, x: Tensor, loss: ELBOLoss) -> tuple[Tensor, Tensor]:
    """Images with their channels last, in the order in which they lie, so that the loss reads no copy."""
    scales = (loss.log_variance, loss.log_scale)
    by_element = any(isinstance(scale, Tensor) and scale.numel() > 1 for scale in scales)
    images = x_hat.ndim == 4 and x_hat.shape == x.shape
    if by_element or not images or x_hat.is_contiguous():
        return x_hat, x
    return x_hat.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
