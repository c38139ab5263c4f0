"""The whole on real data: as good as the plain PyTorch loop, and pictures of every kind of garment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import fastvae
from fastvae.cli import main
from fastvae.data import DataError, Dataset, resolve, split
from fastvae.inference.generate import sample

SEEDS = range(5)
EPOCHS, BATCH, LATENTS = 10, 128, 20


@pytest.fixture(scope="module")
def fashion() -> Dataset:
    try:
        return resolve("fashion-mnist")
    except DataError as error:
        pytest.skip(f"Fashion-MNIST is not on this machine: {error}")


def pixels(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(x).reshape(len(x), -1)).float() / 255


class EagerTwin(torch.nn.Module):
    """The same model and loss in plain PyTorch, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(784, 400), torch.nn.ReLU(), torch.nn.Linear(400, 2 * LATENTS)
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(LATENTS, 400), torch.nn.ReLU(), torch.nn.Linear(400, 784)
        )

    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
        return (((self.decoder(z) - x) ** 2).sum() + kl) / len(x)

    def train_and_test(self, train: Tensor, test: Tensor) -> float:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train)).split(BATCH):
                optimizer.zero_grad()
                self.loss(train[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            return self.loss(test).item()


@pytest.mark.slow
def test_as_good_as_the_eager_twin(
    fashion: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fashion.test is not None
    train, test = pixels(fashion.train.x), pixels(fashion.test.x)
    ours, twins = [], []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        options = [
            "--epochs",
            str(EPOCHS),
            "--latent-dim",
            str(LATENTS),
            "--seed",
            str(seed),
            "--out",
            str(out),
        ]
        assert main(["train", "--amp", "--data", "fashion-mnist", *options]) == 0
        assert "collapse" not in capsys.readouterr().out
        ours.append(json.loads((out / "summary.json").read_text())["test_loss"])
        torch.manual_seed(seed)
        rows, _ = split(len(train), 0.1, seed)
        twins.append(EagerTwin().train_and_test(train[torch.from_numpy(rows)], test))
    difference = np.mean(ours) - np.mean(twins)
    error = np.sqrt((np.var(ours, ddof=1) + np.var(twins, ddof=1)) / len(SEEDS))
    print(f"test loss: fastvae {ours}, eager twin {twins}: {difference:+.3f}, standard error {error:.3f}")
    assert abs(difference) <= 0.2

    # a classifier of real garments must recognise at least eight kinds among the samples
    labels = np.asarray(fashion.train.y)[:10_000]
    classifier = LogisticRegression(C=0.01, tol=1e-3, max_iter=1000).fit(train[:10_000].numpy(), labels)
    assert classifier.score(test.numpy(), np.asarray(fashion.test.y)) > 0.8
    drawn = sample(fastvae.load(tmp_path / "0"), 1000).clamp(0, 1).flatten(1)
    found = np.bincount(classifier.predict(drawn.numpy()), minlength=10)
    print(f"classes among 1,000 samples: {found.tolist()}")
    assert (found >= 5).sum() >= 8
