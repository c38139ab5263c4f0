"""Activation checkpointing around encoder and sampling: what is recomputed draws the same noise."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvae

digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = fastvae.VAE.mlp((64,), hidden=(128, 128), latent_dim=8)
loss_fn = fastvae.ELBOLoss()


def encode_and_sample(x: Tensor) -> tuple[Tensor, Tensor]:
    return fastvae.sample_and_kl(*model.encode(x))


def gradients(*, checkpointed: bool) -> list[Tensor]:
    torch.manual_seed(1)
    if checkpointed:
        z, kl = checkpoint(encode_and_sample, digits, use_reentrant=False)
    else:
        z, kl = encode_and_sample(digits)
    loss = loss_fn(model.decode(z), digits, kl=kl)
    return list(torch.autograd.grad(loss, list(model.parameters())))


kept, recomputed = gradients(checkpointed=False), gradients(checkpointed=True)
difference = max((a - b).abs().max().item() for a, b in zip(kept, recomputed, strict=True))
print(f"largest difference of a gradient with and without checkpointing: {difference:.1e}")
