"""Sources: what opens, as what, and the one line that says why something does not."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.data import DataError, DataLoader, as_source, counts, open_source, source_from_arrays
from fastvae.data.formats import read_idx
from fastvae.data.pack import pack

IMAGES = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
LABELS = np.array([3, 1, 0, 2], dtype=np.uint8)
IDX_CODES = {"uint8": 0x08, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_CODES[array.dtype.name], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def npy_bytes(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def idx_folder(folder: Path, pack: Callable[[bytes], bytes] = bytes, end: str = "") -> Path:
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx_bytes(IMAGES)))
        (folder / f"{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx_bytes(LABELS)))
    return folder


@pytest.mark.parametrize(
    ("shape", "item_shape", "channels_last"),
    [
        ((7, 10), (10,), False),
        ((7, 28, 20), (1, 28, 20), False),
        ((7, 8, 9, 3), (3, 8, 9), True),
        ((7, 8, 9, 1), (1, 8, 9), True),
        ((7, 8, 9, 4), (4, 8, 9), True),
        ((7, 3, 8, 9), (3, 8, 9), False),
        ((7, 3, 8, 3), (3, 8, 3), False),
        ((7, 1, 8, 1), (1, 8, 1), False),
        ((7, 2, 8, 9), (2, 8, 9), False),
        ((7, 16, 4, 4), (16, 4, 4), False),
        ((7, 64, 1, 1), (64, 1, 1), False),
        ((7, 2, 3, 4, 5), (2, 3, 4, 5), False),
    ],
)
def test_item_shapes(shape: tuple[int, ...], item_shape: tuple[int, ...], channels_last: bool) -> None:
    source = source_from_arrays(np.ones(shape, np.uint8))
    assert (source.n_samples, source.item_shape, source.channels_last) == (7, item_shape, channels_last)
    assert not source.has_labels


def test_arrays_are_used_in_place() -> None:
    x = np.ones((3, 4), np.float32)
    assert np.shares_memory(as_source(x).x, x)
    assert np.shares_memory(as_source(torch.from_numpy(x)).x, x)
    source = as_source(source_from_arrays(x))
    assert as_source(source) is source


def test_pairs_and_dtypes() -> None:
    source = as_source((torch.ones(4, 2, dtype=torch.bfloat16), torch.arange(4, dtype=torch.int32)))
    assert (source.x.dtype, source.has_labels) == (np.float32, True)
    assert source.y is not None
    assert source.y.dtype == np.int64
    assert as_source(np.array([[True, False]])).x.tolist() == [[255, 0]]
    assert as_source(np.ones((2, 2), np.float16)).x.dtype == np.float32


class SequenceArray(np.ndarray):
    """An array as NumPy 2.5 has it."""


Sequence.register(SequenceArray)


def test_two_samples_are_no_pair() -> None:
    assert as_source(np.ones((2, 3), np.float32).view(SequenceArray)).n_samples == 2


def test_npy_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    source = open_source(tmp_path / "x.npy")
    assert np.array_equal(source.x, IMAGES)
    assert isinstance(source.x.base, np.memmap)
    assert not source.x.flags.writeable
    np.save(tmp_path / "f.npy", np.asfortranarray(IMAGES))
    assert np.array_equal(open_source(str(tmp_path / "f.npy")).x, IMAGES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("x_key", "y_key"), [("x", "y"), ("images", "labels"), ("data", "targets")])
def test_npz(tmp_path: Path, save: Callable[..., None], x_key: str, y_key: str) -> None:
    save(tmp_path / "set.npz", **{x_key: np.asfortranarray(IMAGES), y_key: LABELS})
    source = open_source(tmp_path / "set.npz")
    assert np.array_equal(source.x, IMAGES)
    assert np.array_equal(source.y, LABELS)


def test_npz_without_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", IMAGES)
    assert np.array_equal(open_source(tmp_path / "set.npz").x, IMAGES)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("dtype", list(IDX_CODES))
def test_idx(tmp_path: Path, pack: Callable[[bytes], bytes], dtype: str) -> None:
    (tmp_path / "file").write_bytes(pack(idx_bytes(IMAGES.astype(dtype))))
    assert np.array_equal(read_idx(tmp_path / "file"), IMAGES)
    if dtype != "int32":
        assert open_source(tmp_path / "file").item_shape == (1, 5, 6)


@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_folder(tmp_path: Path, pack: Callable[[bytes], bytes], end: str) -> None:
    source = open_source(idx_folder(tmp_path, pack, end))
    assert np.array_equal(source.x, IMAGES)
    assert np.array_equal(source.y, LABELS)
    (tmp_path / f"train-labels-idx1-ubyte{end}").unlink()
    assert not open_source(tmp_path).has_labels


HEADER = struct.pack(">BBBB3I", 0, 0, 8, 3, 4, 5, 6)
PROMISES_MUCH = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31)
GZIPPED = gzip.compress(idx_bytes(IMAGES), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x-idx3-ubyte", b"\0\0\x07\x03" + b"\0" * 12, "magic number 0x00000703, expected IDX"),
        ("x-idx3-ubyte", b"\0\0\x08", "magic number 0x000008, expected IDX"),
        ("x-idx3-ubyte", HEADER[:10], "truncated within its header"),
        ("x-idx3-ubyte", HEADER + bytes(119), r"truncated: .*\[4, 5, 6\], 120 bytes, .* 119|hold no more"),
        ("x-idx3-ubyte", HEADER + bytes(121), "trailing bytes"),
        ("x-idx3-ubyte", PROMISES_MUCH + bytes(9), "truncated: .* the file can hold no more than"),
        ("x-idx3-ubyte", struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 5, 6), r"\[0, 5, 6\] is empty"),
        ("x-idx3-ubyte", idx_bytes(LABELS), r"shape \[4\], expected \[N, ...\]"),
        ("x.gz", GZIPPED[:-20], "not a whole gzip file"),
        ("x.gz", GZIPPED[:30] + b"\xff\xff\xff" + GZIPPED[33:], "not a whole gzip file|truncated|trailing"),
        ("x.gz", gzip.compress(HEADER + bytes(100)), "truncated: .* but 100 are there"),
        ("x.gz", gzip.compress(HEADER + bytes(121)), "trailing bytes"),
        ("x.gz", gzip.compress(PROMISES_MUCH), "truncated: .* can hold no more than"),
        ("x.gz", gzip.compress(b"hello"), "magic number 0x68656c6c"),
        ("x.csv", b"1,2,3\n", "begins with b'1,2,', expected .npy, .npz, IDX"),
        ("x.npy", b"1,2,3\n", "begins with b'1,2,', expected a .npy file"),
        ("x.npz", b"", "begins with b'', expected a .npz file"),
        ("x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': broken", "not a .npy header"),
        ("x.npy", npy_bytes(IMAGES)[:-1], "truncated: .* 120 bytes, but 119 follow"),
        ("x.npy", npy_bytes(IMAGES) + b"!", "trailing bytes: .* 120 bytes, but 121 follow"),
        ("x.npy", npy_bytes(IMAGES[:0]), r"\[0, 5, 6\] is empty, expected at least one sample"),
        ("x.npy", npy_bytes(IMAGES[:, :0]), r"\[4, 0, 6\] is empty"),
        ("x.npy", npy_bytes(np.array([[{}]], dtype=object), allow_pickle=True), "dtype object"),
        ("x.npy", npy_bytes(IMAGES.astype(np.int64)), "dtype int64, expected uint8"),
        ("x.npy", npy_bytes(IMAGES.astype(np.complex64)), "dtype complex64, expected uint8"),
        ("x.npy", npy_bytes(IMAGES.astype("U3")), "dtype <U3, expected uint8"),
        ("x.npz", b"PK\x03\x04garbage", "not a whole .npz file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": IMAGES}, r"arrays \['pixels'\], expected one of x, images, data, arr_0"),
        ({"x": IMAGES, "y": LABELS[:3]}, r"labels of shape \[3\], expected \[4\]"),
        ({"x": IMAGES, "y": np.array(list("abcd"))}, "labels of dtype <U1, expected integers"),
        ({"x": np.array([[{}]], dtype=object)}, "dtype object, .* never loaded"),
        ({"data": LABELS, "indices": LABELS, "indptr": LABELS}, "a sparse matrix without shape"),
        ({"x": IMAGES[:0]}, "is empty"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x=IMAGES)
    content = path.read_bytes()
    at = content.index(IMAGES.tobytes())
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        open_source(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        open_source(path)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npy: No such file or directory; expected \.npy"):
        open_source(tmp_path / "nowhere.npy")
    with pytest.raises(DataError, match=r"without PNG, .* images and without train-images-idx3-ubyte"):
        open_source(tmp_path)


def test_label_count_of_a_folder(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:2]))
    with pytest.raises(DataError, match=r"labels of shape \[2\], expected \[4\]"):
        open_source(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_inf_are_found(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvae.data.arrays._SCAN_BYTES", 64)
    x = np.zeros((50, 3, 4), dtype)
    x[30, 2, 1], x[31, 0, 0], x[31, 0, 1] = np.nan, np.inf, -np.inf
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(DataError, match=r"x\.npz: 3 values are NaN .* first nan at \[30, 2, 1\]"):
        open_source(tmp_path / "x.npz")


def test_finite_is_meant_in_float32() -> None:
    assert source_from_arrays(np.full((2, 2), 3e38)).n_samples == 2
    with pytest.raises(DataError, match=r"1 value is NaN or infinite, the first inf at \[1, 0\]"):
        source_from_arrays(np.array([[1.0], [1e300]]))


@pytest.mark.parametrize(("data", "kind"), [({}, "dict"), (7, "int"), (None, "NoneType"), ((1,), "tuple")])
def test_other_objects_are_refused(data: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"source is a {kind}, expected a Source, a numpy array"):
        as_source(data)


@pytest.mark.parametrize("name", ["digits", "shapes:50"])
def test_a_name_is_no_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"expected a path; .* is fastvae.data.resolve\('{name}'\).train"):
        as_source(name)
    np.save("digits.npy", np.zeros((3, 4), np.uint8))
    Path("digits.npy").rename(name)
    assert as_source(name).n_samples == 3


@pytest.mark.parametrize(("y", "kind"), [([1, 2], "list"), (None, "NoneType")])
def test_labels_are_an_array(y: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"y is a {kind}, expected a numpy array or a torch tensor of"):
        as_source((np.eye(2), y))
    with pytest.raises(TypeError, match="y is a list, expected a numpy array"):
        counts(np.eye(2), [1, 2])


def test_labels_lie_anywhere() -> None:
    packed = np.zeros(1, [("image", "u1", (2, 3)), ("label", "i8")])
    packed["label"] = 7
    assert not packed["label"].flags.aligned
    ((_, y),) = DataLoader((packed["image"], packed["label"]))
    assert y.tolist() == [7]


def test_a_path_without_a_name_is_not_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert as_source(".").n_samples == 1
    for read in (as_source, open_source, lambda path: pack(path, "y.npy")):
        with pytest.raises(DataError, match="the path is '', expected"):
            read("")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3).to(torch.float8_e5m2),
        torch.zeros(3, dtype=torch.complex64).conj(),
    ],
    ids=["sparse", "float8", "conj"],
)
def test_tensors_that_are_no_arrays_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"y: a tensor of torch\.float|labels of dtype complex64"):
        as_source((np.eye(3), tensor))
    if not tensor.is_sparse:
        with pytest.raises(DataError, match=r"source: a tensor of torch\.float8_e5m2|dtype complex64"):
            as_source(tensor[:, None])


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(DataError, match=r"a tensor on meta, expected one on the CPU; use source\.cpu\(\)"):
        as_source(torch.empty(3, 3, device="meta"))
