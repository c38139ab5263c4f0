"""Folders of images: found in a fixed order, of one shape, decoded in threads."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from .arrays import source_from_arrays
from .images import KINDS, SUFFIXES, ImageError, Pixels, decode, measure, quiet
from .memory import available_memory
from .source import DataError, Source

Report: TypeAlias = Callable[[str, int, int], None]  # what is done, how much of it, of how much

_CHUNK_BYTES = 1 << 20
_CHUNK_FILES = 32
_SHARE_OF_MEMORY = 0.5

T = TypeVar("T")
R = TypeVar("R")


class SizesError(DataError):
    """Images of several sizes where one is expected."""


@dataclass(frozen=True)
class ImageFile:
    """A file: its name below the folder; the subfolder that is its class, or ""; what shows a change."""

    name: str
    subfolder: str
    bytes: int
    modified: int  # in nanoseconds

    @property
    def stamp(self) -> str:
        """Another one when the file is changed or replaced."""
        return f"{self.name}\0{self.bytes}\0{self.modified}\n"


@dataclass(frozen=True)
class Survey:
    """What a folder holds: images, their classes, and the height, width and channels that each will have."""

    n_images: int
    classes: tuple[str, ...]
    height: int
    width: int
    channels: int

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of an image in an array: [H, W] or [H, W, 3]."""
        return (self.height, self.width) + ((3,) if self.channels == 3 else ())


def image_files(folder: Path) -> Iterator[ImageFile]:
    """The images of a folder and its subfolders: sorted by name, a folder's files before its subfolders'.

    Names that begin with a dot are passed over. One folder's names are held at a time. Raises DataError.
    """
    ahead: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # below the folder; what each is in
    while ahead:
        below, above = ahead.pop()
        here = folder / below
        try:
            state = here.stat()
            if (identity := (state.st_dev, state.st_ino)) in above:
                raise DataError(f"{here}: a link to a folder that it lies in; remove it")
            with os.scandir(here) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
            for entry in visible:
                if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                    state = entry.stat()
                    top = below.split("/", 1)[0]
                    yield ImageFile(below + entry.name, top, state.st_size, state.st_mtime_ns)
            inner = [f"{below}{entry.name}/" for entry in reversed(visible) if entry.is_dir()]
        except OSError as error:
            raise DataError(f"{error.filename or here}: {error.strerror}") from error
        ahead += [(name, (*above, identity)) for name in inner]


def classes_of(folder: Path) -> tuple[int, tuple[str, ...]]:
    """The number of images, and the sorted names of the subfolders that hold them; none where none does.

    Raises DataError where some lie in subfolders and others do not, and where there are none.
    """
    count = Counter(file.subfolder for file in image_files(folder))
    if not count:
        missing = f"{KINDS} images and without train-images-idx3-ubyte (or .gz)"
        raise DataError(f"{folder}: a folder without {missing}{_others(folder)}")
    if "" in count and len(count) > 1:
        example = next(name for name in sorted(count) if name)
        expected = "all in subfolders, which are the labels, or none"
        raise DataError(f"{folder}: images in it and in its subfolder {example!r}, expected {expected}")
    return count.total(), tuple(sorted(name for name in count if name))


def survey(
    folder: Path,
    size: int | None = None,
    channels: int | None = None,
    *,
    workers: int | None = None,
    report: Report | None = None,
) -> Survey:
    """Reads the headers of a folder's images: how many, of which classes, and one shape for all.

    size: the side of the squares that the images will be made into; None keeps their own, which must agree.
    channels: 1 or 3; None is 1 if all images are grey, else 3.

    An image that cannot be read is left to `decoded`, unless none can. Raises SizesError, DataError.
    """
    n, classes = classes_of(folder)
    if size is not None and channels is not None:
        return Survey(n, classes, size, size, channels)
    shapes: dict[tuple[int, int], str] = {}
    is_grey, problem = True, ""

    def measured(file: ImageFile) -> tuple[ImageFile, tuple[int, int, bool] | ImageError]:
        try:
            return file, measure(folder / file.name)
        except ImageError as error:
            return file, error

    with quiet():
        for i, (file, found) in enumerate(in_threads(measured, image_files(folder), workers, _CHUNK_FILES)):
            if report:
                report("reading headers", i + 1, n)
            if isinstance(found, ImageError):
                problem = problem or f"{file.name}: {found}"
                continue
            height, width, grey = found
            is_grey &= grey
            if len(shapes) < 2:
                shapes.setdefault((height, width), file.name)
    if not shapes:
        raise DataError(f"{folder}: none of its {n:,} images can be used; {problem}")
    if size is None and len(shapes) > 1:
        each = " and ".join(f"{name} is {h} x {w}" for (h, w), name in shapes.items())
        raise SizesError(f"{folder}: images of several sizes: {each}")
    height, width = next(iter(shapes)) if size is None else (size, size)
    return Survey(n, classes, height, width, channels or (1 if is_grey else 3))


