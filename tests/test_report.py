"""`fastvae report`: what the page says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import ABSENT, PATH, Browser, browser
from digits import validation

from fastvae import VAE, load
from fastvae.cli import main
from fastvae.inference import report
from fastvae.inference.generate import sample
from fastvae.inference.report import charts, tables
from fastvae.inference.report.record import RunRecord

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = """<script>alert(1)</script>"'&$\\frac{{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def runs(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on the digits: two finished, and one that ended before its time and knows hostile words."""
    small = train("--epochs 2 --hidden 16 --latent-dim 4 --batch-size 256", "small")
    options = "--epochs 3 --model conv --latent-dim 2 --beta 4 --batch-size 256 --no-report"
    other = train(options, "other")
    ended = tmp_path_factory.mktemp("runs") / "ended <b>&"
    shutil.copytree(small, ended)
    for name in ("summary.json", "model.safetensors", "report.html", "samples.png", "reconstructions.png"):
        (ended / name).unlink()
    options = (ended / "train.toml").read_text()
    (ended / "train.toml").write_text(options.replace("epochs = 2", "epochs = 9"))
    with (ended / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "val_l')
    return {"small": small, "other": other, "ended": ended}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of the run that ended early, and that of all three."""
    folder = tmp_path_factory.mktemp("pages")
    assert main(["report", str(runs["ended"]), "--out", str(folder / "one.html")]) == 0
    assert main(["report", *map(str, runs.values()), "--out", str(folder / "three.html")]) == 0
    return {"one": folder / "one.html", "three": folder / "three.html"}


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    if PATH is None:
        pytest.skip(ABSENT)
    with browser() as window:
        yield window


def _report(out: Path, *folders: Path) -> str:
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out.read_text()


def test_a_training_ends_with_its_report(runs: dict[str, Path], tmp_path: Path) -> None:
    drawn = (runs["small"] / "report.html").read_text()
    assert len(drawn) < 1_000_000
    assert not (runs["other"] / "report.html").exists()
    again = _report(tmp_path / "again.html", runs["small"])
    pattern = r"<footer>.*</footer>"  # which has the time
    assert re.sub(pattern, "", again) == re.sub(pattern, "", drawn)


def test_the_page_holds_what_the_run_says(runs: dict[str, Path]) -> None:
    text = (runs["small"] / "report.html").read_text()
    summary = json.loads((runs["small"] / "summary.json").read_text())
    for value in (f"{summary['val_loss']:.4f}", f"{summary['parameters']:,}", summary["versions"]["torch"]):
        assert f">{value}<" in text
    titles = ("Loss", "Reconstruction term", "KL term", "KL by dimension", "Throughput", "Samples",
              "Reconstructions", "Traversals", "Latent space", "Configuration", "Environment")  # fmt: skip
    for title in titles:
        assert f">{title}<" in text
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)="(?!data:|#)[^"]*""", text)
    assert "http://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)


