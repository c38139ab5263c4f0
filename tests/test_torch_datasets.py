"""torch's Datasets as sources, and torch's DataLoaders where ours are expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
    random_split,
)
from torch.utils.data import DataLoader as TorchDataLoader

from fastvae import VAE, DataLoader, Trainer
from fastvae.data import ArraySource, DataError, Transform, as_source
from fastvae.inference.evaluate import evaluate
from fastvae.training.config import TrainConfig

N = 23


class Items(Dataset[Any]):
    """Items by a function of their number."""

    def __init__(self, item: Callable[[int], object], n: int = N) -> None:
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> object:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.item(index)


class Stream(IterableDataset[Any]):
    def __init__(self, n: int, delivers: int | None = None) -> None:
        self.n, self.delivers = n, n if delivers is None else delivers

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((3,), float(i)) for i in range(self.delivers))


@pytest.fixture
def x(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (N, 1, 6, 5), dtype=torch.uint8)


Y = torch.arange(N) % 5
OPTIONS: dict[str, Any] = {"batch_size": 4, "shuffle": True, "seed": 9}


def same(one: DataLoader, other: DataLoader) -> None:
    """Both deliver the same, in two epochs."""
    assert (len(one), one.item_shape, one.has_labels) == (len(other), other.item_shape, other.has_labels)
    for _ in range(2):
        for a, b in zip(one, other, strict=True):
            for left, right in zip(*(p if isinstance(p, tuple) else (p,) for p in (a, b)), strict=True):
                assert left.dtype == right.dtype
                assert torch.equal(left, right)


def test_tensors_are_read_where_they_lie(x: torch.Tensor) -> None:
    source = as_source(TensorDataset(x, Y))
    assert isinstance(source, ArraySource)
    assert np.shares_memory(source.x, x.numpy())
    same(DataLoader(TensorDataset(x, Y), **OPTIONS), DataLoader((x, Y), **OPTIONS))
    same(DataLoader(TensorDataset(x.double()), **OPTIONS), DataLoader(x.double(), **OPTIONS))


def test_subsets_of_tensors(x: torch.Tensor) -> None:
    whole = as_source(Subset(Subset(TensorDataset(x), range(9)), [3])).whole.whole  # type: ignore[attr-defined]
    assert np.shares_memory(whole.x, x.numpy())
    train, val = random_split(TensorDataset(x, Y), [15, 8])
    for part in (train, val, Subset(train, [3, 1, -1])):
        rows = np.array(part.indices) if part.dataset is not train else np.array(train.indices)[part.indices]
        same(DataLoader(part, **OPTIONS), DataLoader((x, Y), **OPTIONS, indices=rows))
    same(
        DataLoader(train, **OPTIONS, indices=[2, 0]),
        DataLoader((x, Y), **OPTIONS, indices=train.indices[2::-2]),
    )
    with pytest.raises(ValueError, match=r"indices\[0\] is 15, expected 0 <= index < 15"):
        DataLoader(train, indices=[15])


def test_a_loader_has_its_dataset_as_torchs_has(x: torch.Tensor) -> None:
    for given in (x, (x, Y), TensorDataset(x, Y), Items(lambda i: x[i]), Stream(N)):
        loader = DataLoader(given, 4)
        assert len(loader.dataset) == loader.n_samples == N
        assert loader.dataset is given or not isinstance(given, Dataset)
    some = DataLoader(dataset := TensorDataset(x, Y), 4, indices=[3, 1])
    assert len(some.dataset) == some.n_samples == 2
    assert isinstance(some.dataset, Subset)
    assert some.dataset.dataset is dataset
    assert some.dataset[1][1] == Y[1]
    assert len(DataLoader(x, 4, indices=[3, 1]).dataset) == 2
    theirs = TorchDataLoader(dataset, 4)
    for name in ("batch_size", "drop_last", "num_workers", "pin_memory"):
        assert getattr(DataLoader(dataset, 4, num_workers=0), name) == getattr(theirs, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_items_come_as_those_of_arrays(
    x: torch.Tensor, dtype: torch.dtype, labelled: bool, drop_last: bool
) -> None:
    dataset = Items(lambda i: (x[i], int(Y[i])) if labelled else x[i])
    data = (x, Y) if labelled else x
    options = {**OPTIONS, "dtype": dtype, "drop_last": drop_last}
    same(DataLoader(dataset, **options), DataLoader(data, **options))
    chosen = [5, 5, 1, 22, 0, 7, 9]
    same(DataLoader(dataset, **options, indices=chosen), DataLoader(data, **options, indices=chosen))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.numpy(),
        lambda x: x[0],
        lambda x: [x, torch.tensor(3)],
        lambda x: (x, np.int32(3)),
        lambda x: x.float() / 255,
        lambda x: x.double() / 255,
        lambda x: x[0].numpy()[..., None].repeat(3, axis=-1),
        lambda x: Image.fromarray(x[0].numpy()),
        lambda x: Image.fromarray(x[0].numpy()).convert("RGB"),
        lambda x: x > 100,
        lambda x: x.flatten(),
    ],
)
def test_kinds_of_items(x: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> None:
    loader = DataLoader(Items(lambda i: make(x[i])), 5)
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in loader]
    assert all(batch.is_contiguous() for batch in batches)
    got = torch.cat(batches)
    assert got.dtype == torch.float32
    assert got.shape[1:] == loader.item_shape
    expected = x.float() / 255 if make(x[0]) is not None and not _is_bool(make(x[0])) else (x > 100).float()
    assert torch.allclose(
        got.reshape(N, -1, 30), expected.reshape(N, 1, 30).expand(N, got[0].numel() // 30, 30)
    )


def _is_bool(item: object) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype == torch.bool


def test_ranks_and_resuming(x: torch.Tensor) -> None:
    dataset = ConcatDataset([TensorDataset(x[:10], Y[:10]), TensorDataset(x[10:], Y[10:])])
    for loader in (DataLoader(dataset, **OPTIONS), DataLoader((x, Y), **OPTIONS)):
        loader.set_rank(1, 3)
        loader.set_epoch(4, 2)
        parts = list(loader)
        if loader.num_workers == 0:
            first = parts
    for (a, y_a), (b, y_b) in zip(first, parts, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(y_a, y_b)


def test_states_and_statistics(x: torch.Tensor) -> None:
    loaders = [DataLoader(data, **OPTIONS) for data in (Items(lambda i: (x[i], int(Y[i]))), (x, Y))]
    for loader in loaders:
        whole = list(loader)
        first = iter(loader)
        seen = [next(first), next(first)]
        assert (loader.stats.batches, loader.stats.samples) == (8, 31)
        other = DataLoader(loader._source, **OPTIONS)
        other.load_state_dict(loader.state_dict())
        again = DataLoader(loader._source, **OPTIONS)
        again.set_epoch(1)
        for (a, _), (b, _) in zip([*seen, *other], again, strict=True):
            assert torch.equal(a, b)
        assert len(whole) == 6
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            next(first)
    with pytest.raises(ValueError, match="state: "):
        DataLoader(Items(lambda i: x[i], 9), **OPTIONS).load_state_dict(again.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork, from Python 3.12 on
def test_worker_processes(x: torch.Tensor) -> None:
    dataset = Items(lambda i: (x[i], int(Y[i])))
    same(DataLoader(dataset, **OPTIONS, num_workers=2), DataLoader((x, Y), **OPTIONS))
    odd = Items(lambda i: x[i] if i != 6 else x[i, :, :2])
    with pytest.raises(
        DataError, match=r"item 6 is uint8 of shape \[1, 2, 5\], expected uint8 of shape \[1, 6, 5\]"
    ):
        list(DataLoader(odd, 4, num_workers=1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork, from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_do_not_hear_what_the_group_of_the_training_is_told(workers: int) -> None:
    """Ctrl-C, and SIGTERM to torchrun: a training that is to save itself needs them for one more step."""
    groups = Items(lambda i: torch.tensor([os.getpgrp()], dtype=torch.float64), 3)
    (batch,) = DataLoader(groups, 3, num_workers=workers)
    assert bool((batch == os.getpgrp()).all()) == (workers == 0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: {"x": i}, "Items: item 0 is a dict, expected x or"),
        (lambda i: (torch.ones(2), 1, 2), "item 0 is a tuple of Tensor, int, int"),
        (lambda i: (), "item 0 is a tuple"),
        (lambda i: "a", "item 0 is a str"),
        (
            lambda i: torch.ones(3, dtype=torch.int64),
            r"item 0 is int64 of shape \[3\], expected numbers of uint8",
        ),
        (lambda i: torch.ones(0), r"item 0 is float32 of shape \[0\]"),
        (lambda i: (torch.ones(2), "cat"), "the label of item 0 is a str, expected an integer"),
        (lambda i: (torch.ones(2), 0.5), "the label of item 0 is a float"),
        (
            lambda i: torch.ones(2 + i // 7),
            r"item 7 is float32 of shape \[3\], expected float32 of shape \[2\]",
        ),
        (lambda i: torch.ones(2, dtype=[torch.float32, torch.float64][i // 5 % 2]), "item 5 is float64"),
        (lambda i: torch.ones(2) if i else (torch.ones(2), 1), r"item 1 is .*expected .* with a label"),
        (lambda i: torch.ones(2, device="meta"), "item 0: a tensor on meta"),
    ],
)
def test_bad_items(item: Callable[[int], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(DataLoader(Items(item), 4))


def test_bad_datasets(x: torch.Tensor) -> None:
    with pytest.raises(
        DataError, match=r"a TensorDataset of uint8 \[23, 1, 6, 5\], float32 \[23\], expected x"
    ):
        DataLoader(TensorDataset(x, Y.float()))
    with pytest.raises(DataError, match="empty, expected at least one item"):
        DataLoader(Items(lambda i: x[i], 0))
    with pytest.raises(DataError, match="Stream: ended after 0 items, expected the 5 of its __len__"):
        DataLoader(Stream(5, 0))
    with pytest.raises(DataError, match="an empty Subset"):
        DataLoader(Subset(TensorDataset(x), []))
    for index in (23, -24, 2**63):
        with pytest.raises(DataError, match=f"a Subset with index {index} of 23 samples"):
            DataLoader(Subset(TensorDataset(x), [index]))
    for indices in ([1.7], [True, False], ["1"]):
        with pytest.raises(DataError, match=r"a Subset with indices of .*, expected integers"):
            DataLoader(Subset(TensorDataset(x), indices))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transform is given for Items, expected it in the dataset itself"):
        DataLoader(Items(lambda i: x[i]), transform=Transform(hflip=True))
    with pytest.raises(ValueError, match=r"indices\[1\] is 23, expected 0 <= index < 23"):
        DataLoader(Items(lambda i: x[i]), indices=[0, 23])
    with pytest.raises(ZeroDivisionError):
        list(DataLoader(Items(lambda i: x[i] // (1 if i < 9 else 1 // 0)), 4))


def test_iterable_datasets() -> None:
    loader = DataLoader(Stream(10), 4)
    assert len(loader) == 3
    assert torch.cat(list(loader))[:, 0].tolist() == list(range(10))
    loader.set_epoch(0, 1)
    loader.set_rank(1, 2)
    assert [batch[:, 0].tolist() for batch in loader] == [[6.0, 7.0], [9.0]]
    assert len(torch.cat(list(DataLoader(Stream(10), 4, drop_last=True)))) == 8
    with pytest.raises(DataError, match="Stream: ended after 6 items, expected the 10 of its __len__"):
        list(DataLoader(Stream(10, 6), 4))
    with pytest.raises(ValueError, match="shuffle is True for Stream, an IterableDataset"):
        iter(DataLoader(Stream(10), 4, shuffle=True))
    with pytest.raises(ValueError, match="indices are given for Stream"):
        DataLoader(Stream(10), 4, indices=[1])
    stream = Stream(10)
    stream.n = None  # type: ignore[assignment]
    with pytest.raises(DataError, match="Stream: a dataset without length, expected a __len__"):
        DataLoader(stream, 4)


def test_items_that_are_not_finite_are_named() -> None:
    batches = iter(DataLoader(Items(lambda i: torch.full((3,), float("inf") if i == 5 else float(i)), 7), 4))
    next(batches)
    with pytest.raises(DataError, match="Items: item 5 has NaN or infinite values, expected finite ones"):
        next(batches)


class Parts(Stream):
    """Each worker gives its part."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(super().__iter__(), first, None, step)


