"""Charts as SVG that take the colours and the font of the HTML page around them, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..projection import strips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

COLORS = 8  # of series, --s0 to --s7; a page has to define them, and --ink, --muted and --line
CLASS_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
_SIZE = (4.4, 2.6)  # inches
_MARKED = 12  # points of a curve; fewer are marked
# matplotlib knows no CSS: it draws in colours that nobody asks for, and these become variables
_MUTED, _LINE = "#0f0ff0", "#0f0ff1"
_VARIABLES = {_MUTED: "var(--muted)", _LINE: "var(--line)"} | {
    f"#0f0f{i:02x}": f"var(--s{i})" for i in range(COLORS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastvae",  # the same page from the same run
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.parse_math": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}


class Curve(NamedTuple):
    """y over x, in the colour of the series `color`; None and what is not finite are gaps."""

    x: Sequence[float]
    y: Sequence[float | None]
    color: int
    dashed: bool = False


def lines(curves: Sequence[Curve], ylabel: str, *, from_zero: bool = False) -> str:
    """Curves over the epochs, as SVG. from_zero: y goes from there to the largest value.

    Else, where the first epochs would take most of the height, their curves come in from above.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure("epoch", ylabel)
        rows = [np.array([np.nan if y is None else y for y in curve.y], float) for curve in curves]
        for curve, y in zip(curves, rows, strict=True):
            axes.plot(
                curve.x,
                np.where(np.isfinite(y), y, np.nan),
                color=_color(curve.color),
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                linewidth=1.1 if curve.dashed else None,
                marker="o" if len(y) <= _MARKED else None,
                markersize=3,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        top = _top(rows)
        if from_zero:
            axes.set_ylim(0, None if any((row > 0).any() for row in rows) else 1)
        elif top is not None:
            axes.set_ylim(top=top)
        return _svg(figure)


def bars(values: Sequence[Sequence[float]], xlabel: str, ylabel: str) -> str:
    """The values of each series by rank, as SVG: bars of one, steps of several."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(xlabel, ylabel)
        for i, heights in enumerate(values):
            if len(values) == 1:
                axes.bar(range(1, len(heights) + 1), heights, color=_color(i), width=0.8)
            else:
                edges = np.arange(len(heights) + 1) + 0.5
                axes.stairs(heights, edges, color=_color(i), linewidth=1.6, baseline=None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.4, max(map(len, values)) + 0.6)
        axes.set_ylim(bottom=0)
        return _svg(figure)


def heat(values: npt.NDArray[np.float64], xlabel: str, ylabel: str, unit: str) -> str:
    """values [x, y] by colour, both axes counted from 1, as SVG."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = _figure(xlabel, ylabel)
        extent = (0.5, len(values) + 0.5, values.shape[1] + 0.5, 0.5)
        image = axes.imshow(values.T, aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        bar = figure.colorbar(image, ax=axes, label=unit, pad=0.02)
        bar.outline.set_visible(False)
        return _svg(figure)


def scatter(points: Tensor, labels: npt.NDArray[np.int64] | None, names: Sequence[str]) -> str:
    """points [N, 2], coloured by label (CLASS_COLORS, round and round), as SVG; the points are an image.

    Those [N, 1] are drawn in a strip for each label. names: of the axes.
    """
    in_strips = points.shape[1] == 1
    x, y = (strips(points, labels) if in_strips else points).numpy().T
    xlabel, ylabel = (*names, "")[:2]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(xlabel, ylabel, (4.4, 3.6))
        if labels is None:
            colors = np.array([_SCATTERED])
        else:
            colors = np.array(CLASS_COLORS)[labels % len(CLASS_COLORS)]
        size = min(max(8000 / len(points), 5), 20)
        axes.scatter(x, y, s=size, c=colors, alpha=0.7, linewidths=0, rasterized=True)
        if in_strips:
            axes.set_yticks([])
        return _svg(figure)


_SCATTERED = "#3b8fd6"  # in an image there are no variables: legible on both grounds


def _figure(xlabel: str, ylabel: str, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(length=0)
    return figure, axes


def _color(series: int) -> str:
    return f"#0f0f{series % COLORS:02x}"


def _top(rows: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """Where y ends if not at its largest: at twice the range of all but the first tenth of the epochs."""
    late = [y[max(1, len(y) // 10) :] for y in rows if len(y) >= 5]
    shown = np.concatenate([y[np.isfinite(y)] for y in late]) if late else np.empty(0)
    if shown.size == 0 or len(late) < len(rows):
        return None
    low, high = float(shown.min()), float(shown.max())
    top = high + (high - low)
    beyond = any(np.nanmax(y, initial=low, where=np.isfinite(y)) > top for y in rows)
    return top if high > low and beyond else None


def _svg(figure: Figure) -> str:
    """The figure as an <svg> for the inside of a page: no ids of its own but those it refers to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text


def numbered(svg: str, number: int) -> str:
    """The same chart with ids that no other of a page has."""
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>chart-{number}-", svg)


_METADATA = ("Creator", "Date", "Format", "Type")
