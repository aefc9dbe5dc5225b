"""Figures of what benchmark.py measured: accuracy over cost with its spread, area under the curve, scoring time.

    python scripts/plot.py results/digits.jsonl --at macs --out digits.png

One row of panels for everything that is comparable. The area under a curve (by trapezoids, seed by seed) is
that over the costs that all runs cover, divided by their range: a mean accuracy. It is printed as a table too.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from curves import (
    COSTS,
    METRICS,
    areas,
    common_range,
    contexts,
    cost_of,
    curves,
    failures,
    only,
    read,
    tell,
    unfinished,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jbrprune.errors import JBRError

COLOURS = (
    *("#1f4e79", "#c8742c", "#3f7d4e", "#7b4b94", "#b3262a", "#8c6d1f"),
    *("#2a9d9d", "#d0699d", "#6b6b6b", "#7fa81f", "#3a86ff", "#5c3317"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Styles = dict[str, tuple[str, str]]
"""Criterion -> colour and marker."""
LABEL = {
    "macs": "share of the dense model's MACs",
    "params": "share of the dense model's parameters",
    "sparsity": "share of weights that are zero",
    "latency": "share of the dense model's time for one image",
}


def figure(frame: pd.DataFrame, at: str | None, metric: str) -> Figure:
    """Three panels a row: curves, areas, scoring times; a criterion has one colour and marker in all of a row."""
    found = list(contexts(frame))
    heights = [max(4.5, 0.24 * rows["criterion"].nunique() + 1.6) for _, rows in found]
    drawn = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts = drawn.subfigures(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, rows) in zip(parts, found, strict=True):
        part.suptitle(textwrap.fill(title, 200), x=0.01, ha="left", fontsize=10)
        _row(part.subplots(1, 3, width_ratios=(2, 1, 1)), rows, cost_of(rows, at), metric)
    return drawn


def _row(panels: np.ndarray, rows: pd.DataFrame, at: str, metric: str) -> None:
    table = areas(rows, at, metric)
    styles = {
        name: (COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)])
        for place, name in enumerate(table.index)
    }
    _draw_curves(panels[0], rows, at, metric, styles)
    low, high = table["low"].iloc[0], table["high"].iloc[0]
    bounds = f"from {low:.2f} to {high:.2f}" if low < high else "(no common costs)"
    _draw_dots(panels[1], table, ("area", "deviation"), f"mean {metric} {bounds}, deviation over seeds", styles)
    panels[2].set_xscale("log")
    _draw_dots(panels[2], table, ("scoring_seconds", None), "seconds of one scoring", styles)


def _draw_curves(axes: Axes, rows: pd.DataFrame, at: str, metric: str, styles: Styles) -> None:
    for name, seeds in curves(rows, at, metric).items():
        colour, marker = styles[name]
        low, high = common_range({name: seeds})
        grid = np.unique(np.concatenate([curve[0] for curve in seeds.values()]).clip(low, high))
        values = np.stack([np.interp(grid, *curve) for curve in seeds.values()])
        axes.plot(grid, values.mean(0), color=colour, lw=1.4, zorder=2)
        axes.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.13, lw=0, zorder=1)
        for curve in seeds.values():
            axes.plot(*curve, marker, color=colour, ms=3, alpha=0.7, lw=0, zorder=3)
    axes.set(xlabel=LABEL[at], ylabel=metric)
    if at != "sparsity":
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.set_title("mean over seeds, band from the least to the largest; points are single runs", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_dots(axes: Axes, table: pd.DataFrame, columns: tuple[str, str | None], title: str, styles: Styles) -> None:
    """One line per criterion, the first on top; its name in its colour is the legend."""
    mean, deviation = columns
    for place, (name, row) in enumerate(table[::-1].iterrows()):
        colour, marker = styles[name]
        spread = 0.0 if deviation is None or math.isnan(row[deviation]) else row[deviation]
        axes.errorbar(row[mean], place, xerr=spread, fmt=marker, color=colour, ms=6, capsize=3)
        axes.annotate(
            f"{row[mean]:#.3g}",
            (row[mean] + spread, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(table)), table.index[::-1], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_color(styles[label.get_text()][0])
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.margins(x=0.2)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def text(frame: pd.DataFrame, at: str | None, metric: str) -> str:
    """The areas and scoring times as a table of text."""
    parts = []
    for title, rows in contexts(frame):
        table = areas(rows, at, metric)
        low, high = table["low"].iloc[0], table["high"].iloc[0]
        shown = table.drop(columns=["low", "high"]).to_string(float_format="{:.4f}".format)
        parts.append(f"{title}\narea: mean {metric} from {low:.3f} to {high:.3f}, {LABEL[cost_of(rows, at)]}\n{shown}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+", help="files that benchmark.py wrote")
    parser.add_argument("--at", choices=COSTS, help="the cost on the axis; default: macs, for single weights sparsity")
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--criterion", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, required=True, help="the suffix gives the format")
    args = parser.parse_args(argv)
    try:
        frame = only(read(args.lines), args.criterion)
        print(text(frame, args.at, args.metric))
        figure(frame, args.at, args.metric).savefig(args.out, dpi=130)
        tell([*failures(args.lines, args.criterion), *unfinished(args.lines)])
    except JBRError as error:
        raise SystemExit(f"plot.py: {error}") from error


if __name__ == "__main__":
    main()
