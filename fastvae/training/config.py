"""Every option of a training in one validated structure, which TOML holds and the command line is made of.

Imports neither torch nor numpy: `fastvae train --help` needs only this.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from .schedules import KLWarmup, LRSchedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_MAX_SKIPPED = 10

WIDEST = 2**31 - 1  # a layer beyond it has no room
LARGEST = 3.4e38  # in float32

CUDAGraph = Literal["auto", "always", "never"]


class ConfigError(ValueError):
    """An option that does not exist or has no such value; `option` is its name in TrainConfig."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = problem


class ConfigFileError(ValueError):
    """A file of options that is not TOML, or a wrong name or value in it; the message names the file."""


def _variance(value: Any) -> Any:
    return value if value in (None, "learned") else _number(value, 0, None, "a number above 0, or 'learned'")


def _sum(value: Any) -> Any:
    return value if value in (None, "median") else _number(value, 0, None, "a number above 0, or 'median'")


def _file_or_fraction(value: Any) -> Any:
    try:
        float(value)
    except (TypeError, ValueError):
        return value
    return _number(value, 0, 1, "a fraction between 0 and 1, or a file")


def _number(value: Any, above: float, below: float | None, expected: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = above
    if not above < number < (float("inf") if below is None else below):
        raise PydanticCustomError("number", "Input should be {expected}", {"expected": expected})
    return number


def _interval(value: Any) -> Any:
    if value is None:
        return None
    expected = "two numbers, LOW and HIGH, LOW not above HIGH"
    try:
        low, high = (float(bound) for bound in value)
        valid = not isinstance(value, str) and -LARGEST <= low <= high <= LARGEST
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise PydanticCustomError("interval", "Input should be {expected}", {"expected": expected})
    return low, high


def _model(value: Any) -> Any:
    if value in ("mlp", "conv") or (isinstance(value, str) and re.fullmatch(r"\w[\w.]*:\w[\w.]*", value)):
        return value
    expected = "'mlp', 'conv' or package.module:Class"
    raise PydanticCustomError("model", "Input should be {expected}", {"expected": expected})


Width = Annotated[int, Field(ge=1, le=WIDEST)]


class TrainConfig(BaseModel):
    """The options of `fastvae train`; immutable. Raises ConfigError for a wrong name or value."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    data: str | None = Field(
        None,
        description="fashion-mnist, mnist, digits, shapes (shapes:N for N of them), or a path: .npy, .npz, a "
        "folder of images, whose subfolders are labels, or of IDX files (default: fashion-mnist if it is on "
        "this machine, else digits)",
    )
    val: Annotated[float | str, BeforeValidator(_file_or_fraction)] = Field(
        0.1, description="validation data: a file, or a fraction of the training data"
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="make the images of a folder N x N: the centre square, resized (default: as they are)",
    )
    hflip: bool = Field(False, description="mirror half of the training images, others in each epoch")
    crop_padding: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="shift training images by up to so many pixels, zeros around them",
    )
    binarize: bool = Field(
        False,
        description="draw each pixel as 1 with probability x, else 0: anew in each epoch of training, "
        "once for validation and test",
    )
    normalize_counts: Annotated[float | Literal["median"] | None, BeforeValidator(_sum)] = Field(
        None,
        description="bring the counts of each datum to this sum: a number, or median, that of the sums of "
        "the training data",
    )
    log1p: bool = Field(False, description="take log(1 + x) of counts, after that")
    model: Annotated[str, BeforeValidator(_model)] = Field(
        "mlp",
        description="architecture of encoder and decoder: mlp, conv, or a class of your own, "
        "package.module:Class, found from the current folder",
    )
    hidden: tuple[Width, ...] | None = Field(
        None, description="widths of the mlp's hidden layers, mirrored in the decoder (default: 400)"
    )
    latent_dim: int = Field(20, ge=1, le=WIDEST, description="number of latents")
    likelihood: Literal["mse", "gaussian", "bernoulli"] | None = Field(
        None,
        description="p(x|z): mse is the squared error, gaussian has --variance, bernoulli is from logits "
        "(default: mse; gaussian on digits, and with --variance; bernoulli with --binarize)",
    )
    variance: Annotated[float | Literal["learned"] | None, BeforeValidator(_variance)] = Field(
        None, description="variance of a gaussian p(x|z): a number, or learned (default: learned)"
    )
    beta: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of the KL term")
    kl_warmup: KLWarmup = Field(
        "none", description="how beta rises from 0 in training: once, or at the start of each cycle"
    )
    kl_warmup_steps: int | None = Field(
        None, ge=1, description="steps that --kl-warmup takes, or a cycle (default: a tenth of all steps)"
    )
    free_bits: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="floor of the KL of each latent in training, in nats"
    )
    free_bits_form: Literal["batch", "element"] = Field(
        "batch", description="what --free-bits floors: a latent's mean over the batch, or that of each datum"
    )
    capacity: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="hold the KL at C nats, by beta * |KL - C|; C rises from 0 to this",
    )
    capacity_steps: int | None = Field(
        None, ge=1, description="steps in which C of --capacity rises (default: half of all steps)"
    )
    logvar_clamp: Annotated[tuple[float, float] | None, BeforeValidator(_interval)] = Field(
        None, description="bounds of the posterior's log variance, in training and validation"
    )
    epochs: int | None = Field(
        None, ge=1, description="passes over the training data (default: 10, or more where the data are few)"
    )
    patience: int | None = Field(
        None, ge=1, description="end when the validation loss has not improved in so many epochs"
    )
    batch_size: int = Field(128, ge=1, le=2**62, description="data in a step")
    accumulate: int = Field(
        1, ge=1, description="parts of a batch that a step computes one after another, to take less memory"
    )
    checkpoint_activations: bool = Field(
        False, description="compute encoder and decoder again for their gradients, to take less memory"
    )
    channels_last: bool = Field(
        False, description="lay images and convolutions out with the channels last, which GPUs like in bf16"
    )
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate")
    lr_schedule: LRSchedule = Field("constant", description="cosine: the learning rate falls to 0")
    lr_warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="adamw: with --weight-decay")
    weight_decay: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="weight decay of adamw (default: 0.01)"
    )
    clip_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="largest norm of all gradients together (default: any)"
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="when a loss or gradient is not finite: end the run, or skip the step"
    )
    max_skipped_steps: int | None = Field(
        None,
        ge=1,
        description=f"steps in a row that --non-finite skip skips (default: {DEFAULT_MAX_SKIPPED})",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an exponential moving average of the weights, which is validated and saved: 0.999",
    )
    amp: bool = Field(False, description="compute in bf16, or fp16, where the device is made for it")
    cuda_graph: CUDAGraph = Field(
        "auto",
        description="on a GPU, capture the step as a CUDA graph; always: with a model or an extra loss of "
        "your own too, which does the same in each step",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    seed: int = Field(0, ge=0, lt=2**63, description="makes the run repeatable")
    out: str | None = Field(None, description="run folder (default: runs/<data>-<model>-<time>)")
    overwrite: bool = Field(False, description="replace the run that is in --out")
    checkpoint_steps: int | None = Field(
        None,
        ge=1,
        description="steps from one checkpoint to the next (default: one at the end of each epoch)",
    )
    image_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs from one set of reconstructions and samples, in images/, to the next "
        "(default: none)",
    )
    weights_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs from one copy of the weights that stays, in checkpoints/, to the next, for "
        "fastvae latents --animate (default: none)",
    )
    report: bool = Field(True, description="draw report.html, a page about the run, at its end (default: so)")
    tensorboard: bool = Field(False, description="write TensorBoard's event files into the run folder too")
    download: bool = Field(False, description="fetch named data that is not on this machine")
    debug: bool = Field(False, description="show the traceback of an error")

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise _first_problem(error) from None
        for option, value in options.items():
            # the bytes of a path that are no text
            if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                raise ConfigError(option, f"got {value!r}, expected UTF-8, which the files of a run are in")
        if self.variance is not None and self.likelihood not in (None, "gaussian"):
            got = f"got {self.variance} with likelihood {self.likelihood}"
            raise ConfigError("variance", f"{got}, expected it with gaussian only")
        if self.hidden is not None and self.model != "mlp":
            got = f"got {' '.join(map(str, self.hidden))} with model {self.model}"
            raise ConfigError("hidden", f"{got}, expected it with mlp only")
        if self.weight_decay is not None and self.optimizer != "adamw":
            got = f"got {self.weight_decay:g} with optimizer {self.optimizer}"
            raise ConfigError("weight_decay", f"{got}, expected it with adamw only; use optimizer adamw")
        if self.kl_warmup_steps is not None and self.kl_warmup == "none":
            got = f"got {self.kl_warmup_steps} with kl_warmup none"
            raise ConfigError("kl_warmup_steps", f"{got}, expected it with linear, cosine or cyclical")
        if self.kl_warmup_steps == 1 and self.kl_warmup == "cyclical":
            raise ConfigError("kl_warmup_steps", "got 1 with kl_warmup cyclical, expected at least 2 a cycle")
        if self.max_skipped_steps is not None and self.non_finite != "skip":
            got = f"got {self.max_skipped_steps} with non_finite {self.non_finite}"
            raise ConfigError("max_skipped_steps", f"{got}, expected it with skip only")
        if self.capacity is not None and self.free_bits is not None:
            got = f"got {self.capacity:g} with free_bits {self.free_bits:g}"
            raise ConfigError("capacity", f"{got}, expected one of the two")
        if self.capacity_steps is not None and self.capacity is None:
            raise ConfigError("capacity_steps", f"got {self.capacity_steps} without capacity, expected both")
        if self.accumulate > self.batch_size:
            got = f"got {self.accumulate} with batch_size {self.batch_size}"
            raise ConfigError("accumulate", f"{got}, expected at most one part a datum")
        floored = self.free_bits is not None and self.free_bits_form == "batch"
        if self.accumulate > 1 and (floored or self.capacity is not None):
            got = f"got {self.accumulate} with {'free_bits' if floored else 'capacity'}"
            raise ConfigError("accumulate", f"{got}, expected 1, since that takes the KL of a whole batch")
        if self.free_bits_form != "batch" and self.free_bits is None:
            got = f"got {self.free_bits_form} without free_bits"
            raise ConfigError("free_bits_form", f"{got}, expected it with free_bits only")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """The options in a TOML file, such as a run's train.toml.

        Types are those of TOML: a number in quotes is an error. Raises ConfigFileError for a wrong name or
        value and for a file that is not TOML, OSError for one that cannot be read.
        """
        with open(path, "rb") as file:
            try:
                options = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigFileError(f"{path}: expected a TOML file: {error}") from error
        try:
            config = cls(**options)
            _check_types(options)
        except ConfigError as error:
            raise ConfigFileError(f"{path}: {error}") from error
        return config

    def to_toml(self) -> str:
        """The options as TOML; those without a value are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def replace(self, **changes: Any) -> TrainConfig:
        """The same options with some changed, validated again."""
        return TrainConfig(**{**self.model_dump(), **changes})


def _check_types(options: dict[str, Any]) -> None:
    """Raise ConfigError for a value that only a command line may give so: a number as a string, say."""
    for option, value in options.items():
        annotation: Any = TrainConfig.model_fields[option].annotation
        strict = TypeAdapter(annotation, config=ConfigDict(strict=True))
        try:
            strict.validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            raise _first_problem(error, option) from None


def _first_problem(error: ValidationError, option: str | None = None) -> ConfigError:
    """The first problem that pydantic found, in one line: what was got, what was expected.

    option: whose value it is; None where the error says so itself.
    """
    problem = error.errors(include_url=False)[0]
    option, message = option or str(problem["loc"][0]), problem["msg"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(option, TrainConfig.model_fields, n=1)
        return ConfigError(option, "no such option" + (f"; did you mean {near[0]}?" if near else ""))
    expected = message.removeprefix("Input should be ").split(", unable to parse")[0].replace("tuple", "list")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return ConfigError(option, f"got {problem['input']!r}, expected {expected}")
