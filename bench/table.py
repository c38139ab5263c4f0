"""Prints the README's table of ratios from a file of figures that `pytest bench/ --results FILE` wrote.

python bench/table.py bench/results/cpu.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Markdown: what was done, fastvae's median, and how many times as long each opponent took."""
    lines = ["| | fastvae | opponent | times as fast |", "|---|---|---|---|"]
    for row in results["rows"]:
        ours, *opponents = row["median_s"]
        for i, name in enumerate(opponents):
            title, figure = ("", "") if i else (row["title"], figure_of(row, ours))
            lines.append(f"| {title} | {figure} | {name} | {row['ratio'][name]:.1f} |")
    return "\n".join(lines)


def figure_of(row: dict[str, Any], name: str) -> str:
    """The median as a rate, or as a time."""
    seconds = row["median_s"][name]
    if row["samples"] is not None:
        return f"{row['samples'] / seconds:,.0f} samples/s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


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
