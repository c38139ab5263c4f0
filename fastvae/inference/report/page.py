"""The page of a report."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...models.files import replacing
from . import charts, tables
from .pictures import REACH
from .record import RunRecord

SHOWN_LATENTS = 64  # in charts by latent, those of most KL


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    note: str = ""


def write(runs: Sequence[RunRecord], path: str | os.PathLike[str], *, version: str) -> None:
    """Write the report of `runs` to a file, all or nothing. Raises OSError where writing fails."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(html(runs, version=version), encoding="utf-8")


def html(runs: Sequence[RunRecord], *, version: str) -> str:
    """The report of `runs`, at least one, as an HTML page. version: of fastvae, for its last line."""
    if not runs:
        raise ValueError("runs: got none, expected at least one")
    runs = _with_names_apart(runs)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and options are anybody's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {run.pictures.data for run in runs}
    numbers = itertools.count(1)
    templates.filters["numbered"] = lambda svg: Markup(charts.numbered(str(svg), next(numbers)))
    return templates.get_template("page.html").render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        colors=charts.COLORS,
        results=tables.results(runs),
        charts=_charts(runs),
        comparable=tables.alike(runs, tables.OF_LOSS),
        configuration=tables.configuration(runs),
        environment=tables.environment(runs),
        evaluation=tables.evaluation(runs),
        data=data.pop() if len(data) == 1 else "the data",
        reach=REACH,
        version=version,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _with_names_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, those of one name numbered."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]


def _charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """What the history of the runs shows, over their epochs."""
    if not any(run.history for run in runs):
        return []
    found = [_losses(runs, term, title) for term, title in _TERMS.items()]
    found += [_by_latent(runs)]
    if len(runs) == 1:
        found += [_latents_over_epochs(runs[0])]
    found += [_over_epochs(runs, *chart) for chart in _USAGE]
    return [chart for chart in found if chart is not None]


_TERMS = {"loss": "Loss", "recon": "Reconstruction term", "kl": "KL term", "extra": "Extra loss"}
_USAGE = (
    ("active_units", "Active units", "latents", 1.0, ""),
    ("samples_per_second", "Throughput", "samples a second", 1.0, ""),
    ("data_wait_share", "Waiting for data", "% of the steps' time", 100.0, ""),
    ("gpu_utilization", "GPU utilisation", "%", 100.0, ""),
    ("gpu_memory_bytes", "GPU memory", "GiB", 2.0**-30, ""),
    ("gpu_power_watts", "GPU power", "W", 1.0, ""),
)


def _losses(runs: Sequence[RunRecord], term: str, title: str) -> Chart | None:
    curves = []
    for i, run in enumerate(runs):
        for part, dashed in (("train", True), ("val", False)):
            curve = _curve(run, f"{part}_{term}", i, dashed)
            curves += [] if curve is None else [curve]
    return Chart(title, Markup(charts.lines(curves, "nats a datum"))) if curves else None


def _over_epochs(
    runs: Sequence[RunRecord], key: str, title: str, unit: str, scale: float, note: str
) -> Chart | None:
    found = [_curve(run, key, i, scale=scale) for i, run in enumerate(runs)]
    curves = [curve for curve in found if curve is not None]
    return Chart(title, Markup(charts.lines(curves, unit, from_zero=True)), note) if curves else None


def _curve(
    run: RunRecord, key: str, color: int, dashed: bool = False, scale: float = 1.0
) -> charts.Curve | None:
    values = [row.get(key) for row in run.history]
    y = [float(value) * scale if isinstance(value, (int, float)) else None for value in values]
    if all(value is None for value in y):
        return None
    return charts.Curve([row.get("epoch", i) for i, row in enumerate(run.history, 1)], y, color, dashed)


def _by_latent(runs: Sequence[RunRecord]) -> Chart | None:
    values = [sorted(run.kl_by_latent, reverse=True)[:SHOWN_LATENTS] for run in runs]
    if not any(values):
        return None
    svg = charts.bars(values, "latents, by their KL", "nats a datum")
    return Chart("KL by dimension", Markup(svg), _shown_of(max(len(run.kl_by_latent) for run in runs)))


def _latents_over_epochs(run: RunRecord) -> Chart | None:
    final = run.kl_by_latent
    each = [row.get("kl_by_latent") or [] for row in run.history]
    rows = [row for row in each if len(row) == len(final)]
    if len(rows) < 2 or not final:
        return None
    order = np.argsort(final)[::-1][:SHOWN_LATENTS]
    values = np.array(rows, float)[:, order]
    svg = charts.heat(values, "epoch", "latents, by their KL", "nats a datum")
    return Chart("KL by dimension over the epochs", Markup(svg), _shown_of(len(final)))


def _shown_of(latents: int) -> str:
    return f"The {SHOWN_LATENTS} largest of {latents:,}." if latents > SHOWN_LATENTS else ""