def test_what_is_shown_is_what_the_model_makes(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures' tiles are decode_mean at their z, and the points are posterior means."""
    drawn: list[torch.Tensor] = []
    points: list[np.ndarray] = []
    monkeypatch.setattr(report.pictures, "_uri", lambda *x, columns=8: drawn.extend(x) or "data:,")
    monkeypatch.setattr(charts, "scatter", lambda p, *rest: points.append(p) or "")
    model = load(runs["other"])
    x = validation(0)
    kl = json.loads((runs["other"] / "summary.json").read_text())["kl_by_latent"]
    pictures = report.draw(model, [x[:100], x[100:]], seed=5, kl_by_latent=kl)
    mu = model.encode(x)[0].detach()
    order = [j for j in sorted(range(2), key=lambda j: -kl[j]) if kl[j] >= 0.01] or [0, 1]
    assert [t.name for t in pictures.traversals] == [f"z{j}" for j in order]
    for tiles, j in zip(drawn, order, strict=False):
        z = mu[:1].repeat(9, 1)
        z[:, j] = torch.linspace(-3, 3, 9)
        torch.testing.assert_close(tiles, model.decode_mean(z).detach(), atol=1e-5, rtol=0)
    samples, shown, x_hat = drawn[len(order) :]
    torch.testing.assert_close(samples, sample(model, 40, seed=5))
    torch.testing.assert_close(shown, x[:16])
    torch.testing.assert_close(x_hat, model.decode_mean(mu[:16]).detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(points[0], mu.numpy(), atol=1e-5)


def test_several_runs_are_compared(pages: dict[str, Path]) -> None:
    text = pages["three"].read_text()
    configuration = text[text.index("<h2>Configuration") : text.index("<h2>Environment")]
    marked = re.findall(r'<tr class="differs"><th scope="row">([^<]*)', configuration)
    assert set(marked) == {"model", "hidden", "latent dim", "beta", "epochs"}
    assert re.findall(r'<th scope="row">([^<]*)', configuration)[: len(marked)] == marked
    assert "of different kinds" in text  # the losses, as beta differs
    loss = text[text.index(">Loss<") : text.index(">Reconstruction term<")]
    assert all(f"var(--s{i})" in loss for i in range(3))


def test_a_run_of_the_trainer_is_finished_too(tmp_path: Path) -> None:
    """Which leaves no summary."""
    for name in ("metrics.jsonl", "model.safetensors"):
        (tmp_path / name).touch()
    assert report.read_run(tmp_path).status == "finished after 0 epochs"
    (tmp_path / "model.safetensors").unlink()
    assert report.read_run(tmp_path).status == "not finished: 0 epochs"


def test_a_run_without_validation_data_is_shown() -> None:
    """Of the trainer, whose rows then have neither val_loss nor kl_by_latent."""
    history = [{"epoch": epoch, "step": epoch, "train_loss": 2.0 / epoch} for epoch in (1, 2)]
    text = report.html([RunRecord("one", finished=True, history=history)], version="0")
    assert "finished after 2 epochs" in text
    assert "KL by dimension" not in text


def test_equal_runs_have_no_differences_and_names_of_their_own() -> None:
    run = RunRecord("same", options={"beta": 1.0}, summary={"val_loss": 2.0})
    text = report.html([run, run], version="0")
    assert "of different kinds" not in text
    assert 'class="differs"' not in text
    assert ">same (1)<" in text
    assert ">same (2)<" in text


def test_an_evaluation_is_shown_with_its_errors_and_notes() -> None:
    figures = {
        "data": "digits (test)", "n_data": 1797, "elbo": -12.5, "elbo_monte_carlo_error": 0.0123,
        "elbo_data_error": 0.5, "kl_by_latent": [1.0], "active_units": 3, "notes": ["beta <b>"],
    }  # fmt: skip
    text = report.html([RunRecord("one", evaluation=figures), RunRecord("two")], version="0")
    assert "<td>-12.5000 (± 0.012 Monte Carlo, ± 0.5 over data)</td><td>–</td>" in text  # noqa: RUF001
    assert ">1,797<" in text
    assert "one: beta &lt;b&gt;" in text
    other = report.html([RunRecord("one", evaluation={"fid": {"train": 3.5, "test": [1, 2]}})], version="0")
    assert '<th scope="row">fid, train</th><td>3.5</td>' in other
    assert '<th scope="row">fid, test</th><td>1, 2</td>' in other


def test_the_best_is_marked_where_it_means_the_same() -> None:
    same = {"data": "digits", "likelihood": "mse", "beta": 1.0, "seed": 0, "val": 0.1}
    losses = (3.0, 2.0, None)
    runs = [RunRecord("run", options=same, summary={"val_loss": loss, "test_loss": loss}) for loss in losses]

    def best(runs: list[RunRecord]) -> dict[str, tuple[bool, ...]]:
        return {row.label: row.best for row in tables.results(runs)}

    found = best(runs)
    assert found["validation loss, nats"] == found["test loss at beta = 1, nats"] == (False, True, False)
    runs[0] = RunRecord("run", options={**same, "beta": 4.0}, summary=runs[0].summary)
    found = best(runs)
    assert found["validation loss, nats"] == (False, False, False)
    assert found["test loss at beta = 1, nats"] == (False, True, False)


def test_a_run_that_ended_early_is_shown_as_far_as_it_came(pages: dict[str, Path]) -> None:
    """With the weights of its best epoch, and its name as text only."""
    text = pages["one"].read_text()
    assert "<h1>ended &lt;b&gt;&amp;</h1>" in text
    assert "not finished: 2 epochs of 9" in text
    assert "metrics.jsonl, line 3: cut off" in text
    assert text.count("data:image/") > 5


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_at_its_beginning(runs: dict[str, Path], rows: int, tmp_path: Path) -> None:
    """No epoch has ended, or one: with neither weights nor data there are charts and a reason."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.toml").write_text(f"data = {json.dumps(HOSTILE)}\nmodel = {json.dumps(HOSTILE)}\n")
    first = (runs["small"] / "metrics.jsonl").read_text().splitlines(keepends=True)[:rows]
    (run / "metrics.jsonl").write_text("".join(first))
    text = _report(tmp_path / "page.html", run)
    assert ("No epoch has ended yet" in text) == (rows == 0)
    assert ("<svg" in text) == (rows == 1)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "$\\frac{{ 7 * 7 }}" in text
    assert "No new pictures: " in text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = [
        {"epoch": i, "val_loss": loss, "train_loss": loss, "kl_by_latent": [0.1, 2.0]}
        for i, loss in enumerate((float("inf"), 1.0, float("nan"), None, 2.0, 1.5), 1)
    ]
    page = report.html([RunRecord("run", history=rows)], version="0")
    assert re.search(r">\s*2\.0<", page)
    assert "nan" not in re.sub(r"data:image[^\"']*", "", page).lower().replace("nance", "")


def test_a_model_of_ones_own_is_drawn_where_it_is_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["small"], run)
    config = json.loads((run / "config.json").read_text())
    own = {"architecture": "mine:Mine", "item_shape": config["item_shape"], "latent_shape": [4]}
    (run / "config.json").write_text(json.dumps({**own, "likelihood": "gaussian", "variance": "learned"}))
    options = re.sub(r"hidden = \[.*?\]\n", "", (run / "train.toml").read_text(), flags=re.DOTALL)
    (run / "train.toml").write_text(options.replace('model = "mlp"', 'model = "mine:Mine"'))
    (run / "metrics.jsonl").write_text("")  # charts take time
    text = _report(tmp_path / "page.html", run)
    assert "name it with --model mine:Mine" in text
    assert "Traversals" not in text
    (tmp_path / "mine.py").write_text(
        "import fastvae\ndef Mine(item_shape, latent_dim):\n"
        "    return fastvae.VAE.mlp(item_shape, (16,), latent_dim, likelihood='gaussian')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run", "--model", "mine:Mine", "--out", "page.html"]) == 0
    assert "Traversals" in (tmp_path / "page.html").read_text()


def test_it_says_which_data_it_shows(
    runs: dict[str, Path], typed: Callable[..., str], tmp_path: Path
) -> None:
    assert "Posterior means of the validation data" in (runs["small"] / "report.html").read_text()
    typed("report", runs["small"], "--split", "train", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Posterior means of digits (training)" in text
    assert "validation data" not in text
    assert "got test, but digits has none" in typed("report", runs["small"], "--split", "test", status=2)


def test_errors_are_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in (
        ([tmp_path], "no train.toml and no metrics.jsonl there, expected a run of fastvae train"),
        ([runs["small"], "--out", tmp_path / "absent" / "page.html"], "--out: got"),
        ([runs["small"], "--data", "nowhere"], "no dataset or path named 'nowhere'"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert expected in captured.err
        assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_does_not_lose_the_run(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(report, "draw", fail)
    run = train("--epochs 1 --hidden 8")
    captured = capsys.readouterr()
    again = f"the run is whole; to draw it again: fastvae report {run}"
    assert captured.err == f"fastvae: warning: no report: RuntimeError: no fonts; {again}\n"
    assert "report:" not in captured.out
    assert (run / "summary.json").is_file()
    assert not (run / "report.html").exists()


def test_large_pictures_stay_small(seed: int) -> None:
    """Colour, noise, many latents: what compresses worst."""
    model = VAE.mlp((3, 64, 64), (8,), 300)
    pictures = report.draw(model, [torch.rand(20, 3, 64, 64)])
    uris = [pictures.samples, pictures.reconstructions, *(t.picture for t in pictures.traversals)]
    assert sum(len(uri or "") for uri in uris) < 1_500_000
    assert len(pictures.traversals) == 8


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_any_number_of_latents_is_scattered(latent_dim: int, seed: int) -> None:
    pictures = report.draw(VAE.mlp((6,), (4,), latent_dim), [(torch.rand(9, 6), torch.arange(9) % 3)])
    assert "<image" in str(pictures.latents)
    assert [name for _, name in pictures.labels] == ["0", "1", "2"]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_it_whole(page: Browser, pages: dict[str, Path], width: int, dark: bool) -> None:
    """It asks for nothing, complains of nothing, decodes each picture, and is no wider than the window."""
    for path in pages.values():
        page.open(path, width, dark=dark)
        assert [url for url in page.requests if not url.startswith("data:")] == [path.as_uri()]
        assert page.complaints == []
        sizes = page.evaluate(
            "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.width])))"
        )
        assert len(sizes) > 5
        assert all(natural > 50 and shown > 50 for natural, shown in sizes)
        charts_shown = page.evaluate(
            "[...document.querySelectorAll('figure svg')]"
            ".map(s => [s.clientWidth, s.querySelectorAll('path').length])"
        )
        assert len(charts_shown) >= 8
        assert all(wide > 200 and paths > 5 for wide, paths in charts_shown)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colors = page.evaluate(
            "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
            ".map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3)"
        )
        assert (colors[0] < colors[1]) == dark
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


def test_the_browser_would_tell(page: Browser, tmp_path: Path) -> None:
    """Of a request, of a broken picture, and of an error."""
    (tmp_path / "page.html").write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>throw Error('so')</script>"
    )
    page.open(tmp_path / "page.html", 600)
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert any("so" in complaint for complaint in page.complaints)
    assert page.evaluate("document.images[0].naturalWidth") == 0


def test_a_curve_that_stays_at_zero_goes_up_to_one() -> None:
    """As of active units, and not to a twentieth of one."""
    for y, top in ((0, "1.0"), (3, "3.0")):
        drawn = charts.lines([charts.Curve([1, 2], [0, y], 0)], "latents", from_zero=True)
        assert re.findall(r">([\d.]+)</text>", drawn)[-1] == top
