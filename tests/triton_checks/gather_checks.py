"""Checks of passes on a device, collected only by the process that tests/test_triton_interpreted.py starts.

The device comes from FASTVAE_CHECK_DEVICE: "cpu" under Triton's interpreter, or "cuda". What they give is
compared, bit for bit, to what the C++ loader gives, which tests/test_transform.py holds against a plain
specification.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from fastvae.kernels.gather import is_on
from torch import Tensor

from fastvae import _native
from fastvae.data import DataError, DataLoader, ShapeSource, Transform, counts, resident
from fastvae.data.device import DevicePasses, passes_on
from fastvae.data.gather import Gather
from fastvae.data.resident import Resident
from fastvae.data.streaming import Streaming
from fastvae.data.transfers import CudaCopies

DEVICE = torch.empty(0, device=os.environ["FASTVAE_CHECK_DEVICE"]).device  # with its number
BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
KINDS = [Resident, Streaming]


class InOrder:
    """`Copies` that have ended when they have been asked for."""

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def room(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def copy(self, host: Tensor, room: Tensor) -> None:
        room.copy_(host)

    def copied(self) -> None: ...

    def read(self) -> None: ...

    def before_copies(self, mark: None) -> None: ...

    def before_reading(self, mark: None) -> None: ...

    def wait(self, mark: None) -> None: ...


def on_device(loader: DataLoader, kind: type[DevicePasses]) -> DataLoader:
    """The loader with passes of this kind, whatever `passes_on` would choose."""
    copies = CudaCopies(DEVICE) if DEVICE.type == "cuda" else InOrder()
    loader._maker = kind(loader._batching, copies, DEVICE)  # type: ignore[call-arg]
    return loader


def pairs(loader: DataLoader) -> list[tuple[Tensor, ...]]:
    return [batch if isinstance(batch, tuple) else (batch,) for batch in loader]


def assert_same(got: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    """Bit for bit, on the host."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for tensor, truth in zip(one, other, strict=True):
            assert tensor.device.type == DEVICE.type
            assert (tensor.dtype, tensor.shape) == (truth.dtype, truth.shape)
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[truth.element_size()]
            assert torch.equal(tensor.cpu().view(kind), truth.view(kind))


def check(kind: type[DevicePasses], data: Any, epoch: int = 0, first_batch: int = 0, **options: Any) -> None:
    def loader() -> DataLoader:
        made = DataLoader(data, **{"batch_size": 3, "shuffle": True, "seed": 5, **options})
        made.set_epoch(epoch, first_batch)
        return made

    host = pairs(loader())
    if options.get("dtype") is BF16 and DEVICE.type == "cpu":  # the interpreter cuts where a GPU rounds
        options["dtype"] = FP32
        whole = pairs(loader())
        host = [((x.view(torch.int32) >> 16).to(torch.int16).view(BF16), *y) for x, *y in whole]
        options["dtype"] = BF16
    there = on_device(loader(), kind)
    assert_same(pairs(there), host)
    assert there.item_shape == loader().item_shape


def pixels(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002 -- of the seed that is printed
    x = rng.integers(0, 256, shape, dtype=np.uint8)
    x[rng.random(shape) < 0.2] = 0
    x[rng.random(shape) < 0.1] = 255
    return x


IMAGES = {"planar": (7, 3, 9, 13), "interleaved": (7, 9, 13, 3), "grey": (7, 17, 19)}
MOVES = {
    "flip": Transform(hflip=True),
    "crop": Transform(crop=(5, 4)),
    "pad far": Transform(padding=30, crop=(6, 5)),
    "pad and enlarge": Transform(padding=3, crop=(14, 19)),
    "center of the padded": Transform(padding=2, crop=(5, 6), crop_at="center", hflip=True),
    "flip and crop": Transform(hflip=True, padding=1, crop=(6, 5), fixed=True),
}
ALL = Transform(hflip=True, padding=2, crop=(6, 5), binarize=True)
SCALED = Transform(hflip=True, padding=2, crop=(6, 5), scale=0.0217, shift=-0.37)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, UINT8], ids=str)
@pytest.mark.parametrize("shape", list(IMAGES))
def test_bytes_are_widened_as_on_the_host(
    kind: type[DevicePasses], dtype: torch.dtype, shape: str, seed: int
) -> None:
    check(kind, (pixels(*IMAGES[shape]), np.arange(7) * 2**40), dtype=dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("transform", [None, Transform(scale=1 / 127.5, shift=-1.0), Transform(shift=0.1)])
def test_every_byte(dtype: torch.dtype, transform: Transform | None) -> None:
    x = np.stack([np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-1]])
    check(Resident, x, dtype=dtype, transform=transform)


