"""One training step, as fast as eager PyTorch goes: no host sync, few launches, few Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss import ELBOLoss
from ..models import VAE
from ..ops import ELBOTerms, sample_and_kl
from .optimizer import make_optimizer
from .weights import FlatWeights

MOST_KEPT = 1000  # steps whose terms are kept before they are added up


class TrainStep:
    """The step of `model` under `loss`: call it with each batch, read `averages` now and then.

    amp_dtype: of the matrix products; the weights, the KL and the loss stay float32. float16 scales the
        gradients (torch.amp.GradScaler) and leaves out steps whose gradients overflow.
    count: the data trained on since `reset`.
    """

    def __init__(
        self,
        model: VAE,
        loss: ELBOLoss,
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        amp_dtype: torch.dtype = torch.float32,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.loss = loss
        learned_by_loss = list(loss.parameters())
        self.weights = FlatWeights(model, amp_dtype, exclude=learned_by_loss)
        self.optimizer = make_optimizer(self.weights, learned_by_loss, optimizer, lr)
        self._autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
        self._terms: list[Tensor] = []
        self._sizes: list[int] = []
        self._sums = torch.zeros(len(ELBOTerms._fields), dtype=torch.float64, device=device)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        """Train on x, float32 [B, *item] on the model's device."""
        with self.weights.lent():
            with self._autocast:
                mu, logvar = self.model.encode(x)
                z, kl = sample_and_kl(mu, logvar)
                x_hat = self.model.decode(z)
            terms = self.loss.terms(x_hat, x, kl=kl)
            self.optimizer.backward(terms.loss)
        self.optimizer.step()
        # kept as they are until they are read, so that no step waits for the one before
        self._terms += [term.detach() for term in terms]
        self._sizes.append(len(x))
        self.count += len(x)
        if len(self._sizes) == MOST_KEPT:
            self._add_up()

    def averages(self) -> tuple[float, float, float]:
        """(loss, recon, kl), averaged over the data since `reset`; waits for the device."""
        self._add_up()
        loss, recon, kl = (self._sums / max(self.count, 1)).tolist()
        return loss, recon, kl

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step and the averages depend on, beside weights, options and generators."""
        self._add_up()
        state = {"sums": self._sums, "count": torch.tensor(self.count)}
        return state | {f"optimizer.{name}": t for name, t in self.optimizer.tensors().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave; the model has its weights back already."""
        start = "optimizer."
        self.optimizer.load_tensors(
            {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        )
        self.weights.refresh_copies()
        self.reset()
        self._sums.copy_(tensors["sums"])
        self.count = int(tensors["count"])

    def reset(self) -> None:
        """Begin new averages."""
        self._terms, self._sizes = [], []
        self._sums.zero_()
        self.count = 0

    def _add_up(self) -> None:
        """Add the terms that were kept to the sums."""
        if not self._sizes:
            return
        sizes = torch.tensor(self._sizes, dtype=torch.float64).to(self._sums.device)
        self._sums += sizes @ torch.stack(self._terms).double().view(len(sizes), -1)
        self._terms, self._sizes = [], []
