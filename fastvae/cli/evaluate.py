"""`fastvae evaluate`: the bounds on log p(x), the latents and the reconstructions of a run, as figures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..training.config import ConfigError, TrainConfig
from .arguments import add_run_command, add_run_options, positive
from .runs import open_data, open_run, track

if TYPE_CHECKING:
    from ..inference.importance import EvaluationError

PIXEL_LEVELS = 255  # pixels are k / 255
_NEVER_WRAPPED = 10_000
SHOWN = 20  # latents in the table; all are in evaluation.json


def add(commands: Any) -> None:
    """Add `evaluate` to argparse's subcommands."""
    parser = add_run_command(
        commands,
        "evaluate",
        run,
        "judge a run: ELBO, log p(x), latents, reconstructions",
        "Evaluate a run on data: ELBO and log p(x) in nats with their errors, bits per dimension, "
        "the use of the latents, the aggregate posterior and the error of reconstructions. Prints a table "
        "and writes evaluation.json into the run folder.",
    )
    parser.add_argument(
        "--importance-samples",
        type=positive,
        default=100,
        metavar="K",
        help="draws of z a datum, for the importance-weighted bound L_K on log p(x) (default: 100)",
    )
    parser.add_argument(
        "--mixture",
        type=positive,
        metavar="N",
        help="data whose posteriors make the mixture that estimates q(z) (default: all, at most 10,000)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the figures of each latent")
    group = parser.add_argument_group("what is made of the data")
    group.add_argument(
        "--binarize",
        action="store_true",
        help="draw each value as 1 with the probability that it says, else 0: for the bernoulli likelihood",
    )
    group.add_argument(
        "--dequantize",
        nargs="?",
        type=positive,
        const=PIXEL_LEVELS,
        metavar="S",
        help="take values for integers / S and add uniform noise of a step, for bits per dimension "
        "(default of S: 255, for pixels)",
    )
    add_run_options(parser, data="to evaluate on")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    opened = open_run(arguments)

    from ..inference.importance import EvaluationError
    from ..inference.judge import judge
    from ..models.files import write_json
    from ..models.model import likelihood_of
    from ..training.run_folder import EVALUATION_NAME

    levels, binarize = arguments.dequantize, arguments.binarize or opened.config.binarize
    if levels is not None and (binarize or likelihood_of(opened.model) == "bernoulli"):
        got = "binarized data" if binarize else "a bernoulli likelihood"
        raise ConfigError(
            "dequantize", f"got it for {got}, expected a likelihood with a density, and no --binarize"
        )
    data = open_data(opened, arguments, binarize=binarize)
    try:
        judgement = judge(
            opened.model,
            track(data.loader, "evaluating"),
            n_samples=arguments.importance_samples,
            seed=opened.seed,
            logvar_clamp=opened.config.logvar_clamp,
            levels=levels,
            n_mixture=arguments.mixture,
        )
    except EvaluationError as error:
        raise _of_the_command_line(error) from error
    figures = {
        "run": str(opened.folder),
        "data": data.name,
        "seed": opened.seed,
        "beta_of_training": opened.config.beta,
        "binarized": binarize,
        **judgement.figures(),
    }
    figures["notes"] = _notes(figures, opened.config)
    if arguments.json:
        print(json.dumps(figures, indent=2, allow_nan=False))
    else:
        _print(figures)
    path = opened.folder / EVALUATION_NAME
    write_json(path, figures)
    if not arguments.json:
        print(f"figures: {path}")


def _of_the_command_line(error: EvaluationError) -> Exception:
    """The error, named for the option that it is about."""
    option, _, problem = str(error).partition(": ")
    if option == "data":
        drawn = "binary data, or --binarize, to draw each value as 1 with the probability that it says"
        return ConfigError("data", f"{problem.partition('; expected ')[0]}; expected {drawn}")
    if option == "levels":
        return ConfigError("dequantize", f"{problem}; --dequantize S is for data in steps of 1/S")
    return error


