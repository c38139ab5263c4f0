"""A CUDA graph of forward and backward: replays draw fresh noise, and torch.manual_seed repeats it.

Needs an NVIDIA GPU; without one it says so and ends with exit status 1.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fastvae

if not torch.cuda.is_available():
    sys.exit("cuda_graph.py: needs an NVIDIA GPU, and torch sees none")

digits = torch.tensor(load_digits().data / 16, dtype=torch.float32, device="cuda")
model = fastvae.VAE.mlp((64,), hidden=(128,), latent_dim=8).cuda()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
loss_fn = fastvae.ELBOLoss(beta=0.1)
x = digits[:128].clone()  # what the graph reads: a batch is copied into it


def forward_and_backward() -> tuple[Tensor, Tensor]:
    optimizer.zero_grad()
    mu, logvar = model.encode(x)
    z, kl = fastvae.sample_and_kl(mu, logvar)
    loss = loss_fn(model.decode(z), x, kl=kl)
    loss.backward()
    return z.detach(), loss.detach()


# kernels are compiled and buffers made before the capture, on a stream of their own
warm_up = torch.cuda.Stream()
warm_up.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(warm_up):
    for _ in range(3):
        forward_and_backward()
torch.cuda.current_stream().wait_stream(warm_up)
optimizer.zero_grad()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    z, loss = forward_and_backward()

draws = []
for seed in (1, None, 1):  # None goes on from where the first stopped
    if seed is not None:
        torch.manual_seed(seed)
    graph.replay()
    draws.append(z.clone())
print(f"two replays draw the same z: {torch.equal(draws[0], draws[1])}")
print(f"two replays after the same seed: {torch.equal(draws[0], draws[2])}")

losses = []
for _ in range(20):
    for batch in digits[torch.randperm(len(digits), device="cuda")].split(128)[:-1]:
        x.copy_(batch)
        graph.replay()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} in the first step, {losses[-1]:.2f} in the last")
