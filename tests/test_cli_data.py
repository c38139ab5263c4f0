"""`fastvae data list` and `fetch` as a user types them, against a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvae.cli import main
from fastvae.data import datasets
from fastvae.data.datasets import REMOTES
from fastvae.training.signals import SIGNALS

FILES = list(REMOTES["mnist"].md5)


@dataclass
class Server:
    """Files over HTTP: those in `cut` end early, with the length that they should have had or without."""

    url: str = ""
    content: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, bool] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    said = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            said.asked.append(name)
            if name not in said.content:
                self.send_error(404)
                return
            content = said.content[name]
            self.send_response(200)
            if said.cut.get(name, True):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in said.cut else content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        said.url = f"http://127.0.0.1:{http.server_port}/mnist/"
        for name in FILES:
            n, dims = (6, (5, 4)) if "images" in name else (6, ())
            header = struct.pack(f">BBBB{1 + len(dims)}I", 0, 0, 8, 1 + len(dims), n, *dims)
            size = n * 20 if dims else n
            said.content[name] = gzip.compress(header + os.urandom(size), mtime=0)
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in said.content.items()}
        monkeypatch.setitem(REMOTES, "mnist", replace(REMOTES["mnist"], url=said.url, md5=md5))
        yield said
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no installed packages, and no proxy."""
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, remote in REMOTES.items():
        monkeypatch.setitem(REMOTES, name, replace(remote, installed=()))
    return tmp_path / "cache" / "fastvae"


def rows(printed: str) -> dict[str, list[str]]:
    return {line.split("  ")[0]: re.split(r"  +", line) for line in printed.splitlines()}


def test_list(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    shown = rows(capsys.readouterr().out)
    assert list(shown) == ["NAME", "fashion-mnist", "mnist", "digits", "shapes"]
    assert shown["mnist"][1:] == ["60,000", "10,000", "1 x 28 x 28", "not here: fastvae data fetch mnist"]
    assert shown["fashion-mnist"][-1] == (
        "not here: fastvae data fetch fashion-mnist or apt install dataset-fashion-mnist"
    )
    assert shown["digits"][1:4] == ["1,797", "-", "1 x 8 x 8"]
    assert shown["shapes"][1:4] == ["737,280", "-", "1 x 64 x 64"]
    assert (server.asked, cache.exists()) == ([], False)
    assert main(["data", "fetch", "mnist"]) == 0
    capsys.readouterr()
    main(["data", "list"])
    assert rows(capsys.readouterr().out)["mnist"][-1] == str(cache / "mnist")
    (cache / "mnist" / FILES[2]).unlink()
    main(["data", "list"])
    incomplete = f"{cache / 'mnist'}, incomplete: fastvae data fetch mnist"
    assert rows(capsys.readouterr().out)["mnist"][-1] == incomplete


def test_fetch(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "mnist"]) == 0
    assert capsys.readouterr().out == f"mnist: {cache / 'mnist'}\n"
    assert server.asked == FILES
    assert {path.name: path.read_bytes() for path in (cache / "mnist").iterdir()} == server.content
    assert datasets.resolve("mnist").train.n_samples == 6
    assert main(["data", "fetch", "mnist"]) == 0
    assert server.asked == FILES


@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_download_that_is_interrupted(
    server: Server, cache: Path, capsys: pytest.CaptureFixture[str], says_its_length: bool
) -> None:
    server.cut[FILES[1]] = says_its_length
    assert main(["data", "fetch", "mnist"]) == 2
    error = capsys.readouterr().err
    half, whole = len(server.content[FILES[1]]) // 2, len(server.content[FILES[1]])
    ended = f"ended after {half} of {whole} bytes; try again"
    assert (ended if says_its_length else "damaged or another file, try again") in error
    assert (FILES[1] in error, error.count("\n")) == (True, 1)
    assert [path.name for path in (cache / "mnist").iterdir()] == FILES[:1]
    server.cut.clear()
    assert main(["data", "fetch", "mnist"]) == 0
    assert server.asked == [*FILES[:2], *FILES[1:]]


def test_a_download_that_is_corrupt(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.content[FILES[0]] = server.content[FILES[0]][:-1] + b"?"
    assert main(["data", "fetch", "mnist"]) == 2
    assert re.search(r"train-images.*: MD5 \w{32}, expected \w{32}; damaged", capsys.readouterr().err)
    assert list((cache / "mnist").iterdir()) == []


def test_a_server_without_the_file(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del server.content[FILES[0]]
    assert main(["data", "fetch", "mnist"]) == 2
    error = capsys.readouterr().err
    assert "mnist: could not be fetched from http://127.0.0.1" in error
    assert "404" in error


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_download(
    server: Server,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    copy = datasets._copy

    def signalled(*arguments: object) -> str:
        os.kill(os.getpid(), number)
        return copy(*arguments)

    monkeypatch.setattr(datasets, "_copy", signalled)
    with pytest.raises(SystemExit) as ended:
        main(["data", "fetch", "mnist"])
    assert ended.value.code == 128 + number
    assert "fastvae: stopped by SIG" in capsys.readouterr().err
    assert list((cache / "mnist").iterdir()) == []


def test_names_that_need_no_download_or_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "digits"]) == 0
    assert capsys.readouterr().out == "digits: nothing to fetch: a part of scikit-learn\n"
    assert main(["data", "fetch", "fashion"]) == 2
    assert "no dataset named 'fashion', expected fashion-mnist, mnist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "fetch", "pack", "verify"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", command, "--help"])
    assert ended.value.code == 0
    assert f"usage: fastvae data {command}" in capsys.readouterr().out


def test_a_misspelt_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", "a", "b.npy", "--on-eror", "skip"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "fastvae: error: --on-eror: no such option; did you mean --on-error?\n"
