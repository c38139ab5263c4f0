"""Folders of images: which files in which order, what becomes of a pixel, and what is refused by name."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvae import DataLoader
from fastvae.cli import main
from fastvae.data import DataError, folders, open_source, resolve
from fastvae.data.folders import image_files, survey
from fastvae.data.images import ImageError, decode, measure


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Pixels that JPEG keeps within a few grey levels."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return pixels if channels == 3 else pixels[..., 0]


def save(pixels: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_classes_and_order(rng: np.random.Generator, tmp_path: Path) -> None:
    """Sorted by name; the top subfolder is the label, however deep a file lies."""
    names = ["b/2.png", "b/10.png", "a/z.PNG", "a/deep/1.png", "C/x.png"]
    pixels = {name: rng.integers(0, 256, (4, 5), dtype=np.uint8) for name in names}
    for name, array in pixels.items():
        save(array, tmp_path / "set" / name)
    (tmp_path / "set" / "a" / "notes.txt").touch()
    (tmp_path / "set" / "empty").mkdir()
    save(pixels["C/x.png"], tmp_path / "set" / ".thumbnails" / "x.png")
    (tmp_path / "set" / "a" / "._z.png").write_bytes(b"resource fork")
    source = open_source(tmp_path / "set")
    order = ["C/x.png", "a/z.PNG", "a/deep/1.png", "b/10.png", "b/2.png"]
    assert [file.name for file in image_files(tmp_path / "set")] == order
    assert source.classes == ("C", "a", "b")
    assert source.y is not None
    assert source.y.tolist() == [0, 1, 1, 2, 2]
    ((x, _),) = DataLoader(source, 8)
    assert x.shape == (5, 1, 4, 5)
    assert np.array_equal(x[:, 0].numpy(), np.stack([pixels[name] for name in order]) / np.float32(255))
    data = resolve(str(tmp_path / "set"))
    assert (data.name, data.classes, data.test) == ("set", ("C", "a", "b"), None)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(rng: np.random.Generator, tmp_path: Path, suffix: str, channels: int) -> None:
    pixels = smooth(rng, 20, 24, channels)
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
    save(pixels, tmp_path / f"x.{suffix}", **({} if suffix == "png" else options))
    got = decode(tmp_path / f"x.{suffix}", channels)
    assert (got.shape, got.dtype) == (pixels.shape, np.uint8)
    assert np.abs(got.astype(int) - pixels).max() <= (6 if suffix.startswith("j") else 0)
    source = open_source(tmp_path)
    # WebP has no grey images
    assert source.item_shape == (3 if suffix == "webp" else channels, 20, 24)
    assert source.y is None


def test_one_colour_image_makes_all_of_them_colour(rng: np.random.Generator, tmp_path: Path) -> None:
    grey, colour = smooth(rng, 8, 8, 1), smooth(rng, 8, 8)
    save(grey, tmp_path / "a.png")
    assert survey(tmp_path).item_shape == (8, 8)
    save(colour, tmp_path / "b.png")
    assert survey(tmp_path).item_shape == (8, 8, 3)
    assert survey(tmp_path, channels=1).item_shape == (8, 8)
    assert np.array_equal(decode(tmp_path / "a.png", 3), np.stack([grey] * 3, axis=-1))
    assert decode(tmp_path / "b.png", 1).shape == (8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_orientation(rng: np.random.Generator, tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = smooth(rng, 16, 32)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"png": {}, "jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}[suffix]
    path = save(np.ascontiguousarray(undo[orientation]), tmp_path / f"x.{suffix}", exif=exif, **options)
    assert measure(path) == (16, 32, False)
    assert np.abs(decode(path, 3).astype(int) - upright).max() <= 6


def test_transparent_images_are_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 3] = 0, 128, 255
    assert decode(save(pixels, tmp_path / "rgba.png"), 3)[0, :, 0].tolist() == [255, 127, 0]
    assert decode(save(pixels, tmp_path / "rgba.webp", lossless=True), 1)[0].tolist() == [255, 127, 0]
    assert decode(save(pixels[..., 2:], tmp_path / "la.png"), 1)[0].tolist() == [255, 127, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert decode(tmp_path / "p.png", 3)[0].tolist() == [[255] * 3, [40, 50, 60]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert decode(tmp_path / "bits.png", 1)[0].tolist() == [255, 0]


def test_resizing_takes_the_centre_square(rng: np.random.Generator, tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (40, 61, 3), dtype=np.uint8)
    path = save(pixels, tmp_path / "x.png")
    square = Image.fromarray(pixels[:, 10:50])
    assert np.array_equal(decode(path, 3, 16), square.resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(decode(path, 3, 40), square)


def test_a_large_jpeg_is_decoded_smaller_without_a_difference_to_see(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = save(smooth(rng, 800, 1000), tmp_path / "x.jpg", quality=95)
    with Image.open(path) as image:
        whole = image.crop((100, 0, 900, 800)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(decode(path, 3, 32).astype(int) - np.asarray(whole)).max() <= 8


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that promises so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 99))


def bytes_of(kind: str, size: int = 64) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((size, size), 50).save(stream, kind)
    return stream.getvalue()


BAD = {
    "empty.png": (lambda: b"", "not a PNG, JPEG or WebP image"),
    "text.jpg": (lambda: b"<html>404</html>", "not a PNG, JPEG or WebP image"),
    "other.png": (lambda: bytes_of("BMP"), "not a PNG, JPEG or WebP image"),
    "cut.png": (lambda: bytes_of("PNG")[:-900], "truncated|corrupt|broken"),
    "cut.jpg": (lambda: bytes_of("JPEG")[:-900], "truncated"),
    "cut.webp": (lambda: bytes_of("WEBP")[:-300], "not a PNG, JPEG or WebP image|decod|corrupt"),
    "bomb.png": (
        lambda: png_of(10_000, 10_000),
        "more than 89,478,485 pixels, refused as a decompression bomb",
    ),
    "large-bomb.png": (lambda: png_of(10**6, 10**6), "refused as a decompression bomb"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    content, problem = BAD[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ImageError, match=problem), folders.quiet():
        decode(tmp_path / name, 3)
    Image.new("L", (64, 64)).save(tmp_path / "good.png")
    with pytest.raises(DataError, match=rf"{name}: .*; leave such images out with: fastvae data pack "):
        open_source(tmp_path)


def test_sixteen_bits_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    path = save(rng.integers(0, 2**16, (4, 4), dtype=np.uint16), tmp_path / "grey.png")
    with pytest.raises(ImageError, match="more than 8 bits a channel; convert it to 8"):
        decode(path, 1)
    colour = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(6))
    chunks = png_chunk(b"IHDR", colour) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ImageError, match="more than 8 bits a channel"):
        decode(tmp_path / "colour.png", 3)


def mixed(folder: Path) -> None:
    save(np.zeros((4, 4), np.uint8), folder / "a.png")
    save(np.zeros((4, 4), np.uint8), folder / "cats" / "b.png")


def of_two_sizes(folder: Path) -> None:
    save(np.zeros((4, 4), np.uint8), folder / "a.png")
    save(np.zeros((4, 6), np.uint8), folder / "b.png")


def bitmaps(folder: Path) -> None:
    for i in range(3):
        save(np.zeros((4, 4), np.uint8), folder / f"{i}.bmp")


def unreadable(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.png").write_bytes(b"?")


def circular(folder: Path) -> None:
    save(np.zeros((4, 4), np.uint8), folder / "in" / "a.png")
    (folder / "in" / "loop").symlink_to(folder)


def endless(folder: Path) -> None:
    save(np.zeros((4, 4), np.uint8), folder / "a.png")
    (folder / "loop").symlink_to("loop")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            mixed,
            r"images in it and in its subfolder 'cats', expected all in subfolders, which are the labels",
        ),
        (
            of_two_sizes,
            r"a.png is 4 x 4 and b.png is 4 x 6; --image-size N makes .* fastvae data pack .* --size N",
        ),
        (bitmaps, r"without PNG, JPEG or WebP images and without train-images.*; there are 3 .bmp"),
        (unreadable, r"none of its 1 images can be used; a.png: not a PNG, JPEG or WebP image"),
        (circular, r"a link to a folder that it lies in"),
        (endless, r"set/loop: Too many levels of symbolic links"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "set")


def test_a_folder_may_be_deep(tmp_path: Path) -> None:
    depth, limit = 400, sys.getrecursionlimit()
    save(np.zeros((4, 4), np.uint8), tmp_path / ("a/" * depth) / "a.png")
    sys.setrecursionlimit(depth)
    try:
        assert open_source(tmp_path).n_samples == 1
    finally:
        sys.setrecursionlimit(limit)


def test_too_much_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(np.zeros((40, 40), np.uint8), tmp_path / "a.png")
    monkeypatch.setattr(folders, "available_memory", lambda: 3000)
    message = r"1 images of 40 x 40 take .* are free; read them from a file made with: fastvae data pack"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


@pytest.mark.usefixtures("one_thread")
def test_training_on_a_folder(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of images of two sizes, made squares, which the commands after the training do again."""
    for i in range(40):
        save(
            rng.integers(0, 256, (6, 5 + i % 3, 3), dtype=np.uint8),
            tmp_path / "set" / "ab"[i % 2] / f"{i}.png",
        )
    data, run = str(tmp_path / "set"), tmp_path / "run"
    options = ["--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--val", "0.25", "--no-report"]
    assert main(["train", "--data", data, *options, "--image-size", "4", "--out", str(run)]) == 0
    assert "data: set, items of 3 x 4 x 4, 30 for training, 10 for validation" in capsys.readouterr().out
    assert main(["encode", str(run), "--split", "all", "--out", str(tmp_path / "z.npy")]) == 0
    assert len(np.load(tmp_path / "z.npy")) == 40


def test_image_size_is_for_folders_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "digits", "--image-size", "4"]) == 2
    assert capsys.readouterr().err == (
        "fastvae: error: --image-size: got 4 for digits, expected a folder of images; for others: "
        "fastvae data pack digits DST.npy --size 4\n"
    )
