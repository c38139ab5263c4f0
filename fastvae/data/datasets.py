"""Datasets by name or path: what there is, where it lies, how to fetch it, how to split it."""

from __future__ import annotations

import difflib
import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401 -- brings the OpenMP runtime that _native is linked against

from .. import _native
from .arrays import ArraySource, source_from_arrays
from .shapes import N_IMAGES, ShapeSource
from .source import DataError, Source
from .sources import idx_path, is_image_folder, open_idx_folder, open_source

_SPLIT_EPOCH = 2**63 - 1  # no pass of a loader has it, so a split is not the order of one
_TIMEOUT_SECONDS = 60
_PIECE_BYTES = 1 << 18
_MOST_NAMED = 80  # characters of what is not there


@dataclass(frozen=True)
class Dataset:
    """A training source, the test source where there is one, and a line for the user where one is due."""

    name: str
    train: Source
    test: Source | None = None
    note: str | None = None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the labels 0, 1, ..., where they have names."""
        return self.train.classes or None


@dataclass(frozen=True)
class Remote:
    """A dataset of gzipped IDX files: where it is fetched from, the MD5 of each, where packages put it.

    classes: the names of the labels 0, 1, ..., where they say more than their numbers.
    """

    url: str
    md5: dict[str, str]
    installed: tuple[Path, ...] = ()
    hint: str = ""
    classes: tuple[str, ...] = ()
    n_samples: tuple[int, int] = (60_000, 10_000)  # for training and for tests
    item_shape: tuple[int, ...] = (1, 28, 28)


@dataclass(frozen=True)
class Known:
    """A set with a name: samples for training and tests, shape of one, where it is or how to get it."""

    name: str
    n_samples: tuple[int, int]
    item_shape: tuple[int, ...]
    where: str


REMOTES = {
    "fashion-mnist": Remote(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        installed=(Path("/usr/share/datasets/fashion-mnist"),),
        hint="apt install dataset-fashion-mnist",
        classes=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
    "mnist": Remote(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
}
NAMES = (*REMOTES, "digits", "shapes")
Report = Callable[[str, int, int], None]  # what is done, how much of it, of how much (0 if that is not known)


def resolve(data: str | None, download: bool = False, image_size: int | None = None) -> Dataset:
    """The dataset that `--data` means: a name in NAMES, or a path to a file or to a folder.

    shapes:N is N of the shapes, drawn by seed 0; shapes:N:SEED by another. None is fashion-mnist where it is
    on the machine, else digits; the note then says so and how to get more. A folder holds images, or IDX
    files, of which t10k is the test set. image_size makes the images of a folder squares of that side. With
    download, a named set that is not here is fetched into the cache; nothing is fetched otherwise. Raises
    DataError.
    """
    if data is None:
        return _default(download)
    if data == "digits":
        return _digits()
    if data == "shapes" or data.startswith("shapes:"):
        return Dataset("shapes", _shapes(data))
    if data in REMOTES:
        return _remote(data, download)
    path = Path(data)
    if data and is_image_folder(path):
        return Dataset(path.resolve().name, open_source(path, image_size))
    if data and os.path.isdir(path):
        return _folder(path, path.resolve().name)
    if data and (os.path.exists(path) or path.suffix or len(path.parts) > 1):
        return Dataset(path.stem, open_source(path))
    named = repr(data) if len(data) < _MOST_NAMED else f"{data[:_MOST_NAMED]!r}..."
    expected = f"expected {', '.join(NAMES)} or a path"
    raise DataError(f"no dataset or path named {named}, {expected}{_guess(data)}")


def known() -> list[Known]:
    """The sets that have a name, and where they are. Nothing is read."""
    found = []
    for name, remote in REMOTES.items():
        folder = find(name)
        where = str(folder)
        if folder is None:
            where = " or ".join(filter(None, [f"not here: fastvae data fetch {name}", remote.hint]))
        elif not _is_complete(folder):
            where = f"{folder}, incomplete: fastvae data fetch {name}"
        found.append(Known(name, remote.n_samples, remote.item_shape, where))
    found.append(Known("digits", (1797, 0), (1, 8, 8), "a part of scikit-learn"))
    shapes = "drawn as they are read; shapes:N is N of them, shapes:N:SEED N others"
    found.append(Known("shapes", (N_IMAGES, 0), (1, 64, 64), shapes))
    return found


def data_folders() -> list[Path]:
    """Where named sets may lie: $FASTVAE_DATA if set, then fastvae in the user's cache ($XDG_CACHE_HOME).

    What is fetched goes to the first.
    """
    chosen = os.environ.get("FASTVAE_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae"
    return [Path(chosen), cache] if chosen else [cache]


def find(name: str) -> Path | None:
    """The folder on this machine that holds the named set's training images, or None."""
    folders = (*(folder / name for folder in data_folders()), *REMOTES[name].installed)
    return next((folder for folder in folders if idx_path(folder, "train", "images")), None)