@pytest.mark.parametrize("name", list(MOVES))
def test_crops_and_flips(name: str, seed: int) -> None:
    check(Resident, pixels(*IMAGES["interleaved"]), epoch=seed % 3, transform=MOVES[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("transform", [ALL, SCALED], ids=["binarized", "scaled"])
def test_all_that_goes_together(
    kind: type[DevicePasses], source: type, transform: Transform, seed: int
) -> None:
    if (kind, source) == (Resident, np.float64):
        pytest.skip("float64 are transformed on the host")
    x = pixels(4, 3, 9, 13)
    data = x if source is np.uint8 else (x / 255).astype(source)
    for dtype in (FP32, FP16):
        check(kind, data, epoch=2, transform=transform, dtype=dtype, seed=2**64 - 1 - seed)


@pytest.mark.parametrize("dtype", [FP32, UINT8], ids=str)
def test_rows_longer_than_a_program(dtype: torch.dtype, seed: int) -> None:
    """And not a multiple of what a thread, a Philox block or 256 pixels have."""
    check(Resident, pixels(2, 9001), dtype=dtype, transform=Transform(binarize=True))
    check(Resident, pixels(5, 9001), dtype=dtype)
    check(Resident, pixels(5, 1), dtype=dtype)


@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_floats_are_taken_as_they_are(source: type, seed: int) -> None:
    x = np.random.randn(7, 5, 4).astype(source) * 10.0 ** np.random.randint(-30, 5, (7, 5, 4))  # noqa: NPY002
    for kind in KINDS:
        check(kind, x, dtype=FP32, transform=Transform(padding=1))
    check(Resident, x.astype(np.float32), dtype=FP32, transform=Transform(scale=0.3, shift=1e-3))


@pytest.mark.parametrize("indices", [None, range(49, 9, -1)])
def test_what_is_no_probability_is_not_kept(
    tmp_path: Path, indices: range | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mapped file, which is not looked at before; a step above 1 and below 0, in float32."""
    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 1000)
    monkeypatch.setattr(resident, "_UPLOAD_BYTES", 1000)
    for value in (np.nextafter(np.float32(1), np.float32(2)), np.float32(-1e-30)):
        x = np.ones((50, 4, 3, 2), np.float32)
        x[30, 2, 1, 0] = value
        np.save(tmp_path / "x.npy", x)
        loader = DataLoader(tmp_path / "x.npy", 8, transform=Transform(binarize=True), indices=indices)
        with pytest.raises(DataError, match=r"x\.npy: no probability in row 30; expected values in"):
            next(iter(on_device(loader, Resident)))


@triton.jit
def _is_on_kernel(p_x, p_random, p_out):
    triton.language.store(
        p_out, is_on(triton.language.load(p_x), triton.language.load(p_random).to(triton.language.uint32))
    )


def test_a_draw_is_decided_exactly() -> None:
    """Where the random word is next to x, of floats of every size and of bytes."""
    halves = [0.0, 1.0, 2.0**-40, 2.0**-32, 1.5 * 2.0**-32, 1 - 2.0**-24, 0.3, 0.001, 1e-9, 2.0]
    for x in [torch.tensor(h, dtype=FP32, device=DEVICE) for h in halves] + [
        torch.tensor(b, dtype=UINT8, device=DEVICE) for b in (0, 1, 128, 254, 255)
    ]:
        # a byte is 0.xxxx in base 256, and 255 is 1
        exact = (
            Fraction(x.item())
            if x.dtype == FP32
            else Fraction(x.item() * 0x01010101 + x.item() // 255, 2**32)
        )
        near = int(exact * 2**32)
        for word in {min(max(near + step, 0), 2**32 - 1) for step in (-1, 0, 1)}:
            out = torch.zeros((), dtype=torch.uint8, device=DEVICE)
            _is_on_kernel[(1,)](x, torch.tensor(word, device=DEVICE), out)
            assert bool(out.item()) == (Fraction(word, 2**32) < exact), (x, word)


def test_the_last_digit_decides(seed: int) -> None:
    """Pixels that are just below and just above the 32 bits that they are compared to."""
    n, key = 5000, _native.transform_key(seed, 0, False)
    digits = np.empty((4, -(-n // 256) * 256), np.uint8)
    for digit in range(4):
        blocks = [
            _native.philox((i, digit + 1, 0, 0), (key & 0xFFFFFFFF, key >> 32))
            for i in range(-(-n // 256) * 16)
        ]
        # [256 pixels, word, block, byte]
        digits[digit] = (
            np.array(blocks, "<u4").view(np.uint8).reshape(-1, 16, 4, 4).transpose(0, 2, 1, 3).ravel()
        )
    words = digits[:, :n].T.astype(np.int64) @ [1 << 24, 1 << 16, 1 << 8, 1]
    above = np.arange(n) % 2
    x = ((words + above) / 2**32).astype(np.float32)
    exact = words < 2**24  # and so is x
    assert exact.any()
    loader = on_device(DataLoader(x[None], seed=seed, transform=Transform(binarize=True)), Resident)
    ((drawn,),) = pairs(loader)
    assert np.array_equal(drawn[0].cpu().numpy()[exact], above[exact])
    check(Resident, x[None], seed=seed, transform=Transform(binarize=True))


def test_keys_are_int64() -> None:
    form = Gather((3,), FP32, None, is_uint8=True, device=DEVICE)
    keys = [form.key(seed, 1) for seed in range(64)]
    assert [key % 2**64 for key in keys] == [_native.transform_key(seed, 1, False) for seed in range(64)]
    assert -(2**63) <= min(keys) < 0 < max(keys) < 2**63


FLAT = np.arange(17 * 3, dtype=np.uint8).reshape(17, 3)
FLIPPED = {"transform": Transform(hflip=True)}
PASSES: dict[str, dict[str, Any]] = {
    "in order": {"shuffle": False},
    "resumed": {"epoch": 3, "first_batch": 2},
    "resumed in order": {"shuffle": False, "first_batch": 5},
    "at the end": {"first_batch": 6},
    "without the last": {"drop_last": True},
    "one batch": {"batch_size": 2**40},
    "a rank": {"rank": 1, "world_size": 2, "first_batch": 2},
    "a rank without rows at the end": {"rank": 2, "world_size": 3},
    "windows": {"window": 7, "epoch": 1},
    "indices": {"indices": [5, 3, 16, 11, 7, 2, 1]},
    "workers": {"num_workers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(PASSES))
def test_passes(kind: type[DevicePasses], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_WINDOW", 7)  # samples whose order is sent at a time
    data = FLAT.reshape(17, 1, 3), np.arange(17)[::-1].copy()
    check(kind, data, **{**PASSES[name], **FLIPPED})


def _subset() -> Any:
    data = torch.utils.data.TensorDataset(torch.from_numpy(FLAT.reshape(17, 1, 3)), torch.arange(17))
    return torch.utils.data.Subset(data, [9, 4, 16, 0, 13])


def _counts() -> Any:
    return counts(np.random.default_rng(1).poisson(0.3, (9, 40)).astype(np.float32), normalize=10, log1p=True)


@pytest.mark.parametrize("make", [_subset, _counts, lambda: ShapeSource(5, seed=2)])
def test_other_sources(make: Callable[[], Any]) -> None:
    source = make()
    moves = len(DataLoader(source).item_shape) == 3
    for kind in KINDS:
        check(kind, source, **(FLIPPED if moves else {}))


def test_a_mapped_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", FLAT)
    for kind in KINDS:
        check(kind, tmp_path / "x.npy", indices=[15, 3, 4, 11])


def test_a_dataset_s_own_items_stream() -> None:
    class Items(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(FLAT)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(FLAT[index]), index

    check(Streaming, Items(), first_batch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_stats_are_of_what_was_delivered(kind: type[DevicePasses]) -> None:
    data = FLAT, np.arange(17)
    host = DataLoader(data, 3, True, seed=1)
    loader = on_device(DataLoader(data, 3, True, seed=1), kind)
    for one in (host, loader):
        batches = iter(one)
        for _ in range(4):
            next(batches)
        del batches  # which ends the pass
    assert loader.state_dict() == host.state_dict()
    assert (loader.stats.batches, loader.stats.samples) == (4, 12)
    assert loader.stats.bytes_read == 36
    assert 0 < loader.stats.wait_seconds <= loader.stats.seconds
    resumed = on_device(DataLoader(data, 3, True, seed=1), kind)
    resumed.load_state_dict(loader.state_dict())
    host.load_state_dict(loader.state_dict())
    assert_same(pairs(resumed), pairs(host))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_passes(kind: type[DevicePasses]) -> None:
    with on_device(DataLoader(FLAT, 3), kind) as loader:
        batches = iter(loader)
        kept = next(batches).clone()
    with pytest.raises(RuntimeError, match="closed, expected no more batches"):
        next(batches)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        iter(loader)
    assert torch.equal(kept.cpu(), torch.from_numpy(FLAT[:3]) / 255)
    assert len(loader) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_made_where_a_graph_reads_them(kind: type[DevicePasses]) -> None:
    data = FLAT, np.arange(17)
    loader, host = on_device(DataLoader(data, 4, True), kind), DataLoader(data, 4, True)
    x, y = torch.empty(4, 3, device=DEVICE), torch.empty(4, dtype=torch.int64, device=DEVICE)
    for (got_x, got_y), truth in zip(loader.into(x, y), pairs(host), strict=True):
        assert (got_x.data_ptr(), got_y.data_ptr()) == (x.data_ptr(), y.data_ptr())
        assert_same([(got_x, got_y)], [truth])
    for bad, message in (
        ((x, None), "y is None, expected a tensor"),
        ((x[:3], y), r"x is torch.float32 of shape \[3, 3\] on .*, expected torch.float32 of shape \[4, 3\]"),
        ((x.half(), y), "x is torch.float16"),
        ((x.T.contiguous().T, y), "not contiguous, expected"),
        ((x, y.int()), "y is torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.into(*bad)


@pytest.mark.parametrize(
    ("source", "options", "free", "kind", "note"),
    [
        (FLAT, {}, 2 * 17 * (3 + 16), Resident, "kept on cpu, 0.0 MB"),
        (
            FLAT,
            {},
            2 * 17 * (3 + 16) - 1,
            Streaming,
            "streamed to cpu, as 0.0 MB are more than half of the 0.0 MB",
        ),
        (FLAT, {"indices": [0]}, 38, Resident, "kept"),
        (FLAT / 255, {"transform": Transform(binarize=True)}, 10**9, Streaming, "transformed in float64"),
        (FLAT / 255, {}, 10**9, Resident, "kept"),
    ],
)
def test_what_fits_is_kept(
    source: Any, options: Any, free: int, kind: type, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvae.data.transfers.CudaCopies", lambda device: InOrder())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    made, why = passes_on(torch.device("cpu"), DataLoader(source, 2, **options)._batching)
    assert type(made) is kind
    assert note in why
