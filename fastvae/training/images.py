"""Pictures of what a model makes of data and of draws, while it is trained and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..inference import generate, plots
from ..inference.evaluate import Batch, inputs
from ..models import VAE, as_model
from ..models.model import evaluating
from .run_folder import IMAGES_NAME

RECONSTRUCTED = 32  # data in a picture of reconstructions
SAMPLED = 64  # draws in a picture of samples


class Images:
    """The pictures of every `every` epochs, none if it is None: of the first of `val` and of draws of `seed`.

    They are written to `folder`/images, if there is a folder.
    """

    def __init__(
        self,
        every: int | None,
        seed: int,
        val: Iterable[Batch] | None,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.every = every
        self.seed = seed
        self.val = val
        self.device = device
        self.folder = folder
        self._shown: Tensor | None = None  # the same data each time

    def draw(self, model: nn.Module, epoch: int) -> dict[str, Tensor]:
        """Those that are due after `epoch`, as `draw_images` gives them."""
        if self.every is None or epoch % self.every:
            return {}
        if self._shown is None and self.val is not None:
            with torch.random.fork_rng(devices=()):  # from which torch's DataLoader draws
                self._shown = next(inputs(self.val, self.device))[:RECONSTRUCTED]
        return draw_images(model, self._shown, self.seed)

    def write(self, epoch: int, images: Mapping[str, Tensor]) -> None:
        """Write them as <name>-<epoch>.png."""
        if self.folder is None:
            return
        folder = self.folder / IMAGES_NAME
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            plots.save(folder / f"{name}-{epoch:04}.png", image)


@torch.no_grad()
def draw_images(model: nn.Module, x: Tensor | None, seed: int) -> dict[str, Tensor]:
    """`reconstructions` of the first of x [B, *item], and `samples`: uint8 [C, H, W], in eval mode.

    The draws are those of `seed`, the same each time. None for x leaves the reconstructions out; the samples
    are left out too for a model whose latents' shape is not known without it.
    """
    images = {}
    latent_shape: tuple[int, ...] | None = None
    if x is not None:
        x = x[:RECONSTRUCTED]
        images["reconstructions"] = plots.pairs(x, generate.reconstruct(model, x))
        with evaluating(model):
            latent_shape = as_model(model).encode(x[:1])[0].shape[1:]
    elif isinstance(model, VAE) and model.config is not None:
        latent_shape = (model.config["latent_dim"],)
    if latent_shape is not None:
        images["samples"] = plots.grid(generate.sample(model, SAMPLED, latent_shape=latent_shape, seed=seed))
    return images
