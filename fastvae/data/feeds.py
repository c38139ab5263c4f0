"""Where the rows of a packed file come from: the images of a folder, or the samples of any other source."""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from .arrays import ArraySource
from .folders import ImageFile, Report, SizesError, Survey, classes_of, decoded, image_files, survey
from .images import ImageError, Pixels, squared
from .loader import DataLoader
from .partial import StaleError, State
from .source import Array, DataError, Source
from .state import fingerprint

_PIECE_BYTES = 1 << 22


class CorruptImages(DataError):
    """Images that cannot be used; `problems` has the name of each and what is wrong with it."""

    def __init__(self, message: str, problems: dict[str, str]) -> None:
        super().__init__(message)
        self.problems = problems


class Feed(Protocol):
    """Rows, made again from any row on. `request` says what they are, in JSON's types."""

    request: dict[str, Any]
    classes: tuple[str, ...]
    channels_last: bool  # the rows are [H, W, C]

    def begin(self, state: State | None) -> tuple[tuple[int, ...], int]:
        """The shape of a row, and the most rows there can be. Raises StaleError if they differ from state."""

    def rows(self, state: State) -> Iterator[tuple[Pixels, str]]:
        """Rows [n, *shape] from state.rows on, each piece with the digest after it; keeps state.skipped."""

    def labels(self) -> list[int] | None:
        """Of all rows, once they have been made; None without labels."""


class ImageFeed:
    """The images of a folder.

    A pack is gone on from where the files of its rows are still the first, unchanged; what was skipped may be
    gone.
    """

    def __init__(
        self,
        folder: Path,
        size: int | None,
        channels: int | None,
        workers: int | None,
        skips: bool,
        report: Report | None,
    ) -> None:
        self._folder, self._size, self._channels, self._workers = folder, size, channels, workers
        self._skips, self._report = skips, report
        self.request: dict[str, Any] = {"source": str(folder.absolute()), "size": size, "channels": channels}
        self.classes: tuple[str, ...] = ()
        self.channels_last = False
        self._labels = array("q")

    def begin(self, state: State | None) -> tuple[tuple[int, ...], int]:
        if state is None:
            self._found = self._survey()
        else:
            n, classes = classes_of(self._folder)
            height, width = state.shape[:2]
            self._found = Survey(n, classes, height, width, channels=3 if len(state.shape) == 3 else 1)
        self.classes = self._found.classes
        self.channels_last = self._found.channels == 3
        self.request["classes"] = list(self.classes)
        if state is not None and state.request["classes"] != self.request["classes"]:
            raise _changed(self._folder)
        return self._found.item_shape, self._found.n_images

    def _survey(self) -> Survey:
        try:
            return survey(
                self._folder, self._size, self._channels, workers=self._workers, report=self._report
            )
        except SizesError as error:
            raise SizesError(f"{error}; make them squares of one size with --size N") from error

    def rows(self, state: State) -> Iterator[tuple[Pixels, str]]:
        folder, index = self._folder, {name: i for i, name in enumerate(self.classes)}
        digest, known, state.skipped = hashlib.sha256(), state.skipped, {}
        self._labels = array("q")

        def keep(file: ImageFile) -> None:
            digest.update(file.stamp.encode(errors="surrogateescape"))
            if self.classes:
                self._labels.append(index[file.subfolder])

        def skip(file: ImageFile, problem: str) -> None:
            if not self._skips:
                message = f"{folder / file.name}: {problem}; --on-error skip leaves such images out"
                raise CorruptImages(message, {file.name: problem})
            state.skipped[file.stamp] = problem

        files, kept = image_files(folder), 0
        while kept < state.rows:
            file = next(files, None)
            if file is None:
                raise _changed(folder)
            if file.stamp in known:
                skip(file, known[file.stamp])
            else:
                keep(file)
                kept += 1
        if kept and digest.hexdigest() != state.digest:
            raise _changed(folder)
        for file, pixels in decoded(folder, files, self._found, self._size, self._workers):
            if isinstance(pixels, ImageError):
                skip(file, str(pixels))
            else:
                keep(file)
                yield pixels[None], digest.hexdigest()

    def labels(self) -> list[int] | None:
        return self._labels.tolist() if self.classes else None


