"""The commands that look at a run, as a user types them: their pictures show what they must."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import digits
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastvae import VAE, load
from fastvae.cli import main
from fastvae.data.datasets import REMOTES
from fastvae.inference import (
    decode,
    fit_mixture,
    interpolation,
    prior_quantiles,
    quantile_grid,
    sample,
    traversal,
)
from fastvae.inference.plots import CAPTION, GAP, ROW_GAP, ROW_LABEL
from fastvae.inference.projection import principal_plane, strips, tsne
from fastvae.inference.scatter import picture, scatter

SEED, LATENTS = 5, 4
TILE = 80  # of 8 x 8 pixels


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    return train(f"--epochs 8 --lr 1e-2 --hidden 32 --latent-dim {LATENTS} --seed {SEED} --no-report")


@pytest.fixture
def model(run: Path) -> VAE:
    return load(run)


@pytest.fixture
def look(run: Path, tmp_path: Path, monkeypatch, typed: Callable[..., str]) -> Callable[..., str]:
    """Runs a command on the run, in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    return lambda command, *options, status=0: typed(command, run, *options, status=status)


@pytest.fixture(scope="module")
def validation() -> Tensor:
    return digits.validation(SEED)


def mean(model: VAE, z: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode_mean(z)


def cells(
    picture: str | Path | Image.Image, rows: int, columns: int, *, left=GAP, top=GAP, gap=GAP, tile=TILE
) -> np.ndarray:
    """The tiles of a grey picture as 8 x 8 pixels in [0, 1]: [rows, columns, 1, 8, 8]."""
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    pixels = np.asarray(picture.convert("L")) / 255
    found = np.empty((rows, columns, 1, 8, 8))
    for i in range(rows):
        for j in range(columns):
            y, x = top + i * (tile + gap), left + j * (tile + gap)
            cell = pixels[y : y + tile, x : x + tile].reshape(8, tile // 8, 8, tile // 8)
            assert np.ptp(cell, axis=(1, 3)).max() == 0
            found[i, j, 0] = cell[:, 0, :, 0]
    return found


def assert_shows(found: np.ndarray, x: Tensor) -> None:
    """To half a level of grey, and the rounding of other batch sizes."""
    np.testing.assert_allclose(found, x.reshape(found.shape).clamp(0, 1), atol=0.51 / 255)


def test_sample(run: Path, model: VAE, look) -> None:
    printed = look("sample", "--n", 24, "--temperature", 0.7, "--seed", 3)
    assert printed == f"{run}/sample.png: 24 draws of the prior at temperature 0.7\n"
    z = 0.7 * torch.randn(24, LATENTS, generator=torch.Generator().manual_seed(3))
    assert_shows(cells(run / "sample.png", 3, 8), mean(model, z))


def test_samples_are_the_same_whatever_is_torchs_default_device(model: VAE) -> None:
    for draw in (lambda: sample(model, 3), lambda: model.sample(3, seed=0)):
        expected = draw()
        with torch.device("meta"):
            assert torch.equal(draw(), expected)


def test_samples_repeat_whatever_the_batches(look) -> None:
    options = ("--n", 30, "--format", "npy")
    for seed, size in ((5, 7), (5, 256), (6, 256)):
        for noise in ((), ("--draw-x",)):
            out = f"{seed}-{size}-{len(noise)}.npy"
            look("sample", *options, "--seed", seed, "--batch-size", size, *noise, "--out", out)
    look("sample", *options, "--out", "run-seed.npy")
    for noise in (0, 1):
        few, all_, other = (np.load(f"{name}-{noise}.npy") for name in ("5-7", "5-256", "6-256"))
        assert few.shape == (30, 1, 8, 8)
        assert few.dtype == np.float32
        np.testing.assert_allclose(few, all_, atol=1e-5)
        assert np.abs(all_ - other).max() > 0.01
    np.testing.assert_array_equal(np.load("run-seed.npy"), np.load("5-256-0.npy"))
    assert np.abs(np.load("5-256-0.npy") - np.load("5-256-1.npy")).max() > 0.01


def test_sample_from_the_aggregate_posterior(model: VAE, look, validation) -> None:
    printed = look("sample", "--from", "posterior", "--n", 2000, "--out", "x.npy")
    assert "2,000 draws of 10 Gaussians fitted to the posteriors of digits (training)" in printed
    look("sample", "--n", 2000, "--out", "prior.npy")
    held_out, x, prior = validation.numpy(), np.load("x.npy"), np.load("prior.npy")
    with torch.no_grad():
        mu, logvar = model.encode(validation)
    z = fit_mixture(mu + (logvar / 2).exp() * torch.randn(mu.shape), components=3).draw(5)
    assert z.shape == (5, LATENTS)
    # nearer to the data than draws of the prior, which this short training is far from
    away = [float(np.square(draws.mean(0) - held_out.mean(0)).sum()) for draws in (x, prior)]
    assert away[0] < away[1]


def test_given_latents(run: Path, model: VAE, look, seed: int) -> None:
    z = torch.randn(11, LATENTS)
    np.save("z.npy", z.double())
    look("sample", "--latents", "z.npy", "--out", "z.png")
    found = cells("z.png", 2, 8).reshape(16, 1, 8, 8)
    assert_shows(found[:11], mean(model, z))
    assert (found[11:] == 1).all()


@pytest.mark.parametrize("which", ["first", "worst", "best"])
def test_reconstruct(run: Path, model: VAE, look, validation, which: str) -> None:
    printed = look("reconstruct", "--n", 12, *([] if which == "first" else [f"--{which}"]))
    assert printed.startswith(f"{run}/reconstruct.png: the {which} 12 of digits (validation)\n")
    with torch.no_grad():
        x_hat = model.decode_mean(model.encode(validation)[0])
    error = (x_hat - validation).square().flatten(1).sum(1)
    order = list(range(180)) if which == "first" else error.argsort(descending=which == "worst").tolist()
    caption = CAPTION if which != "first" else 0
    for half, x in enumerate((validation, x_hat)):
        for row in range(2):
            top = GAP + caption + row * (2 * TILE + GAP + ROW_GAP + caption) + half * (TILE + GAP)
            found = cells(run / "reconstruct.png", 1, 4 if row else 8, top=top)
            assert_shows(found, x[order[8 * row : 8 * row + 8][: found.shape[1]]])
    if which != "first":
        variance = float(model.log_variance.detach().exp())
        term = error[order[0]] / (2 * variance) + 32 * math.log(2 * math.pi * variance)
        index, nats = printed.splitlines()[2].split(": ")
        assert (int(index), float(nats)) == (order[0], pytest.approx(float(term), rel=1e-3))


def kl_order(run: Path) -> list[int]:
    kl = json.loads((run / "summary.json").read_text())["kl_by_latent"]
    return sorted(range(LATENTS), key=lambda latent: -kl[latent])


def test_the_most_used_come_first_without_a_summary_too(run: Path, look, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("summary.json", "checkpoints"))
    assert main(["traverse", str(copy), "--out", "computed.npy"]) == 0
    look("traverse", "--out", "of-summary.npy")
    np.testing.assert_array_equal(np.load("computed.npy"), np.load("of-summary.npy"))
    nan = [math.nan] * LATENTS
    for damaged in (5, [1, 2], *({"kl_by_latent": kl} for kl in (5, [1.0], ["a"] * LATENTS, nan))):
        (copy / "summary.json").write_text(json.dumps(damaged))
        assert main(["traverse", str(copy), "--out", "despite.npy"]) == 0
        np.testing.assert_array_equal(np.load("despite.npy"), np.load("of-summary.npy"))


def test_paths_of_latents_of_any_shape(seed: int) -> None:
    center = torch.randn(2, 3)
    moved = traversal(center, [4, 1], torch.tensor([-1.0, 0.0, 2.0]))
    assert moved.shape == (2, 3, 2, 3)
    expected = center.clone()
    expected[1, 1] += 2
    assert torch.equal(moved[0, 2], expected)
    assert torch.equal(moved[:, 1], center.expand(2, 2, 3))
    grid = quantile_grid(center, (5, 0), 4)
    assert grid.shape == (4, 4, 2, 3)
    assert torch.equal(grid[..., 1:, 1], center[1:, 1].expand(4, 4, 1))
    assert torch.equal(grid[2, :, 1, 2], prior_quantiles(4))


def test_a_run_in_the_place_of_another_has_none_of_its_pictures(tmp_path: Path) -> None:
    options = f"train --data digits --epochs 1 --hidden 8 --no-report --out {tmp_path / 'run'}".split()
    assert main(options) == 0
    assert main(["sample", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "sampled.png").touch()
    assert main([*options, "--overwrite"]) == 0
    assert not (tmp_path / "run" / "sample.png").exists()
    assert (tmp_path / "run" / "sampled.png").exists()


@pytest.mark.parametrize("around", [None, 7])
def test_traverse(run: Path, model: VAE, look, validation, around: int | None) -> None:
    options = [] if around is None else ["--index", around]
    look("traverse", *options, "--range", 2, "--steps", 5)
    center = torch.zeros(LATENTS)
    if around is not None:
        with torch.no_grad():
            center = model.encode(validation[around : around + 1])[0][0]
    z = center.repeat(LATENTS, 5, 1)
    for row, latent in enumerate(kl_order(run)):
        z[row, :, latent] += torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    found = cells(run / "traverse.png", LATENTS, 5, left=GAP + ROW_LABEL, top=GAP + CAPTION)
    assert_shows(found, mean(model, z))
    assert np.ptp(found[0], axis=0).max() > 20 / 255  # the most used latent does something


def test_a_moving_traversal_and_chosen_latents(run: Path, model: VAE, look) -> None:
    look("traverse", "--dims", 3, 1, "--steps", 4, "--out", "t.gif")
    look("traverse", "--dims", 3, 1, "--steps", 4, "--out", "t.npy")
    x = torch.from_numpy(np.load("t.npy"))
    assert x.shape == (2, 4, 1, 8, 8)
    z = torch.zeros(2, 4, LATENTS)
    for row, latent in enumerate(latent for latent in kl_order(run) if latent in (1, 3)):
        z[row, :, latent] = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    torch.testing.assert_close(x, mean(model, z), atol=1e-5, rtol=0)
    with Image.open("t.gif") as gif:
        assert gif.n_frames == 6
        assert gif.info["loop"] == 0
        for frame, step in enumerate((0, 1, 2, 3, 2, 1)):
            gif.seek(frame)
            assert_shows(cells(gif, 1, 2, top=GAP + CAPTION), x[:, step])


def test_the_grid_over_the_quantiles_of_the_prior(run: Path, model: VAE, look) -> None:
    look("traverse", "--grid", "--dims", 2, 0, "--steps", 5)
    normal = torch.distributions.Normal(0.0, 1.0)
    values = normal.icdf(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    found = cells(run / "grid.png", 5, 5, left=0, top=0, gap=0, tile=40)
    z = torch.zeros(5, 5, LATENTS)
    for i in range(5):
        for j in range(5):
            z[4 - i, j, 2], z[4 - i, j, 0] = values[j], values[i]  # the second grows upwards
    assert_shows(found, mean(model, z))
    look("traverse", "--grid", "--out", "most-used.npy")
    first, second = sorted(kl_order(run)[:2])
    grid = mean(model, quantile_grid(torch.zeros(LATENTS), (first, second), 20).flatten(0, 1))
    np.testing.assert_allclose(np.load("most-used.npy").reshape(400, 1, 8, 8), grid, atol=1e-5)


def test_interpolate(run: Path, model: VAE, look, validation) -> None:
    look("interpolate", "--from", 3, 8, "--to", 5, 6, "--steps", 4)
    with torch.no_grad():
        mu, _ = model.encode(validation)
    t = torch.linspace(0, 1, 4).view(1, 4, 1)
    x = mean(model, (1 - t) * mu[[3, 8]].unsqueeze(1) + t * mu[[5, 6]].unsqueeze(1))
    found = cells(run / "interpolate.png", 2, 6, top=GAP + CAPTION)
    assert_shows(found[:, 0], validation[[3, 8]])
    assert_shows(found[:, -1], validation[[5, 6]])
    assert_shows(found[:, 1:-1], x)
    look("interpolate", "--from", 3, "--to", 5, "--steps", 3, "--spherical", "--out", "s.gif")
    z = interpolation(mu[3], mu[5], 3, spherical=True)
    with Image.open("s.gif") as gif:
        assert gif.n_frames == 4
        gif.seek(1)
        assert_shows(cells(gif, 1, 3)[:, 1], mean(model, z[1:2]))


@pytest.mark.parametrize("command", [("traverse", "--dims", 0, 1), ("interpolate", "--from", 3, "--to", 5)])
def test_draws_of_x_on_a_path(model: VAE, look, command: tuple[object, ...]) -> None:
    look(*command, "--steps", 400, "--out", "means.npy")
    for seed in (1, 2):
        look(*command, "--steps", 400, "--draw-x", "--seed", seed, "--out", f"{seed}.npy")
    means, first, second = (np.load(f"{name}.npy") for name in ("means", 1, 2))
    assert first.shape == means.shape
    variance = model.log_variance.exp().item()
    for a, b, of_both in ((first, means, 1), (second, means, 1), (first, second, 2)):
        # of 25,600 values at least: 6 standard errors
        assert abs(np.square(a - b).mean() / (of_both * variance) - 1) < 6 * math.sqrt(2 / a.size)


def test_spherical_paths_keep_their_length(seed: int) -> None:
    a, b = torch.randn(2, 3, 5)
    b = b * a.norm() / b.norm()
    path = interpolation(a, b, 9, spherical=True)
    assert path.shape == (9, 3, 5)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), a.norm().expand(9))
    torch.testing.assert_close(path[[0, -1]], torch.stack((a, b)))
    steps = path.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-4, atol=1e-5)
    for start, end in ((a, a), (a, -a), (torch.zeros(3, 5), b)):  # no angle, any circle, no direction
        straight = interpolation(start, end, 5)
        torch.testing.assert_close(interpolation(start, end, 5, spherical=True), straight)
        assert straight.isfinite().all()


def test_prior_quantiles() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(normal.cdf(prior_quantiles(20)), (torch.arange(20) + 0.5) / 20)


def test_encode_and_decode(model: VAE, look, validation) -> None:
    printed = look("encode", "--batch-size", 50, "--out", "z.npy")
    z = np.load("z.npy", mmap_mode="r")
    with torch.no_grad():
        mu, logvar = model.encode(validation)
    np.testing.assert_allclose(z, mu, atol=1e-5)
    assert (z.dtype, z.shape) == (np.float32, (180, LATENTS))
    std = float(mu.double().std(correction=0))
    figures = printed.splitlines()[1].replace(",", "").replace(";", "").split()
    assert float(figures[4]) == pytest.approx(std, rel=1e-4)
    assert float(figures[6]) == pytest.approx(1 / std, rel=1e-4)
    look("decode", "--latents", "z.npy", "--batch-size", 70, "--out", "x.npy")
    np.testing.assert_allclose(np.load("x.npy"), mean(model, mu), atol=1e-5)

    for size in (50, 180):
        look("encode", "--sample", "--seed", 2, "--batch-size", size, "--out", f"draws-{size}.npy")
    draws = np.load("draws-50.npy")
    np.testing.assert_allclose(draws, np.load("draws-180.npy"), atol=1e-5)
    noise = (draws - mu.numpy()) / (logvar / 2).exp().numpy()
    n = noise.size
    assert abs(noise.mean()) < 6 / math.sqrt(n)
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / n)


