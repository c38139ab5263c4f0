"""The loss on the validation data after an epoch, and the use of the latents there."""

from __future__ import annotations

import math
from typing import Any

from ..inference.evaluate import evaluate, inputs
from ..inference.latents import LatentStatistics
from ..loss import ELBOLoss
from ..models import Model
from .config import TrainConfig
from .distributed import Ranks
from .numbers import largest_of, remedy_for
from .result import TrainingError
from .shares import Batches

_LOSSES = ("val_loss", "val_recon", "val_kl")


class Validation:
    """Of the model that all ranks train; each comes to every call, and gets the same."""

    def __init__(self, val: Batches | None, loss: ELBOLoss, config: TrainConfig, ranks: Ranks) -> None:
        self._val, self._loss, self._config, self._ranks = val, loss, config, ranks

    def __call__(self, model: Model, epoch: int) -> dict[str, Any]:
        """What a row of metrics.jsonl says of it; None for each loss where there are no data.

        Raises TrainingError where the loss is not finite.
        """
        if self._val is None:
            return dict.fromkeys(_LOSSES)
        latents = LatentStatistics()
        device = next(model.parameters()).device
        terms = evaluate(
            model,
            self._val,
            loss=self._loss,
            seed=self._config.seed,
            latents=latents,
            process_group=self._ranks.group(device),
        )
        loss, recon, kl = (float(term) for term in terms)
        if not math.isfinite(loss):
            remedy = f"try a lower --lr than {self._config.lr:g}"
            for i, x in enumerate(inputs(self._val, device)):
                if its := remedy_for(largest_of(x)):
                    remedy = f"{its}, in batch {i}"
                    break
            raise TrainingError(
                f"the validation loss is not finite after epoch {epoch}: "
                f"loss {loss}, recon {recon}, KL {kl}; {remedy}"
            )
        return {
            **dict(zip(_LOSSES, (loss, recon, kl), strict=True)),
            "kl_by_latent": latents.kl.tolist(),
            "active_units": latents.active_units,
        }
