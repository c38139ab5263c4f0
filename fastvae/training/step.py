"""One training step, as fast as eager PyTorch goes: no host sync, few launches, few Python calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..loss import ELBOLoss
from ..models import Model
from ..ops import ELBOTerms
from ..ops.library import random_bits
from .backward import Backward
from .config import DEFAULT_MAX_SKIPPED, TrainConfig
from .distributed import Ranks, Share
from .extra import ExtraLoss
from .gradient_sum import GradientSum
from .native_adam import NativeAdam
from .numbers import SkippedSteps
from .optimizer import make_optimizer
from .schedules import capacity_factor, kl_factor, lr_factor
from .weights import FlatWeights

MOST_KEPT = 1000  # steps whose terms are kept before they are added up


class TrainStep:
    """The step of `model` under `loss`: call it with each batch, read `averages` now and then.

    weight_decay: of "adamw"; None is 0.01.
    clip_norm: the largest norm of all gradients together; None does not clip.
    ema_decay: of an exponential moving average of the weights, for `averaged_weights`.
    amp_dtype: of the matrix products; the weights, the KL and the loss stay float32. float16 scales the
        gradients (torch.amp.GradScaler) and leaves out steps whose gradients overflow.
    max_skipped: a step whose loss or gradient is not finite is not applied; more than so many in a row raise
        NonFiniteError: at once on a CPU, elsewhere when the averages are read.
    accumulate: parts of a batch whose gradients are computed one after another and added up; noise, loss and
        gradients are those of the whole batch.
    checkpoint_activations: compute encoder and decoder again in backward, and do not keep what is in them.
    channels_last: lay images and the weights of convolutions out with the channels last.
    lr_factor, kl_factor, capacity_factor: the factors of `lr` and of the loss's beta and capacity in each
        step, counted from 0; None is 1. `loss` itself keeps its beta and capacity.
    extra_loss: a term to add, see `ExtraLoss`.
    ranks: that train together, each with a part of every batch; None is this process alone.
    steps: how many were made, which is all the state that the schedules have.
    count: the data trained on since `reset`.
    skipped: what is known of steps that were not applied.
    """

    def __init__(
        self,
        model: Model,
        loss: ELBOLoss,
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        weight_decay: float | None = None,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        amp_dtype: torch.dtype = torch.float32,
        max_skipped: int = 0,
        accumulate: int = 1,
        checkpoint_activations: bool = False,
        channels_last: bool = False,
        lr_factor: Callable[[int], float] | None = None,
        kl_factor: Callable[[int], float] | None = None,
        capacity_factor: Callable[[int], float] | None = None,
        extra_loss: Callable[..., Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        if ranks is not None and ranks.size > 1:
            loss = _of_all_ranks(loss, ranks, device)
        self.loss = loss
        self.lr = lr
        self.steps = 0
        self._lr_factor = lr_factor
        factors = {"beta": kl_factor, "capacity": capacity_factor}
        self._factors = {name: factor for name, factor in factors.items() if factor is not None}
        if self._factors:
            self.loss = _with_own(loss, list(self._factors), device)
            self._full = {name: getattr(self.loss, name).clone() for name in self._factors}
        if accumulate > 1:
            _check_sums_over_parts(loss)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learned_by_loss = list(self.loss.parameters())
        names_of_loss = [name for name, _ in self.loss.named_parameters()]
        self.weights = FlatWeights(model, amp_dtype, exclude=learned_by_loss)
        self.optimizer = make_optimizer(
            self.weights, learned_by_loss, optimizer, lr, weight_decay, clip_norm, ema_decay
        )
        name = "loss" if extra_loss is None else "loss with its extra term"
        self.skipped = SkippedSteps(max_skipped, [*self.weights.names, *names_of_loss], name)
        self._checks_each_step = isinstance(self.optimizer, NativeAdam)  # which is not waited for
        self.extra = None if extra_loss is None else ExtraLoss(extra_loss, device, ranks)
        self._sum: GradientSum | None = None
        self._waits_for_ranks = loss.process_group is not None
        if ranks is not None and ranks.size > 1:
            self._sum = GradientSum(ranks, self.weights, learned_by_loss)
            self._waits_for_ranks |= any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        self.backward = Backward(
            model,
            self.loss,
            self.weights,
            learned_by_loss,
            self.optimizer.backward,
            amp_dtype=amp_dtype,
            accumulate=accumulate,
            checkpoint_activations=checkpoint_activations,
            channels_last=channels_last,
            extra=self.extra,
            records=isinstance(self.optimizer, NativeAdam) and not self._waits_for_ranks,
        )
        self._kept: list[Tensor] = []
        self._sizes: list[int] = []
        # of the terms, and of the data whose terms are finite
        self._sums = torch.zeros(len(ELBOTerms._fields) + 1, dtype=torch.float64, device=device)
        self.count = 0

    @classmethod
    def from_config(
        cls,
        model: Model,
        loss: ELBOLoss,
        config: TrainConfig,
        total_steps: int,
        amp_dtype: torch.dtype,
        extra_loss: Callable[..., Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> TrainStep:
        """The step that `config` describes, in a training of `total_steps`."""
        lr_changes = config.lr_schedule != "constant" or config.lr_warmup_steps > 0
        lr = partial(lr_factor, total=total_steps, schedule=config.lr_schedule, warmup=config.lr_warmup_steps)
        kl = partial(kl_factor, total=total_steps, schedule=config.kl_warmup, warmup=config.kl_warmup_steps)
        capacity = partial(capacity_factor, total=total_steps, steps=config.capacity_steps)
        return cls(
            model,
            loss,
            optimizer=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
            amp_dtype=amp_dtype,
            max_skipped=0 if config.non_finite == "stop" else config.max_skipped_steps or DEFAULT_MAX_SKIPPED,
            accumulate=config.accumulate,
            checkpoint_activations=config.checkpoint_activations,
            channels_last=config.channels_last,
            lr_factor=lr if lr_changes else None,
            kl_factor=kl if config.kl_warmup != "none" else None,
            capacity_factor=None if loss.capacity is None or config.capacity is None else capacity,
            extra_loss=extra_loss,
            ranks=ranks,
        )

    def __call__(self, x: Tensor, share: Share | None = None) -> None:
        """Train on x, float32 [B, *item] on the model's device. Raises NonFiniteError.

        share: which rows of the batch these are; None is all.
        """
        share = Share(0, len(x), len(x)) if share is None else share
        if self._lr_factor is not None:
            self.optimizer.set_lr(self.lr * self._lr_factor(self.steps))
        for name, factor in self._factors.items():
            torch.mul(self._full[name], factor(self.steps), out=getattr(self.loss, name))
        own: ELBOTerms | None = None
        if share.rows == 0 and self._sum is not None and not self._waits_for_ranks:
            random_bits(x.device)  # which the other ranks draw for the noise
        else:
            own = self.backward(x, share)
        terms = own if self._sum is None else self._sum(own)
        assert terms is not None  # who has no others makes its own
        self.optimizer.step(terms)
        self.steps += 1
        # kept as they are until they are read, so that no step waits for the one before
        self._kept += [term.detach() for term in terms]
        self._sizes.append(share.batch)
        self.count += share.batch
        if len(self._sizes) == MOST_KEPT:
            self._add_up()
        if self._checks_each_step or not self._sizes:
            self._check()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """While it lasts, model and loss have the averages of their weights, if there are such."""
        own = [weights.clone() for weights, _ in self.optimizer.averages]
        for weights, average in self.optimizer.averages:
            weights.copy_(average)
        try:
            yield
        finally:
            for (weights, _), before in zip(self.optimizer.averages, own, strict=True):
                weights.copy_(before)

    def averages(self) -> tuple[float, float, float]:
        """(loss, recon, kl), averaged over the data since `reset`; waits for the device.

        Steps whose terms are not finite are left out. Raises NonFiniteError.
        """
        self._add_up()
        self._check()
        if self.extra is not None:
            self.extra.gather()
        loss, recon, kl, data = self._sums.tolist()
        data = max(data, 1)
        return loss / data, recon / data, kl / data

    def extra_average(self) -> dict[str, float]:
        """That of the extra loss since `reset`, by its name in the metrics; nothing where there is none."""
        return {} if self.extra is None else {"train_extra": self.extra.average()}

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step and the averages depend on, beside weights, options and generators."""
        self._add_up()
        self._check()
        state = {"sums": self._sums, "count": torch.tensor(self.count), "steps": torch.tensor(self.steps)}
        state |= {f"skipped.{name}": t for name, t in self.skipped.tensors().items()}
        if self.extra is not None:
            state |= {f"extra.{name}": t for name, t in self.extra.tensors().items()}
        return state | {f"optimizer.{name}": t for name, t in self.optimizer.tensors().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave; the model has its weights back already."""

        def part(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

        self.optimizer.load_tensors(part("optimizer."))
        self.skipped.load_tensors(part("skipped."))
        self.weights.refresh_copies()
        self.reset()
        if self.extra is not None:
            self.extra.load_tensors(part("extra."))
        self._sums.copy_(tensors["sums"])
        self.count = int(tensors["count"])
        self.steps = int(tensors["steps"])

    def reset(self) -> None:
        """Begin an epoch: new averages, and new tapes of a model that its owner may have changed."""
        self.backward.reset()
        self._kept, self._sizes = [], []
        self._sums.zero_()
        self.count = 0
        if self.extra is not None:
            self.extra.reset()

    def _add_up(self) -> None:
        """Add the terms that were kept to the sums."""
        if not self._sizes:
            return
        sizes = torch.tensor(self._sizes, dtype=torch.float64).to(self._sums.device)
        terms = torch.stack(self._kept).double().view(len(sizes), -1)
        finite = terms.isfinite().all(1, keepdim=True)
        counted = torch.where(finite, torch.cat((terms, torch.ones_like(terms[:, :1])), 1), 0.0)
        self._sums += sizes @ counted
        self._kept, self._sizes = [], []

    def _check(self) -> None:
        """Hear of the steps that were not applied. Raises NonFiniteError."""
        findings = self.optimizer.findings()
        self.skipped.count(findings, self.steps - len(findings) + 1)


def _check_sums_over_parts(loss: ELBOLoss) -> None:
    """Raise ValueError unless the loss of a batch is a sum over its parts."""
    spec = loss.spec
    reductions = {spec.recon_reduction, spec.kl_reduction}
    found = ""
    if isinstance(loss.log_variance, str):
        found = 'log_variance="batch"'
    elif loss.capacity is not None:
        found = "a capacity"
    elif spec.free_bits is not None and spec.free_bits_form == "batch":
        found = "free bits by batch"
    elif "none" in reductions or ("sum" in reductions and len(reductions) > 1):
        found = " and ".join(f'reduction "{reduction}"' for reduction in sorted(reductions))
    if found:
        raise ValueError(f"accumulate: given for a loss with {found}, expected one that adds up over parts")


def _with_own(loss: ELBOLoss, names: list[str], device: torch.device) -> ELBOLoss:
    """A copy of `loss` that shares its parameters and has buffers of its own with these names."""
    shared = (*loss.parameters(), loss.process_group)
    own = copy.deepcopy(loss, {id(value): value for value in shared})
    for name in names:
        value = torch.as_tensor(getattr(own, name), dtype=torch.float32, device=device).detach().clone()
        delattr(own, name)
        own.register_buffer(name, value, persistent=False)
    return own


def _of_all_ranks(loss: ELBOLoss, ranks: Ranks, device: torch.device) -> ELBOLoss:
    """The loss, with the process group where it depends on the totals of a batch."""
    by_free_bits = loss.spec.free_bits is not None and loss.spec.free_bits_form == "batch"
    by_totals = by_free_bits or loss.capacity is not None or isinstance(loss.log_variance, str)
    if loss.process_group is not None or not by_totals:
        return loss
    own = copy.copy(loss)  # with the same parameters and buffers
    own.process_group = ranks.group(device)
    return own
