"""Anything with samples, opened as a source: arrays, tensors, matrices, datasets, files and folders."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from .arrays import ArraySource, array_of, label_array, source_from_arrays
from .formats import EXTENSIONS, map_npy, opened, read_idx, read_member
from .source import Array, DataError, Source
from .sparse import csr_source, sparse_arrays

SourceLike: TypeAlias = (
    "Source | Array | torch.Tensor | torch.utils.data.Dataset[Any] | tuple[Any, Any] | str | os.PathLike[str]"
)

X_KEYS = ("x", "images", "data", "arr_0")
Y_KEYS = ("y", "labels", "targets")
_CSR_KEYS = {"indices", "indptr", "format"}  # any of them: a sparse matrix


def as_source(data: SourceLike) -> Source:
    """Whatever a loader accepts, as a source.

    A Source, an array, a CPU tensor, a CSR matrix of scipy or torch, a pair (x, y) of samples and labels, a
    torch Dataset (see `torch_datasets`), or a path.

    Raises DataError for data that cannot be used, TypeError for anything else.
    """
    match data:
        case Source():
            return data
        case str() | os.PathLike():
            return open_source(data)
        case tuple((x, y)):  # for an array is a sequence too, since NumPy 2.5
            return _source_of(x, label_array(y), "x")
        case torch.utils.data.Dataset():
            from .torch_datasets import dataset_source

            return dataset_source(data)
        case _:
            return _source_of(data, None, "source")


def _source_of(x: object, y: Array | None, name: str) -> Source:
    sparse = sparse_arrays(x, name)
    if sparse is not None:
        return csr_source(*sparse, y)
    return source_from_arrays(array_of(x, name), y)


def open_source(path: str | os.PathLike[str], image_size: int | None = None) -> Source:
    """Opens a .npy (memory-mapped), a .npz, an IDX file (gzipped or not), or a folder.

    A .npz holds samples under one of X_KEYS, or a CSR matrix as scipy's `save_npz` writes it, and may hold
    labels under one of Y_KEYS. A .npy has labels where `fastvae data pack` has left its JSON beside it. Of a
    folder, the IDX training files are opened, or else the images in it are decoded into memory; image_size
    makes these squares of that side. Raises DataError.
    """
    if not os.fspath(path):  # which pathlib takes for the folder that one is in
        raise DataError(f"the path is '', expected {EXTENSIONS}")
    path = Path(path)
    if is_image_folder(path):
        from .folders import open_image_folder

        return open_image_folder(path, image_size)
    if os.path.isdir(path):
        return open_idx_folder(path, "train")
    if not os.path.exists(path):
        from .datasets import NAMES

        if str(path).partition(":")[0] in NAMES:
            named = f"the set with that name is fastvae.data.resolve({str(path)!r}).train"
            raise DataError(f"{path}: no such file or folder, expected a path; {named}")
    with opened(path) as stream:
        try:
            start = stream.read(4)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; expected {EXTENSIONS}") from error
    if start == b"\x93NUM":
        return _open_npy(path)
    if start == b"PK\x03\x04":
        return _open_npz(path)
    if path.suffix in (".npy", ".npz"):
        raise DataError(f"{path}: begins with {start!r}, expected a {path.suffix} file as NumPy saves it")
    if start[:2] in (b"\x1f\x8b", b"\0\0"):
        return source_from_arrays(read_idx(path), name=str(path))
    raise DataError(f"{path}: begins with {start!r}, expected {EXTENSIONS}")


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder that is read as images: one without IDX training files."""
    return os.path.isdir(path) and idx_path(path, "train", "images") is None


def idx_path(folder: Path, split: str, kind: str) -> Path | None:
    """The IDX file of a split ("train" or "t10k") and kind ("images" or "labels") in a folder, or None."""
    dims = {"images": 3, "labels": 1}[kind]
    names = (f"{split}-{kind}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_idx_folder(folder: Path, split: str) -> ArraySource:
    """The samples of a split ("train" or "t10k") of a folder of IDX files, with labels where they are there.

    Raises DataError.
    """
    images = idx_path(folder, split, "images")
    if images is None:
        expected = f"{split}-images-idx3-ubyte (or .gz)"
        raise DataError(f"{folder}: a folder without {expected}; expected the IDX files of MNIST's layout")
    labels = idx_path(folder, split, "labels")
    return source_from_arrays(read_idx(images), None if labels is None else read_idx(labels), str(images))


def _open_npy(path: Path) -> Source:
    from .packed import read_packed  # and pydantic, which takes long

    x = map_npy(path)
    packed = read_packed(path, x.shape)
    if packed is None:
        return source_from_arrays(x, name=str(path))
    return source_from_arrays(x, packed.y, str(path), packed.classes, packed.channels_last)


def _open_npz(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            x_key = next((key for key in X_KEYS if key in keys), None)
            y_key = next((key for key in Y_KEYS if key in keys), None)
            if _CSR_KEYS & set(keys):
                return _open_sparse_npz(archive, keys, y_key, path)
            if x_key is None:
                raise DataError(f"{path}: arrays {_some(keys)}, expected one of {', '.join(X_KEYS)}")
            x = read_member(archive, x_key, path)
            y = None if y_key is None else read_member(archive, y_key, path)
    except DataError:
        raise
    except Exception as error:  # zipfile's readers fail in many ways
        raise DataError(f"{path}: not a whole .npz file ({error}); save it again") from error
    return source_from_arrays(x, y, str(path))


def _open_sparse_npz(archive: zipfile.ZipFile, keys: list[str], y_key: str | None, path: Path) -> Source:
    """A CSR matrix as scipy's `save_npz` lays it out, or without its `format`."""
    layout = read_member(archive, "format", path) if "format" in keys else np.array(b"csr")
    if layout.dtype.kind not in "SU" or layout.size != 1 or layout.astype("U").item() != "csr":
        raise DataError(f"{path}: a sparse matrix of format {str(layout)[:20]}, expected csr; save x.tocsr()")
    missing = [key for key in ("data", "indices", "indptr", "shape") if key not in keys]
    if missing:
        raise DataError(
            f"{path}: a sparse matrix without {', '.join(missing)}; save it as scipy's save_npz does"
        )
    shape = read_member(archive, "shape", path)
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise DataError(f"{path}[shape]: {shape.dtype} of shape {list(shape.shape)}, expected 2 integers")
    data, indices, indptr = (read_member(archive, key, path) for key in ("data", "indices", "indptr"))
    y = None if y_key is None else read_member(archive, y_key, path)
    return csr_source(data, indices, indptr, (int(shape[0]), int(shape[1])), y, str(path))


def _some(names: list[str]) -> str:
    return str(names if len(names) <= 8 else [*names[:8], "..."])
