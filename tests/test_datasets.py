"""Datasets: names, paths, downloads and splits. Nothing here leaves the machine."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvae.data import DataError, datasets
from fastvae.data.datasets import REMOTES, fetch, resolve, split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = list(REMOTES["mnist"].md5)


def idx_file(name: str, n: int) -> bytes:
    shape = (n, 5, 6) if "images" in name else (n,)
    content = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))
    return gzip.compress(content, mtime=0)


def write_set(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(idx_file(name, 6 if name.startswith("train") else 2))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no installed packages, for every test."""
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, remote in REMOTES.items():
        monkeypatch.setitem(REMOTES, name, replace(remote, installed=()))
    return tmp_path / "cache" / "fastvae"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `mnist` is fetched from, by file:// address."""
    folder = write_set(tmp_path / "server")
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in FILES}
    monkeypatch.setitem(REMOTES, "mnist", replace(REMOTES["mnist"], url=f"{folder.as_uri()}/", md5=md5))
    return folder


def test_digits_are_always_here() -> None:
    digits = resolve("digits")
    assert (digits.name, digits.test, digits.note) == ("digits", None, None)
    assert (digits.train.n_samples, digits.train.item_shape) == (1797, (1, 8, 8))
    assert digits.train.has_labels
    assert digits.train.x.dtype == np.float32
    assert (digits.train.x.min(), digits.train.x.max()) == (0.0, 1.0)


def test_default_is_digits_with_a_note_where_fashion_mnist_is_missing() -> None:
    default = resolve(None)
    assert default.name == "digits"
    assert default.note is not None
    assert default.note.startswith("data: digits, as fashion-mnist is not here; get it with --download or")


def test_default_is_fashion_mnist_where_it_is_here(cache: Path) -> None:
    write_set(cache / "fashion-mnist")
    default = resolve(None)
    assert default.name == "fashion-mnist"
    assert default.note is not None
    assert default.note.startswith("data: fashion-mnist, by default")


def test_a_name_is_found_in_the_cache(cache: Path) -> None:
    write_set(cache / "mnist")
    mnist = resolve("mnist")
    assert (mnist.name, mnist.train.n_samples, mnist.note) == ("mnist", 6, None)
    assert mnist.test is not None
    assert mnist.test.n_samples == 2


def test_fastvae_data_comes_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(cache / "mnist")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "chosen"))
    assert datasets.find("mnist") == cache / "mnist"
    write_set(tmp_path / "chosen" / "mnist")
    assert datasets.find("mnist") == tmp_path / "chosen" / "mnist"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REMOTES, "fashion-mnist", replace(REMOTES["fashion-mnist"], installed=(DEBIAN,)))
    fashion = resolve("fashion-mnist")
    assert fashion.test is not None
    assert (fashion.train.x.shape, fashion.test.x.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert np.array_equal(np.bincount(fashion.train.y), [6000] * 10)


def test_a_missing_set_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(
        DataError, match="mnist is not on this machine; get it by one of: fastvae data fetch mnist, put"
    ):
        resolve("mnist")
    assert not cache.exists()


@pytest.mark.parametrize(("name", "guess"), [("fashion_mnist", "fashion-mnist"), ("digit", "digits")])
def test_unknown_names(name: str, guess: str) -> None:
    with pytest.raises(DataError, match=rf"named '{name}', expected .* or a path; did you mean {guess}\?"):
        resolve(name)
    with pytest.raises(DataError, match=r"'zzz', expected fashion-mnist, mnist, digits, shapes or a path$"):
        resolve("zzz")


def test_paths(tmp_path: Path) -> None:
    np.save(tmp_path / "faces.npy", np.zeros((3, 4), np.uint8))
    assert resolve(str(tmp_path / "faces.npy")).name == "faces"
    with pytest.raises(DataError, match=r"none\.npy: No such file"):
        resolve(str(tmp_path / "none.npy"))
    folder = resolve(str(write_set(tmp_path / "mine")))
    assert folder.name == "mine"
    assert folder.test is not None
    for name in FILES[2:]:
        (tmp_path / "mine" / name).unlink()
    assert resolve(str(tmp_path / "mine")).test is None


def test_download(server: Path, cache: Path) -> None:
    assert resolve("mnist", download=True).train.n_samples == 6
    assert sorted(file.name for file in (cache / "mnist").iterdir()) == sorted(FILES)
    for name in FILES:
        (server / name).unlink()
    assert resolve("mnist", download=True).train.n_samples == 6


def test_download_completes_what_was_begun(server: Path, cache: Path) -> None:
    write_set(cache / "mnist")
    (cache / "mnist" / FILES[3]).unlink()
    test = resolve("mnist", download=True).test
    assert test is not None
    assert test.has_labels


def test_download_with_a_wrong_checksum_leaves_nothing(server: Path, cache: Path) -> None:
    (server / FILES[1]).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: MD5 [0-9a-f]+, expected [0-9a-f]+"):
        fetch("mnist")
    assert [file.name for file in (cache / "mnist").iterdir()] == [FILES[0]]


def test_download_that_fails(server: Path, cache: Path) -> None:
    (server / FILES[0]).unlink()
    with pytest.raises(DataError, match="mnist: could not be fetched from file://"):
        fetch("mnist")
    assert list((cache / "mnist").iterdir()) == []


@pytest.mark.parametrize(
    ("n", "fraction", "n_val"), [(1000, 0.1, 100), (10, 0.25, 2), (2, 0.5, 1), (7, 0.9, 6)]
)
def test_split(n: int, fraction: float, n_val: int) -> None:
    train, val = split(n, fraction, seed=3)
    assert (len(train), len(val)) == (n - n_val, n_val)
    assert train.dtype == val.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert np.array_equal(split(n, fraction, seed=3)[1], val)


def test_split_depends_on_the_seed() -> None:
    assert not np.array_equal(split(1000, 0.1, 0)[1], split(1000, 0.1, 1)[1])


@pytest.mark.parametrize(
    ("n", "fraction", "message"),
    [
        (10, 0.0, "fraction is 0.0, expected a number between 0 and 1"),
        (10, 1.0, "fraction is 1.0, expected"),
        (10, float("nan"), "fraction is nan, expected"),
        (10, 0.01, "fraction 0.01 of 10 samples is 0, expected at least 1 in each part"),
        (1, 0.6, "of 1 samples is 1, expected at least 1"),
    ],
)
def test_bad_splits(n: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(n, fraction, seed=0)


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "a" * 300])
def test_what_can_be_no_path_is_no_dataset(name: str) -> None:
    with pytest.raises(DataError, match=r"^no dataset or path named '.*, expected .* or a path$") as error:
        resolve(name)
    assert len(str(error.value)) < 200


def test_more_shapes_than_memory_are_an_error() -> None:
    with pytest.raises(DataError, match=r"^shapes: the numbers of 1000000000000000 images take more memory"):
        resolve("shapes:1000000000000000")
