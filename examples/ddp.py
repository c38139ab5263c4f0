"""DistributedDataParallel: two ranks draw the noise of the whole batch, and train what one process trains.

Starts its two ranks itself, on the CPU with gloo. A sample's noise depends on the seed, the offset (here the
step) and its row in the global batch, of which each rank says where its own part begins: first_row.
"""

import copy
import gc
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastvae

WORLD, BATCH, SEED = 2, 128, 1


class NegativeELBO(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae = fastvae.VAE.mlp((64,), hidden=(128,), latent_dim=8)
        self.loss = fastvae.ELBOLoss()

    def forward(self, x: Tensor, step: int, first_row: int) -> Tensor:
        mu, logvar = self.vae.encode(x)
        z, kl = fastvae.sample_and_kl(mu, logvar, seed=SEED, offset=step, first_row=first_row)
        return self.loss(self.vae.decode(z), x, kl=kl)


def train(model: nn.Module, digits: Tensor, rank: int = 0, world: int = 1) -> None:
    """One epoch on this rank's rows of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = BATCH // world
    for step in range(len(digits) // BATCH):
        x = digits[step * BATCH + rank * rows :][:rows]
        optimizer.zero_grad()
        model(x, step, rank * rows).backward()
        optimizer.step()


def run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(SEED)
    digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    alone = NegativeELBO()
    initial, together = copy.deepcopy(alone), copy.deepcopy(alone)
    train(DistributedDataParallel(together), digits, rank, WORLD)
    if rank == 0:
        train(alone, digits)
        print(f"largest change of a weight in training: {distance(together, initial):.1e}")
        print(f"largest difference of a weight, two ranks and one process: {distance(together, alone):.1e}")
    gc.collect()  # DistributedDataParallel holds the process group in a cycle of references
    dist.destroy_process_group()


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"{folder}/store",), nprocs=WORLD)
