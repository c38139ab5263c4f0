"""The tables of a report: runs as columns, and what they say as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .record import RunRecord

ABSENT = "–"  # noqa: RUF001
LISTED = 8  # values of a list, at most


@dataclass(frozen=True)
class Row:
    """What it is of, its cell for each run, whether they differ, and which of them are the best."""

    label: str
    cells: tuple[str, ...]
    differs: bool
    best: tuple[bool, ...]


@dataclass(frozen=True)
class _Result:
    label: str
    value: Callable[[RunRecord], Any]
    shown: Callable[[Any], str] | None = None
    best: Callable[[Iterable[float]], float] | None = None
    of_same: tuple[str, ...] = ()  # the options that must be the same for one to be better than another


def results(runs: Sequence[RunRecord]) -> list[Row]:
    """What the runs came to. The best is marked where it means the same in all."""
    rows = []
    for result in _RESULTS[0 if len(runs) > 1 else 1 :]:  # the page of one begins with its status
        values = [result.value(run) for run in runs]
        if all(value is None for value in values):
            continue
        marked = [False] * len(runs)
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if alike(runs, result.of_same) and result.best is not None and len(set(numbers)) > 1:
            best = result.best(numbers)
            marked = [value == best for value in values]
        show = result.shown or shown
        rows.append(_row(result.label, values, [ABSENT if v is None else show(v) for v in values], marked))
    return rows


def alike(runs: Sequence[RunRecord], options: Iterable[str]) -> bool:
    """Whether these options are the same in all runs."""
    return all(len({repr(run.options.get(key)) for run in runs}) == 1 for key in options)


def configuration(runs: Sequence[RunRecord]) -> list[Row]:
    """The options of the runs: those that differ first."""
    options = [{k: v for k, v in run.options.items() if k not in _OF_NO_EFFECT} for run in runs]
    rows = _union(options, _option)
    return sorted(rows, key=lambda row: not row.differs)


_OF_NO_EFFECT = ("overwrite", "download", "debug", "report")  # on what a run comes to


def environment(runs: Sequence[RunRecord]) -> list[Row]:
    """Where the runs were computed, and by what."""
    keys = {"device": "device", "impl": "operators", "amp_dtype": "precision", "parameters": "parameters"}
    parts = []
    for run in runs:
        part = {label: run.summary[key] for key, label in keys.items() if key in run.summary}
        versions = run.summary.get("versions")
        part |= versions if isinstance(versions, dict) else {}
        parts.append(part)
    rows = _union(parts)  # of a run that has not ended nothing is known, which is no difference
    return [replace(row, differs=len({*row.cells} - {ABSENT}) > 1) for row in rows]


def evaluation(runs: Sequence[RunRecord]) -> list[Row]:
    """What `fastvae evaluate` has found, with its errors; of another evaluation.json all that it says."""
    found = [run.evaluation for run in runs]
    if not all("elbo" in figures for figures in found if figures):
        return _union([dict(_flat(figures)) for figures in found])
    rows = []
    for label, key, error in _EVALUATION:
        values = [figures.get(key) for figures in found]
        if any(value is not None for value in values):
            cells = [_with_error(figures, key, error) for figures in found]
            rows.append(_row(label, values, cells))
    return rows


def _with_error(figures: Mapping[str, Any], key: str, error: str) -> str:
    """A figure and its standard errors: of Monte Carlo, and over the data."""
    value = figures.get(key)
    if not isinstance(value, float):
        return shown(value)
    kinds = (("monte_carlo", "Monte Carlo"), ("data", "over data"))
    errors = [(figures.get(f"{error}_{kind}_error"), name) for kind, name in kinds]
    known = [f"± {size:.2g} {name}" for size, name in errors if error and isinstance(size, (int, float))]
    return f"{value:.4f}" + (f" ({', '.join(known)})" if known else "")


_EVALUATION = (
    ("data", "data", ""),
    ("number of data", "n_data", ""),
    ("importance samples a datum, K", "importance_samples", ""),
    ("ELBO at beta = 1, nats", "elbo", "elbo"),
    ("E ln p(x|z), nats", "reconstruction", ""),
    ("KL(q(z|x) || p(z)), nats", "kl", ""),
    ("ln p(x) by the bound L_K, nats", "log_likelihood", "log_likelihood"),
    ("inference gap, nats", "inference_gap", ""),
    ("bits per dimension", "bits_per_dimension", "bits_per_dimension"),
    ("active units", "active_units", ""),
    ("KL(q(z) || p(z)), nats", "aggregate_kl_to_prior", ""),
    ("mutual information I(x; z), nats", "mutual_information", "mutual_information"),
    ("mean squared error a value", "mean_squared_error", ""),
)


def shown(value: Any) -> str:
    """A value for people: four significant digits, and no more of a list than can be read."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        large = math.isfinite(value) and abs(value) >= 1e4
        return f"{value:,.0f}" if large else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        more = f", … ({len(value)})" if len(value) > LISTED else ""
        return ", ".join(map(shown, value[:LISTED])) + more
    return str(value)


