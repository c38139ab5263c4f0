"""Points of the latent space, coloured by label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .projection import strips

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (7.0, 5.6)
DPI = 120
IN_A_LEGEND = 20  # classes; more are shown by a scale of colours
LONGEST_NAME, LONGEST_TITLE = 24, 64  # characters


def scatter(
    points: Tensor,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    classes: Sequence[str] | None = None,
    axes: Sequence[str] = (),
    title: str = "",
    limits: Sequence[tuple[float, float]] | None = None,
    prior: bool = False,
    ticks: bool = True,
) -> Figure:
    """A figure of points [N, 2], each class in its colour, drawn in a mixed order, with a legend.

    Points [N, 1] are drawn in a strip for each class.

    labels: int64 [N]. classes: the names of the labels 0, 1, ...; the labels themselves without, and before
    a name that is too long or has characters that the font does not have. axes: their names. limits: of them;
    those of the points without. prior: with circles at one, two and three standard deviations of N(0, I), and
    one scale for both axes. ticks: whether the numbers of the axes mean something.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    figure = Figure(INCHES, DPI, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    order = np.random.default_rng(0).permutation(len(points))  # so that no class covers the others
    in_strips = points.shape[1] == 1
    x, y = (strips(points, labels) if in_strips else points).numpy()[order].T
    kinds = [] if labels is None else np.unique(labels).tolist()
    colours: Any = ["tab:blue"]
    if labels is not None and len(kinds) <= IN_A_LEGEND:
        colour_of = colormaps["tab10" if len(kinds) <= 10 else "tab20"]
        colours = colour_of(np.searchsorted(kinds, labels[order]))
        marks = [
            Line2D([], [], marker="o", linestyle="", color=colour_of(i), label=str(kind))
            for i, kind in enumerate(kinds)
        ]
        legend = figure.legend(handles=marks, loc="outside right center", frameon=False, handletextpad=0.1)
        for kind, text in zip(kinds, legend.get_texts(), strict=True):
            if classes and 0 <= kind < len(classes):
                name = _drawable(classes[kind], LONGEST_NAME)
                text.set_text(name if name == classes[kind] else f"{kind}: {name}")
                text.set_parse_math(False)  # a $ in a name is one
    elif labels is not None:
        scale = ScalarMappable(Normalize(min(kinds), max(kinds)), "viridis")
        colours = scale.to_rgba(labels[order])
        figure.colorbar(scale, ax=ax, label="label")
    ax.scatter(x, y, s=40_000 / (len(x) + 4000), c=colours, alpha=0.8, linewidths=0)
    limits = limits_of(points) if limits is None else limits
    ax.set_xlim(limits[0])
    if not in_strips:
        ax.set_ylim(limits[1])
    if prior and in_strips:
        for place in (-3, -2, -1, 1, 2, 3):
            ax.axvline(place, color="0.75", linewidth=0.8, zorder=0)
    elif prior:
        ax.set_aspect("equal")
        for radius in (1, 2, 3):
            ax.add_patch(Circle((0, 0), radius, fill=False, color="0.75", linewidth=0.8, zorder=0))
            if limits[1][0] < radius < limits[1][1]:
                text = ax.text(0, radius, rf"{radius}$\sigma$", ha="center", va="center", fontsize=7)
                text.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.5})
    if not ticks:
        ax.set_xticks([])
    if not ticks or in_strips:
        ax.set_yticks([])
    for axis, name in zip((ax.xaxis, ax.yaxis), axes, strict=False):
        axis.set_label_text(name)
    ax.set_title(_drawable(title, LONGEST_TITLE), fontsize=10, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _drawable(text: str, longest: int) -> str:
    """The text with "?" for what the font does not have, cut where it is longer than so many characters."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    files = [findfont(FontProperties(family=[family])) for family in rcParams["font.family"]]
    known = {code for file in files for code in get_font(file).get_charmap()}
    text = "".join(character if ord(character) in known else "?" for character in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def limits_of(points: Tensor) -> list[tuple[float, float]]:
    """Limits of the axes that show points [N, 1 or 2], but for one in a thousand, with a margin."""
    quantiles = points.new_tensor([0.0005, 0.9995])
    low, high = torch.quantile(points, quantiles, dim=0)
    margin = 0.05 * (high - low).clamp_min(1e-6)
    return list(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))


def picture(figure: Figure) -> Tensor:
    """The figure as uint8 [3, H, W]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
