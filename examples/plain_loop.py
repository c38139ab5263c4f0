"""A VAE in plain PyTorch. One line is fastvae's: the loss."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastvae


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 8))
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
# in place of (F.mse_loss(x_hat, x, reduction="sum") + 0.1 * kl) / len(x), and of the formula for kl; beta 0.1
# with the squared error is the negative ELBO of a Gaussian p(x|z) with variance 0.05
loss_fn = fastvae.ELBOLoss(beta=0.1)

losses = []
for _ in range(20):
    total = 0.0
    for x in digits[torch.randperm(len(digits))].split(128):
        x_hat, mu, logvar = model(x)
        loss = loss_fn(x_hat, x, mu, logvar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    losses.append(total / len(digits))
print(f"loss {losses[0]:.2f} in the first epoch, {losses[-1]:.2f} in the last")
