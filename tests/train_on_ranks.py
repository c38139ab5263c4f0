"""Trainings in plain Python, as torchrun starts them: `train_on_ranks.py FOLDER` leaves each rank's weights.

`train_on_ranks.py FOLDER own` makes the process group itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from fastvae import VAE, Callback, DataLoader, ELBOLoss
from fastvae.inference.evaluate import evaluate
from fastvae.training.config import TrainConfig
from fastvae.training.result import TrainingError
from fastvae.training.trainer import Trainer

EVEN, UNEVEN, LAST_ALONE = 160, 149, 145  # data: batches of 16, the last of 16, 5 and 1
RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Unused(nn.Module):
    """An encoder with weights that no step uses: without a gradient they stay, also under weight decay."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.extra = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x)
        return mu, logvar


def mlp(**options) -> VAE:
    return VAE.mlp((12,), (16,), 3, **options)


def with_unused_weights() -> VAE:
    model = mlp()
    return VAE(Unused(model.encoder), model.decoder)


def with_batch_norm() -> VAE:
    model = mlp()
    model.decoder = nn.Sequential(model.decoder, nn.BatchNorm1d(12))
    return model


class Reshaping(nn.Module):
    """An encoder that takes no batch without rows, of which torch cannot tell what -1 is."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x.view(len(x), -1))
        return mu, logvar


def with_reshaping() -> VAE:
    model = mlp()
    return VAE(Reshaping(model.encoder), model.decoder)


def with_spectral_norm() -> VAE:
    """Whose buffers a forward pass changes, whatever the rows are."""
    model = mlp()
    spectral_norm(model.encoder.layers[0])
    return VAE(model.encoder, model.decoder)


class Writing(Callback):
    """Begins with other weights, of which some are frozen in the first epoch, and writes to all after it."""

    def on_start(self, trainer: Trainer, step: int) -> None:
        self.model = trainer.model
        self.model.decoder.requires_grad_(False)
        self._scale(0.5)

    def on_epoch(self, row) -> None:
        self.model.decoder.requires_grad_(True)
        self._scale(0.9)

    def _scale(self, factor: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(factor)


def learned_by_loss() -> ELBOLoss:
    return ELBOLoss("gaussian", log_variance=nn.Parameter(torch.zeros(())))


def in_batches(data: Tensor) -> DataLoader:
    return DataLoader(data.numpy(), 16, shuffle=True, seed=3)


def brightness(x_hat: Tensor, x: Tensor) -> Tensor:
    return 3 * (x_hat.mean(1) - x.mean(1)).square().mean()


def in_torch_batches(data: Tensor) -> TorchDataLoader:
    return TorchDataLoader(TensorDataset(data), 16, shuffle=True)


def with_one_bad(data: Tensor) -> DataLoader:
    """A datum that is not a number, which one rank has: no rank applies the step."""
    data = data.clone()
    data[77, 3] = torch.nan
    return in_torch_batches(data)


# name: model, loss, data, loader, options
CASES = {
    "even": (mlp, None, EVEN, in_batches, {}),
    "uneven": (lambda: mlp(likelihood="gaussian"), None, UNEVEN, in_batches, {}),
    "last alone": (lambda: mlp(likelihood="bernoulli"), None, LAST_ALONE, in_batches, {"clip_norm": 1.0}),
    "torch": (mlp, None, UNEVEN, in_torch_batches, {}),
    "schedules": (mlp, None, UNEVEN, in_batches, {"kl_warmup": "linear", "lr_schedule": "cosine"}),
    "free bits": (mlp, None, LAST_ALONE, in_batches, {"free_bits": 0.2}),
    "free bits of each": (mlp, None, UNEVEN, in_batches, {"free_bits": 0.2, "free_bits_form": "element"}),
    "accumulate": (mlp, None, LAST_ALONE, in_batches, {"accumulate": 3}),
    "capacity": (mlp, None, LAST_ALONE, in_batches, {"capacity": 0.5}),
    "averages": (mlp, None, LAST_ALONE, in_batches, {"ema_decay": 0.8}),
    "not a number": (mlp, None, UNEVEN, with_one_bad, {"non_finite": "skip"}),
    "extra": (mlp, None, LAST_ALONE, in_batches, {"extra_loss": brightness}),
    "extra of a sum": (
        mlp, lambda: ELBOLoss(reduction="sum"), LAST_ALONE, in_batches, {"extra_loss": brightness},
    ),
    "batch variance": (
        mlp, lambda: ELBOLoss("gaussian", log_variance="batch"), LAST_ALONE, in_batches, {},
    ),
    "learned by loss": (mlp, learned_by_loss, LAST_ALONE, in_batches, {}),
    "sum": (mlp, lambda: ELBOLoss(reduction="sum"), UNEVEN, in_batches, {}),
    "sum and mean": (
        mlp, lambda: ELBOLoss(recon_reduction="mean", kl_reduction="sum"), UNEVEN, in_batches, {},
    ),
    "unused weights": (with_unused_weights, None, LAST_ALONE, in_batches, {"optimizer": "adamw"}),
    "callback": (mlp, None, UNEVEN, in_batches, {"callbacks": [Writing()]}),
    "no rows": (with_reshaping, None, LAST_ALONE, in_batches, {"free_bits": 0.2}),
    "no rows, variance": (
        with_reshaping, lambda: ELBOLoss("gaussian", log_variance="batch"), LAST_ALONE, in_batches, {},
    ),
    "spectral norm": (with_spectral_norm, None, LAST_ALONE, in_batches, {}),
    "batch norm": (with_batch_norm, None, EVEN, in_batches, {}),
    "batch norm, no validation": (with_batch_norm, None, EVEN, in_batches, {"val": None}),
    "amp": (mlp, None, UNEVEN, in_batches, {"amp": True}),
}  # fmt: skip


def train(name: str, data: Tensor) -> dict[str, Tensor]:
    """The weights after two epochs, 20 steps, and what the epochs' rows say."""
    make_model, make_loss, size, make_batches, options = CASES[name]
    torch.manual_seed(RANK)  # weights are those of rank 0
    model = make_model()
    loss = None if make_loss is None else make_loss()
    options = {"epochs": 2, "device": "cpu", "seed": 5, **options}
    extra_loss, callbacks = options.pop("extra_loss", None), options.pop("callbacks", [])
    whole = DataLoader(data[-40:].numpy(), 16)
    # who deals out the rows, as one may for the training data, still validates all of them
    dealt = DataLoader(data[-40:].numpy(), 16, rank=RANK, world_size=SIZE)
    val = options.pop("val", dealt)
    config = TrainConfig(**options)
    own = {"loss": loss, "extra_loss": extra_loss, "callbacks": callbacks}
    trainer = Trainer(model, make_batches(data[:size]), val, config=config, **own)
    result = trainer.fit()
    parts = ("train",) if val is None else ("train", "val")
    names = [f"{part}_{term}" for part in parts for term in ("loss", "recon", "kl")]
    names += ["train_extra"] if extra_loss else []
    rows = torch.tensor([[row[name] for name in names] for row in result.history], dtype=torch.float64)
    own = {f"loss.{name}": p.detach().clone() for name, p in trainer.loss.named_parameters()}
    found = {**model.state_dict(), **own, "rows": rows}
    if val is None:
        return found
    latents = [[*row["kl_by_latent"], row["active_units"]] for row in result.history]
    alone = evaluate(model, whole, loss=trainer.loss, seed=5).loss
    best = torch.tensor(result.best["val_loss"], dtype=torch.float64)
    return {**found, "latents": torch.tensor(latents), "best": best, "alone": alone}


def train_all(data: Tensor) -> dict[str, dict[str, Tensor]]:
    return {name: train(name, data) for name in CASES}


def problem(data: Tensor) -> str:
    """What a training says of a value too large in the last row of its first batch."""
    data = data[:32].clone()
    data[-1] = 1e30
    try:
        Trainer(mlp(), [data], config=TrainConfig(epochs=1, device="cpu")).fit()
    except TrainingError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("a line of its own")
    folder, *own = Path(sys.argv[1]), *sys.argv[2:]
    if own:
        dist.init_process_group("gloo")
    data = torch.load(folder / "data.pt")
    torch.save({**train_all(data), "problem": problem(data)}, folder / f"rank{RANK}.pt")
    if own:
        dist.destroy_process_group()