def test_what_a_command_reads_is_not_written(run: Path, look) -> None:
    look("encode", "--out", "z.npy")
    np.save("x.npy", np.random.default_rng(0).random((5, 8, 8), np.float32))
    Path("link.npy").symlink_to("z.npy")
    files = [Path("z.npy"), Path("x.npy"), run / "model.safetensors", run / "config.json"]
    before = [file.read_bytes() for file in files]
    for command, out, options in (
        ("decode", "z.npy", ["--latents", "z.npy"]),
        ("decode", "z.npy", ["--latents", "link.npy"]),
        ("sample", "./z.npy", ["--latents", "z.npy"]),
        ("encode", "x.npy", ["--data", "x.npy"]),
        ("reconstruct", "x.npy", ["--data", "x.npy"]),
        ("latents", "x.npy", ["--data", "x.npy"]),
        ("sample", run / "model.safetensors", ["--format", "npy"]),
        ("report", run / "config.json", []),
    ):
        printed = look(command, *options, "--out", out, status=2)
        expected = f"--out: got '{Path(out)}', which the command reads, expected another file"
        assert printed == f"fastvae: error: {expected}\n"
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "bernoulli"])
def test_draws_of_x_have_the_likelihoods_mean_and_variance(likelihood, seed: int) -> None:
    model = VAE.mlp((6,), (5,), 2, likelihood=likelihood, variance=0.3 if likelihood == "gaussian" else None)
    n = 20_000
    z = torch.randn(1, 2).expand(n, 2)
    p = mean(model, z[:1])[0]
    x = torch.cat(list(decode(model, z.split(3000), draw_x=True, seed=seed)))
    variance = {"mse": torch.full((6,), 0.5), "gaussian": torch.full((6,), 0.3), "bernoulli": p * (1 - p)}
    expected = variance[likelihood]
    assert ((x.mean(0) - p).abs() < 6 * (expected / n).sqrt() + 1e-5).all()
    if likelihood == "bernoulli":
        assert set(x.unique().tolist()) == {0.0, 1.0}
    else:
        assert ((x.var(0) / expected - 1).abs() < 6 * math.sqrt(2 / n)).all()
    assert x.T.corrcoef().triu(1).abs().max() < 6 / math.sqrt(n)


