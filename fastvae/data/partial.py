"""A .npy in the making: in DST.partial beside it, renamed when it is whole, gone on with after a stop."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from .folders import Report
from .images import Pixels
from .packed import Count, Label, Packed, checksum, json_path
from .source import DataError

SAVE_SECONDS = 2.0  # between two states on the disk


class StaleError(DataError):
    """What an earlier pack has left is not a part of what is asked for now."""


@dataclass
class State:
    """How far a pack is. `request` is what it was asked for, `shape` that of a row."""

    request: dict[str, Any]
    shape: list[Count]
    rows: Count = 0
    digest: str = ""  # of the stamps of the files that the rows are of
    skipped: dict[str, str] = field(default_factory=dict)  # stamp of a file -> what is wrong with it
    labels: list[Label] = field(default_factory=list)  # of the rows, where they come with them


class Partial:
    """The folder beside dst in which it is made, by one process at a time."""

    def __init__(self, dst: Path) -> None:
        self.dst, self.folder = dst, dst.with_name(dst.name + ".partial")
        self._rows = self.folder / "rows"
        self._state = self.folder / "state.json"
        self._stream: io.FileIO | None = None
        self._saved = time.monotonic()

    def __enter__(self) -> Partial:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(f"{self.dst}: another process is packing it") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        if not self._state.exists():  # nothing to go on from
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def load(self, request: dict[str, Any]) -> State | None:
        """Where an earlier pack was. Raises StaleError where it was asked for something else."""
        if not (self._state.exists() and self._rows.exists()):
            return None
        try:
            state = State(**json.loads(self._state.read_text()))
        except (ValueError, TypeError) as error:
            problem = str(error).partition("\n")[0]
            raise StaleError(f"{self._state}: damaged ({problem}); begin anew with --overwrite") from error
        for name, wanted in request.items():
            got = state.request.get(name)
            if got != wanted:
                was = f"begun with {name} {got}, now asked for {wanted}"
                raise StaleError(f"{self.folder}: {was}; begin anew with --overwrite")
        return state

    def forget(self) -> None:
        """Begins anew."""
        self._close()
        self._state.unlink(missing_ok=True)

    def open(self, state: State, n: int) -> None:
        """Opens the rows where they end. Raises DataError where there is no room for n of them."""
        header, row = len(header_of((n, *state.shape))), int(np.prod(state.shape))
        end = header + state.rows * row
        stream = self._stream = open(self._rows, "r+b" if state.rows else "wb", buffering=0)  # noqa: SIM115
        if state.rows and stream.seek(0, os.SEEK_END) < end:
            raise StaleError(f"{self._rows}: shorter than its state says; begin anew with --overwrite")
        stream.truncate(end)
        stream.seek(end)
        free, needed = shutil.disk_usage(self.folder).free, (n - state.rows) * row
        if needed > free:
            room = f"{needed / 1e9:,.2f} GB needed for {n - state.rows:,} rows, {free / 1e9:,.2f} GB free"
            raise DataError(f"{self.dst}: {room} in {self.folder.parent}")
        if not state.rows:
            stream.seek(0)
            self._write(header_of((n, *state.shape)))

    def append(self, state: State, rows: Pixels, digest: str) -> None:
        """Writes rows, and the state when it is time."""
        self._write(np.ascontiguousarray(rows).data.cast("B"))
        state.rows, state.digest = state.rows + len(rows), digest
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save(state)

    def save(self, state: State) -> None:
        """Brings the rows, then the state, to the disk."""
        assert self._stream is not None
        os.fsync(self._stream.fileno())
        _write_whole(self._state, json.dumps(state.__dict__).encode())
        self._saved = time.monotonic()

    def save_if_possible(self, state: State) -> None:
        """For a pack that ends early; where the disk is full, the state before stays."""
        if state.rows:
            with suppress(OSError):
                self.save(state)

    def finish(self, packed: Packed, report: Report | None) -> Packed:
        """Makes dst and its JSON; `packed` says all but the size and the checksum."""
        assert self._stream is not None
        self._stream.seek(0)
        self._write(header_of(packed.shape))
        os.fsync(self._stream.fileno())
        size, digest = self._rows.stat().st_size, checksum(self._rows, report)
        packed = packed.model_copy(update={"bytes": size, "sha256": digest})
        staged = self.folder / "json"
        _write_whole(staged, packed.model_dump_json(exclude_none=True).encode() + b"\n")
        self.dst.unlink(missing_ok=True)  # so that it never lies beside the JSON of another
        os.replace(staged, json_path(self.dst))
        os.replace(self._rows, self.dst)
        _sync_folder(self.dst.parent)
        self._state.unlink()
        return packed

    def _write(self, content: bytes | memoryview) -> None:
        assert self._stream is not None
        rest = memoryview(content)
        while len(rest):
            rest = rest[self._stream.write(rest) or 0 :]

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def header_of(shape: tuple[int, ...]) -> bytes:
    """The .npy header of uint8; NumPy leaves room in it, so that any number of samples has one length."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".new")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
