"""A loader's state, its meter, and its end."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orders import numbered
from processes import n_threads

from fastvae.data import DataLoader, mapped


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def rows(batches: Any) -> list[list[int]]:
    return [batch[:, 0].long().tolist() for batch in batches]


def make(data: Any = None, **options: Any) -> DataLoader:
    data = numbered(103) if data is None else data
    return DataLoader(data, **{"batch_size": 8, "shuffle": True, "seed": 3, "num_workers": 2, **options})


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("done", [0, 1, 5, 12, 13])
def test_resumed_where_it_stood(num_workers: int, window: int | None, done: int) -> None:
    """What is delivered counts, not what is ready; after the last batch comes the next epoch."""
    loader = make(window=window, num_workers=num_workers)
    list(loader)
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = through_json(loader.state_dict())
    assert (state["epoch"], state["batch"]) == ((1, done) if done < 13 else (2, 0))
    rest = rows(batches)
    following = rows(loader)
    for workers in (0, 2):
        resumed = make(window=window, num_workers=workers)
        resumed.load_state_dict(state)
        assert through_json(resumed.state_dict()) == state
        assert rows(resumed) == (rest if done < 13 else following)
        if done < 13:
            assert rows(resumed) == following
        assert resumed.state_dict()["epoch"] == 3


def test_state_before_and_after_a_pass() -> None:
    loader = make()
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (0, 0)
    loader.set_epoch(4, 2)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (4, 2)
    next(iter(loader))
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (4, 3)  # though it was dropped
    list(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (6, 0)
    empty = make(numbered(5), drop_last=True)
    list(empty)
    assert empty.state_dict()["epoch"] == 1


def test_a_state_is_of_all_ranks() -> None:
    loader = make(rank=1, world_size=2)
    next(iter(loader))
    whole = make()
    whole.load_state_dict(loader.state_dict())
    first, parts = rows(whole), [make(rank=rank, world_size=3) for rank in range(3)]
    for part in parts:
        part.load_state_dict(loader.state_dict())
    assert [list(chain(*batch)) for batch in zip(*map(rows, parts), strict=True)] == first


changed = numbered(103)
changed[102, 1] += 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 9}, "batch_size: it is of 8, this loader of 9"),
        ({"seed": 4}, "seed: it is of 3, this loader of 4"),
        ({"shuffle": False}, "shuffle: it is of True, this loader of False"),
        ({"drop_last": True}, "drop_last: it is of False"),
        ({"window": 20}, "window: it is of None, this loader of 20"),
        ({"data": numbered(104)}, "n_samples: it is of 103, this loader of 104"),
        ({"data": numbered(103, 4)}, r"item_shape: it is of \[3\], this loader of \[4\]"),
        ({"data": numbered(103).astype(np.float64)}, "dtype: it is of 'float32', this loader of 'float64'"),
        ({"data": changed}, "other data: .* expected a loader of the same data and options"),
        ({"data": (numbered(103), np.arange(103))}, "other data"),
        ({"data": numbered(104), "indices": range(103)}, "other data"),
    ],
)
def test_a_state_of_something_else_is_refused(other: dict[str, Any], message: str) -> None:
    loader = make(**other)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=f"state: {message}"):
        loader.load_state_dict(make().state_dict())
    assert loader.state_dict() == before


@pytest.mark.parametrize("state", [{}, None, {"epoch": 1}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="not one of a fastvae"):
        make().load_state_dict(state)
    with pytest.raises(ValueError, match="batch is 14"):
        make().load_state_dict({**make().state_dict(), "batch": 14})
    loader = make()
    before = loader.state_dict()
    with pytest.raises(ValueError, match="window is 0, expected"):
        loader.load_state_dict({**before, "epoch": 3, "window": 0})
    assert loader.state_dict() == before


def test_a_chosen_window_goes_with_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with more memory the order stays that of the training's beginning."""
    np.save(tmp_path / "x.npy", numbered(103))
    indices = np.random.default_rng(0).permutation(103)[:90]
    with monkeypatch.context() as small:
        small.setattr(mapped, "window_for", lambda *_: 17)
        small.setattr("fastvae.data.loader.window_for", lambda *_: 17)
        with pytest.warns(UserWarning, match="windows of 17 samples"):
            loader = make(tmp_path / "x.npy", indices=indices)
    batches = iter(loader)
    next(batches)
    here = make(tmp_path / "x.npy", indices=indices)
    assert here.window is None
    here.load_state_dict(through_json(loader.state_dict()))
    assert here.window == 17
    assert rows(here) == rows(batches)


def test_stats_count_what_was_delivered() -> None:
    x = np.zeros((103, 5), np.uint8)
    loader = make(x, num_workers=2)
    assert loader.stats.samples == loader.stats.wait_share == 0
    batches = iter(loader)
    next(batches)
    stats = loader.stats
    assert (stats.batches, stats.samples, stats.bytes_read) == (1, 8, 40)
    list(batches)
    list(loader)
    stats = loader.stats
    assert (stats.batches, stats.samples, stats.bytes_read) == (26, 206, 1030)
    assert 0 < stats.wait_seconds <= stats.seconds
    assert 0 < stats.wait_share <= 1


def test_work_between_batches_is_not_waiting() -> None:
    loader = make(num_workers=0)
    for _, _ in zip(range(5), loader, strict=False):
        time.sleep(0.01)
    assert loader.stats.seconds - loader.stats.wait_seconds >= 4 * 0.01


@pytest.mark.parametrize("num_workers", [0, 3])
def test_closing_ends_the_passes_under_way(num_workers: int) -> None:
    before = n_threads()
    with make(num_workers=num_workers) as loader:
        batches, other = iter(loader), iter(loader)
        kept = next(batches)
        next(other)
        truth = kept.clone()
    assert n_threads() == before
    assert torch.equal(kept, truth)
    for late in (batches, other):
        with pytest.raises(RuntimeError, match="loader of this iterator is closed"):
            next(late)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        iter(loader)
    loader.close()
    assert loader.state_dict()["batch"] == 1
    assert len(loader) == 13


def stop_early(loader: DataLoader) -> None:
    for _ in loader:
        break


def fail(loader: DataLoader) -> None:
    with suppress(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError


def drop(loader: DataLoader) -> None:
    next(iter(loader))


@pytest.mark.parametrize("leave", [stop_early, fail, drop])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pass_that_is_left_ends(leave: Callable[[DataLoader], None], on_disk: bool, tmp_path: Path) -> None:
    data: Any = numbered(5000, 100)
    if on_disk:
        np.save(tmp_path / "x.npy", data)
        data = tmp_path / "x.npy"
    before = n_threads()
    loader = make(data, num_workers=3, window=500)
    for _ in range(10):
        leave(loader)
    gc.collect()
    assert n_threads() == before
    assert len(loader._passes) == 0
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