def test_the_mixture_is_that_of_the_draws(seed: int) -> None:
    centers = torch.tensor([[-8.0, 0.0], [8.0, 4.0]])
    spread = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    n = 6000
    first = torch.arange(n) < n // 4
    z = centers[(~first).long()] + torch.randn(n, 2) @ spread.T
    draws = fit_mixture(z.reshape(n, 2, 1), components=2, seed=1).draw(n, seed=2)
    assert draws.shape == (n, 2, 1)
    cold = fit_mixture(z, components=2, seed=1).draw(50, temperature=0.0)
    draws = draws.reshape(n, 2)
    of_first = draws[:, 0] < 0
    assert abs(of_first.double().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / n)
    for center, own in ((centers[0], draws[of_first]), (centers[1], draws[~of_first])):
        assert ((own.mean(0) - center).abs() < 12 / math.sqrt(n / 4)).all()
        torch.testing.assert_close(own.T.cov(), spread @ spread.T, atol=12 / math.sqrt(n / 4), rtol=0)
    assert (torch.cdist(cold, centers).amin(1) < 12 / math.sqrt(n / 4)).all()
    assert not of_first[: n // 4].all()  # not one component after the other


def test_what_cannot_be_done_is_said_in_a_line(run: Path, look) -> None:
    np.save("narrow.npy", np.zeros((5, 3), np.float32))
    np.save("integers.npy", np.zeros((5, LATENTS), int))
    Path("text.npy").write_text("no array")
    with_nan = np.zeros((5, LATENTS))
    with_nan[4, 1] = np.nan
    np.save("nan.npy", with_nan)
    for command, options, problem in (
        ("sample", ["--temperature", "-1"], "--temperature: got -1.0, expected a number of at least 0"),
        ("sample", ["--components", 3], "--components: got 3, expected it with --from posterior only"),
        ("sample", ["--latents", "narrow.npy"], "--latents: got narrow.npy of 5 x 3, expected N x 4"),
        ("sample", ["--latents", "integers.npy"], "--latents: got integers.npy of int64"),
        (
            "decode",
            ["--latents", "nan.npy", "--out", "x.npy"],
            "--latents: got nan.npy: 1 value is NaN or infinite, the first nan at [4, 1]",
        ),
        ("sample", ["--latents", "text.npy"], "--latents: got text.npy: not a .npy header"),
        (
            "decode",
            ["--latents", "nowhere.npy", "--out", "x.npy"],
            "--latents: got 'nowhere.npy', which is not there, expected a .npy of fastvae encode",
        ),
        ("sample", ["--latents", "."], "--latents: got '.', which is a folder, expected a .npy"),
        ("decode", ["--latents", "", "--out", "x.npy"], "--latents: got '', which is not there"),
        ("sample", ["--latents", "narrow.npy", "--n", 3], "--n: got 3 with --latents"),
        ("sample", ["--n", 20000], "--n: got 20,000 for a picture, expected at most 10,000; --format npy"),
        ("traverse", ["--dims", 4], f"--dims: got 4, expected 0 to 3, the latents of {run}"),
        ("traverse", ["--grid", "--dims", 1], "--dims: got 1, expected two"),
        ("traverse", ["--index", 180], "--index: got 180, expected 0 to 179, of digits (validation)"),
        ("interpolate", ["--from", 1, 2, "--to", 3], "--to: got 1 data for 2 of --from, expected as many"),
        ("interpolate", ["--from", 1, "--to", 900], "--to: got 900, expected 0 to 179"),
        ("encode", ["--out", "z.png"], "--out: got 'z.png', expected a name that ends with .npy"),
        ("encode", ["--out", "no/z.npy"], "--out: got 'no/z.npy', but there is no folder no"),
        ("reconstruct", ["--data", "narrow.npy"], "--data: got narrow with items of 3, expected 1 x 8 x 8"),
        ("reconstruct", ["--data", "nowhere.npy"], "nowhere.npy"),
    ):
        printed = look(command, *options, status=2)
        assert printed.startswith(f"fastvae: error: {problem}")


@pytest.mark.parametrize(
    ("command", "options", "problem"),
    [
        ("sample", ["--n", "0"], "--n: got '0', expected an integer of at least 1"),
        ("sample", ["--temp", "1"], "--temp: no such option; did you mean --temperature?"),
        ("reconstruct", ["--index", "3"], "--index: no such option"),
        ("sample", ["more"], "got 'more', which belongs to no option"),
        ("sample", ["-n", "3"], "-n: no such option; did you mean --n?"),
        ("encode", [], "the following arguments are required: --out"),
        (
            "traverse",
            ["--dims", "."],
            "--dims: got '.', expected an integer of at least 0; a RUN goes before the options",
        ),
        ("reconstruct", ["--worst", "--best"], "--best: not allowed with --worst"),
    ],
)
def test_options_that_do_not_exist(run: Path, command: str, options: list[str], problem: str, capsys) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, str(run), *options])
    assert done.value.code == 2
    assert capsys.readouterr().err == f"fastvae: error: {problem}\n"


