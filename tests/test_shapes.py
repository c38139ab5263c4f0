"""`shapes`: the drawings against their definition in NumPy, the factors, the draws, and a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastvae import DataLoader
from fastvae.cli import main
from fastvae.data import DataError, resolve
from fastvae.data.shapes import FACTOR_SIZES, FACTOR_VALUES, FACTORS, N_IMAGES, SHAPES, ShapeSource

RADIUS = 15  # pixels, of the circle around a shape of scale 1
HEART = 0.6306019374818708  # radius and height of the centre of the circle around the unit heart
SAMPLES = 300


@pytest.fixture(scope="module")
def every() -> ShapeSource:
    return ShapeSource()


@pytest.fixture
def numbers(seed: int) -> np.ndarray:
    """Some images of every shape, the first and the last among them."""
    chosen = np.random.default_rng(seed).integers(0, N_IMAGES, SAMPLES)
    chosen[:2] = 0, N_IMAGES - 1
    return chosen


def own_axes(values: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's place in the shape's own axes, v downwards, by the radius around it, [side, side]."""
    _, scale, angle, x, y = values
    middle = (np.arange(side) + 0.5) * 64 / side
    u, v = np.meshgrid(middle - 16 - 32 * x, middle - 16 - 32 * y)
    size = RADIUS * scale
    return (np.cos(angle) * u + np.sin(angle) * v) / size, (np.cos(angle) * v - np.sin(angle) * u) / size


def is_inside(values: np.ndarray, side: int) -> np.ndarray:
    u, v = own_axes(values, side)
    if values[0] == 0:
        return np.maximum(np.abs(u), np.abs(v)) < np.sqrt(0.5)
    if values[0] == 1:
        return u**2 + (v / 0.6) ** 2 < 1
    x, y = np.abs(u) * HEART, HEART - v * HEART
    lobe = (x - 0.25) ** 2 + (y - 0.75) ** 2 < 1 / 8
    return np.where(x + y > 1, lobe, x < y)


def specified(values: np.ndarray) -> np.ndarray:
    """An image in float64: the part of each pixel that is covered, by the distance to the edge, of 255."""
    u, v = own_axes(values, 64)
    size = RADIUS * values[1]
    if values[0] == 0:
        covered = [np.clip((np.sqrt(0.5) - np.abs(w)) * size + 0.5, 0, 1) for w in (u, v)]
        return 255 * covered[0] * covered[1]
    if values[0] == 1:
        gradient = 2 * np.hypot(u, v / 0.36) / size
        distance = (u**2 + (v / 0.6) ** 2 - 1) / np.maximum(gradient, 1e-9)
    else:
        x, y = np.abs(u) * HEART, HEART - v * HEART
        lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(1 / 8)
        middle = np.maximum(x + y, 0) / 2
        body = np.minimum(np.hypot(x, y - 1), np.hypot(x - middle, y - middle)) * np.sign(x - y)
        distance = np.where(x + y > 1, lobe, body) * size / HEART
    return 255 * np.clip(0.5 - distance, 0, 1)


def test_images_are_as_specified(every: ShapeSource, numbers: np.ndarray) -> None:
    images = every.images(numbers)
    assert (images.shape, images.dtype) == ((SAMPLES, 64, 64), np.uint8)
    for image, values in zip(images, every.factor_values[numbers], strict=True):
        assert np.abs(image - specified(values)).max() <= 1


def test_grey_is_the_part_that_is_covered(every: ShapeSource, numbers: np.ndarray) -> None:
    """Against counting points inside: 16 x 16 in each pixel."""
    for number in numbers[:30]:
        values = every.factor_values[number]
        inside = is_inside(values, 64 * 16).reshape(64, 16, 64, 16).mean(axis=(1, 3))
        error = every.images([number])[0] / 255 - inside
        # the notch and the tip of a small heart are sharper than a pixel
        assert np.abs(error).max() < (0.4 if values[0] == 2 else 0.12)
        assert abs(error.sum()) < 0.02 * inside.sum()


