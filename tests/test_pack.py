"""Packing: what is made, and what is left by an error, a signal, a kill or a full disk, and gone on from."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.cli import main
from fastvae.data import DataError, folders, open_source, partial
from fastvae.data.feeds import CorruptImages
from fastvae.data.pack import pack
from fastvae.data.packed import json_path, verify
from fastvae.data.shapes import ShapeSource

COMMAND = [sys.executable, "-m", "fastvae", "data"]
N = 40


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def photos(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A folder of 40 images, 6 x 5 in colour, of the classes a and b."""
    folder = tmp_path / "photos"
    for i in range(N):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        image.save(folder / "ab"[i % 2] / f"{i:02d}.png")
    return folder


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def left(folder: Path) -> list[str]:
    """What lies beside the photos."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


class Interrupt(Exception):
    pass


def interrupted_after(n: int) -> Callable[[str, int, int], None]:
    def report(what: str, done: int, total: int) -> None:
        if what == "packing" and done >= n:
            raise Interrupt

    return report


def test_a_folder_becomes_one_file(photos: Path, tmp_path: Path) -> None:
    (photos / "a" / "notes.txt").touch()
    packed = pack(photos, tmp_path / "p.npy")
    expected = pixels(photos)
    assert np.array_equal(np.load(tmp_path / "p.npy"), expected)
    source = open_source(tmp_path / "p.npy")
    assert (source.n_samples, source.item_shape, source.classes) == (N, (3, 6, 5), ("a", "b"))
    assert not source.in_memory
    assert source.y is not None
    assert source.y.tolist() == [0] * (N // 2) + [1] * (N // 2)
    assert left(photos) == ["p.npy", "p.npy.json"]
    said = json.loads((tmp_path / "p.npy.json").read_text())
    assert said["source"] == str(photos)
    assert said["sha256"] == sha256((tmp_path / "p.npy").read_bytes()).hexdigest()
    assert (said["shape"], said["classes"], said["labels"]) == ([N, 6, 5, 3], ["a", "b"], source.y.tolist())
    assert verify(tmp_path / "p.npy") == packed


def test_size_and_channels(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "p.npy", size=4, channels=1, workers=1)
    expected = [
        np.asarray(Image.open(path).convert("L").crop((0, 0, 5, 5)).resize((4, 4), Image.Resampling.LANCZOS))
        for path in sorted(photos.rglob("*.png"))
    ]
    assert np.array_equal(np.load(tmp_path / "p.npy"), expected)
    pack(photos, tmp_path / "p.npy", size=4, overwrite=True)  # a height that could be a number of channels
    assert open_source(tmp_path / "p.npy").item_shape == (3, 4, 4)


def test_other_sources(rng: np.random.Generator, tmp_path: Path) -> None:
    grey = rng.integers(0, 256, (7, 6, 5), dtype=np.uint8)
    chosen = ShapeSource(9000, 3)
    wide = rng.random((3, 3, 5, 6), dtype=np.float32)
    sources: list[tuple[Any, np.ndarray]] = [
        (grey, grey),
        (torch.from_numpy(grey[:, None]), grey),
        ((grey / np.float32(255), np.arange(7)), grey),
        (rng.permutation(256).reshape(2, 128) / 255.0, None),
        (chosen, chosen.images(np.arange(9000))),
        (wide, np.rint(wide * 255).astype(np.uint8)),
    ]
    for i, (source, expected) in enumerate(sources):
        pack(source, tmp_path / f"{i}.npy")
        if expected is None:
            expected = np.rint(source * 255).astype(np.uint8)
        assert np.array_equal(np.load(tmp_path / f"{i}.npy"), expected)
    assert np.array_equal(open_source(tmp_path / "2.npy").y, np.arange(7))
    assert np.array_equal(open_source(tmp_path / "4.npy").y, chosen.y)
    assert open_source(tmp_path / "4.npy").classes == chosen.classes
    pack(wide, tmp_path / "small.npy", size=4)
    small = np.load(tmp_path / "small.npy")
    image = Image.fromarray(np.rint(wide[1] * 255).astype(np.uint8).transpose(1, 2, 0)).crop((0, 0, 5, 5))
    assert open_source(tmp_path / "small.npy").item_shape == (3, 4, 4)
    assert open_source(tmp_path / "5.npy").item_shape == (3, 5, 6)
    assert np.array_equal(small[1], image.resize((4, 4), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": np.array([[0.5, 1.5]])},
            r"values from 0.5 to 1.5 in samples 0 to 0, expected",
        ),
        (
            {"source": np.zeros((2, 9), np.uint8), "size": 3},
            "items of 9, expected images of .* with --size",
        ),
        ({"source": np.zeros((2, 9), np.uint8), "channels": 1}, "expected it with a folder of images only"),
        ({"dst": "p.png"}, r"dst is '.*p.png', expected a name that ends in .npy"),
        ({"size": 0}, "size is 0, expected an integer from 1 to"),
        ({"size": 9000}, "size is 9000, expected an integer from 1 to 8192"),
        ({"size": 1.5}, "size is 1.5, expected an integer"),
        ({"size": "4"}, "size is '4', expected an integer"),
        ({"workers": 0}, "workers is 0, expected an integer from 1 to"),
        ({"channels": 2}, "channels is 2, expected 1 or 3"),
        ({"on_error": "ask"}, "on_error is 'ask', expected one of stop, skip, list"),
    ],
)
def test_what_cannot_be_packed(photos: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    source, dst = arguments.pop("source", photos), tmp_path / arguments.pop("dst", "p.npy")
    with pytest.raises(DataError, match=message):
        pack(source, dst, **arguments)
    assert left(photos) == []


def test_a_folder_is_not_replaced_and_nothing_is_no_folder(tmp_path: Path, capsys) -> None:
    (tmp_path / "p.npy").mkdir()
    with pytest.raises(DataError, match=r"p\.npy: a folder, expected the name of a file"):
        pack(np.zeros((2, 9), np.uint8), tmp_path / "p.npy", overwrite=True)
    assert main(["data", "pack", "", str(tmp_path / "q.npy")]) == 2
    assert "no dataset or path named ''" in capsys.readouterr().err
    assert left(tmp_path / "p.npy") == []


def test_nan_is_refused_where_it_was_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 8)  # of a mapped file
    x = np.zeros((40, 2))
    x[1, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=r"x\.npy: values from nan to nan in samples 0 to 39, expected"):
        pack(tmp_path / "x.npy", tmp_path / "p.npy")


def test_what_is_packed_is_not_replaced(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 9), np.float32))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"dst is '.*x\.npy', which is what to pack, expected another"):
        pack(path, tmp_path / "." / "x.npy", overwrite=True)
    assert main(["data", "pack", str(path), str(path), "--overwrite"]) == 2
    assert f"DST: got '{path}', which is what to pack" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("dst", "options", "message"),
    [
        ("p.png", [], "DST: got '{folder}/p.png', expected a name that ends in .npy"),
        ("p.npy", ["--size", "9000"], "--size: got 9000, expected an integer from 1 to 8192"),
        ("p.npy", ["--workers", "999"], "--workers: got 999, expected an integer from 1 to 256"),
    ],
)
def test_an_error_names_what_was_typed(
    photos: Path, dst: str, options: list[str], message: str, capsys
) -> None:
    folder = photos.parent
    assert main(["data", "pack", str(photos), str(folder / dst), *options]) == 2
    assert capsys.readouterr().err == f"fastvae: error: {message.format(folder=folder)}\n"


def test_nothing_is_replaced_unasked(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "p.npy")
    before = (tmp_path / "p.npy").read_bytes()
    with pytest.raises(DataError, match=r"p\.npy: exists already; --overwrite replaces it"):
        pack(photos, tmp_path / "p.npy", size=3)
    assert (tmp_path / "p.npy").read_bytes() == before
    pack(photos, tmp_path / "p.npy", size=3, overwrite=True)
    assert np.load(tmp_path / "p.npy").shape == (N, 3, 3, 3)
    assert left(photos) == ["p.npy", "p.npy.json"]


@pytest.fixture
def spoilt(photos: Path) -> dict[str, str]:
    """Two of the photos are corrupt."""
    whole = (photos / "a" / "10.png").read_bytes()
    (photos / "a" / "10.png").write_bytes(whole[: len(whole) // 2])
    (photos / "b" / "31.png").write_bytes(b"what?")
    return {"a/10.png": "truncated|corrupt|broken", "b/31.png": "not a PNG, JPEG or WebP image"}


def test_a_corrupt_image_stops(photos: Path, spoilt: dict[str, str], tmp_path: Path) -> None:
    whole = pixels_without(photos, spoilt)
    with pytest.raises(CorruptImages, match=r"a/10\.png: .*; --on-error skip leaves such images out"):
        pack(photos, tmp_path / "p.npy")
    assert left(photos) == ["p.npy.partial"]
    # taken away, they do not keep what is there from being gone on from
    for name in spoilt:
        (photos / name).unlink()
    rows = rows_decoded(lambda: pack(photos, tmp_path / "p.npy"))
    assert rows == N - 2 - 5
    assert np.array_equal(np.load(tmp_path / "p.npy"), whole)


def test_a_corrupt_image_is_skipped(photos: Path, spoilt: dict[str, str], tmp_path: Path) -> None:
    packed = pack(photos, tmp_path / "p.npy", on_error="skip")
    assert packed.skipped.keys() == spoilt.keys()
    for name, problem in spoilt.items():
        assert re.search(problem, packed.skipped[name])
    assert np.array_equal(np.load(tmp_path / "p.npy"), pixels_without(photos, spoilt))
    assert open_source(tmp_path / "p.npy").n_samples == N - 2
    assert packed.labels == (0,) * (N // 2 - 1) + (1,) * (N // 2 - 1)


def test_corrupt_images_are_listed_and_then_skipped(
    photos: Path, spoilt: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "pack", str(photos), str(tmp_path / "p.npy"), "--on-error"]
    assert main([*command, "list"]) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == list(spoilt)
    assert re.fullmatch(r"fastvae: error: .*photos: 2 of 40 images cannot be used; --on-error skip .*\n", err)
    assert left(photos) == ["p.npy.partial"]
    with (tmp_path / "p.npy.partial" / "rows").open("ab") as rows:
        rows.write(b"half a row")
    assert rows_decoded(lambda: main([*command, "skip"])) == 0
    assert open_source(tmp_path / "p.npy").n_samples == N - 2
    assert "p.npy: 38 samples of 6 x 5 x 3" in capsys.readouterr().out
    assert np.array_equal(np.load(tmp_path / "p.npy"), pixels_without(photos, spoilt))


def pixels_without(photos: Path, spoilt: dict[str, str]) -> np.ndarray:
    names = [path for path in sorted(photos.rglob("*.png")) if str(path.relative_to(photos)) not in spoilt]
    return np.stack([np.asarray(Image.open(path)) for path in names])


def rows_decoded(run: Callable[[], object]) -> int:
    """How many images are decoded meanwhile."""
    counted, decode = [0], folders.decode

    def counting(*arguments: Any) -> Any:
        counted[0] += 1
        return decode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "decode", counting)
        run()
    return counted[0]


def test_a_stopped_pack_goes_on(photos: Path, tmp_path: Path) -> None:
    expected = pixels(photos)
    with pytest.raises(Interrupt):
        pack(photos, tmp_path / "p.npy", report=interrupted_after(25))
    assert left(photos) == ["p.npy.partial"]
    assert rows_decoded(lambda: pack(photos, tmp_path / "p.npy")) == N - 25
    assert np.array_equal(np.load(tmp_path / "p.npy"), expected)
    assert open_source(tmp_path / "p.npy").y.tolist() == [0] * (N // 2) + [1] * (N // 2)
    assert left(photos) == ["p.npy", "p.npy.json"]
    verify(tmp_path / "p.npy")


def test_an_array_goes_on(rng: np.random.Generator, tmp_path: Path) -> None:
    x = rng.integers(0, 256, (64, 400, 400), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(Interrupt):
        pack(tmp_path / "x.npy", tmp_path / "p.npy", report=interrupted_after(30))
    with (tmp_path / "p.npy.partial" / "rows").open("ab") as rows:
        rows.write(b"half a row")
    said: list[int] = []
    pack(tmp_path / "x.npy", tmp_path / "p.npy", report=lambda what, done, total: said.append(done))
    assert said[0] > 30
    assert np.array_equal(np.load(tmp_path / "p.npy"), x)


@pytest.mark.parametrize("limit", [500, 2500])
def test_what_a_loader_makes_goes_on(tmp_path: Path, limit: int) -> None:
    """Where the last piece is a short one and all are there too, before the checksum."""
    shapes = ShapeSource(2500)
    with pytest.raises(Interrupt):
        pack(shapes, tmp_path / "p.npy", report=interrupted_after(limit))
    pack(shapes, tmp_path / "p.npy")
    pack(shapes, tmp_path / "whole.npy")
    assert np.array_equal(np.load(tmp_path / "p.npy"), np.load(tmp_path / "whole.npy"))
    assert np.array_equal(open_source(tmp_path / "p.npy").y, shapes.y)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"rows": -1}, "state.json: damaged"),
        ({"rows": "many"}, "state.json: damaged"),
        ({"shape": None}, "state.json: damaged"),
        ({"skipped": [1]}, "state.json: damaged"),
        ({"shape": [2]}, r"p.npy.partial: \d\d rows of \[2\], not of the 64 of \[200, 200\]"),
        ({"rows": 65}, r"p.npy.partial: 65 rows of \[200, 200\], not of the 64 of"),
    ],
)
def test_a_damaged_state_is_not_gone_on_from(tmp_path: Path, damage: dict[str, object], message: str) -> None:
    x, path = np.zeros((64, 200, 200), np.uint8), tmp_path / "p.npy.partial" / "state.json"
    with pytest.raises(Interrupt):
        pack(x, tmp_path / "p.npy", report=interrupted_after(30))
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(DataError, match=f"{message}.*; begin anew with --overwrite"):
        pack(x, tmp_path / "p.npy")
    pack(x, tmp_path / "p.npy", overwrite=True)
    assert np.array_equal(np.load(tmp_path / "p.npy"), x)


class Items(torch.utils.data.Dataset):
    """Items of 100 x 100 pixels, all the item's number, with labels from -3 on."""

    def __len__(self) -> int:
        return 250

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.full((1, 100, 100), i, np.uint8), i - 3


