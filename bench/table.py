"""Prints the README's table of ratios from a file of figures that `pytest bench/ --results FILE` wrote.

python bench/table.py bench/results/cpu.json
"""

from __future__ import annotations

import json
import math
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Markdown: what was done, fastvae's medians, how many times as long each opponent took.

    Where memory was measured, the peaks of fastvae and of the opponent beside it, in MiB.
    """
    rows = results["rows"]
    columns = ["fastvae", "opponent", "times as fast"]
    if with_memory := any("memory_bytes" in row for row in rows):
        columns.append("MiB: fastvae, opponent")
    lines = []
    for row in rows:
        ours = [figure_of(row, name) for name in row["median_s"] if name not in row["ratio"]]
        for i, (figure, name) in enumerate(zip_longest(ours, row["ratio"], fillvalue="")):
            line = [row["title"] if i == 0 else "", figure, name, ratio_to(row, name)]
            if with_memory:
                line.append(memory_of(row, name))
            lines.append(line)
    header = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*header, *(f"| {' | '.join(line)} |" for line in lines)])


def figure_of(row: dict[str, Any], name: str) -> str:
    """The median as a rate, or as a time and its share of a copy's bandwidth."""
    seconds = row["median_s"][name]
    path = name.removeprefix("fastvae").strip(", ")
    if row["samples"] is not None:
        return f"{row['samples'] / seconds:,.0f} samples/s {path}".strip()
    figure = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
    share = f"{row['share_of_copy'][name]:.0%} of copy" if name in row.get("share_of_copy", {}) else ""
    return ", ".join(filter(None, [f"{figure} {path}".strip(), share]))


def ratio_to(row: dict[str, Any], opponent: str) -> str:
    """How many times as fast fastvae is; nothing beside figures for which no opponent is left."""
    if not opponent:
        return ""
    ratio = row["ratio"][opponent]
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def memory_of(row: dict[str, Any], opponent: str) -> str:
    """The peaks of fastvae's first path and of the opponent, in MiB."""
    if not opponent or "memory_bytes" not in row:
        return ""
    ours = next(iter(row["memory_bytes"].values()))
    return f"{ours / 2**20:.1f}, {row['memory_bytes'][opponent] / 2**20:.1f}"


def geometric_mean(results: dict[str, Any], prefix: str, opponent: str) -> float:
    """Of the ratios to `opponent` over the rows whose title begins with `prefix`."""
    ratios = [row["ratio"][opponent] for row in results["rows"] if row["title"].startswith(prefix)]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text())
    device = results["gpu"] or f"{results['cpu']}, {results['threads']} threads"
    print(f"{device}; torch {results['torch']}; commit {(results['commit'] or 'unknown')[:12]}\n")
    print(table(results))
    print()
    for opponent in ("eager, by hand", "eager, F.mse_loss(sum)", "torch.compile, by hand"):
        mean = geometric_mean(results, "loss and gradient", opponent)
        print(f"loss and gradient, geometric mean against {opponent}: {mean:.1f}")


if __name__ == "__main__":
    main()
