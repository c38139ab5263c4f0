"""The JSON that `fastvae data pack` leaves beside a .npy: labels, their names, source and checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .source import DataError

Count = Annotated[int, Field(ge=0)]
Label = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_PIECE = 1 << 20


class Packed(BaseModel):
    """The JSON beside a packed .npy."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal["fastvae-packed-1"] = "fastvae-packed-1"
    shape: tuple[Count, ...]  # of the array, samples first
    dtype: Literal["uint8"] = "uint8"
    channels_last: bool | None = None  # None: as the shape has it
    bytes: Count  # of the file
    sha256: str  # of the file
    source: str
    size: int | None = None  # of --size
    classes: tuple[str, ...] = ()
    labels: tuple[Label, ...] | None = None
    skipped: dict[str, str] = {}  # name of an image -> what was wrong with it
    fastvae: str = ""  # its version

    @property
    def y(self) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """The labels, int64 [N], or None."""
        return None if self.labels is None else np.array(self.labels, np.int64)


def json_path(array: Path) -> Path:
    """Where the JSON of a .npy lies."""
    return array.with_name(array.name + ".json")


def read_packed(array: Path, shape: tuple[int, ...] | None = None) -> Packed | None:
    """What the JSON beside a .npy says, or None where there is none of fastvae's.

    Raises DataError where it does not belong to the file: of another size or, if it is given, shape.
    """
    path = json_path(array)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        found: Any = json.loads(content)
        if not isinstance(found, dict) or not str(found.get("format")).startswith("fastvae-packed-"):
            return None  # somebody else's
        packed = Packed.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg'].lower()}; pack {array} again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a whole JSON file ({error}); pack again, or remove it") from error
    _check(packed, array, shape)
    return packed


def verify(array: Path, report: Callable[[str, int, int], None] | None = None) -> Packed:
    """Reads a packed .npy whole and compares it with its JSON. Raises DataError where they differ."""
    packed = read_packed(array) if array.is_file() else None
    if packed is None:
        expected = "a .npy of fastvae data pack with its JSON beside it"
        missing = "there is no JSON" if array.is_file() else "there is no such file"
        raise DataError(f"{array}: {missing}; expected {expected}")
    got = checksum(array, report)
    if got != packed.sha256:
        raise DataError(f"{array}: SHA-256 {got}, expected {packed.sha256}; damaged, pack it again")
    return packed


def checksum(path: Path, report: Callable[[str, int, int], None] | None = None) -> str:
    """The SHA-256 of a file."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        total = path.stat().st_size
        while piece := stream.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            if report:
                report("checksum", done, total)
    return digest.hexdigest()


def _check(packed: Packed, array: Path, shape: tuple[int, ...] | None) -> None:
    path, n = json_path(array), packed.shape[0] if packed.shape else 0
    problem = ""
    try:
        size = array.stat().st_size
    except OSError as error:
        raise DataError(f"{array}: {error.strerror}") from error
    if size != packed.bytes:
        problem = f"{packed.bytes} bytes, but {array.name} has {size}"
    elif shape is not None and shape != packed.shape:
        problem = f"shape {list(packed.shape)}, but {array.name} has {list(shape)}"
    elif packed.channels_last and (len(packed.shape) != 4 or packed.shape[3] not in (1, 3, 4)):
        problem = f"channels last for shape {list(packed.shape)}"
    elif packed.labels is not None and len(packed.labels) != n:
        problem = f"{len(packed.labels)} labels for {n} samples"
    elif packed.classes and (other := set(packed.labels or ()) - set(range(len(packed.classes)))):
        problem = f"label {max(other)} with {len(packed.classes)} classes"
    if problem:
        raise DataError(f"{path}: says {problem}; pack again, or remove the JSON if it is not of this file")
