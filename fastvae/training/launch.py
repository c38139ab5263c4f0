"""How the ranks of a training find each other, also after torchrun has restarted them."""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .checkpoint import checkpoints
from .config import ConfigError
from .run_folder import check_run_folder

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

START_SECONDS = 600  # for all ranks to start


class RankError(RuntimeError):
    """Another rank has failed or is gone; its own message says why."""


def is_one_of_several() -> bool:
    """Whether the environment is that of a rank: set by torchrun, or in its way."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def begin_process_group() -> None:
    """Meet the other ranks: NCCL where there are GPUs, each rank with its own; else gloo."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    store = _agent_store()
    if store is not None:
        start = _agree_on_start(store, rank, size)
        store = dist.PrefixStore(f"fastvae/{start}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def open_run(folder: Path | None, overwrite: bool, resume: bool) -> bool:
    """Whether to resume the run in `folder`: as asked, or because torchrun has restarted its training.

    A training that is restarted before its first checkpoint begins anew. Raises ConfigError for a folder that
    may not be written (see `check_run_folder`), and for none where torchrun would restart.
    """
    if folder is None:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            raise ConfigError(
                "out", "got none with --max-restarts of torchrun, expected a folder to resume from"
            )
        return False
    is_own = _was_begun(folder)
    check_run_folder(folder, overwrite or resume or is_own)
    return resume or (is_own and bool(checkpoints(folder)))


def note_begun(folder: Path) -> None:
    """Let a process that torchrun restarts know that the run in `folder` is its own."""
    store, key = _agent_store(), _key_of(folder)
    if store is not None and not store.check([key]):
        store.set(key, _process_name())


def _was_begun(folder: Path) -> bool:
    store, key = _agent_store(), _key_of(folder)
    return store is not None and store.check([key]) and store.get(key).decode() != _process_name()


def _key_of(folder: Path) -> str:
    return f"fastvae/begun/{folder.resolve()}"


def _process_name() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _agent_store() -> Store | None:
    """The store that torchrun keeps for its processes, and that outlives them; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=START_SECONDS)
    return dist.TCPStore(address, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]


def _agree_on_start(store: Store, rank: int, size: int) -> str:
    """A name for this start of all ranks, under which the store has nothing yet.

    After a restart the store still has the addresses of the ranks that are gone; ranks that read those fail
    or wait for ever (pytorch/pytorch#135712). So each rank asks with a word of its own, which rank 0 answers:
    nobody takes an old answer for a new one.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"fastvae/word/{rank}", word)
        name: str = store.get(f"fastvae/answer/{word}").decode()  # waits for it
        store.set(f"fastvae/heard/{name}/{rank}", "")
        return name
    name = uuid.uuid4().hex
    answered: set[str] = set()
    deadline = time.monotonic() + START_SECONDS
    while missing := [r for r in range(1, size) if not store.check([f"fastvae/heard/{name}/{r}"])]:
        for r in missing:
            if store.check([f"fastvae/word/{r}"]):
                word = store.get(f"fastvae/word/{r}").decode()
                if word not in answered:
                    store.set(f"fastvae/answer/{word}", name)
                    answered.add(word)
        if time.monotonic() > deadline:
            raise RankError(f"ranks {missing} of {size} have not started within {START_SECONDS} s")
        time.sleep(0.01)
    return name
