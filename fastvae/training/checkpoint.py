"""All that a training needs to go on, on disk: whole at any moment, checked by a checksum, never unpickled.

A checkpoint is one safetensors file, checkpoints/step-<step>.safetensors: tensors by name, and what is not a
tensor as JSON in one of bytes. It is written beside the training to a new file, fsynced and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from ..models.files import replacing, save_weights
from .file_image import FileImage
from .run_folder import CHECKPOINTS_NAME

BEST_NAME = "best.safetensors"
STATE, CHECKSUM = "state", "checksum"  # what a checkpoint holds beside the tensors of the training
STATE_ROOM = 1 << 14  # bytes; an epoch adds about 500
KEPT = 2  # so that one is left when the newest turns out to be damaged


class CheckpointError(ValueError):
    """There is no checkpoint that can be used; the message names each file and what is wrong with it."""


class Checkpoint(NamedTuple):
    """tensors by name, on the CPU; state is what JSON can hold."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of a run in the background; a context manager, which waits for the last one."""

    def __init__(self, run: Path) -> None:
        self.folder = run / CHECKPOINTS_NAME
        self.folder.mkdir(parents=True, exist_ok=True)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._image: FileImage | None = None  # kept, for memory that was touched is written faster
        self._rows: list[str] = []  # of the history, which only grows, as JSON

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.shutdown()
        if kind is None:  # else the first error is the one to hear of
            self.wait()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Copy the tensors and begin to write; waits for the write before, and raises its OSError.

        Returns where the checkpoint will be. An error leaves the earlier ones as they were.
        """
        self.wait()
        path = checkpoint_path(self.folder.parent, step)
        contents = {
            **tensors,
            STATE: _as_bytes(self._as_json(state)),
            CHECKSUM: torch.empty(8, dtype=torch.uint8, device="cpu"),
        }
        if self._image is None or not self._image.holds(contents):
            self._image = None  # its memory goes first
            self._image = FileImage(contents)
        self._image.fill(contents)
        self._writing = self._background.submit(self._write, path, self._image)
        return path

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        """Replace best.safetensors, the weights alone."""
        save_weights(self.folder / BEST_NAME, weights)

    def save_epoch(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights after an epoch; 0 is before the first."""
        save_weights(self.folder / f"epoch-{epoch:06d}.safetensors", weights)

    def wait(self) -> None:
        """Wait until nothing is being written; raises the OSError of a write that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _as_json(self, state: Mapping[str, Any]) -> str:
        """The state, of whose history only what is new is encoded: of 1,000 epochs that takes 10 ms."""
        others = dict(state)
        history = others.pop("history", None)
        if history is None:
            return json.dumps(state)
        self._rows += map(json.dumps, history[len(self._rows) :])
        return json.dumps({**others, "history": []})[: -len("]}")] + ", ".join(self._rows) + "]}"

    def _write(self, path: Path, image: FileImage) -> None:
        try:
            image.tensors[CHECKSUM].copy_(_checksum(image.tensors))
            with replacing(path) as temporary:
                image.write(temporary)
            for old in checkpoints(self.folder.parent)[KEPT:]:
                old.unlink()
        except OSError as error:
            raise OSError(error.errno, f"could not be written: {error.strerror}", str(path)) from error


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run / CHECKPOINTS_NAME / f"step-{step:010d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((run / CHECKPOINTS_NAME).glob("step-*.safetensors"), reverse=True)


def weights_of_epochs(run: Path) -> list[tuple[int, Path]]:
    """The epochs whose weights a run has kept, in their order, and where these are."""
    found = sorted((run / CHECKPOINTS_NAME).glob("epoch-*.safetensors"))
    return [(int(path.stem.removeprefix("epoch-")), path) for path in found]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError for a damaged file, OSError for one that cannot be read."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        state, checksum = tensors[STATE], tensors[CHECKSUM]
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint of fastvae: {error}") from error
    if not _checksum(tensors).equal(checksum):
        raise CheckpointError(f"{path}: its contents do not have its checksum; it has been damaged")
    del tensors[STATE], tensors[CHECKSUM]
    return Checkpoint(tensors, json.loads(state.numpy().tobytes()))


def load_newest_checkpoint(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run that is whole, and what was wrong with those that are newer.

    Raises CheckpointError where there is none.
    """
    problems: list[str] = []
    for path in checkpoints(run):
        try:
            return load_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    found = "; ".join(problems) or f"{run / CHECKPOINTS_NAME}: no checkpoint"
    expected = f"expected a run that has made one; fastvae train --out {run} --overwrite begins one again"
    raise CheckpointError(f"{found}; {expected}")


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors whose names begin with `prefix/`, under the rest of their names."""
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _as_bytes(text: str) -> Tensor:
    """With spaces behind it, so that a text that grows keeps its length for some time."""
    content = text.encode()
    return torch.frombuffer(
        bytearray(content.ljust(-(-len(content) // STATE_ROOM) * STATE_ROOM)), dtype=torch.uint8
    )


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Eight bytes, of all but the checksum."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(tensors.items()):
        if name != CHECKSUM:
            content: Any = tensor.view(-1).view(torch.uint8).numpy()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(content)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
