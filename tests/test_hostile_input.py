"""Files made to break a reader: one clear line each, and memory for no more than is really there."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

from fastvae import _native
from fastvae.data import DataError, as_source, open_source

NPY = b"\x93NUMPY"


class Trap:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("unpickled",))


def npy(header: str | dict[str, object], data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = (header if isinstance(header, str) else repr(header)).encode("latin1") + b"\n"
    return NPY + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text + data


def described(shape: object, descr: object = "|u1", fortran: object = False) -> dict[str, object]:
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


def saved(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def zipped(content: bytes, name: str = "x.npy", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def lying(content: bytes, *, compressed: int | None = None, size: int | None = None) -> bytes:
    """A .npz of one member whose directory has other sizes, those of zip64 where they are large."""
    archive = bytearray(zipped(content))
    entry = archive.index(b"PK\x01\x02")
    if compressed is not None:
        struct.pack_into("<I", archive, entry + 20, compressed)
    if size is not None:
        struct.pack_into("<I", archive, entry + 24, size)
    return bytes(archive)


def idx(*shape: int, data: bytes = b"", dims: int | None = None) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape) if dims is None else dims, *shape) + data


PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", npy(described((2**40, 784))), r"truncated: .*\[1099511627776, 784\].*, but 0 follow"),
        ("x.npy", npy(described((2**62, 2**62))), r"truncated: .* bytes, but 0 follow"),
        ("x.npy", npy(described((-1, 4))), r"\[-1, 4\] is empty"),
        ("x.npy", npy(described((2, -(2**70)))), "is empty"),
        ("x.npy", npy(described((0, 4))), r"\[0, 4\] is empty"),
        ("x.npy", npy(described(()), b"\1"), r"shape \[\], expected \[N, ...\]"),
        ("x.npy", npy(described((1,) * 40), b"\1"), "40 dimensions, expected at most 32"),
        ("x.npy", npy(described((2.0, 2)), b"1234"), "not a .npy header"),
        ("x.npy", npy(described((2, 2), fortran="yes"), b"1234"), "not a .npy header"),
        ("x.npy", npy(described((2, 2), "|V0")), "expected one number a place"),
        ("x.npy", npy(described((2, 2), "|S0")), "expected one number a place"),
        ("x.npy", npy(described((2, 2), "4f4"), bytes(64)), "expected one number a place"),
        ("x.npy", npy(described((2, 2), [("a", "<f4")]), bytes(16)), "expected one number a place"),
        ("x.npy", npy(described((2, 2), "V2147483647")), r"truncated|expected one number"),
        ("x.npy", npy(described((2, 2), "<f3"), bytes(12)), "not a .npy header"),
        ("x.npy", npy(described((2, 2), "<M8[ns]"), bytes(32)), r"dtype datetime64\[ns\], expected uint8"),
        ("x.npy", npy(described((2, 2), "<i8"), bytes(32)), "dtype int64, expected uint8"),
        ("x.npy", npy("{" * 9000), "not a .npy header"),
        ("x.npy", npy("[" * 40000), "not a .npy header"),
        ("x.npy", npy("__import__('os').abort()"), "not a .npy header"),
        ("x.npy", npy("{'descr': '|u1', 'shape': (2, 2)}", b"1234"), "not a .npy header"),
        ("x.npy", npy("{'shape': (\\d, 1if 1else 2)}"), "not a .npy header"),
        ("x.npy", NPY + b"\x02\x00\xff\xff\xff\xff" + b" " * 100, "not a .npy header .of 4294967295 bytes"),
        ("x.npy", npy(described((3, 4)), bytes(12), version=b"\x09\x00"), "not a .npy header .of version"),
        ("x.npy", NPY, "not a .npy header"),
        ("x.npy", saved(np.array([[Trap()]]), allow_pickle=True), "dtype object, .* never loaded"),
        ("x.npz", zipped(saved(np.array([[Trap()]]), allow_pickle=True)), r"\[x\]: dtype object, .* never"),
        ("x.npz", zipped(pickle.dumps(Trap())), r"\[x\]: not a .npy header"),
        ("x.pkl", pickle.dumps(Trap()), r"begins with b'\\x80"),
        ("x.npy", pickle.dumps(Trap()), "expected a .npy file"),
        (
            "x.npz",
            zipped(saved(PIXELS), method=zipfile.ZIP_LZMA),
            "compressed by method 14, expected deflate",
        ),
        ("x.npz", zipped(saved(PIXELS), method=zipfile.ZIP_BZIP2), "compressed by method 12, expected"),
        ("x.npz", lying(saved(PIXELS), size=20), r"\[x\]|not a whole"),
        ("x.npz", lying(saved(PIXELS), compressed=1), r"\[x\]|not a whole"),
        (
            "x.npz",
            lying(npy(described((2**40, 1))), compressed=2**31),
            r"no more than|Overlapped",
        ),
        ("x.npz", zipped(b"", "x.npy"), r"\[x\]: not a .npy header"),
        ("x.npz", zipped(b"", "../../x.npy"), "arrays .*expected one of x"),
        ("x.npz", zipped(b"", "a\nb.npy"), r"arrays \['a\\nb'\]"),
        ("x-ubyte", idx(2**32 - 1, 2**32 - 1, 2**32 - 1, data=b"1"), "truncated: .* no more than"),
        ("x-ubyte", idx(*[1] * 40, data=b"1"), "40 dimensions, expected at most 32"),
        ("x-ubyte", idx(1, dims=255), "truncated within its header, expected 255 dimensions"),
        ("x-ubyte", b"\0\0\x08\0", "magic number 0x00000800"),
        ("x.gz", bz2.compress(idx(3, 4, data=bytes(12))), r"begins with b'BZh9'"),
        ("x.gz", b"\x1f\x8b", "not a whole gzip file"),
        ("x.gz", gzip.compress(b""), "magic number 0x, expected IDX"),
        ("x.gz", gzip.compress(gzip.compress(idx(3, 4, data=bytes(12)))), "magic number 0x1f8b"),
        ("a\nb\x1b[2J.npy", b"", r"a\\nb\\x1b\[2J.npy: begins with b''"),
        ("a\udcff.npy", b"", r"a\\udcff.npy: begins with b''"),
        ("x" * 240 + ".npy", b"", "begins with"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(path)
    line = str(caught.value)
    assert str(tmp_path) in line
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize("descr", ["|u1", ">f4", "<f8", ">f8", ">f2", "|b1"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("pack", [bytes, zipped], ids=["npy", "npz"])
def test_unusual_layouts_are_read_right(tmp_path: Path, descr: str, fortran: bool, pack: object) -> None:
    array = (np.arange(24).reshape(4, 2, 3) % 2).astype(descr)
    content = saved(np.asfortranarray(array) if fortran else array)
    path = tmp_path / "x.npy"
    path.write_bytes(pack(content))  # type: ignore[operator]
    source = open_source(path) if pack is bytes else open_source(path.rename(tmp_path / "x.npz"))
    assert np.array_equal(source.x, array.astype(float) * (255 if descr == "|b1" else 1))


@pytest.mark.parametrize("compressed", [None, 2**31, 2**32 - 1])
@pytest.mark.parametrize("size", [2**31, 2**32 - 1])
def test_a_directory_that_promises_more_changes_nothing(
    tmp_path: Path, compressed: int | None, size: int
) -> None:
    (tmp_path / "x.npz").write_bytes(lying(saved(PIXELS), compressed=compressed, size=size))
    try:
        assert np.array_equal(open_source(tmp_path / "x.npz").x, PIXELS)
    except DataError as error:  # of newer versions of zipfile
        assert compressed is not None and "Overlapped entries" in str(error)  # noqa: PT017, PT018


def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (tmp_path / "pipe.npy", Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(DataError, match=r"not a regular file|begins with"):
            open_source(path)
    with pytest.raises(DataError, match=r"null|No such file"):
        open_source("a\0b.npy")
    with pytest.raises(DataError, match="name too long"):
        open_source("x" * 300)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="symbolic links"):
        open_source(tmp_path / "loop")


def test_labels_and_gaps_that_would_be_garbage() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(DataError, match="label 18446744073709551615, expected one that fits into int64"):
        as_source((x, np.array([0, 2**64 - 1], np.uint64)))
    with pytest.raises(DataError, match="a masked array, expected one without gaps"):
        as_source(np.ma.masked_equal(x, 1))


def deflated_zeros(size: int) -> bytes:
    """A deflate stream of `size` zeros, 16 MiB at a time, which are compressed once."""
    step = 1 << 24
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(step)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return block * (size // step)


def bomb_npz(path: Path, header: bytes, size: int) -> None:
    """A deflate bomb behind a .npy header; its directory tells the truth but for the checksum."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = compressor.compress(header) + compressor.flush(zlib.Z_FULL_FLUSH)
    stream = start + deflated_zeros(size) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    fields = struct.pack("<HHHHIIIHH", 20, 0, 8, 0, 0, len(stream), len(header) + size, 5, 0)
    local = b"PK\x03\x04" + fields + b"x.npy" + stream
    central = b"PK\x01\x02\x14\x00" + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"x.npy"
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def test_memory_is_taken_for_what_is_there(tmp_path: Path) -> None:
    """Bombs and lies under a limit of memory, and what they took of it."""
    million = 1 << 20
    zeros = gzip.compress(bytes(64 * million), 9)
    bombs = {
        "promised.gz": gzip.compress(idx(1024, million)) + zeros * 16,
        "more than promised.gz": gzip.compress(idx(1, 16)) + zeros * 16,
        "less than promised.gz": gzip.compress(idx(600, million)) + zeros,
        "lie.npy": npy(described((2**40, 784))),
        "header.npy": NPY + b"\x02\x00" + struct.pack("<I", 2**32 - 1),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    bomb_npz(tmp_path / "promised.npz", npy(described((1024, million))), 1024 * million)
    bomb_npz(tmp_path / "more.npz", npy(described((1, 16))), 1024 * million)
    bomb_npz(tmp_path / "header.npz", NPY + b"\x02\x00" + struct.pack("<I", 2**30), 1024 * million)
    sparse_file = tmp_path / "fortran.npy"  # of zeros that take no room on the disk
    sparse_file.write_bytes(npy(described((1024, million), fortran=True)))
    os.truncate(sparse_file, sparse_file.stat().st_size + 1024 * million)
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    output = run_python(f"""
        import json, resource
        from pathlib import Path
        from fastvae.data import DataError, open_source

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = []
        for path in {paths!r}:
            try:
                open_source(path)
            except DataError as error:
                lines.append(str(error))
        print(json.dumps([lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
    """)
    lines, kilobytes = json.loads(output)
    assert [line.split(":")[0].split("[")[0] for line in lines] == paths
    assert kilobytes < 150 << 10  # the 64 MiB that are really there, and room to read them


@pytest.mark.parametrize(
    "item_shape", [[], [7], [6, 0], [-2, -3], [2**62, 4, 6], [2**63 - 1, 3], [-(2**63), 2], [2**32, 2**32, 6]]
)
def test_an_item_shape_is_that_of_the_rows(item_shape: list[int]) -> None:
    x = np.zeros((4, 6), np.uint8)
    with pytest.raises(ValueError, match="expected the 6 features of a row"):
        _native.DenseRows(x, item_shape=item_shape, channels_last=False)
