"""What a training is made of between two steps, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import DataLoader
from ..loss import ELBOLoss
from ..models import Model
from .checkpoint import CheckpointError, prefixed, without_prefix
from .shares import Batches
from .step import TrainStep


@dataclass
class Progress:
    """Where a training stands: in epoch `epoch`, from 1, after `batch` of its batches.

    epoch_samples, epoch_seconds: of this epoch; samples, seconds: of the steps of all epochs before it.
    epoch_wait_seconds, wait_seconds: those of them in which the loader was waited for.
    wall_seconds: since the training began, without the time between a stop and a resumption.
    history, best: rows of metrics.jsonl, of all finished epochs and of the best one.
    """

    epoch: int = 1
    batch: int = 0
    epoch_samples: int = 0
    epoch_seconds: float = 0.0
    epoch_wait_seconds: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    wall_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    def step(self, batches: int) -> int:
        """The steps since the beginning, of an epoch of `batches` batches."""
        return (self.epoch - 1) * batches + self.batch

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the best epoch lies `patience` epochs or more behind the last one that is finished."""
        return patience is not None and bool(self.best) and self.epoch - 1 - self.best["epoch"] >= patience

    def to_json(self, batches: int) -> dict[str, Any]:
        return {"batches": batches, **vars(self)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any], batches: int) -> Progress:
        """Raises CheckpointError if the epochs of the checkpoint had another number of batches."""
        if state["batches"] != batches:
            raise CheckpointError(
                f"the checkpoint is of epochs of {state['batches']} batches, got {batches}; expected the "
                "same data and batch size"
            )
        return cls(**{name: value for name, value in state.items() if name != "batches"})


def checkpoint_of(
    model: Model,
    loss: ELBOLoss,
    step: TrainStep,
    train: Batches,
    progress: Progress,
    best_weights: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a training goes on from: tensors, and what is none."""
    state = progress.to_json(len(train))
    if isinstance(train, DataLoader):
        state["loader"] = train.state_dict()
    return {**training_tensors(model, loss, step), **prefixed("best", best_weights)}, state


def go_on_from(
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    model: Model,
    loss: ELBOLoss,
    step: TrainStep,
    train: Batches,
) -> tuple[Progress, dict[str, Tensor]]:
    """Put back what `checkpoint_of` gave: the progress and the best weights.

    Raises CheckpointError for a checkpoint of another model, or of other data or options.
    """
    loader = state.pop("loader", None)  # not in those of older versions
    progress = Progress.from_json(state, len(train))
    if isinstance(train, DataLoader) and loader is not None:
        try:
            train.load_state_dict(loader)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint is of other data or options: {error}") from error
    load_training_tensors(tensors, model, loss, step)
    return progress, without_prefix("best", tensors)


def training_tensors(model: Model, loss: ELBOLoss, step: TrainStep) -> dict[str, Tensor]:
    """All tensors that the next step depends on."""
    device = next(model.parameters()).device
    generators = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    return {
        **prefixed("model", model.state_dict()),
        **prefixed("buffer", _other_buffers(model)),
        **prefixed("loss", dict(loss.named_parameters())),
        **prefixed("step", step.tensors()),
        **prefixed("generator", generators),
    }


def load_training_tensors(
    tensors: Mapping[str, Tensor], model: Model, loss: ELBOLoss, step: TrainStep
) -> None:
    """Put back what `training_tensors` gave. Raises CheckpointError for those of another model or options."""
    device = next(model.parameters()).device
    try:
        model.load_state_dict(without_prefix("model", tensors))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from error
    _check_alike(tensors, training_tensors(model, loss, step))
    others = _other_buffers(model)
    with torch.no_grad():
        for name, value in without_prefix("buffer", tensors).items():
            others[name].copy_(value)
        for name, value in without_prefix("loss", tensors).items():
            loss.get_parameter(name).copy_(value)
    step.load_tensors(without_prefix("step", tensors))
    generators = without_prefix("generator", tensors)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"], device)


def _check_alike(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a training that has its `own` tensors cannot go on from these."""
    for name in sorted(tensors.keys() | own.keys()):
        kind, _, what = name.partition("/")
        got, expected = (list(t[name].shape) if name in t else "none" for t in (tensors, own))
        if name in tensors and name in own:
            is_alike = got == expected
        elif kind == "step":  # an extra loss may be new, as may a scale of gradients; and averages may end
            is_alike = name in tensors or what.startswith(("extra.", "optimizer.scaler."))
        else:
            is_alike = kind not in ("buffer", "loss") or name in own
        if not is_alike:
            raise CheckpointError(
                f"the checkpoint is of another loss or other options: {what}: got {got}, expected {expected}"
            )


def _other_buffers(model: Model) -> dict[str, Tensor]:
    """Those that are not persistent: of no use to who has the weights, but steps may change them."""
    persistent = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in persistent}