def test_ctrl_c_says_that_it_was_interrupted(run: Path, look, monkeypatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VAE, "encode", interrupted)
    assert look("encode", "--out", "z.npy", status=130) == "fastvae: interrupted\n"
    assert not list(Path().iterdir())


def test_a_file_is_written_whole_or_not_at_all(run: Path, look, monkeypatch) -> None:
    look("encode", "--out", "z.npy")
    before = Path("z.npy").read_bytes()
    broken = VAE.encode

    def encode(model, x):
        if len(x) < 100:
            raise OSError("the disk is gone")
        return broken(model, x)

    monkeypatch.setattr(VAE, "encode", encode)
    look("encode", "--batch-size", 100, "--out", "z.npy", status=2)
    assert Path("z.npy").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["z.npy"]


def shown_at(pixels: np.ndarray, figure, place: tuple[float, float]) -> np.ndarray:
    """The colour in [0, 1] of a picture [3, H, W] of a figure, at a place in its axes."""
    x, y = figure.axes[0].transData.transform(place)
    return pixels[:, round(pixels.shape[1] - y), round(x)] / 255


def test_points_have_the_colour_of_their_class_and_a_legend_says_which(seed: int) -> None:
    points = torch.tensor([[0.0, 0.0], [2.4, 0.0], [0.0, -2.4], [2.4, -2.4]])
    labels = np.array([7, 3, 3, 12])
    classes = [f"class {i}" for i in range(9)]
    figure = scatter(points, labels, classes=classes, axes=("a", "b"), title="t", prior=True)
    pixels = picture(figure).numpy()
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["class 3", "class 7", "12"]
    colour = dict(zip((3, 7, 12), (to_rgb(mark.get_color()) for mark in legend.get_lines()), strict=True))
    for place, label in zip(points.tolist(), labels, strict=True):
        on_white = 0.8 * np.array(colour[int(label)]) + 0.2
        np.testing.assert_allclose(shown_at(pixels, figure, place), on_white, atol=0.02)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("a", "b", "t")
    circle = [patch.radius for patch in ax.patches]
    assert circle == [1, 2, 3]
    assert shown_at(pixels, figure, (math.cos(-1), math.sin(-1))).max() < 0.95  # where latents are plain