def decoded(
    folder: Path,
    files: Iterable[ImageFile],
    found: Survey,
    size: int | None = None,
    workers: int | None = None,
) -> Iterator[tuple[ImageFile, Pixels | ImageError]]:
    """Each file with its pixels, of found.item_shape, or with what is wrong with it, in order."""
    row_bytes = found.height * found.width * found.channels

    def one(file: ImageFile) -> tuple[ImageFile, Pixels | ImageError]:
        try:
            pixels = decode(folder / file.name, found.channels, size)
        except ImageError as error:
            return file, error
        if pixels.shape == found.item_shape:
            return file, pixels
        got = " x ".join(map(str, pixels.shape[:2]))
        return file, ImageError(f"{got} pixels, expected {found.height} x {found.width}")

    with quiet():
        yield from in_threads(one, files, workers, max(1, min(_CHUNK_FILES, _CHUNK_BYTES // row_bytes)))


def open_image_folder(
    folder: Path, size: int | None = None, channels: int | None = None, workers: int | None = None
) -> Source:
    """The images of a folder, decoded into memory; the subfolders that they lie in are the labels.

    Raises DataError for images that are corrupt or of several sizes, and where memory does not suffice.
    """
    pack = f"fastvae data pack {folder} FILE.npy"
    try:
        found = survey(folder, size, channels, workers=workers)
    except SizesError as error:
        raise SizesError(
            f"{error}; --image-size N makes them squares, and so does: {pack} --size N"
        ) from error
    shape = (found.n_images, *found.item_shape)
    needed, free = math.prod(shape), available_memory()
    if needed > _SHARE_OF_MEMORY * free:
        images = f"{found.n_images:,} images of {' x '.join(map(str, found.item_shape))}"
        took = f"{images} take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free"
        raise DataError(f"{folder}: {took}; read them from a file made with: {pack}")
    x = np.empty(shape, np.uint8)
    labels = np.empty(found.n_images, np.int64) if found.classes else None
    index = {name: i for i, name in enumerate(found.classes)}
    read = 0
    for file, pixels in islice(decoded(folder, image_files(folder), found, size, workers), len(x)):
        if isinstance(pixels, ImageError):
            hint = f"leave such images out with: {pack} --on-error skip"
            raise DataError(f"{folder / file.name}: {pixels}; {hint}")
        x[read] = pixels
        if labels is not None:
            labels[read] = index[file.subfolder]
        read += 1
    if read < len(x):
        raise DataError(f"{folder}: {read:,} images where there were {len(x):,}; it has changed")
    return source_from_arrays(x, labels, str(folder), found.classes, found.channels == 3)


def in_threads(
    function: Callable[[T], R], items: Iterable[T], workers: int | None, chunk: int
) -> Iterator[R]:
    """function of each item, in order, computed in threads that are a bounded number of items ahead."""
    workers = workers or _cores()
    rest = iter(items)
    ahead: deque[Future[list[R]]] = deque()

    def each(piece: list[T]) -> list[R]:
        return [function(item) for item in piece]

    with ThreadPoolExecutor(workers, "fastvae-images") as pool:
        try:
            while piece := list(islice(rest, chunk)):
                ahead.append(pool.submit(each, piece))
                if len(ahead) > 2 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _others(folder: Path) -> str:
    """What lies there instead, for the message."""
    suffixes = Counter(Path(name).suffix.lower() for name in os.listdir(folder))
    suffixes.pop("", None)
    if not suffixes:
        return ""
    suffix, count = suffixes.most_common(1)[0]
    return f"; there {'are' if count > 1 else 'is'} {count:,} {suffix}"
