"""Work for the ranks of a process group, in a module that their processes can import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import fastvae


def losses_and_gradients(rank: int, ranks: int, folder: str) -> None:
    """Each rank's share of a batch: saves (loss, gradients) of the options that need the batch's totals."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    batch = [t.chunk(ranks)[rank].requires_grad_() for t in torch.load(f"{folder}/batch.pt")]
    results = {}
    for name, options in (
        ("variance", {"likelihood": "gaussian", "log_variance": "batch"}),
        ("free bits", {"free_bits": 0.5}),
    ):
        loss = fastvae.elbo(*batch, process_group=dist.group.WORLD, **options).loss
        results[name] = (loss.detach(), *torch.autograd.grad(loss, [batch[i] for i in (0, 2, 3)]))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
