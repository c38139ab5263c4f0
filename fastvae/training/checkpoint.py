"""All that a training needs to go on, on disk: whole at any moment, checked by a checksum, never unpickled.

A checkpoint is one safetensors file, checkpoints/step-<step>.safetensors: tensors by name, and what is not a
tensor as JSON in its metadata. It is written beside the training to a new file, fsynced and renamed.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..models.files import save_weights
from .run_folder import CHECKPOINTS_NAME

BEST_NAME = "best.safetensors"
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
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._copies: dict[str, Tensor] = {}  # kept, for memory that was touched is written faster

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the first error is the one to hear of

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Copy the tensors and begin to write; waits for the write before, and raises its OSError.

        Returns where the checkpoint will be. An error leaves the earlier ones as they were.
        """
        self.wait()
        path = checkpoint_path(self.folder.parent, step)
        self._copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(path, self._copies, json.dumps(state)))
        self._thread.start()
        return path

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        """Replace best.safetensors, the weights alone."""
        save_weights(self.folder / BEST_NAME, weights)

    def save_epoch(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights after an epoch; 0 is before the first."""
        save_weights(self.folder / f"epoch-{epoch:06d}.safetensors", weights)

    def wait(self) -> None:
        """Wait until nothing is being written; raises the OSError of a write that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return copy.copy_(tensor.detach())

    def _write(self, path: Path, tensors: dict[str, Tensor], state: str) -> None:
        try:
            save_weights(path, tensors, {"state": state, "checksum": _checksum(tensors, state)})
            for old in checkpoints(self.folder.parent)[KEPT:]:
                old.unlink()
        except OSError as error:
            error.filename = error.filename or str(path)
            self._error = error


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
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state, checksum = metadata["state"], metadata["checksum"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint of fastvae: {error}") from error
    if _checksum(tensors, state) != checksum:
        raise CheckpointError(f"{path}: its contents do not have its checksum; it has been damaged")
    return Checkpoint(tensors, json.loads(state))


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
    raise CheckpointError(f"{found}; expected a run of fastvae train that has made one")


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors whose names begin with `prefix/`, under the rest of their names."""
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    crc = zlib.crc32(state.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(content, crc)
    return f"{crc:08x}"
