"""Prints tables of ratios from files of figures that `pytest bench/ --results FILE` wrote.

python bench/table.py bench/results/*.json, for docs/benchmarks.md, and with --summary the README's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

LOSS = "loss and gradient"
EAGER_OR_COMPILED = ("eager, by hand", "eager, F.mse_loss(sum)", "torch.compile, by hand")
# title, or its beginning, and opponent
SUMMARY = (
    ("training an epoch of 54,000 on cpu", "eager loop"),
    ("training 3 epochs of 54,000 on cpu", "torch.compile, amp, fused Adam, indexing"),
    ("training 3 epochs of 54,000 on cpu", "the bare matrix products"),
    ("loader against plain tensor indexing", "x[rows]"),
    ("loader against torch's DataLoader", "DataLoader(0 workers)"),
    ("loader against torch's DataLoader", "DataLoader(2 workers)"),
    ("CSR counts to dense batches", "scipy x[rows].toarray().astype"),
    ("first batch of 10 GB", "np.load, x[rows]"),
    ("ln p(x) of 300 test images", "a datum at a time, torch.distributions"),
)


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
    return times(row["ratio"][opponent])


def times(ratio: float) -> str:
    """A ratio with two or three figures."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


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


def machine(results: dict[str, Any]) -> str:
    """Where and on what it was measured."""
    device = results["gpu"] or f"{results['cpu'].replace('(R)', '')}, {results['threads']} threads"
    return f"{device}; torch {results['torch']}; commit {(results['commit'] or 'unknown')[:12]}"


def full(results: dict[str, Any]) -> str:
    """All that was measured on one machine, as a section in Markdown."""
    means = [
        f"{LOSS}, geometric mean against {opponent}: {times(geometric_mean(results, LOSS, opponent))}"
        for opponent in EAGER_OR_COMPILED
    ]
    return "\n\n".join([f"## {machine(results)}", table(results), "  \n".join(means)])


def summary(several: Sequence[dict[str, Any]]) -> str:
    """How many times as fast fastvae is, in Markdown: a column for each machine."""
    lines = [
        [
            f"{LOSS}, geometric mean of four sizes",
            opponent,
            *(geometric_mean(r, LOSS, opponent) for r in several),
        ]
        for opponent in EAGER_OR_COMPILED
    ]
    for title, opponent in SUMMARY:
        rows = [next(row for row in r["rows"] if row["title"].startswith(title)) for r in several]
        lines.append([rows[0]["title"], opponent, *(row["ratio"][opponent] for row in rows)])
    names = [r["gpu"] or r["cpu"].replace("(R)", "").removesuffix(" Processor") for r in several]
    shown = [[times(cell) if isinstance(cell, float) else cell for cell in line] for line in lines]
    header = [["times as fast as", "", *names], ["---"] * (2 + len(names))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*header, *shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--summary", action="store_true", help="the README's few lines")
    arguments = parser.parse_args()
    several = [json.loads(file.read_text()) for file in arguments.files]
    print(summary(several) if arguments.summary else "\n\n".join(map(full, several)))


if __name__ == "__main__":
    main()