def _option(value: Any) -> str:
    """An option as it is typed."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_option, value))
    return shown(value) if value is None or isinstance(value, bool) else str(value)


def _union(parts: Sequence[Mapping[str, Any]], show: Callable[[Any], str] = shown) -> list[Row]:
    keys = dict.fromkeys(key for part in parts for key in part)
    rows = []
    for key in keys:
        values = [part.get(key) for part in parts]
        rows.append(_row(key.replace("_", " "), values, [show(value) for value in values]))
    return rows


def _row(label: str, values: Sequence[Any], cells: Sequence[str], best: Sequence[bool] | None = None) -> Row:
    differs = any(value != values[0] for value in values)
    return Row(label, tuple(cells), differs, tuple(best or [False] * len(cells)))


def _flat(content: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}, ")
        else:
            yield f"{before}{key}", value


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _of_best(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: run.summary.get(key, run.best.get(key))


def _of_summary(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: run.summary.get(key)


def _seconds(run: RunRecord) -> Any:
    return run.summary.get("seconds", run.history[-1].get("seconds") if run.history else None)


def _rate(run: RunRecord) -> Any:
    if "samples_per_second" in run.summary:
        return run.summary["samples_per_second"]
    rates = [row["samples_per_second"] for row in run.history if "samples_per_second" in row]
    return sum(rates) / len(rates) if rates else None


def _skipped(run: RunRecord) -> Any:
    return (run.history[-1] if run.history else {}).get("skipped_steps") or None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


_DATA_AND_LIKELIHOOD = ("data", "likelihood", "variance")
OF_LOSS = (*_DATA_AND_LIKELIHOOD, "beta", "capacity")  # what a loss of the training depends on
_RESULTS = (
    _Result("status", lambda run: run.status),
    _Result(
        "validation loss, nats",
        _of_best("val_loss"),
        _loss,
        min,
        (*OF_LOSS, "val", "seed"),
    ),
    _Result("test loss at beta = 1, nats", _of_summary("test_loss"), _loss, min, _DATA_AND_LIKELIHOOD),
    _Result("test reconstruction term, nats", _of_summary("test_recon"), _loss),
    _Result("test KL term, nats", _of_summary("test_kl"), _loss),
    _Result("active units", _of_best("active_units")),
    _Result("best epoch", lambda run: run.summary.get("best_epoch", run.best.get("epoch"))),
    _Result("parameters", _of_summary("parameters")),
    _Result("samples a second", _rate, lambda value: f"{value:,.0f}"),
    _Result("time of training", _seconds, _duration),
    _Result("waiting for data", _of_summary("data_wait_share"), lambda value: f"{value:.1%}"),
    _Result("GPU memory", _of_summary("gpu_memory_bytes"), lambda value: f"{value / 2**30:.1f} GiB"),
    _Result("GPU utilisation", _of_summary("gpu_utilization"), lambda value: f"{value:.0%}"),
    _Result("GPU power", _of_summary("gpu_power_watts"), lambda value: f"{value:.0f} W"),
    _Result("skipped steps", _skipped),
)