def test_the_whole_shape_is_in_the_image(every: ShapeSource) -> None:
    largest = np.argwhere((every.factors[:, 1] == 5) & np.isin(every.factors[:, 3:], (0, 31)).all(axis=1))
    images = every.images(largest[:, 0])
    assert len(images) == 3 * 40 * 4
    assert max(images[:, [0, -1]].max(), images[:, :, [0, -1]].max()) <= 3  # of 255


def test_factors_are_the_digits_of_the_number(every: ShapeSource, numbers: np.ndarray) -> None:
    assert (every.n_samples, every.item_shape, every.name) == (N_IMAGES, (1, 64, 64), "shapes")
    assert (every.factors.shape, every.factors.dtype) == ((N_IMAGES, len(FACTORS)), np.int64)
    expected = np.stack(np.unravel_index(numbers, FACTOR_SIZES), axis=1)
    assert np.array_equal(every.factors[numbers], expected)
    for i, values in enumerate(FACTOR_VALUES):
        assert np.array_equal(every.factor_values[numbers, i], values[expected[:, i]])
    assert every.y is not None
    assert np.array_equal(every.y, every.factors[:, 0])
    assert every.classes == SHAPES


def test_draws(seed: int) -> None:
    source, again, other = ShapeSource(2000, seed), ShapeSource(2000, seed), ShapeSource(2000, seed + 1)
    assert np.array_equal(source.factors, again.factors)
    assert not np.array_equal(source.factors, other.factors)
    assert len(np.unique(source.factors, axis=0)) == 2000
    assert np.array_equal(ShapeSource(50, seed).factors, source.factors[:50])


def test_more_than_there_are() -> None:
    source = ShapeSource(N_IMAGES + 100, seed=1)
    number = np.ravel_multi_index(tuple(source.factors.T), FACTOR_SIZES)
    assert np.array_equal(np.bincount(number[:N_IMAGES]), np.ones(N_IMAGES))
    assert len(np.unique(number[N_IMAGES:])) == 100


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_the_same_images(workers: int, seed: int) -> None:
    source = ShapeSource(300, seed)
    seen = 0
    for x, y in DataLoader(source, 128, num_workers=workers):
        rows = np.arange(seen, seen + len(x))
        assert np.array_equal(x.numpy()[:, 0], source.images(rows).astype(np.float32) / np.float32(255))
        assert np.array_equal(y, source.factors[rows, 0])
        seen += len(x)
    assert seen == 300


def test_names() -> None:
    assert resolve("shapes").train.n_samples == N_IMAGES
    few = resolve("shapes:500:7")
    assert (few.name, few.train.name, few.train.n_samples) == ("shapes", "shapes:500:7", 500)
    assert few.classes == SHAPES
    assert np.array_equal(few.train.y, ShapeSource(500, 7).y)
    for name in ("shapes:", "shapes:0", "shapes:many", "shapes:5:-1", "shapes:1:2:3"):
        with pytest.raises(DataError, match=f"got '{name}', expected shapes, shapes:N or shapes:N:SEED"):
            resolve(name)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] is 5, expected 0 <= it < 5"):
        ShapeSource(5).images([0, 5])
    with pytest.raises(ValueError, match=r"rows\[0\] is -1"):
        ShapeSource(5).images([-1])


@pytest.mark.usefixtures("one_thread")
def test_training_and_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "shapes:200", "--hidden", "8", "--latent-dim", "3", "--no-report"]
    run = tmp_path / "run"
    assert main(["train", *options, "--epochs", "1", "--val", "0.2", "--out", str(run)]) == 0
    assert (
        "data: shapes, items of 1 x 64 x 64, 160 for training, 40 for validation" in capsys.readouterr().out
    )
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert (run / "reconstructions.png").is_file()
