"""What a fuzzer of the data files needs: whole files to begin with, ways to damage them, and what may be.

`tests/test_fuzz.py` damages them at random. `python tests/fuzzing.py -max_total_time=600`, with options of
libFuzzer, lets Google's atheris (`pip install atheris`) look for what is not covered yet.
"""

from __future__ import annotations

import gzip
import inspect
import io
import math
import random
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastvae.data import DataError, DataLoader, Source, open_source, sources, sparse

NUMBERS = [-1, 0, 1, 2, 3, 127, 128, 255, 256, 2**15, 2**16 - 1]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, -(2**63)]
WORDS = [
    *(
        b"shape",
        b"descr",
        b"fortran_order",
        b"|O",
        b"<f8",
        b">u2",
        b"V0",
        b"(",
        b"[",
        b"{",
        b"True",
        b"9" * 40,
    ),
    *(
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"\x1f\x8b\x08",
        b"\x93NUMPY",
        b"\0\0\x08\x03",
        b"\n",
        b"\0",
    ),
]


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def idx(array: np.ndarray, code: int) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, method)
    return stream.getvalue()


PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
FLOATS = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)
COUNTS = {
    "data": npy(np.array([1, 2, 3], np.int32)),
    "indices": npy(np.array([0, 4, 2], np.int32)),
    "indptr": npy(np.array([0, 2, 2, 3], np.int32)),
    "shape": npy(np.array([3, 5])),
    "format": npy(np.array(b"csr")),
}
NPY = [npy(PIXELS), npy(FLOATS), npy(FLOATS.astype(">f8")), npy(np.asfortranarray(FLOATS)), npy(PIXELS > 5),
       npy(FLOATS.astype(np.float16), (2, 0)), npy(np.arange(4)), npy(PIXELS, (3, 0))]  # fmt: skip
IDX = [idx(PIXELS, 0x08), idx(FLOATS, 0x0D), idx(FLOATS.astype(np.float64), 0x0E)]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes after one to four accidents."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(8):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + draw.randint(1, 16)]
            case 4:
                data[at:at] = draw.randbytes(draw.randint(1, 16))
            case 5:
                data[at:at] = data[at : at + draw.randint(1, 64)]
            case 6:
                size, order = draw.choice([2, 4, 8]), draw.choice(["little", "big"])
                number = draw.choice(NUMBERS) % 2 ** (8 * size)
                data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
            case _:
                word = draw.choice(WORDS)
                data[at : at + draw.choice([0, len(word)])] = word
    return bytes(data)


def some_file(draw: random.Random) -> tuple[str, bytes]:
    """A name and a damaged file: outside, or within what is compressed, so that its checksum is right."""

    def maybe(content: bytes) -> bytes:
        return damaged(content, draw) if draw.random() < 0.5 else content

    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    kinds: list[Callable[[], tuple[str, bytes]]] = [
        lambda: ("x.npy", damaged(draw.choice(NPY), draw)),
        lambda: ("x-ubyte", damaged(draw.choice(IDX), draw)),
        lambda: ("x.gz", maybe(gzip.compress(damaged(draw.choice(IDX), draw), 1))),
        lambda: ("x.npz", maybe(npz({"x": maybe(draw.choice(NPY)), "y": maybe(npy(np.arange(4)))}, method))),
        lambda: ("x.npz", maybe(npz({name: maybe(part) for name, part in COUNTS.items()}, method))),
        lambda: ("x.npz", npz({name: numbers(name, draw) for name in COUNTS}, method)),
    ]
    return draw.choice(kinds)()


def numbers(name: str, draw: random.Random) -> bytes:
    """A part of a CSR matrix with other numbers in it, in a file that is whole."""
    if draw.random() < 0.5 or name == "format":
        return COUNTS[name]
    array = np.load(io.BytesIO(COUNTS[name]))
    dtype = draw.choice([np.int8, np.int32, np.int64, np.uint64, np.float32, np.float64])
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(dtype)
        for _ in range(draw.randint(0, 2)):
            array[draw.randrange(len(array))] = np.array(draw.choice(NUMBERS)).astype(dtype)
    if draw.random() < 0.2:
        array = array[: draw.randrange(len(array) + 1)]
    return npy(array)


def read(path: Path) -> bool:
    """Whether the file opens; what opens gives batches of finite numbers, and nothing else than an error that
    says so may come of it."""
    try:
        source = open_source(path)
    except OSError:
        return False
    except DataError as error:
        refusal = str(error)
    else:
        return delivers_numbers(source)
    assert refusal.isprintable(), refusal
    assert str(path) in refusal, refusal
    return False


def delivers_numbers(source: Source) -> bool:
    """True, without looking where a batch takes gigabytes."""
    if math.prod(source.item_shape) > 1e6:
        return True
    for batch in DataLoader(source, 3, shuffle=True, num_workers=0):
        x = batch[0] if isinstance(batch, tuple) else batch
        assert x.isfinite().all()
    return True


def main() -> None:
    """Atheris on all kinds of files, by their name's end."""
    import atheris

    # one by one, since atheris's own loaders know nothing of an editable install
    for module in (sources, sparse, zipfile, gzip):
        owners = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
        for owner in (
            owner for owner in owners if getattr(owner, "__module__", module.__name__) == module.__name__
        ):
            for function in filter(inspect.isfunction, vars(owner).values()):
                atheris.instrument_func(function)
    folder = Path(tempfile.mkdtemp())
    names = ["x.npy", "x.npz", "x-ubyte", "x.gz"]
    corpus = folder / "corpus"
    corpus.mkdir()
    draw = random.Random(0)
    for i in range(500):
        name, content = some_file(draw)
        (corpus / str(i)).write_bytes(bytes([names.index(name)]) + content)

    def one(data: bytes) -> None:
        path = folder / names[data[0] % len(names)] if data else folder / "x"
        path.write_bytes(data[1:])
        read(path)

    warnings.simplefilter("error")
    atheris.Setup([*sys.argv, "-rss_limit_mb=4096", "-timeout=20", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
