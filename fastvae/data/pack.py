"""Packing: a folder of images, or any other source, into one .npy of uint8 with a JSON beside it."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from .feeds import CorruptImages, Feed, ImageFeed, SourceFeed
from .folders import Report
from .packed import Packed
from .partial import Partial, StaleError, State
from .source import DataError, Source
from .sources import SourceLike, as_source, is_image_folder

OnError = Literal["stop", "skip", "list"]
_LARGEST_SIZE = 8192  # whose square is an image that is not refused for its size
_MOST_WORKERS = 256  # each has images in memory


def pack(
    source: SourceLike,
    dst: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    workers: int | None = None,
    on_error: OnError = "stop",
    overwrite: bool = False,
    report: Report | None = None,
) -> Packed:
    """Packs a folder of images, or any source, into dst, a .npy of uint8 [N, ...], with a JSON beside it.

    size: makes images squares of this side, cut from the centre and resized by Lanczos' filter.
    channels: of a folder's images, 1 or 3; None is 1 if all are grey, else 3.
    workers: threads that decode; None is one for each core.
    on_error: at a corrupt image "stop"; "skip" it, naming it in the JSON; or "list": find all, and make
        nothing if there is one.
    overwrite: replace dst.
    report: called with what is done, how much of it, and of how much. What it raises stops the pack.

    Floating point must lie in [0, 1] and becomes the nearest k / 255. The file is made in dst.partial, and
    after a stop goes on there when the same is asked for again. Raises DataError, and for images that
    cannot be used CorruptImages.
    """
    dst = Path(dst)
    _check_arguments(dst, size, channels, workers, on_error)
    if dst.is_dir():
        raise DataError(f"{dst}: a folder, expected the name of a file")
    if dst.exists() and not overwrite:
        raise DataError(f"{dst}: exists already; --overwrite replaces it")
    path = Path(source) if isinstance(source, str | os.PathLike) and os.fspath(source) else None
    read = Path(source.name) if isinstance(source, Source) else path
    if read is not None and dst.exists() and read.exists() and dst.samefile(read):
        raise DataError(f"dst is {str(dst)!r}, which is what to pack, expected another name")
    feed: Feed
    if path is not None and is_image_folder(path):
        feed = ImageFeed(path, size, channels, workers, on_error != "stop", report)
    elif channels is not None:
        raise DataError(f"channels is {channels}, expected it with a folder of images only")
    else:
        feed = SourceFeed(as_source(source), size)
    with Partial(dst) as partial:
        try:
            return _pack(feed, partial, size, on_error, report)
        except StaleError:
            if not overwrite:
                raise
            partial.forget()
            return _pack(feed, partial, size, on_error, report)


def _pack(feed: Feed, partial: Partial, size: int | None, on_error: OnError, report: Report | None) -> Packed:
    state = partial.load(feed.request)
    shape, n = feed.begin(state)
    if state is None:
        state = State(feed.request, list(shape))
    if tuple(state.shape) != shape or state.rows > n:
        got = f"{state.rows:,} rows of {state.shape}, not of the {n:,} of {list(shape)}"
        raise StaleError(f"{partial.folder}: {got}; begin anew with --overwrite")
    partial.open(state, n)
    try:
        for rows, digest in feed.rows(state):
            partial.append(state, rows, digest)
            if report:
                report("packing", state.rows + len(state.skipped), n)
        partial.save(state)
    except OSError as error:
        partial.save_if_possible(state)
        raise _stopped(partial, state, n, error) from error
    except BaseException:
        partial.save_if_possible(state)
        raise
    source = str(feed.request["source"])
    problems = {_text(stamp.split("\0", 1)[0]): problem for stamp, problem in state.skipped.items()}
    if problems and (on_error == "list" or not state.rows):
        counted = f"{len(problems):,} of {state.rows + len(problems):,} images"
        hint = "; --on-error skip packs the others" if state.rows else ""
        raise CorruptImages(f"{source}: {counted} cannot be used{hint}", problems)
    labels = feed.labels()
    packed = Packed(
        shape=(state.rows, *state.shape),
        source=_text(source),
        size=size,
        channels_last=feed.channels_last,
        classes=tuple(map(_text, feed.classes)),
        labels=None if labels is None else tuple(labels),
        skipped=problems,
        fastvae=version("fastvae"),
        bytes=0,
        sha256="",
    )
    try:
        return partial.finish(packed, report)
    except OSError as error:
        raise _stopped(partial, state, n, error) from error


def _stopped(partial: Partial, state: State, n: int, error: OSError) -> DataError:
    return DataError(
        f"{partial.dst}: {error.strerror or error}, after {state.rows:,} of {n:,} samples; "
        f"{partial.folder} keeps them, and the same command goes on from there"
    )


def _text(name: str) -> str:
    """A file's name, whose bytes need not be text, as JSON can hold it."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _check_arguments(
    dst: Path, size: int | None, channels: int | None, workers: int | None, on_error: str
) -> None:
    if dst.suffix != ".npy":
        raise DataError(f"dst is {str(dst)!r}, expected a name that ends in .npy")
    if on_error not in get_args(OnError):
        raise DataError(f"on_error is {on_error!r}, expected one of {', '.join(get_args(OnError))}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels}, expected 1 or 3")
    for name, number, most in (("size", size, _LARGEST_SIZE), ("workers", workers, _MOST_WORKERS)):
        if number is not None and not (isinstance(number, int) and 1 <= number <= most):
            raise DataError(f"{name} is {number!r}, expected an integer from 1 to {most}")