def ensure(name: str, report: Report | None = None) -> str:
    """Fetches the named set unless it is here whole, and says where it is. Raises DataError."""
    if name in REMOTES:
        folder = find(name)
        return f"{folder if folder and _is_complete(folder) else fetch(name, report)}"
    if name in NAMES:
        return next(f"nothing to fetch: {entry.where}" for entry in known() if entry.name == name)
    raise DataError(f"no dataset named {name!r}, expected {', '.join(NAMES)}{_guess(name)}")


def fetch(name: str, report: Report | None = None) -> Path:
    """Fetches the named set's files that are not there yet, checks them, and returns their folder.

    A file appears under its name only when it is whole and its checksum is right. Raises DataError.
    """
    remote, folder = REMOTES[name], data_folders()[0] / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, md5 in remote.md5.items():
            if not (folder / file).is_file():
                _fetch_file(remote.url + file, folder / file, md5, report)
    except (OSError, HTTPException) as error:
        raise DataError(f"{name}: could not be fetched from {remote.url} to {folder} ({error})") from error
    return folder


def split(n: int, fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of [0, n) for training and for validation, each int64 and ascending, drawn by seed.

    Validation gets round(n * fraction) of them. Raises ValueError where either would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1, both excluded")
    n_val = round(n * fraction)
    if not 1 <= n_val <= n - 1:
        raise ValueError(f"fraction {fraction} of {n} samples is {n_val}, expected at least 1 in each part")
    order = _native.epoch_order(n, seed, _SPLIT_EPOCH)
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def _default(download: bool) -> Dataset:
    if download or find("fashion-mnist"):
        note = "data: fashion-mnist, by default; --data NAME|PATH takes another"
        return replace(_remote("fashion-mnist", download), note=note)
    ways = f"--download or {REMOTES['fashion-mnist'].hint}"
    return replace(_digits(), note=f"data: digits, as fashion-mnist is not here; get it with {ways}")


def _remote(name: str, download: bool) -> Dataset:
    folder = find(name)
    if download and not (folder and _is_complete(folder)):
        folder = fetch(name)
    if folder is None:
        place = f"put its IDX files into {data_folders()[0] / name}"
        ways = ", ".join(filter(None, [f"fastvae data fetch {name}", REMOTES[name].hint, place]))
        raise DataError(f"{name} is not on this machine; get it by one of: {ways}")
    return _folder(folder, name, REMOTES[name].classes)


def _is_complete(folder: Path) -> bool:
    return all(idx_path(folder, split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))


def _folder(folder: Path, name: str, classes: tuple[str, ...] = ()) -> Dataset:
    def opened(split: str) -> ArraySource:
        return replace(open_idx_folder(folder, split), classes=classes)

    return Dataset(name, opened("train"), opened("t10k") if idx_path(folder, "t10k", "images") else None)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values are 0 to 16; in float32, k / 16 is exact.
    images = (digits.images / 16.0).astype(np.float32)
    return Dataset("digits", source_from_arrays(images, digits.target, "digits"))


def _shapes(data: str) -> ShapeSource:
    """shapes, shapes:N or shapes:N:SEED."""
    numbers = data.split(":")[1:]
    try:
        if len(numbers) > 2:
            raise ValueError(f"{len(numbers)} numbers")
        return ShapeSource(*map(int, numbers))
    except DataError:
        raise
    except ValueError as error:
        expected = "shapes, shapes:N or shapes:N:SEED, as shapes:50000"
        raise DataError(f"data: got {data!r}, expected {expected}") from error


def _guess(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _fetch_file(url: str, target: Path, md5: str, report: Report | None) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as partial:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                total = int(response.headers.get("Content-Length") or 0)
                got = _copy(response, partial, lambda done: report and report(target.name, done, total))
            if got != md5:
                size = partial.tell()
                if size < total:
                    raise DataError(f"{url}: ended after {size:,} of {total:,} bytes; try again")
                raise DataError(f"{url}: MD5 {got}, expected {md5}; damaged or another file, try again")
            partial.close()
            os.replace(partial.name, target)
        except BaseException:
            os.unlink(partial.name)
            raise


def _copy(stream: IO[bytes], target: IO[bytes], report: Callable[[int], object]) -> str:
    """Copies all of a stream, and returns its MD5."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    while piece := stream.read(_PIECE_BYTES):
        target.write(piece)
        digest.update(piece)
        done += len(piece)
        report(done)
    return digest.hexdigest()
