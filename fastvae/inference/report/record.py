"""What the folder of a run says of it, whether it has ended or not."""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class Traversal:
    """A latent's name, its KL in nats, None where it is unknown, and the picture of it varied."""

    name: str
    kl: float | None
    picture: str


@dataclass(frozen=True)
class Pictures:
    """What a model makes of data and of draws: pictures as data URIs, `latents` as SVG.

    data: what they are, for people. labels: of the colours in `latents`, each with its colour.
    """

    data: str = "the validation data"

    samples: str | None = None
    reconstructions: str | None = None
    traversals: tuple[Traversal, ...] = ()
    latents: Markup | None = None
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it; whatever is absent is empty.

    options: train.toml. history: the rows of metrics.jsonl. summary, evaluation: the JSON files.
    finished: whether its weights are there. notes: what could not be read or shown, and why, in a line each.
    """

    name: str
    finished: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=Pictures)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> dict[str, Any]:
        """The row of the history whose weights are the run's; empty before the first epoch has ended."""
        rows = [row for row in self.history if isinstance(row.get("val_loss"), (int, float))]
        return min(rows, key=lambda row: float(row["val_loss"])) if rows else (self.history or [{}])[-1]

    @property
    def status(self) -> str:
        """How far it has come, in a few words."""
        done = f"{len(self.history)} {'epoch' if len(self.history) == 1 else 'epochs'}"
        if self.finished:
            return f"finished after {done}"
        planned = self.options.get("epochs")
        return f"not finished: {done} of {planned}" if planned else f"not finished: {done}"

    @property
    def kl_by_latent(self) -> list[float]:
        """The KL of each latent over the validation data, in nats, with the weights of the best epoch."""
        return list(self.best.get("kl_by_latent") or [])


def read_run(folder: str | os.PathLike[str]) -> RunRecord:
    """What a run's folder holds, with the pictures that the training has left there.

    What cannot be read is named in the notes. Raises FileNotFoundError for a folder that is no run's.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("train.toml", "metrics.jsonl")):
        what = "no train.toml and no metrics.jsonl there, expected a run of fastvae train"
        raise FileNotFoundError(errno.ENOENT, what, str(folder))
    notes: list[str] = []
    uris = {name: _picture(folder / f"{name}.png") for name in ("samples", "reconstructions")}
    return RunRecord(
        name=folder.resolve().name,
        finished=(folder / "model.safetensors").is_file(),
        options=_read(folder / "train.toml", tomllib.loads, notes) or {},
        history=_read(folder / "metrics.jsonl", lambda text: _rows(text, notes), notes) or [],
        summary=_read(folder / "summary.json", _object, notes) or {},
        evaluation=_read(folder / "evaluation.json", _object, notes) or {},
        pictures=Pictures(**uris),  # type: ignore[arg-type]
        notes=tuple(notes),
    )


def _read(path: Path, parse: Callable[[str], T], notes: list[str]) -> T | None:
    """What a file holds; None where it is absent, and a note where it cannot be read."""
    try:
        return parse(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def _rows(text: str, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to one that is not whole, as where a training writes or was killed."""
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for i, line in enumerate(lines, 1):
        try:
            rows.append(_object(line))
        except ValueError as error:
            cut = i == len(lines) and not text.endswith("\n")
            notes.append(f"metrics.jsonl, line {i}: {'cut off' if cut else f'{error}; the rest is left out'}")
            break
    return rows


def _picture(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
