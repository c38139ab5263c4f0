"""A LightningModule, and a Trainer that reads batches from fastvae's loader (pip install lightning)."""

import logging

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fastvae


class VAE(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vae = fastvae.VAE.mlp((64,), hidden=(128,), latent_dim=8)
        self.loss = fastvae.ELBOLoss(beta=0.1)
        self.losses: list[float] = []

    def training_step(self, x: Tensor, _: int) -> Tensor:
        mu, logvar = self.vae.encode(x)
        z, kl = fastvae.sample_and_kl(mu, logvar)
        loss: Tensor = self.loss(self.vae.decode(z), x, kl=kl)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(self.trainer.callback_metrics["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = VAE()
trainer = lightning.Trainer(
    max_epochs=20,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, fastvae.DataLoader(digits, 128, shuffle=True))
print(f"loss {model.losses[0]:.2f} in the first epoch, {model.losses[-1]:.2f} in the last")
