"""torch.autocast: the model in bfloat16, the loss in float32 without a cast of its inputs."""

import torch
from sklearn.datasets import load_digits

import fastvae

device = "cuda" if torch.cuda.is_available() else "cpu"
digits = torch.tensor(load_digits().data / 16, dtype=torch.float32, device=device)
model = fastvae.VAE.mlp((64,), hidden=(128,), latent_dim=8).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
loss_fn = fastvae.ELBOLoss(beta=0.1)

losses = []
for _ in range(20):
    for x in digits[torch.randperm(len(digits))].split(128):
        with torch.autocast(device, torch.bfloat16):
            x_hat, mu, logvar = model(x)
            loss = loss_fn(x_hat, x, mu, logvar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"x_hat {x_hat.dtype}, loss {loss.dtype}")
print(f"loss {losses[0]:.2f} in the first step, {losses[-1]:.2f} in the last")