@pytest.mark.parametrize(("n", "workers"), [(10, 2), (16, 2), (12, 2), (23, 2), (10, 1), (1, 2)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_workers_that_share_an_iterable_dataset(n: int, workers: int, drop_last: bool) -> None:
    batches = list(DataLoader(Parts(n), 4, num_workers=workers, drop_last=drop_last))
    sizes = [4] * (n // 4) + ([n % 4] if n % 4 and not drop_last else [])
    assert [len(batch) for batch in batches] == sizes
    seen = [number for batch in batches for number in batch[:, 0].tolist()]
    assert len(set(seen)) == len(seen) == sum(sizes)


def test_workers_that_each_have_all_of_an_iterable_dataset() -> None:
    assert torch.cat(list(DataLoader(Stream(10), 4, num_workers=1)))[:, 0].tolist() == list(range(10))
    for drop_last in (False, True):
        batches = iter(DataLoader(Stream(10), 4, num_workers=2, drop_last=drop_last))
        with pytest.raises(DataError, match="Stream: more than the 10 items of its __len__ came from 2 w"):
            list(batches)


@pytest.mark.parametrize("kind", ["float", "labelled", "uint8", "double", "half", "bool", "bare", "list"])
def test_loaders_of_torch_train_and_evaluate(x: torch.Tensor, kind: str) -> None:
    values = (x > 100) if kind == "bool" else x.float() / 255
    data: dict[str, Any] = {
        "uint8": TensorDataset(x), "labelled": TensorDataset(values, Y), "bool": TensorDataset(x > 100),
        "double": TensorDataset(values.double()), "half": TensorDataset(values.half()), "bare": values,
    }  # fmt: skip
    loader: Any = TorchDataLoader(data.get(kind, TensorDataset(values)), 4, shuffle=kind == "labelled")
    if kind == "list":
        loader = list(loader)
    torch.manual_seed(0)
    model = VAE.mlp((1, 6, 5), latent_dim=2, hidden=(8,))
    exact = 1e-3 if kind == "half" else 1e-5
    if kind != "labelled":  # whose places, and so whose noise, are other ones
        expected = evaluate(model, [values.float()])
        assert float(evaluate(model, loader).loss) == pytest.approx(float(expected.loss), rel=exact)
    result = Trainer(model, loader, loader, config=TrainConfig(epochs=1)).fit()
    assert np.isfinite(result.history[-1]["train_loss"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": torch.ones(2, 20)}], "got a dict, expected tensors: x, or"),
        ([[np.ones((2, 20))]], "got a list of ndarray, expected tensors"),
        ([torch.ones(2, 20, dtype=torch.int64)], "got x of int64, expected floating point, or uint8"),
        ([torch.ones(20)], r"got x of shape \[20\], expected \[B, \*item\]; a loader with batch_size=None"),
    ],
)
def test_batches_of_another_kind(batches: Any, message: str) -> None:
    model = VAE.mlp((1, 6, 5), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches)
    with pytest.raises(ValueError, match=message):
        Trainer(model, batches, config=TrainConfig(epochs=1)).fit()
    with pytest.raises(ValueError, match="train: got a generator without a length"):
        Trainer(model, (batch for batch in batches), config=TrainConfig(epochs=1))  # type: ignore[arg-type]