def _notes(figures: dict[str, Any], config: TrainConfig) -> list[str]:
    """What a reader of the figures should know of them."""
    notes = []
    if config.beta != 1:
        notes.append(
            f"trained with beta {config.beta:g}, evaluated at beta 1: this ELBO is not what the training "
            "maximised"
        )
    for option, value in (("free_bits", config.free_bits), ("capacity", config.capacity)):
        if value is not None:
            name = option.replace("_", " ")
            notes.append(f"trained with {name} {value:g}, evaluated without")
    if figures["likelihood"] == "mse":
        constant = figures["features"] / 2 * math.log(math.pi)
        notes.append(
            f"mse is the density N(x_hat, I / 2): the squared error and its constant, {constant:.2f} nats"
        )
    effective, k = figures["effective_samples"], figures["importance_samples"]
    if k > 1 and effective < max(2, 0.02 * k):
        notes.append(
            f"{effective:.1f} of {k} draws have nearly all the weight: ln p(x) may be higher than L_{k} and "
            "its errors say; give more --importance-samples"
        )
    if figures["mutual_information_limit"] - figures["mutual_information"] < 0.5:
        n, limit = figures["aggregate_n_mixture"], figures["mutual_information_limit"]
        notes.append(
            f"I(x; z) is near ln {n:,} = {limit:.2f}, the most that a mixture of {n:,} data can show: of "
            "more data it may be greater, and KL(q(z) || p(z)) less by as much"
        )
    if figures["bits_per_dimension"] is None:
        notes.append(
            "no bits per dimension: a density has none of data without uniform noise; --dequantize adds it"
        )
    return notes


def _print(f: dict[str, Any]) -> None:
    """The figures as a person reads them."""
    from rich.console import Console
    from rich.table import Table

    likelihood = f"{f['likelihood']} likelihood"
    if f["variance"] is not None:
        likelihood += f" with variance {f['variance']:.4g}"
    made = ", binarized" if f["binarized"] else ""
    if f["levels"] is not None:
        made = f", with uniform noise of 1/{f['levels']}"
    # a pipe or a file gets whole lines
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _NEVER_WRAPPED)
    console.print(f"{f['run']}: {likelihood}\non {f['n_data']:,} of {f['data']}{made}\n", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(("nats a datum", "value", "+- Monte Carlo", "+- over data")):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for name, key, error in _rows(f):
        errors = [_shown(f.get(f"{error}_{kind}_error")) for kind in ("monte_carlo", "data")]
        table.add_row(name, f[key] if isinstance(f[key], str) else f"{f[key]:,.4f}", *errors)
    console.print(table)
    for line in _lines(f):
        console.print(line, markup=False)
    for note in f["notes"]:
        console.print(f"note: {note}", markup=False)


def _rows(f: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What is shown, its key, and that of its errors."""
    k = f["importance_samples"]
    yield "ELBO", "elbo", "elbo"
    yield "  E ln p(x|z)", "reconstruction", ""
    yield "  KL(q(z|x) || p(z))", "kl", ""
    yield f"ln p(x), by L_{k}", "log_likelihood", "log_likelihood"
    if k > 1:
        yield "  bias, about", "log_likelihood_bias", ""
    yield "inference gap, ln p(x) - ELBO", "inference_gap", ""
    if f["bits_per_dimension"] is not None:
        yield "bits per dimension", "bits_per_dimension", "bits_per_dimension"
    yield "aggregate posterior: KL(q(z) || p(z))", "aggregate_kl_to_prior", "mutual_information"
    yield "  mutual information I(x; z)", "mutual_information", "mutual_information"


def _lines(f: dict[str, Any]) -> Iterator[str]:
    """The rest: latents and reconstructions."""
    kl = f["kl_by_latent"]
    order = sorted(range(len(kl)), key=lambda i: -kl[i])
    shown = ", ".join(f"z{i}={kl[i]:.2f}" for i in order[:SHOWN])
    rest = f", and {len(kl) - SHOWN} of less" if len(kl) > SHOWN else ""
    yield f"\nactive units: {f['active_units']} of {len(kl)}"
    yield f"KL by latent, in nats: {shown}{rest}"
    std = f["aggregate_std"]
    moments = f"means within {max(map(abs, f['aggregate_mean'])):.3g} of 0, "
    moments += f"standard deviations {min(std):.3g} to {max(std):.3g}"
    correlation = _largest_correlation(f)
    if correlation is not None:
        moments += f", correlations within {correlation:.2g} of 0"
    yield f"z under q(z): {moments}"
    error = f["mean_squared_error"]
    yield f"reconstruction: mean squared error {error:.5g} a value, {f['squared_error']:.5g} a datum"


def _largest_correlation(f: dict[str, Any]) -> float | None:
    """The largest |correlation| of two latents under q(z); None for one latent, or too many."""
    covariance, std = f["aggregate_covariance"], f["aggregate_std"]
    if covariance is None or len(std) < 2:
        return None
    pairs = ((i, j) for i in range(len(std)) for j in range(i))
    return float(max(abs(covariance[i][j]) / (std[i] * std[j]) for i, j in pairs))


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"
