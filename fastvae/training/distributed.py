"""The ranks that train together: data parallel, each with all weights and with its rows of every batch."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError, TrainConfig
from .launch import RankError, begin_process_group, is_one_of_several
from .signals import SIGNALS

T = TypeVar("T")

REPORT = 0  # a look at the averages
REQUESTS = (REPORT, *SIGNALS)  # what ranks may ask of each other
OF_A_NODE = ("data", "val", "out", "overwrite", "report", "tensorboard", "download", "debug")  # may differ


class Share(NamedTuple):
    """A rank's rows of a batch: `rows` of them from `first` on, of `batch` in all."""

    first: int
    rows: int
    batch: int


class Ranks:
    """The processes that train together, as one of them sees it; of a single process by default.

    rank, size: which one this is, and of how many.
    asked, agreed: for `agree`: what this rank wants of the others, and what any wanted in the last step.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control  # for tensors on a CPU
        self.asked: set[int] = set()
        self.agreed: set[int] = set()
        self._waiting: set[int] = set()

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes, prints and draws."""
        return self.rank == 0

    def group(self, device: torch.device) -> dist.ProcessGroup | None:
        """The process group for tensors on `device`; None for a single process."""
        return self._control if self.size == 1 or device.type == "cpu" else dist.group.WORLD

    def share(self, batch: int) -> Share:
        """This rank's rows of a batch of `batch`, as `DataLoader.set_rank` deals them out."""
        first, end = (-(-r * batch // self.size) for r in (self.rank, self.rank + 1))
        return Share(first, end - first, batch)

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on every rank; if it raises, the other ranks raise RankError."""
        if self.size == 1:
            return function()
        sent: list[Any] = [None, None]
        if self.is_first:
            try:
                sent[1] = function()
            except BaseException as error:
                dist.broadcast_object_list([str(error), None], 0, group=self._control)
                raise
        dist.broadcast_object_list(sent, 0, group=self._control)
        problem, result = sent
        if problem is not None:
            raise RankError(f"rank 0 could not go on: {problem}")
        found: T = result
        return found

    def gather(self, mine: T) -> list[T]:
        """What each rank has, on every rank."""
        found = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(found, mine, group=self._control)
        return found

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks what the tensors are on rank 0."""
        if self.size > 1:
            for tensor in tensors:
                same = tensor.detach().contiguous()
                dist.broadcast(same, 0, group=self.group(same.device))
                tensor.copy_(same)

    def follow_first(self, module: nn.Module) -> None:
        """Give all ranks the weights, buffers, modes and `requires_grad` of the module on rank 0."""
        if self.size == 1:
            return
        parts, parameters = list(module.modules()), list(module.parameters())
        modes, trained = self.from_first(
            lambda: ([part.training for part in parts], [p.requires_grad for p in parameters])
        )
        for part, is_training in zip(parts, modes, strict=True):
            part.training = is_training
        for parameter, is_trained in zip(parameters, trained, strict=True):
            parameter.requires_grad_(is_trained)
        self.broadcast([*parameters, *module.buffers()])

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the mean of floating-point tensors; what is equal on all stays, bit for bit."""
        if self.size > 1:
            for tensor in tensors:
                first = tensor.clone()
                self.broadcast([first])
                apart = torch.where(tensor == first, 0.0, tensor - first)
                dist.all_reduce(apart, group=self.group(tensor.device))
                tensor.copy_(torch.where(apart == 0, first, first + apart / self.size))

    def make_equal(self, buffers: Iterable[Tensor]) -> None:
        """Give all ranks the mean of floating-point buffers, as running statistics, and rank 0's others."""
        for buffer in buffers:
            if buffer.is_floating_point():
                self.average([buffer])
            else:
                self.broadcast([buffer])

    def fill(self, buffers: Iterable[Tensor], has_own: bool) -> None:
        """Give ranks that had no rows, and so not `has_own`, the buffers of rank 0, which had some."""
        for buffer in buffers:
            of_first = buffer.clone()
            self.broadcast([of_first])
            if not has_own:
                buffer.copy_(of_first)

    def share_generators(self, device: torch.device) -> None:
        """Put the generators of all ranks where those of rank 0 are."""
        if self.size > 1:
            state = torch.get_rng_state()
            self.broadcast([state])
            torch.set_rng_state(state)
            if device.type == "cuda":
                state = torch.cuda.get_rng_state(device)
                self.broadcast([state])
                torch.cuda.set_rng_state(state, device)

    def leave(self) -> None:
        """Let go of the process group, which is about to end."""
        self._control = None

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def agree(self, request: int, mine: bool) -> bool:
        """Whether any rank wants this (one of REQUESTS); for all ranks to call after each step.

        It travels with the gradients, so that all ranks get True after the same step: the next one, on a GPU
        a few later.
        """
        if self.size == 1:
            return mine
        if request in self.agreed:
            self._waiting.discard(request)
            return True
        if mine and request not in self._waiting:
            self._waiting.add(request)
            self.asked.add(request)
        return False

    @contextlib.contextmanager
    def node_first(self) -> Iterator[None]:
        """One rank of each node goes through the block before the others."""
        is_node_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not is_node_first:
            self.wait()
        yield
        if is_node_first:
            self.wait()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While it lasts only rank 0 prints to standard output, and a rank that is gone is a RankError."""
        if self.size == 1:
            yield
            return
        with contextlib.ExitStack() as stack:
            if not self.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, dist.DistError) or (
                    type(error) is RuntimeError and "gloo" in str(error)
                ):
                    # gloo begins with the line of its source, and ends with advice
                    reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". This is")[0].partition("\n")[0]
                    raise RankError(f"another rank has ended or cannot be reached: {reason}") from error
                raise


_joined: tuple[dist.ProcessGroup | None, Ranks] = (None, Ranks())  # the default process group, and its ranks


def join() -> Ranks:
    """The ranks that this process was started with, by torchrun for one; their process group begins here.

    A process group that exists already is used. A single process is a Ranks by itself.
    """
    global _joined
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if not is_one_of_several():
            return Ranks()
        begin_process_group()
        atexit.register(dist.destroy_process_group)
    group = dist.group.WORLD
    if _joined[0] is not group:
        atexit.register(_leave)  # before the other
        rank, size = dist.get_rank(), dist.get_world_size()
        control = None
        if size > 1:
            control = group if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        _joined = group, Ranks(rank, size, control)
    return _joined[1]


def check_devices(ranks: Ranks, device: torch.device) -> None:
    """Raise ConfigError where ranks would share a GPU, which NCCL refuses."""
    if ranks.size > 1 and device.type == "cuda":
        gpu = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
        used = ranks.gather(gpu)
        if len(set(used)) < ranks.size:
            got = f"got cuda for {ranks.size} ranks with {len(set(used))} GPUs"
            raise ConfigError("device", f"{got}, expected one for each; use a smaller --nproc-per-node")


def check_same_options(ranks: Ranks, config: TrainConfig) -> None:
    """Raise ConfigError where this rank has other options than rank 0; places may be those of its node."""
    of_first = ranks.from_first(lambda: config)
    for name in TrainConfig.model_fields:
        got, expected = getattr(config, name), getattr(of_first, name)
        if got != expected and (name not in OF_A_NODE or None in (got, expected)):
            raise ConfigError(name, f"got {got} on rank {ranks.rank}, expected {expected}, as on rank 0")


def _leave() -> None:
    """Hold no process group any more, so that it ends with its threads before Python does."""
    global _joined
    _joined[1].leave()
    _joined = (None, Ranks())
    gc.collect()
