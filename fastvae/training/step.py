"""One training step, as fast as eager PyTorch goes: no host sync, few launches, few Python calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..loss import ELBOLoss
from ..models import VAE
from ..ops import ELBOTerms, sample_and_kl

# Adam moves a parameter by about lr a step. ln of a learned variance has several nats to go, where weights
# have hundredths.
LOG_VARIANCE_LR_FACTOR = 10.0


class TrainStep:
    """The step of `model` under `loss`: call it with each batch, read `averages` now and then.

    amp_dtype: of the matrix products; the weights, the KL and the loss stay float32. float16 scales the
        gradients (torch.amp.GradScaler) and leaves out steps whose gradients overflow.
    count: the data trained on since `reset`.
    """

    def __init__(
        self, model: VAE, loss: ELBOLoss, optimizer: torch.optim.Optimizer, amp_dtype: torch.dtype
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self._autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
        self._scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
        self._sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in ELBOTerms._fields]
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        """Train on x, float32 [B, *item] on the model's device."""
        with self._autocast:
            mu, logvar = self.model.encode(x)
            z, kl = sample_and_kl(mu, logvar)
            x_hat = self.model.decode(z)
        terms = self.loss.terms(x_hat, x, kl=kl)
        self.optimizer.zero_grad()
        if self._scaler is None:
            terms.loss.backward()
            self.optimizer.step()
        else:
            self._scaler.scale(terms.loss).backward()
            self._scaler.step(self.optimizer)
            self._scaler.update()
        # kept on the device, so that no step waits for the one before
        for total, term in zip(self._sums, terms, strict=True):
            total.add_(term.detach(), alpha=len(x))
        self.count += len(x)

    def averages(self) -> tuple[float, float, float]:
        """(loss, recon, kl), averaged over the data since `reset`; waits for the device."""
        loss, recon, kl = (torch.stack(self._sums) / max(self.count, 1)).tolist()
        return loss, recon, kl

    def reset(self) -> None:
        """Begin new averages."""
        for total in self._sums:
            total.zero_()
        self.count = 0


def make_optimizer(model: nn.Module, loss: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """Fused Adam ("adam") or AdamW ("adamw", weight decay 0.01) over what the model and the loss learn."""
    learned_by_loss = list(loss.parameters())
    weights = [p for p in model.parameters() if all(p is not q for q in learned_by_loss)]
    groups: list[dict[str, Any]] = [{"params": weights}]
    if learned_by_loss:
        groups.append({"params": learned_by_loss, "lr": lr * LOG_VARIANCE_LR_FACTOR, "weight_decay": 0.0})
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.Adam(groups, lr=lr, fused=True)
