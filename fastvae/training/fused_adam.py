"""torch's fused Adam, for weights on any device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..ops import ELBOTerms
from .adam import BETAS, EPS, LOG_VARIANCE_LR_FACTOR, averages_of, named_averages, share_of_new
from .numbers import Finding
from .weights import FlatWeights

_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}

# with a smaller scale even a gradient of 1 is 0 in float16
LEAST_SCALE = 2.0**-24


class FusedAdam:
    """torch's fused Adam or AdamW over the flat weights; with a GradScaler for float16.

    `step` can be captured as a CUDA graph once it has run: it waits for nothing, and all that changes from
    one step to the next, learning rates too, is in tensors on the device that are changed in place.
    """

    def __init__(
        self,
        weights: FlatWeights,
        learned_by_loss: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.weights = weights
        self.clip_norm = clip_norm
        device = weights.flat.device
        self._on_gpu = device.type == "cuda"
        self._parameters = [weights.flat, *learned_by_loss]
        own_lr = torch.tensor(lr * LOG_VARIANCE_LR_FACTOR, device=device)
        groups = [
            {"params": [weights.flat], "lr": torch.tensor(lr, device=device), "weight_decay": weight_decay},
            *([{"params": learned_by_loss, "lr": own_lr, "weight_decay": 0.0}] if learned_by_loss else []),
        ]
        self.adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
        self.scaler = torch.amp.GradScaler(device.type) if weights.is_half else None
        self._found, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self.applied: Tensor = self._one
        self.ema_decay = ema_decay
        self.averages = [] if ema_decay is None else averages_of(weights, learned_by_loss)

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from the next `step` on."""
        for group, factor in zip(self.adam.param_groups, (1.0, LOG_VARIANCE_LR_FACTOR), strict=False):
            group["lr"].fill_(lr * factor)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, scaled where float16 would lose them."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, terms: ELBOTerms | None = None) -> list[Tensor]:
        """Update the weights by their gradients; those without a gradient stay.

        Where a gradient or the loss is not finite, nothing changes. Gives one tensor: loss, recon and kl, and
        the largest element of each gradient.
        """
        without = [gradient is None for gradient in self.weights.own_gradients()]
        self.weights.gather_gradients()
        terms = ELBOTerms(self._one, self._one, self._one) if terms is None else terms
        row = self._look(terms)
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.adam)
            self._clip(self.clip_norm)
        steps, staying = self._steps().clone(), self._parts(without)
        before = [part.clone() for part in staying]
        for group in self.adam.param_groups:  # torch asks to be told; a fused Adam does the same either way
            group["capturable"] = self._on_gpu and torch.cuda.is_current_stream_capturing()
        if self.scaler is None:
            self.adam.step()
        else:
            self.scaler.step(self.adam)
            self.scaler.update()
        if staying:
            torch._foreach_copy_(staying, before)
        self.applied = self._steps() - steps
        if self.ema_decay is not None:
            self._average(self.ema_decay)
        self.weights.refresh_copies()
        self._drop_gradients()
        return [row]

    def abandon(self) -> None:
        """Forget the gradients, and what the scaler has begun."""
        self._drop_gradients()
        if self.scaler is not None:
            numbers = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.weights.flat.device.type)
            self.scaler.load_state_dict(numbers)

    def _drop_gradients(self) -> None:
        """All but `weights.flat.grad`, whose memory stays."""
        for parameter in (*self.weights.leaves, *self._parameters[1:]):
            parameter.grad = None

    @torch.no_grad()
    def _look(self, terms: ELBOTerms) -> Tensor:
        """The terms, and the largest element of each gradient; Adam hears of what is not finite."""
        gradients = [*self.weights.gradients, *(p.grad for p in self._parameters[1:] if p.grad is not None)]
        largest = torch._foreach_norm(gradients, math.inf)
        row = torch.stack([*(term.detach().float() for term in terms), *largest])
        if self.scaler is None:
            self._found.zero_()
            # the scaler's own test, in one launch; a term may be infinite, and beta 0
            looked_at = [row[:1], row[len(terms) :]]
            torch._amp_foreach_non_finite_check_and_unscale_(looked_at, self._found, self._one)
            self.adam.found_inf = self._found  # type: ignore[attr-defined]
        else:
            # which makes a gradient not a number, as the scaler looks at these alone
            self._parameters[0].grad[:1].add_(row[0] * 0)  # type: ignore[index]
        return row

    def _parts(self, chosen: list[bool]) -> list[Tensor]:
        """Weights and moments of the parameters that are chosen."""
        state = self.adam.state.get(self.weights.flat)
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq")] if state else []  # else they begin as 0
        wholes = [self.weights.flat.detach(), *moments] if any(chosen) else []
        return [part for whole in wholes for part in itertools.compress(self.weights.views(whole), chosen)]

    def _steps(self) -> Tensor:
        """The steps that were applied, counted on the device."""
        state = self.adam.state.get(self.weights.flat)
        found: Tensor = state["step"] if state else torch.zeros_like(self._one)
        return found

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        """Take the weights into their averages, if the last step was applied."""
        share = self.applied * share_of_new(decay, self._steps())
        for weights, average in self.averages:
            average.lerp_(weights, share)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        # a factor that is not a number would stay in the flat gradient, between those of the parameters
        factor = (max_norm / (norm + 1e-6)).clamp(max=1).nan_to_num(0.0)
        torch._foreach_mul_(gradients, factor)

    def findings(self, rows: Tensor | None = None) -> list[Finding | None]:
        """What was not finite in the steps that gave these rows; waits for the device.

        With a scaler, gradients that overflow are no matter while there is a smaller scale to try.
        """
        if rows is None:
            return []
        overflow = self.scaler is not None and self.scaler.get_scale() >= LEAST_SCALE
        n_terms = len(ELBOTerms._fields)
        rows = rows.cpu()
        finite = rows.isfinite()
        finite[:, 1:n_terms] = True
        found: list[Finding | None] = [None] * len(rows)
        for i in finite.all(1).logical_not().nonzero().flatten().tolist():
            terms, of_gradients = tuple(rows[i, :n_terms].tolist()), finite[i, n_terms:].tolist()
            found[i] = Finding(terms)
            if finite[i, 0]:
                found[i] = Finding(terms, of_gradients.index(False), overflow)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The moments, averages and steps, named as of `NativeAdam`, and the scale of the gradients."""
        found = {"steps": self._steps().to(torch.int64)}
        for prefix, parameter in self._named():
            state = self.adam.state.get(parameter)
            for name, torchs in _MOMENTS.items():
                found[prefix + name] = state[torchs] if state else torch.zeros_like(parameter.detach())
        if self.scaler is not None:
            numbers = self.scaler.state_dict()
            found |= {f"scaler.{name}": torch.tensor(value) for name, value in numbers.items()}
        return found | named_averages(self.averages)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave, here or of `NativeAdam`."""
        for prefix, parameter in self._named():
            moments = {torchs: tensors[prefix + name] for name, torchs in _MOMENTS.items()}
            state = {"step": tensors["steps"].to(torch.float32), **moments}
            self.adam.state[parameter] = {
                name: value.to(parameter.device, copy=True) for name, value in state.items()
            }
        for name, average in named_averages(self.averages).items():
            average.copy_(tensors[name])
        if self.scaler is not None and "scaler.scale" in tensors:
            numbers = {n: tensors[f"scaler.{n}"].item() for n in self.scaler.state_dict()}
            self.scaler.load_state_dict(numbers)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters, each with what its moments' names begin with."""
        flat, *learned_by_loss = (p for group in self.adam.param_groups for p in group["params"])
        yield "", flat
        for i, parameter in enumerate(learned_by_loss):
            yield f"loss.{i}.", parameter
