"""The arguments of a loader: what they mean, and what is wrong with them."""

from __future__ import annotations

import math
import operator
import os
import warnings

import numpy as np
import numpy.typing as npt
import torch

from .batching import DTYPES
from .mapped import in_memory, mapped_file
from .memory import available_memory
from .source import DataError, Source
from .torch_datasets import DatasetSource
from .transform import Transform

_MAX_WORKERS = 4  # a few threads reach the memory's rate


def device(device: str | torch.device | None) -> torch.device:
    """The device that batches are made on."""
    found = torch.device("cpu" if device is None else device)
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise ValueError(f"device is {found}, expected a CUDA device, or None for the host's memory")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {found}, but torch finds no CUDA device; expected None here")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def pins(pin_memory: bool, device: torch.device) -> bool:
    """Whether batches are put into pinned memory; what goes to a device by itself needs no asking."""
    if not pin_memory or device.type != "cpu":
        return False
    if not torch.cuda.is_available():
        warnings.warn(
            "pin_memory is True, but torch finds no CUDA device: batches are as usual", stacklevel=3
        )
        return False
    return True


def check_form(source: Source, dtype: torch.dtype, transform: object) -> None:
    """Whether these samples can become batches of `dtype` by `transform`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected torch.float32, bfloat16, float16 or uint8")
    if dtype == torch.uint8 and source.dtype != np.uint8:
        got = f"torch.uint8 for {source.name} of {source.dtype}"
        raise ValueError(f"dtype is {got}, expected a floating point dtype")
    if transform is None:
        return
    if not isinstance(transform, Transform):
        got = f"transform is a {type(transform).__name__}"
        raise TypeError(f"{got}, expected a fastvae.data.Transform; other functions go into a torch Dataset")
    if dtype == torch.uint8 and transform.is_scaled:
        raise ValueError("dtype is torch.uint8 with a transform of scale and shift, expected one of the two")
    transform.check(source.item_shape)
    if transform.binarize and source.dtype != np.uint8 and source.in_memory:
        low, high = source.value_range()
        if low < 0 or high > 1:
            got = f"{source.name}: binarize of values from {low:g} to {high:g}"
            raise DataError(f"{got}, expected probabilities, in [0, 1]")


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value`, from low to high."""
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value}, expected an integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} is {value!r}, expected an integer") from error
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {low} <= {name} <= {high}")
    return number


def check_memory(source: Source, transform: Transform | None, batch_size: int) -> None:
    """Batches that can never be made would be found out late, or by the system, which ends the process."""
    shape = source.item_shape
    if transform is not None and transform.crop is not None:
        shape = (*shape[:-2], *transform.crop)
    needed, free = batch_size * math.prod(shape) * 4, available_memory()
    if needed > free:
        got = f"a batch of {batch_size} samples {list(shape)} takes {needed} bytes"
        raise DataError(f"{source.name}: {got}, more than the {free} that are free; use a smaller batch_size")


def workers(num_workers: int | None, source: Source) -> int:
    """Threads, or torch's worker processes."""
    if num_workers is not None:
        return integer("num_workers", num_workers, 0, 256)
    if isinstance(source, DatasetSource):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, which share the cores
    own = cores // processes
    # one thread beside the reader is slower than two, or than none, on two cores
    return min(_MAX_WORKERS, max(2, own // 2)) if own > 1 else 0


def indices(indices: npt.ArrayLike | torch.Tensor, n_samples: int) -> npt.NDArray[np.int64]:
    """int64 [M], a copy. Whether there are such samples is looked at where they are read."""
    array = np.asarray(indices)
    if array.shape == (0,):
        array = array.astype(np.int64)  # of an empty list, which has no dtype
    if array.ndim != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise ValueError(f"indices is {got}, expected integers of shape [M]")
    if array.dtype == np.uint64 and array.max(initial=0) >= 2**63:  # which would be negative as int64
        at = int(array.argmax())
        expected = f"0 <= index < {n_samples}, the number of samples"
        raise ValueError(f"indices[{at}] is {array[at]}, expected {expected}")
    return np.array(in_memory(array, mapped_file(array)), dtype=np.int64)
