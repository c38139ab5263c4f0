"""A model for other runtimes: encoder and decoder as ONNX, checked where they will run."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.model import Model, as_model, decode_mean, evaluating

ENCODER_NAME = "encoder.onnx"
DECODER_NAME = "decoder.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of onnxruntime to torch, absolute and relative
CHECKED = (1, 5)  # batch sizes; neither is that of the export


class ExportError(RuntimeError):
    """A model that could not be exported, or computes something else there; the message says which part."""


@dataclass(frozen=True)
class Exported:
    """A file, its input and outputs with their shapes, and how far onnxruntime is from torch with it."""

    path: Path
    input: str
    outputs: tuple[str, ...]
    error: float


class _Encoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x)


class _Decoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return decode_mean(self.model, z)


def missing_packages() -> str | None:
    """What to say where a package that the export needs is not installed; None where all are."""
    absent = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    are = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {are} not installed; install with: pip install {' '.join(absent)}"


def export_onnx(
    model: nn.Module,
    folder: str | os.PathLike[str],
    item_shape: Sequence[int],
    latent_shape: Sequence[int],
    *,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[Exported, Exported]:
    """Write encoder.onnx, x -> mu, logvar, and decoder.onnx, z -> the mean of p(x|z), into a folder.

    x: float32 [batch, *item_shape]; mu, logvar, z: float32 [batch, *latent_shape]; any batch. Both are run by
    onnxruntime on drawn x in [0, 1] and z of the prior, and appear in `folder`, which must exist, only if
    they are within TOLERANCE of torch, in eval mode, on the CPU. metadata: goes into both files.

    Raises ExportError where a package is absent, torch.onnx cannot export the model, or the check fails.
    """
    missing = missing_packages()
    if missing is not None:
        raise ExportError(f"onnx: {missing}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model = as_model(model)
    latent = torch.randn(max(CHECKED), *latent_shape, generator=generator)
    items = torch.rand(max(CHECKED), *item_shape, generator=generator)
    parts = (
        ("encoder", _Encoder(model), items, "x", ("mu", "logvar")),
        ("decoder", _Decoder(model), latent, "z", ("x_mean",)),
    )
    exported = []
    with evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            model.cpu()
            for name, part, inputs, of, to in parts:
                path = Path(temporary, f"{name}.onnx")
                _write(part.eval(), path, inputs, of, to, {**(metadata or {}), "part": name})
                error = _check(part, path, inputs, of)
                shapes = [tuple(output.shape[1:]) for output in _outputs(part(inputs))]
                exported.append(
                    Exported(
                        Path(folder, path.name),
                        _described(of, inputs.shape[1:]),
                        tuple(_described(*output) for output in zip(to, shapes, strict=True)),
                        error,
                    )
                )
        finally:
            model.to(device)
        for path in sorted(Path(temporary).iterdir()):  # weights of more than 2 GB are in files of their own
            os.replace(path, Path(folder, path.name))
    encoder, decoder = exported
    return encoder, decoder


def _write(
    part: nn.Module, path: Path, inputs: Tensor, of: str, to: Sequence[str], metadata: Mapping[str, str]
) -> None:
    try:
        with _quiet():
            program = torch.onnx.export(
                part,
                (inputs[:2],),  # of a batch of 1 torch.export would take the 1 for granted
                dynamo=True,
                input_names=[of],
                output_names=list(to),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # whatever is in the model of a user's own
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx says at length what step it was at, and not why
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise ExportError(f"model: torch.onnx cannot export the {metadata['part']}: {reason}") from error
    assert program is not None
    program.model.producer_name = "fastvae"
    program.model.metadata_props.update(metadata)
    program.save(path)


def _check(part: nn.Module, path: Path, inputs: Tensor, of: str) -> float:
    """The largest difference of onnxruntime to torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows in CHECKED:
        expected = _outputs(part(inputs[:rows]))
        got = session.run(None, {of: inputs[:rows].numpy()})
        for i, (ours, theirs) in enumerate(zip(expected, map(torch.from_numpy, got), strict=True)):
            name = session.get_outputs()[i].name
            if ours.shape != theirs.shape:
                problem = f"{name} {tuple(theirs.shape)} for {rows} data, expected {tuple(ours.shape)}"
                raise ExportError(f"{path.name}: onnxruntime gives {problem}")
            error = float((ours - theirs).abs().max())
            if not torch.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE):
                raise ExportError(f"{path.name}: {name} is {error:.2g} from torch's, expected {TOLERANCE:g}")
            largest = max(largest, error)
    return largest


def _outputs(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _described(name: str, shape: Sequence[int]) -> str:
    return f"{name} [{', '.join(map(str, ('batch', *shape)))}]"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript log and deprecate of their own; warnings of the model go through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)
