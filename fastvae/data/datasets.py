"""Datasets by name or path: where they lie on this machine, how to fetch them, how to split them."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401 -- brings the OpenMP runtime that _native is linked against

from .. import _native
from .sources import DataError, Source, idx_path, open_idx_folder, open_source, source_from_arrays

_SPLIT_EPOCH = 2**63 - 1  # no pass of a loader has it, so a split is not the order of one
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Dataset:
    """A training source, the test source where there is one, and a line for the user where one is due."""

    name: str
    train: Source
    test: Source | None = None
    note: str | None = None


@dataclass(frozen=True)
class Remote:
    """A dataset of gzipped IDX files: where it is fetched from, the MD5 of each, where packages put it."""

    url: str
    md5: dict[str, str]
    installed: tuple[Path, ...] = ()
    hint: str = ""


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
NAMES = (*REMOTES, "digits")


def resolve(data: str | None, download: bool = False) -> Dataset:
    """The dataset that `--data` means: a name in NAMES, or a path to a file or to a folder of IDX files.

    None is fashion-mnist where it is on the machine, else digits; the note then says so and how to get more.
    A folder's t10k files are its test set. With download, a named set that is not here is fetched into the
    cache; nothing is fetched otherwise. Raises DataError.
    """
    if data is None:
        return _default(download)
    if data == "digits":
        return _digits()
    if data in REMOTES:
        return _remote(data, download)
    path = Path(data)
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return Dataset(path.stem, open_source(path))
    close = difflib.get_close_matches(data, NAMES, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"data: no dataset or path named {data!r}, expected {', '.join(NAMES)} or a path{guess}")


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


def fetch(name: str) -> Path:
    """Fetches the named set's files that are not there yet, checks them, and returns their folder.

    A file appears under its name only when it is whole and its checksum is right. Raises DataError.
    """
    remote, folder = REMOTES[name], data_folders()[0] / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, md5 in remote.md5.items():
            if not (folder / file).is_file():
                _fetch_file(remote.url + file, folder / file, md5)
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
        ways = ", ".join(filter(None, ["--download", REMOTES[name].hint, place]))
        raise DataError(f"data: {name} is not on this machine; get it by one of: {ways}")
    return _folder(folder, name)


def _is_complete(folder: Path) -> bool:
    return all(idx_path(folder, split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))


def _folder(folder: Path, name: str) -> Dataset:
    test = open_idx_folder(folder, "t10k") if idx_path(folder, "t10k", "images") else None
    return Dataset(name, open_idx_folder(folder, "train"), test)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values are 0 to 16; in float32, k / 16 is exact.
    images = (digits.images / 16.0).astype(np.float32)
    return Dataset("digits", source_from_arrays(images, digits.target, "digits"))


def _fetch_file(url: str, target: Path, md5: str) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as partial:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                shutil.copyfileobj(response, partial)
            partial.flush()
            got = hashlib.md5(Path(partial.name).read_bytes(), usedforsecurity=False).hexdigest()
            if got != md5:
                raise DataError(f"{url}: MD5 {got}, expected {md5}; damaged or another file, try again")
            os.replace(partial.name, target)
        except BaseException:
            os.unlink(partial.name)
            raise
