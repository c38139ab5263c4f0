"""torch.compile(fullgraph=True) over model, sampling and loss: one graph, with the noise of eager mode."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fastvae

digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = fastvae.VAE.mlp((64,), hidden=(128,), latent_dim=8)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
loss_fn = fastvae.ELBOLoss(beta=0.1)


def negative_elbo(x: Tensor) -> Tensor:
    mu, logvar = model.encode(x)
    z, kl = fastvae.sample_and_kl(mu, logvar)
    return loss_fn(model.decode(z), x, kl=kl)


compiled = torch.compile(negative_elbo, fullgraph=True)

losses = []
for _ in range(20):
    for x in digits[torch.randperm(len(digits))].split(128)[:-1]:  # the last is smaller: it would recompile
        loss = compiled(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} in the first step, {losses[-1]:.2f} in the last")

results = []
for function in (negative_elbo, compiled):
    torch.manual_seed(1)
    results.append(function(digits[:128]).item())
print(f"the same seed: {results[0]:.4f} eager, {results[1]:.4f} compiled")