def test_names_of_classes_are_drawn_whatever_they_are() -> None:
    classes = ["$\\alpha$ and $", "_under", "日本", "two\nlines", "x" * 200, "ünï"]
    figure = scatter(torch.rand(6, 2), np.arange(6), classes=classes, title=f"of $x {'y' * 200}")
    picture(figure)  # without a warning of a glyph, of the layout or of mathematical text
    texts = figure.legends[0].get_texts()
    shown = [classes[0], "_under", "2: ??", "3: two?lines", f"4: {'x' * 23}…", "ünï"]
    assert [text.get_text() for text in texts] == shown
    assert not any(text.get_parse_math() for text in (*texts, figure.axes[0].title))
    assert figure.axes[0].get_title() == f"of $x {'y' * 57}…"
    assert figure.axes[0].get_window_extent().width > 300  # of 840 pixels


def test_without_labels_and_with_many(seed: int) -> None:
    points = torch.randn(500, 2)
    assert scatter(points).legends == []
    many = scatter(points, np.arange(500) % 50)
    assert len(many.axes) == 2  # the second is the scale of colours


@pytest.mark.parametrize("labels", [None, np.array([7, 3, 3, 12, 3])])
def test_one_latent_is_drawn_in_a_strip_for_each_class(labels: np.ndarray | None) -> None:
    values = torch.tensor([[0.5], [-1.0], [2.0], [0.25], [1.0]])
    points = strips(values, labels)
    assert torch.equal(points[:, 0], values[:, 0])
    strip = torch.zeros(5) if labels is None else torch.tensor([1, 0, 0, 2, 0])
    assert ((points[:, 1] + strip).abs() < 0.45).all()
    assert len(points[:, 1].unique()) == 5
    figure = scatter(values, labels, axes=("latent 0",), prior=True)
    pixels = picture(figure).numpy()
    for place in points.tolist():
        assert shown_at(pixels, figure, place).min() < 0.7
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.get_yticks())) == ("latent 0", "", 0)


