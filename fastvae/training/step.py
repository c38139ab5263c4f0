"""One training step: no host sync, few launches, few Python calls; on a GPU a single launch, as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..loss import ELBOLoss
from ..models import Model
from ..models.model import ModelError
from ..ops import ELBOTerms
from ..ops.library import random_bits
from ..ops.pages import keep_pages
from .backward import Backward
from .buffers import Buffers
from .config import DEFAULT_MAX_SKIPPED, CUDAGraph, TrainConfig
from .distributed import Ranks, Share
from .extra import ExtraLoss
from .gradient_sum import GradientSum
from .graph import Capture, CUDACapture, Graphs
from .native_adam import NativeAdam
from .numbers import SkippedSteps
from .optimizer import make_optimizer
from .schedules import capacity_factor, kl_factor, lr_factor
from .step_loss import check_sums_over_parts, of_all_ranks, with_own
from .sums import TermSums
from .tape import is_recordable
from .weights import FlatWeights


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
    cuda_graph: on a GPU, capture the step and replay it, see `Graphs`. "auto" does where all is known to do
        the same in each step, so not with code of your own; "always" takes your word for it.
    steps: how many were made, which is all the state that the schedules have.
    sums: the averages of the terms since `reset`, once they were read.
    skipped: what is known of steps that were not applied.
    graphs: the step as CUDA graphs; None where it runs as it is written.
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
        cuda_graph: CUDAGraph = "auto",
    ) -> None:
        device = next(model.parameters()).device
        if device.type == "cpu":
            keep_pages()
        self.model = model
        if ranks is not None and ranks.size > 1:
            loss = of_all_ranks(loss, ranks, device)
        self.loss = loss
        self.lr = lr
        self.steps = 0
        self._lr_factor = lr_factor
        factors = {"beta": kl_factor, "capacity": capacity_factor}
        self._factors = {name: factor for name, factor in factors.items() if factor is not None}
        if self._factors:
            self.loss = with_own(loss, list(self._factors), device)
            self._full = {name: getattr(self.loss, name).clone() for name in self._factors}
        if accumulate > 1:
            check_sums_over_parts(loss)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learned_by_loss = list(self.loss.parameters())
        names_of_loss = [name for name, _ in self.loss.named_parameters()]
        for name, p in self.loss.named_parameters():
            if p.dtype != torch.float32 or not p.is_contiguous():
                layout = "contiguous" if p.is_contiguous() else "not contiguous"
                raise ModelError(
                    f"loss: got {name} of {p.dtype}, {layout}, expected contiguous torch.float32"
                )
        self.weights = FlatWeights(model, amp_dtype, exclude=learned_by_loss)
        self.optimizer = make_optimizer(
            self.weights, learned_by_loss, optimizer, lr, weight_decay, clip_norm, ema_decay
        )
        name = "loss" if extra_loss is None else "loss with its extra term"
        self.skipped = SkippedSteps(max_skipped, [*self.weights.names, *names_of_loss], name)
        self._checks_each_step = isinstance(self.optimizer, NativeAdam)  # which is not waited for
        self.extra = None if extra_loss is None else ExtraLoss(extra_loss, device, ranks)
        self._sum: GradientSum | None = None
        self._model_waits_for_ranks = False
        self._waits_for_ranks = loss.process_group is not None
        self._ranks = Ranks() if ranks is None else ranks
        if ranks is not None and ranks.size > 1:
            self._sum = GradientSum(ranks, self.weights, learned_by_loss)
            self._model_waits_for_ranks = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
            self._waits_for_ranks |= self._model_waits_for_ranks
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
        self._buffers = Buffers(model)
        self.sums = TermSums(device)
        self.graphs: Graphs | None = None
        self._takes_word = cuda_graph == "always"
        if device.type == "cuda" and cuda_graph != "never":
            self.use_graphs(CUDACapture(device))

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
            cuda_graph=config.cuda_graph,
        )

    @property
    def count(self) -> int:
        """The data trained on since `reset`."""
        return self.sums.count

    def __call__(self, x: Tensor, share: Share | None = None) -> None:
        """Train on x, float32 [B, *item] on the model's device. Raises NonFiniteError.

        share: which rows of the batch these are; None is all.
        """
        share = Share(0, len(x), len(x)) if share is None else share
        if self._lr_factor is not None:
            self.optimizer.set_lr(self.lr * self._lr_factor(self.steps))
        for name, factor in self._factors.items():
            torch.mul(self._full[name], factor(self.steps), out=getattr(self.loss, name))
        made = self._make(x, share) if self.graphs is None else self.graphs(self._make, x, share)
        self.steps += 1
        if self.sums.keep(made, share.batch):
            self._read()
        elif self._checks_each_step:
            self._check()

    def _make(self, x: Tensor, share: Share) -> Iterable[Tensor]:
        """All of the step that is done on the device, where nothing is waited for; see Optimizer.step.

        What changes from step to step, but for x, it reads from tensors that stay where they are.
        """
        self._buffers.keep()
        own: ELBOTerms | None = None
        if share.rows == 0 and self._sum is not None and not self._model_waits_for_ranks:
            random_bits(x.device)  # which the other ranks draw for the noise
            if self._waits_for_ranks:
                self.backward.add_nothing(x)
        else:
            own = self.backward(x, share)
        if share.batch < self._ranks.size:
            self._ranks.fill(self.model.buffers(), has_own=share.rows > 0)
        terms = own if self._sum is None else self._sum(own)
        assert terms is not None  # who has no others makes its own
        made = self.optimizer.step(terms)
        self._buffers.settle(self.optimizer.applied)
        return made

    def use_graphs(self, capture: Capture) -> None:
        """Capture the step from now on, where that is possible."""
        extra = [] if self.extra is None else [self.extra.function]
        modules = [part for part in (self.model, self.loss, *extra) if isinstance(part, nn.Module)]
        self.graphs = Graphs(modules, capture, self.optimizer.abandon)
        self.graphs.reset(self._why_not_captured())

    def _why_not_captured(self) -> str | None:
        """Why a graph would be wrong, if it would, as far as one can know beforehand."""
        if self._sum is not None or self._waits_for_ranks:
            return "several ranks train together"
        if self.backward.checkpoint_activations:
            return "checkpointing of activations looks at the state of a generator"
        if self._takes_word:
            return None
        unknown = "has code that may do something else in the next step; if not: --cuda-graph always"
        if self.extra is not None:
            return f"the extra loss {unknown}"
        if not is_recordable(self.model, self.loss):
            return f"the model {unknown}"
        return None

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

        Steps whose terms are not finite are left out; NaN where there are no others. Raises NonFiniteError.
        """
        self._read()
        if self.extra is not None:
            self.extra.gather()
        return self.sums.averages()

    def extra_average(self) -> dict[str, float]:
        """That of the extra loss since `reset`, by its name in the metrics; nothing where there is none."""
        return {} if self.extra is None else {"train_extra": self.extra.average()}

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step and the averages depend on, beside weights, options and generators."""
        self._read()
        state = {**self.sums.tensors(), "steps": torch.tensor(self.steps)}
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
        if self.graphs is not None:
            self.graphs.forget()
        if self.extra is not None:
            self.extra.load_tensors(part("extra."))
        self.sums.load_tensors(tensors)
        self.steps = int(tensors["steps"])

    def take_up(self) -> None:
        """Follow what a callback has done to the model: new tapes or graphs where it was changed."""
        self._buffers.refresh()
        self.backward.reset()
        if self.graphs is not None:
            self.graphs.reset(self._why_not_captured())

    def reset(self) -> None:
        """Begin an epoch: new averages, and `take_up`."""
        self.take_up()
        self.sums.reset()
        if self.extra is not None:
            self.extra.reset()

    def _read(self) -> None:
        """Add up the terms, and hear of the steps that were not applied. Raises NonFiniteError."""
        rows = self.sums.read()
        if rows is not None:
            self._check(rows)

    def _check(self, rows: Tensor | None = None) -> None:
        findings = self.optimizer.findings(rows)
        self.skipped.count(findings, self.steps - len(findings) + 1)
