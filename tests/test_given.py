"""Loaders that do not go with the model: said before the first step, and before anything is written."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import TensorDataset

from fastvae import VAE, DataLoader, Trainer
from fastvae.models.model import ModelError
from fastvae.training.config import TrainConfig
from fastvae.training.given import check_val_items


class Net(nn.Module):
    """For items of 16 numbers in any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 6), nn.Linear(3, 16)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x.flatten(1)).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class Convolutions(nn.Module):
    """For images of one channel of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def of(*shape: int, dtype: torch.dtype = torch.float32) -> TorchDataLoader:
    return TorchDataLoader(TensorDataset(torch.ones(8, *shape).to(dtype)), 4)


def fit(model: nn.Module, train: object, val: object, **options: object) -> None:
    Trainer(model, train, val, config=TrainConfig(epochs=2, device="cpu", **options)).fit()


NOT_TAKEN = "got items of 9, expected items that Net takes, such as those of train, 1 x 4 x 4 (mat1 and mat2"
VAL = {
    "another shape": (lambda: DataLoader(torch.rand(4, 9)), NOT_TAKEN),
    "another shape, of torch": (lambda: of(9), NOT_TAKEN),
    "integers": (lambda: of(1, 4, 4, dtype=torch.int32), "got x of int32, expected floating point, or uint8"),
    "no tensors": (lambda: [{"x": torch.ones(4, 16)}], "got a dict, expected tensors: x, or (x, y)"),
    "batches that come once": (
        lambda: (x for x in of(1, 4, 4)),
        "got a generator, which gives its batches once, expected a loader or a list",
    ),
}


@pytest.mark.parametrize("of_torch", [False, True], ids=["fastvae", "torch"])
@pytest.mark.parametrize("case", VAL)
def test_validation_data_that_the_model_cannot_use(case: str, of_torch: bool, tmp_path) -> None:
    make, message = VAL[case]
    train = of(1, 4, 4) if of_torch else DataLoader(torch.rand(8, 4, 4), 4)
    with pytest.raises(ValueError, match=re.escape(f"val: {message}")):
        fit(Net(), train, make(), out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "val"])
def test_items_of_other_loaders_that_a_vae_is_not_made_for(name: str, tmp_path) -> None:
    loaders = {"train": of(1, 4, 4), "val": of(1, 4, 4)} | {name: of(9)}
    with pytest.raises(ModelError, match=f"a VAE for items of 1 x 4 x 4, expected 9, the items of {name}$"):
        fit(VAE.mlp((1, 4, 4), (4,), 2), **loaders, out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("val", [of(16), of(1, 4, 4, dtype=torch.uint8), of(1, 4, 4, dtype=torch.float64)])
def test_validation_data_in_another_form(val: TorchDataLoader) -> None:
    fit(Net(), of(1, 4, 4), val)


def test_no_batch_of_an_iterator_is_lost() -> None:
    class Batches:
        """One object for all passes, each of which begins at the first batch."""

        def __iter__(self) -> Batches:
            self.left = [torch.ones(4, 16), torch.zeros(4, 16)]
            return self

        def __next__(self) -> Tensor:
            if not self.left:
                raise StopIteration
            return self.left.pop()

    fit(Net(), of(1, 4, 4), Batches())
    check_val_items(Net(), once := iter([torch.ones(4, 16)]), (1, 4, 4))
    assert len(list(once)) == 1


def test_validation_data_of_another_size() -> None:
    fit(Convolutions(), of(1, 4, 4), of(1, 9, 9))


@pytest.mark.parametrize("of_torch", [False, True], ids=["fastvae", "torch"])
def test_sequences(of_torch: bool) -> None:
    """As images from fastvae's loader, and as they are from torch's."""

    class Sequences(Net):
        def encode(self, x: Tensor) -> tuple[Tensor, ...]:
            steps = x if of_torch else x.squeeze(1)
            assert steps.shape[1:] == (8, 2)
            return super().encode(steps)

        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z).unflatten(1, (8, 2))

    loader = of(8, 2) if of_torch else DataLoader(torch.rand(8, 8, 2), 4)
    fit(Sequences(), loader, loader)


def test_looking_at_validation_data_draws_nothing() -> None:
    drawn = []
    for val in (of(1, 4, 4), DataLoader(torch.ones(8, 4, 4), 4)):
        torch.manual_seed(0)
        check_val_items(Net(), val, (1, 4, 4))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