def test_a_run_with_one_latent(train: Callable[..., Path], typed: Callable[..., str], tmp_path: Path) -> None:
    run = train("--epochs 2 --hidden 8 --latent-dim 1 --weights-epochs 1")
    assert typed("latents", run).endswith("the posterior means of digits (validation), latent 0\n")
    typed("latents", run, "--animate", "--out", tmp_path / "moving.npy")
    typed("latents", run, "--animate", "--out", tmp_path / "moving.gif")
    assert np.load(tmp_path / "moving.npy").shape == (3, 180, 1)
    assert "has one latent" in typed("latents", run, "--tsne", status=2)
    two = train("--epochs 1 --hidden 8 --latent-dim 2")
    assert "got 1 datum, expected at least 2" in typed("latents", two, "--tsne", "--n", 1, status=2)
    assert "expected 0, the one latent" in typed("latents", run, "--dims", 0, 1, status=2)


def test_one_of_a_thing_is_said_in_the_singular(
    typed: Callable[..., str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--data digits --epochs 1 --hidden 8 --latent-dim 1 --no-report --out run"
    assert "model: mlp, 1 latent, " in typed("train", *options.split())
    assert typed("sample", "run", "--n", 1) == "run/sample.png: 1 draw of the prior\n"
    fitted = "1 draw of 1 Gaussian fitted to the posteriors of digits (training)"
    drawn = typed("sample", "run", "--n", 1, "--from", "posterior", "--components", 1)
    assert drawn == f"run/sample.png: {fitted}\n"
    Path("images/one").mkdir(parents=True)
    Image.new("L", (8, 8)).save("images/one/a.png")
    Path("images/one/b.png").write_text("none")
    packed = typed("data", "pack", "images", "x.npy", "--on-error", "skip")
    assert "\n1 image was left out\n" in packed
    assert packed.endswith("x.npy: 1 sample of 8 x 8, 0.0 MB, labels of 1 class in its JSON\n")
    assert typed("data", "verify", "x.npy") == "x.npy: 1 sample of 8 x 8, as it was packed\n"


def test_principal_components_of_many_latents(seed: int) -> None:
    scales = torch.cat((torch.tensor([4.0, 2.5]), torch.linspace(1.0, 0.5, 38))).double()
    z = 5 + scales * torch.randn(300, 40, dtype=torch.float64)
    state = torch.random.get_rng_state()
    projection = principal_plane(z.reshape(300, 4, 10))
    assert torch.equal(torch.random.get_rng_state(), state)
    _, spread, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    largest = projection.directions.abs().argmax(1)
    assert (projection.directions[[0, 1], largest] > 0).all()
    cosines = (projection.directions * directions[:2]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(2).double(), rtol=0, atol=1e-4)
    for axis, share in zip(projection.axes, spread[:2].square() / spread.square().sum(), strict=True):
        assert abs(float(axis.split("(")[1].split("%")[0]) - 100 * share) < 0.51


@pytest.mark.parametrize("options", [[], ["--dims", 3, 1]])
def test_latents_are_projected(run: Path, model: VAE, look, validation, options: list[object]) -> None:
    printed = look("latents", *options)
    look("latents", *options, "--out", "points.npy")
    points = np.load("points.npy")
    with torch.no_grad():
        mu = model.encode(validation)[0].double()
    if options:
        np.testing.assert_allclose(points, mu[:, [3, 1]], atol=1e-5)
        assert printed.endswith("the posterior means of digits (validation), latent 3 and latent 1\n")
    else:
        values, directions = torch.linalg.eigh(mu.T.cov())
        expected = (mu - mu.mean(0)) @ directions[:, [-1, -2]]
        expected *= torch.sign((expected * torch.from_numpy(points)).sum(0))
        np.testing.assert_allclose(points, expected, atol=1e-4)
        share = float(values[-1] / values.sum())
        assert f"principal component 1 ({share:.0%} of the variance)" in printed
    with Image.open(run / "latents.png") as image:
        pixels = np.asarray(image)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_tsne_keeps_neighbours_together(seed: int) -> None:
    groups = torch.arange(3).repeat_interleave(20)
    z = 20 * torch.eye(3)[groups] + torch.randn(60, 3)
    points = tsne(z, seed=seed)
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(1)
    assert points.shape == (60, 2)
    assert (groups[nearest] == groups).double().mean() > 0.8


def test_tsne_of_data_that_are_all_the_same() -> None:
    assert torch.equal(tsne(torch.ones(50, 3)), torch.zeros(50, 2))


def test_latents_over_the_epochs(look, tmp_path: Path, validation) -> None:
    options = (
        f"--data digits --epochs 4 --hidden 8 --latent-dim 2 --seed {SEED} --weights-epochs 2 --no-report"
    )
    assert main(["train", *options.split(), "--out", "moving"]) == 0
    kept = [f"epoch-{epoch:06d}.safetensors" for epoch in (0, 2, 4)]
    assert sorted(path.name for path in Path("moving/checkpoints").glob("epoch-*")) == kept
    for options in ([], ["--format", "npy"]):
        assert main(["latents", "moving", "--animate", *options]) == 0
    points = np.load("moving/latents.npy")
    assert points.shape == (3, 180, 2)
    for frame, name in enumerate(kept):
        model = load("moving")
        model.load_state_dict(load_file(f"moving/checkpoints/{name}"))
        with torch.no_grad():
            np.testing.assert_allclose(points[frame], model.encode(validation)[0], atol=1e-5)
    with Image.open("moving/latents.gif") as gif:
        assert gif.n_frames == 3
        frames = []
        for frame in range(3):
            gif.seek(frame)
            frames.append(np.asarray(gif.convert("L"), int))
    assert np.abs(frames[2] - frames[0]).max() > 100
    printed = look("latents", "--animate", status=2)
    assert "has no weights of its epochs; train it with --weights-epochs 1" in printed


def test_fashion_mnist_has_names() -> None:
    classes = REMOTES["fashion-mnist"].classes
    assert classes is not None
    assert (len(classes), classes[0], classes[5], classes[9]) == (10, "T-shirt/top", "sandal", "ankle boot")
