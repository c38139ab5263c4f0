import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.inference.plots import as_tiles, grid, pairs, save


def _pixels(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


@pytest.mark.parametrize(
    ("item_shape", "tile"),
    [
        ((1, 28, 28), (1, 84, 84)),
        ((28, 28), (1, 84, 84)),
        ((3, 64, 64), (3, 64, 64)),
        ((1, 8, 8), (1, 80, 80)),
        ((1, 28, 20), (1, 84, 60)),
        ((1, 512, 1024), (1, 128, 256)),
        ((5, 8, 8), (1, 80, 80)),
        ((64,), (1, 80, 80)),
        ((13,), (1, 84, 84)),
        ((2, 3, 4, 5), (1, 77, 77)),
        ((1,), (1, 84, 84)),
    ],
)
def test_any_item_becomes_a_legible_tile(item_shape, tile):
    assert as_tiles(torch.rand(3, *item_shape)).shape == (3, *tile)


def test_values_are_clipped_and_enlarged_without_blur():
    x = torch.tensor([[[[-1.0, 0.5], [2.0, float("nan")]]]])
    tile = as_tiles(x)[0, 0]
    assert tile[::42, ::42].tolist() == [[0, 128], [255, 0]]
    assert len(tile.unique()) == 3


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_each_reconstruction_is_below_its_original(channels, mode, tmp_path, seed):
    torch.manual_seed(seed)
    x, x_hat = torch.rand(2, 10, channels, 28, 28)
    path = tmp_path / "reconstructions.png"
    save(path, pairs(x, x_hat))
    found_mode, pixels = _pixels(path)
    assert found_mode == mode
    tile, gap, row_gap = 84, 3, 18
    for i in range(10):
        row, column = divmod(i, 8)
        top = gap + row * (2 * tile + gap + row_gap)
        left = gap + column * (tile + gap)
        for j, item in enumerate((x[i], x_hat[i])):
            begin = top + j * (tile + gap)
            cell = pixels[begin : begin + tile : 3, left : left + tile : 3].reshape(28, 28, channels)
            assert np.abs(cell / 255 - item.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_samples_are_a_grid(tmp_path):
    path = tmp_path / "samples.png"
    save(path, grid(torch.zeros(64, 1, 28, 28)))
    _, pixels = _pixels(path)
    assert pixels.shape == (8 * 87 + 3, 8 * 87 + 3)
    assert (pixels == 0).sum() == 64 * 84 * 84


def test_one_datum(tmp_path):
    save(tmp_path / "one.png", pairs(torch.rand(1, 7), torch.rand(1, 7)))
    save(tmp_path / "sample.png", grid(torch.rand(1, 7)))
    assert _pixels(tmp_path / "one.png")[1].shape[0] > _pixels(tmp_path / "sample.png")[1].shape[0]