class SourceFeed:
    """The samples of a source, as uint8."""

    def __init__(self, source: Source, size: int | None) -> None:
        self._source, self._size = source, size
        self.classes = source.classes
        of_source = isinstance(source, ArraySource) and source.channels_last
        self.channels_last = (
            len(source.item_shape) == 3 and source.item_shape[0] != 1 and (size is not None or of_source)
        )
        self.request: dict[str, Any] = {
            "source": source.name,
            "size": size,
            "samples": [source.n_samples, *source.item_shape],
            "modified": _modified(source.name),
            "data": fingerprint(source, None),
        }
        self._labels = None if source.y is None else source.y.tolist()
        if size is not None and (len(source.item_shape) != 3 or source.item_shape[0] not in (1, 3, 4)):
            got = " x ".join(map(str, source.item_shape))
            raise DataError(
                f"{source.name}: items of {got}, expected images of 1, 3 or 4 channels with --size"
            )

    def begin(self, state: State | None) -> tuple[tuple[int, ...], int]:
        x, _ = next(self._pieces(0, 1))
        return self._pixels(x, 0).shape[1:], self._source.n_samples

    def rows(self, state: State) -> Iterator[tuple[Pixels, str]]:
        first, row = state.rows, max(4 * math.prod(self._source.item_shape), math.prod(state.shape))
        comes_with_labels = self._source.y is None and self._source.has_labels
        if comes_with_labels:
            del state.labels[first:]  # of rows that could not be written
            self._labels = state.labels
        for x, y in self._pieces(first, max(1, _PIECE_BYTES // row)):
            if comes_with_labels:
                state.labels += y.tolist()
            yield self._pixels(x, first), ""
            first += len(x)

    def labels(self) -> list[int] | None:
        return self._labels

    def _pieces(self, first: int, step: int) -> Iterator[tuple[Array, Array]]:
        """Samples from `first` on, `step` at a time, and the labels that a loader gives with them."""
        source, none = self._source, torch.empty(0, dtype=torch.int64)
        if isinstance(source, ArraySource):
            for i in range(first, source.n_samples, step):
                yield source.read(slice(i, i + step)), none.numpy()
            return
        loader = DataLoader(source, step, num_workers=0)
        loader.set_epoch(0, first // step)
        done = first % step  # of the first batch, where a pack was stopped after the last one
        for batch in loader:
            x, y = batch if isinstance(batch, tuple) else (batch, none)
            if len(x) > done:
                yield x[done:].numpy(), y[done:].numpy()
            done = 0

    def _pixels(self, x: Array, first: int) -> Pixels:
        """uint8 of floating point, images of the size asked for, grey ones without an axis for channels."""
        if x.dtype != np.uint8:
            low, high = float(x.min()), float(x.max())
            if not (low >= 0 and high <= 1):  # of a large file nobody has looked for NaN
                found = f"values from {low:g} to {high:g} in samples {first} to {first + len(x) - 1}"
                expected = "values in [0, 1], which uint8 can hold as k / 255"
                raise DataError(f"{self._source.name}: {found}, expected {expected}")
            x = np.rint(x * 255).astype(np.uint8)
        item = self._source.item_shape
        if len(item) == 3 and item[0] == 1:
            x = x.reshape(-1, *item[1:])
        if self._size is None:
            return x
        if x.ndim == 4 and x.shape[1:] == item:
            x = x.transpose(0, 2, 3, 1)
        return np.stack([np.array(squared(Image.fromarray(image), self._size)) for image in x])


def _changed(source: object) -> StaleError:
    return StaleError(f"{source}: not as it was when this pack was begun; begin anew with --overwrite")


def _modified(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # not a file
        return None
