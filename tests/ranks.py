"""Work for the ranks of a process group, in a module that their processes can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastvae


def options_of_totals(batch: list[torch.Tensor], ranks: int) -> dict[str, dict[str, Any]]:
    """What depends on the totals of `batch`; the capacity lies between the mean KL and that of one rank."""
    kl = 0.5 * (batch[2] ** 2 + batch[3].exp() - 1 - batch[3]).sum(1)
    most = max(part.mean() for part in kl.chunk(ranks))
    return {
        "variance": {"likelihood": "gaussian", "log_variance": "batch"},
        "free bits": {"free_bits": 0.5},
        "capacity": {"capacity": 0.5 * float(kl.mean() + most), "beta": 3.0},
    }


def losses_and_gradients(rank: int, ranks: int, folder: str) -> None:
    """Each rank's share of a batch: saves (loss, gradients) of the options that need the batch's totals."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    whole = torch.load(f"{folder}/batch.pt")
    batch = [t.chunk(ranks)[rank].requires_grad_() for t in whole]
    results = {}
    for name, options in options_of_totals(whole, ranks).items():
        loss = fastvae.elbo(*batch, process_group=dist.group.WORLD, **options).loss
        results[name] = (loss.detach(), *torch.autograd.grad(loss, [batch[i] for i in (0, 2, 3)]))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
