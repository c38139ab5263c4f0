"""What the loader does to samples: dtype, crop, flip, binarisation, scale, against a plain specification."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fastvae import _native
from fastvae.data import ArraySource, DataError, DataLoader, Transform

MASK64 = 2**64 - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.instruction_sets()
ODD = 6.0  # standard deviations that chance passes once in 10^9


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def key_of(seed: int, epoch: int) -> tuple[int, int]:
    key = mix((mix((seed + 0x9E3779B97F4A7C15) & MASK64) + epoch) & MASK64)
    key = mix((key + int.from_bytes(b"transfor", "big")) & MASK64)
    return key & 0xFFFFFFFF, key >> 32


def words(key: tuple[int, int], block: int, digit: int, row: int) -> list[int]:
    return _native.philox((block, digit, row & 0xFFFFFFFF, row >> 32), key)


def specified(image: np.ndarray, row: int, transform: Transform, seed: int, epoch: int) -> np.ndarray:
    """The specification: image [C, H, W] or [D], uint8 or float, as it is stored, to float32."""
    key = key_of(seed, MASK64 if transform.fixed else epoch)
    x = image
    if transform.moves:
        flip, down, right, _ = words(key, 0, 0, row)
        p = transform.padding
        height, width = transform.crop or x.shape[1:]
        x = np.pad(x, ((0, 0), (p, p), (p, p)))
        spare_y, spare_x = x.shape[1] - height, x.shape[2] - width
        if transform.crop_at == "center":
            top, left = spare_y // 2, spare_x // 2
        else:
            top, left = down * (spare_y + 1) >> 32, right * (spare_x + 1) >> 32
        x = x[:, top : top + height, left : left + width]
        if transform.hflip and flip >> 31:
            x = x[:, :, ::-1]
    if transform.binarize:
        on = np.zeros(x.size, np.float32)
        for pixel, value in enumerate(x.reshape(-1)):
            place = pixel % 256
            block, word, byte = pixel // 256 * 16 + place % 64 // 4, place // 64, place % 4
            digits = [words(key, block, digit, row)[word] >> 8 * byte & 255 for digit in (1, 2, 3, 4)]
            uniform = int.from_bytes(bytes(digits), "big")  # of 32 bits
            if x.dtype == np.uint8:  # value / 255 = 0.vvvv... in base 256
                on[pixel] = value == 255 or uniform < int(value) * 0x01010101
            else:
                on[pixel] = Fraction(uniform, 2**32) < Fraction(float(value))
        return on.reshape(x.shape)
    if transform.is_scaled:
        scale = transform.scale if transform.scale is not None else 1 / 255 if x.dtype == np.uint8 else 1.0
        return (x.astype(np.float64) * scale + transform.shift).astype(np.float32)
    return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)


def batches_by(isa: str, source: ArraySource, dtype: str, transform: Transform | None = None) -> np.ndarray:
    native = transform and transform.native(source.dtype == np.uint8)
    options = {"batch_size": 7, "drop_last": False, "workers": 0, "dtype": dtype, "transform": native}
    loader = _native.Loader(source.rows(), None, None, **options, instruction_set=isa)
    return np.concatenate(list(loader.start(3, 1, False, (0, 0), 0, 0, 1)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("isa", ISAS)
def test_every_uint8_is_rounded_correctly(isa: str) -> None:
    x = np.stack([np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-1]])
    exact = x.astype(np.float64) / 255
    assert np.array_equal(batches_by(isa, ArraySource(x), "uint8"), x)
    assert np.array_equal(batches_by(isa, ArraySource(x), "float32"), exact.astype(np.float32))
    assert np.array_equal(batches_by(isa, ArraySource(x), "float16"), exact.astype(np.float16))
    got = torch.from_numpy(batches_by(isa, ArraySource(x), "bfloat16")).view(torch.bfloat16)
    error = np.abs(got.double().numpy() - exact)
    assert np.all(error[(x == 0) | (x == 255)] == 0)
    for step in (1, -1):  # both neighbours in bfloat16 are farther away
        other = (got.view(torch.int16) + step).view(torch.bfloat16).double().numpy()
        assert np.all((error < np.abs(other - exact))[(x > 0) & (x < 255)])


def hard_floats(rng: np.random.Generator) -> np.ndarray:
    """Floats of every exponent, halfway cases of both 16-bit formats, subnormals, infinities and NaN."""
    random = rng.integers(0, 2**32, 60_000, dtype=np.uint32)
    halves = np.arange(0, 2**16, dtype=np.uint32) << 16
    near = (halves[:, None] | np.array([0x7FFF, 0x8000, 0x8001], np.uint32)).reshape(-1)
    ties = (rng.integers(0x38, 0x48, 20_000, dtype=np.uint32) << 24) | (rng.integers(0, 2**11, 20_000) << 12)
    chosen = np.concatenate([random, near, ties.astype(np.uint32)]).view(np.float32)
    return np.concatenate([chosen, -chosen, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520])])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_rounded_to_nearest_even(
    isa: str, source_dtype: type, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    x = hard_floats(rng)[None].repeat(2, axis=0)
    with np.errstate(invalid="ignore"):
        source = ArraySource(x.astype(source_dtype))
    got = torch.from_numpy(batches_by(isa, source, str(dtype).removeprefix("torch."))).view(dtype)
    expected = torch.from_numpy(x).to(dtype)
    nan = torch.from_numpy(np.isnan(x))
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_dtypes_of_batches(dtype: torch.dtype, num_workers: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (50, 5, 7, 3), dtype=np.uint8)
    options = {"shuffle": True, "seed": 3, "num_workers": num_workers, "dtype": dtype}
    loader = DataLoader((x, np.arange(50)), 16, **options)
    got, y = map(torch.cat, zip(*loader, strict=True))
    expected = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).to(dtype)[y]
    assert got.dtype == loader.dtype == dtype
    assert torch.equal(got, expected)
    raw, y = map(torch.cat, zip(*DataLoader((x, np.arange(50)), 16, dtype=torch.uint8), strict=True))
    assert torch.equal(raw, torch.from_numpy(x).permute(0, 3, 1, 2)[y])


IMAGES = {"planar": (3, 9, 13), "interleaved": (9, 13, 3), "with alpha": (6, 5, 4), "grey": (17, 19)}
TRANSFORMS = {
    "flip": Transform(hflip=True),
    "crop": Transform(crop=(5, 4)),
    "pad": Transform(padding=2),
    "pad far": Transform(padding=30, crop=(6, 5)),
    "pad and enlarge": Transform(padding=3, crop=(9, 11)),
    "center": Transform(crop=(3, 2), crop_at="center"),
    "center of the padded": Transform(padding=2, crop=(5, 6), crop_at="center", hflip=True),
    "flip and crop": Transform(hflip=True, padding=1, crop=(6, 5)),
    "fixed": Transform(hflip=True, padding=2, fixed=True),
    "scale": Transform(scale=1 / 127.5, shift=-1.0),
    "shift": Transform(shift=-0.5),
    "binarize": Transform(binarize=True),
    "all that go together": Transform(hflip=True, padding=2, crop=(6, 5), binarize=True),
    "all others": Transform(hflip=True, padding=2, crop=(6, 5), scale=0.02, shift=0.7),
}


@pytest.mark.parametrize("kind", list(IMAGES))
@pytest.mark.parametrize("name", list(TRANSFORMS))
@pytest.mark.parametrize("source_dtype", [np.uint8, np.float32, np.float64])
def test_transforms_are_the_specified_ones(
    kind: str, name: str, source_dtype: type, rng: np.random.Generator
) -> None:
    transform, seed, epoch = TRANSFORMS[name], int(rng.integers(2**63)), int(rng.integers(5))
    shape = (11, *IMAGES[kind])
    x = rng.integers(0, 256, shape, dtype=np.uint8)
    x[rng.random(shape) < 0.3] = 0
    x[rng.random(shape) < 0.1] = 255
    if source_dtype != np.uint8:
        x = (x / 255).astype(source_dtype)
    source = ArraySource(x, channels_last=kind in ("interleaved", "with alpha"))
    loader = DataLoader(source, 4, seed=seed, transform=transform)
    loader.set_epoch(epoch)
    got = torch.cat(list(loader))
    images = x.transpose(0, 3, 1, 2) if source.channels_last else x.reshape(11, *loader._source.item_shape)
    expected = [specified(image, row, transform, seed, epoch) for row, image in enumerate(images)]
    assert loader.item_shape == expected[0].shape
    assert torch.equal(got, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_dtype_rounds_the_same_draw(name: str, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (20, 9, 13, 3), dtype=np.uint8)
    transform = TRANSFORMS[name]
    wide = torch.cat(list(DataLoader(x, 6, transform=transform)))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(
            torch.cat(list(DataLoader(x, 6, transform=transform, dtype=dtype))), wide.to(dtype)
        )
    if not transform.is_scaled:
        raw = torch.cat(list(DataLoader(x, 6, transform=transform, dtype=torch.uint8)))
        assert raw.dtype == torch.uint8
        assert torch.equal(raw.float() / 255, wide)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("name", [None, *TRANSFORMS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_instruction_sets_agree_to_the_bit(
    isa: str, name: str | None, dtype: str, rng: np.random.Generator
) -> None:
    transform = None if name is None else TRANSFORMS[name]
    for shape in ((23, 9, 13, 3), (23, 6, 5, 4), (23, 17, 19), (3, 3, 40, 50)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays = [pixels] if dtype == "uint8" else [pixels, rng.random(shape, np.float32), rng.random(shape)]
        for x in arrays:
            source = ArraySource(x, channels_last=shape[-1] in (3, 4))
            if dtype == "uint8" and transform is not None and transform.is_scaled:
                continue
            best, other = (batches_by(one, source, dtype, transform) for one in (ISAS[0], isa))
            assert best.tobytes() == other.tobytes()


def test_features_can_be_binarized_and_scaled(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (5, 700), dtype=np.uint8)
    for transform in (TRANSFORMS["binarize"], TRANSFORMS["scale"]):
        got = torch.cat(list(DataLoader(x, 2, seed=9, transform=transform)))
        assert np.array_equal(got, [specified(row, i, transform, 9, 0) for i, row in enumerate(x)])


ALL = Transform(hflip=True, padding=2, crop=(6, 5), binarize=True)


def by_row(loader: DataLoader) -> dict[int, torch.Tensor]:
    return {int(row): x for xs, rows in loader for x, row in zip(xs, rows, strict=True)}


def test_a_draw_depends_on_seed_epoch_and_sample_alone(rng: np.random.Generator) -> None:
    """Neither on batches, threads, ranks, order, the other samples, nor on where the pass began."""
    data = rng.integers(0, 256, (60, 7, 6), dtype=np.uint8), np.arange(60)
    truth = by_row(DataLoader(data, 60, seed=5, transform=ALL))
    chosen = [50, 3, 17]
    resumed = DataLoader(data, 7, shuffle=True, seed=5, transform=ALL)
    resumed.set_epoch(0, 4)
    others = [
        DataLoader(data, 7, shuffle=True, seed=5, transform=ALL, num_workers=3),
        DataLoader(data, 7, seed=5, transform=ALL, num_workers=0),
        DataLoader(data, 2, seed=5, transform=ALL, indices=chosen),
        *(DataLoader(data, 16, True, seed=5, transform=ALL, rank=r, world_size=3) for r in range(3)),
        resumed,
    ]
    seen = [by_row(loader) for loader in others]
    assert [len(rows) for rows in seen] == [60, 60, 3, 22, 19, 19, 60 - 4 * 7]
    for rows in seen:
        assert all(torch.equal(x, truth[row]) for row, x in rows.items())


def test_epochs_and_seeds_draw_anew_unless_fixed(rng: np.random.Generator) -> None:
    x = rng.integers(1, 255, (4, 20, 20), dtype=np.uint8)
    loader = DataLoader(x, 4, transform=Transform(binarize=True))
    other = DataLoader(x, 4, seed=1, transform=Transform(binarize=True))
    draws = [torch.cat(list(one)) for one in (loader, loader, other)]
    assert len({draw.numpy().tobytes() for draw in draws}) == 3
    fixed = DataLoader(x, 4, transform=Transform(binarize=True, fixed=True))
    assert torch.equal(next(iter(fixed)), next(iter(fixed)))
    assert fixed.epoch == 2


def test_binarisation_has_the_probability_of_the_pixel() -> None:
    """For each value, the share of ones lies within 6 standard deviations; 0 and 255 are certain."""
    samples = 4000
    x = np.arange(256, dtype=np.uint8)[None].repeat(samples, axis=0)
    draws = torch.cat(list(DataLoader(x, 500, seed=1, transform=Transform(binarize=True))))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = np.arange(256) / 255
    share = draws.double().mean(0).numpy()
    assert np.all(np.abs(share - p) <= ODD * np.sqrt(p * (1 - p) / samples))
    score = (share - p)[1:255] / np.sqrt(p * (1 - p) / samples)[1:255]
    assert abs(np.sum(score**2) - 254) < ODD * np.sqrt(2 * 254)
    # neighbours, and the same pixel of neighbouring samples, are drawn independently
    centred = (draws.double().numpy() - p)[:, 1:255] / np.sqrt(p * (1 - p))[1:255]
    for shifted in (np.roll(centred, 1, axis=1), np.roll(centred, 1, axis=0)):
        assert abs(np.mean(centred * shifted)) < ODD / np.sqrt(centred.size)


def test_flips_and_crops_are_equally_likely() -> None:
    samples = 20_000
    x = np.arange(1, 26, dtype=np.uint8).reshape(1, 5, 5).repeat(samples, axis=0)
    got = torch.cat(
        list(DataLoader(x, 500, seed=2, dtype=torch.uint8, transform=Transform(hflip=True, crop=(3, 4))))
    )
    first = got[:, 0, 0, 0].int()
    flipped = got[:, 0, 0, 1].int() < first
    corner = torch.where(flipped, got[:, 0, 0, 3].int(), first) - 1
    assert abs(flipped.double().mean() - 0.5) < ODD * 0.5 / np.sqrt(samples)
    counts = torch.bincount((corner // 5 * 2 + corner % 5) * 2 + flipped, minlength=12).double()
    assert len(counts) == 12  # three places down, two across, flipped or not: all independent
    chi_square = float(((counts - samples / 12) ** 2 / (samples / 12)).sum())
    assert chi_square < 11 + ODD * np.sqrt(2 * 11) + ODD**2


def test_binarized_floats_have_their_probability() -> None:
    samples, p = 20_000, np.float32([1e-3, 0.25, 0.5, 0.999, 0.0, 1.0])
    draws = torch.cat(list(DataLoader(p[None].repeat(samples, 0), 500, transform=Transform(binarize=True))))
    share, p = draws.double().mean(0).numpy(), p.astype(np.float64)
    assert np.all(np.abs(share - p) <= ODD * np.sqrt(p * (1 - p) / samples))


FLAT, FLOATS = np.zeros((4, 6), np.uint8), np.full((4, 6), 1.5, np.float32)
PICTURES = np.zeros((4, 6, 7), np.uint8)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (FLOATS, {"dtype": torch.uint8}, ValueError, "dtype is torch.uint8 for array of float32, expected"),
        (FLAT, {"dtype": torch.float64}, ValueError, "dtype is torch.float64, expected torch.float32"),
        (FLAT, {"transform": Transform(hflip=True)}, ValueError, r"got items of \[6\], expected images"),
        (
            PICTURES,
            {"transform": Transform(crop=(6, 8))},
            ValueError,
            "crop is 6 x 8, expected at most 6 x 7",
        ),
        (PICTURES, {"transform": Transform(crop=(9, 7), padding=1)}, ValueError, "expected at most 8 x 9"),
        (
            PICTURES,
            {"transform": Transform(crop=(2**20, 2**20), padding=2**20)},
            DataError,
            r"a batch of 2 samples \[1, 1048576, 1048576\] takes 8796093022208 bytes, more than",
        ),
        (FLOATS, {"transform": Transform(binarize=True)}, DataError, "binarize of values from 1.5 to 1.5"),
        (
            FLAT,
            {"transform": Transform(shift=1), "dtype": torch.uint8},
            ValueError,
            "expected one of the two",
        ),
    ],
)
def test_what_does_not_fit_the_data(data: np.ndarray, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DataLoader(data, 2, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": np.inf}, ValueError, "scale is inf, expected a finite number"),
        ({"shift": np.nan}, ValueError, "shift is nan"),
        ({"crop": 4}, TypeError, r"crop is 4, expected \(height, width\)"),
        ({"crop": (4, 0)}, ValueError, "crop is 4 x 0, expected at least 1 x 1"),
        ({"crop": (4, 4, 4)}, TypeError, "expected"),
        ({"crop_at": "middle"}, ValueError, "crop_at is 'middle', expected 'random' or 'center'"),
        ({"padding": -1}, ValueError, "padding is -1, expected at least 0"),
        ({"padding": 0.5}, TypeError, "padding is 0.5, expected an integer"),
        ({"scale": "2"}, TypeError, "scale is '2', expected a number"),
        ({"shift": None}, TypeError, "shift is None, expected a number"),
        ({"binarize": True, "scale": 2.0}, ValueError, "binarize is given with scale 2.0 and shift 0.0"),
    ],
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Transform(**options)


def test_a_transform_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Transform().hflip = True