def test_labels_that_come_with_items_are_kept(tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        pack(Items(), tmp_path / "p.npy", report=interrupted_after(110))
    state = json.loads((tmp_path / "p.npy.partial" / "state.json").read_text())
    state["labels"].append(7)  # of rows for which there was no room
    (tmp_path / "p.npy.partial" / "state.json").write_text(json.dumps(state))
    pack(Items(), tmp_path / "p.npy")
    source = open_source(tmp_path / "p.npy")
    assert source.x[:, 0, 0].tolist() == list(range(250))
    assert source.y.tolist() == list(range(-3, 247))


def test_other_samples_of_the_same_shape_are_not_gone_on_with(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    x = rng.random((64, 200, 200)).astype(np.float32)
    with pytest.raises(Interrupt):
        pack(x, tmp_path / "p.npy", report=interrupted_after(30))
    with pytest.raises(DataError, match=r"begun with data .*, now asked for .*; begin anew with --overwrite"):
        pack(1 - x, tmp_path / "p.npy")


def test_a_piece_is_small_when_the_samples_become_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    append = partial.Partial.append

    def counted(self: partial.Partial, state: partial.State, rows: np.ndarray, digest: str) -> None:
        sizes.append(rows.nbytes)
        append(self, state, rows, digest)

    monkeypatch.setattr(partial.Partial, "append", counted)
    pack(np.zeros((300, 4, 4), np.uint8), tmp_path / "p.npy", size=200)
    assert sum(sizes) == 300 * 200 * 200
    assert max(sizes) <= 1 << 22


def changed(photos: Path) -> None:
    Image.new("RGB", (5, 6)).save(photos / "a" / "02.png")


def more(photos: Path) -> None:
    Image.new("RGB", (5, 6)).save(photos / "a" / "000.png")


def fewer(photos: Path) -> None:
    (photos / "a" / "02.png").unlink()


def another_class(photos: Path) -> None:
    (photos / "A").mkdir()
    Image.new("RGB", (5, 6)).save(photos / "A" / "x.png")


@pytest.mark.parametrize("change", [changed, more, fewer, another_class])
def test_a_folder_that_has_changed_begins_anew_when_asked(
    photos: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    with pytest.raises(Interrupt):
        pack(photos, tmp_path / "p.npy", report=interrupted_after(25))
    change(photos)
    with pytest.raises(DataError, match=r"not as it was when this pack was begun; .* --overwrite"):
        pack(photos, tmp_path / "p.npy")
    pack(photos, tmp_path / "p.npy", overwrite=True)
    assert np.array_equal(np.load(tmp_path / "p.npy"), pixels(photos))


def test_another_size_begins_anew_when_asked(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        pack(photos, tmp_path / "p.npy", report=interrupted_after(25))
    with pytest.raises(DataError, match="begun with size None, now asked for 3; begin anew with --overwrite"):
        pack(photos, tmp_path / "p.npy", size=3)
    pack(photos, tmp_path / "p.npy", size=3, overwrite=True)
    assert np.load(tmp_path / "p.npy").shape == (N, 3, 3, 3)


def test_one_pack_at_a_time(photos: Path, tmp_path: Path) -> None:
    def report(what: str, done: int, total: int) -> None:
        with pytest.raises(DataError, match=r"p\.npy: another process is packing it"):
            pack(photos, tmp_path / "p.npy")

    pack(photos, tmp_path / "p.npy", report=report)
    assert np.array_equal(np.load(tmp_path / "p.npy"), pixels(photos))


SLOW = """
import sys, time
from fastvae.data import folders, partial
partial.SAVE_SECONDS = 0.0
folders._CHUNK_FILES = 1
decode, done = folders.decode, []
def slowly(*arguments):
    done.append(arguments)
    time.sleep(0.5 if len(done) > 10 else 0)  # in these 15 seconds the signal comes, on any machine
    return decode(*arguments)
folders.decode = slowly
from fastvae.cli import main
sys.exit(main(["data", "pack", "photos", "p.npy", "--workers", "1"]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_what_can_be_gone_on_from(
    photos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    expected = pixels(photos)
    state = tmp_path / "p.npy.partial" / "state.json"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (state.exists() and json.loads(state.read_text())["rows"]):
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert out == ""
    assert left(photos) == ["p.npy.partial"]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert re.fullmatch(
            rf"fastvae: stopped by {number.name}; p\.npy\.partial keeps what was packed, and the same "
            r"command goes on from there\n",
            err,
        )
    packed = json.loads(state.read_text())["rows"]
    assert 0 < packed < N
    os.chdir(tmp_path)
    assert rows_decoded(lambda: pack("photos", "p.npy")) == N - packed
    assert np.array_equal(np.load("p.npy"), expected)


def test_a_full_disk(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit of a file's size: the system's error is another one, and its way the same."""
    x = rng.integers(0, 256, (20, 500_000), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("fastvae.data.feeds._PIECE_BYTES", 1 << 21)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_200_000, before[1]))
        with pytest.raises(
            DataError,
            match=r"p\.npy: File too large, after 8 of 20 samples; .*p\.npy\.partial keeps them",
        ):
            pack(tmp_path / "x.npy", tmp_path / "p.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npy.partial", "x.npy"]
    done: list[int] = []
    pack(tmp_path / "x.npy", tmp_path / "p.npy", report=lambda what, rows, total: done.append(rows))
    assert done[0] == 9
    assert np.array_equal(np.load(tmp_path / "p.npy"), x)


def test_a_disk_that_is_full_at_the_end(tmp_path: Path) -> None:
    x, y = np.zeros((200, 2), np.uint8), np.full(200, 2**62)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # of which the labels take more
        with pytest.raises(DataError, match=r"p\.npy: File too large, after 200 of 200 samples; .*keeps"):
            pack((x, y), tmp_path / "p.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert pack((x, y), tmp_path / "p.npy").labels == tuple(y)


def test_a_disk_that_will_be_full(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = (10**9, 10**9, 1000)
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda path: type("Usage", (), {"free": usage[2]}))
    with pytest.raises(DataError, match=r"p\.npy: 0.00 GB needed for 40 rows, 0.00 GB free"):
        pack(photos, tmp_path / "p.npy")
    assert left(photos) == []


def of_other_shape(said: dict[str, Any]) -> None:
    said["shape"][0] -= 1


def of_other_size(said: dict[str, Any]) -> None:
    said["bytes"] += 1


def short_of_labels(said: dict[str, Any]) -> None:
    said["labels"].pop()


def short_of_classes(said: dict[str, Any]) -> None:
    said["classes"].pop()


def no_numbers(said: dict[str, Any]) -> None:
    said["labels"][3] = "three"


def not_a_class(said: dict[str, Any]) -> None:
    said["labels"][3] = -1


def too_large(said: dict[str, Any]) -> None:
    said["labels"][3] = 2**63


def incomplete(said: dict[str, Any]) -> None:
    del said["sha256"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_other_shape, r"says shape \[39, 6, 5, 3\], but p.npy has \[40, 6, 5, 3\]; pack again"),
        (of_other_size, r"says 3729 bytes, but p.npy has 3728"),
        (short_of_labels, r"says 39 labels for 40 samples"),
        (short_of_classes, r"says label 1 with 1 classes"),
        (no_numbers, r"labels.3: input should be a valid integer"),
        (not_a_class, r"says label -1 with 2 classes"),
        (too_large, r"labels.3: input should be less than 9223372036854775808"),
        (incomplete, r"sha256: field required"),
    ],
)
def test_a_json_that_does_not_fit(
    photos: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    pack(photos, tmp_path / "p.npy")
    said = json.loads(json_path(tmp_path / "p.npy").read_text())
    damage(said)
    json_path(tmp_path / "p.npy").write_text(json.dumps(said))
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "p.npy")


def test_other_jsons(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "p.npy")
    json_path(tmp_path / "p.npy").write_text('{"format": "of somebody else"}')
    assert not open_source(tmp_path / "p.npy").has_labels
    for content in ('{"format": "fastv', "[" * 100_000):
        json_path(tmp_path / "p.npy").write_text(content)
        with pytest.raises(DataError, match=r"p\.npy\.json: not a whole JSON file"):
            open_source(tmp_path / "p.npy")


def test_verify(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.npy"
    pack(photos, path)
    assert main(["data", "verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 40 samples of 6 x 5 x 3, as they were packed\n"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["data", "verify", str(path)]) == 2
    assert re.search(r"p\.npy: SHA-256 \w{64}, expected \w{64}; damaged", capsys.readouterr().err)
    json_path(path).unlink()
    assert main(["data", "verify", str(path)]) == 2
    assert "p.npy: there is no JSON; expected a .npy of fastvae data pack" in capsys.readouterr().err
    assert main(["data", "verify", ""]) == 2
    assert "there is no such file; expected a .npy of fastvae data pack" in capsys.readouterr().err


def test_names_that_are_not_text(photos: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photos / "b") + b"/\xff\n.png"
    try:
        Path(os.fsdecode(odd)).write_bytes(b"?")
    except OSError:
        pytest.skip("this file system takes no such names")
    packed = pack(photos, tmp_path / "p.npy", on_error="skip")
    assert list(packed.skipped) == ["b/\\xff\n.png"]
    assert open_source(tmp_path / "p.npy").n_samples == N
