"""A report as figures and as one HTML page: no scripts, nothing fetched, readable on paper and on a phone."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jbrprune.evaluation.agreement import Agreement
from jbrprune.report.records import Report, Size, StepRow, import_optional
from jbrprune.report.text import Table, headline, make_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_NAMES = 60
COLOURS = ("#c8742c", "#1f4e79", "#3f7d4e", "#7b4b94")
STAGES = {"unrepaired": "before repair", "repaired": "after repair"}
PREDICTIONS = {"predicted_flips": "predicted, without repair", "predicted_flips_repaired": "predicted, with repair"}
LABELS = {
    "agreement": "top-1 agreement with the dense model (%)",
    "nearest-neighbour agreement": "nearest-neighbour agreement (%)",
    "relative error": "1 - relative error (%)",
}

Point = tuple[float, float, float, float]
"""Cost kept, value, and the ends of the value's interval; all of them shares."""


def plot_report(report: Report, path: str | os.PathLike[str] | None = None, predicted: Any = None) -> Figure:
    """Draw the kept width of every layer, and the agreement against the cost over the steps; see `Report.plot`."""
    figure, (widths, curve) = _make_figure(2)
    figure.suptitle(headline(report), x=0.01, ha="left", fontsize=11)
    places, names = range(len(report.layers)), [layer.name for layer in report.layers]
    widths.bar(places, [100.0] * len(places), color="#d9e1e8", zorder=2)
    widths.bar(places, [100 * layer.kept for layer in report.layers], color=COLOURS[1], zorder=2)
    if len(places) <= MAX_NAMES:
        widths.set_xticks(places, names, rotation=90, fontsize=6)
    what = "width" if report.sparsity is None else "weights"
    widths.set(xlabel="layers in the order of the model", ylabel=f"{what} kept (% of the dense layer)", ylim=(0, 100))
    for colour, (stage, label) in zip(COLOURS, STAGES.items()):
        points = _points(report.dense, [(step, getattr(step, stage)) for step in report.steps])
        _draw_line(curve, points, colour, f"{label}, gate images", dashed=stage == "unrepaired")
    for colour, (column, label) in zip(COLOURS[2:], PREDICTIONS.items()):
        if predicted is not None and column in predicted and predicted[column].notna().any():
            points = [(share, *(1 - flips,) * 3) for share, flips in predicted[["macs", column]].to_numpy()]
            _draw_line(curve, points, colour, label, dashed=True)
    final = _points(report.dense, [(report.pruned, report.final)])[1:]
    _draw_line(curve, final, "black", "final, held-out images, 95 % interval")
    _finish_axes(curve, report, _label(report))
    save_figure(figure, path)
    return figure


def plot_sweep(reports: Sequence[Report], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the agreement, and accuracy where it is known, against the cost, before and after the last repair.

    Args:
        reports: At least one; all of one model.
        path: Write the figure here as well; the suffix gives the format.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    reports = sorted(reports, key=lambda report: -cost_left(report.dense, report.pruned))
    values = {"share": _label(reports[0])}
    if any(report.final is not None and report.final.accuracy is not None for report in reports):
        values["accuracy"] = "accuracy (%)"
    figure, panels = _make_figure(len(values))
    for axes, (value, name) in zip(panels, values.items()):
        for colour, (stage, label) in zip(COLOURS, STAGES.items()):
            points = _points(reports[0].dense, [(report.pruned, getattr(report, stage)) for report in reports], value)
            _draw_line(axes, points, colour, label, dashed=stage == "unrepaired")
        _finish_axes(axes, reports[0], name)
    save_figure(figure, path)
    return figure


def _label(report: Report) -> str:
    """Name of the number by which the models are compared."""
    return LABELS[report.final.of if report.final else "agreement"]


def cost_left(dense: Size, after: Size | StepRow) -> float:
    """Share of the cost that is left: of MACs, or where single weights were pruned, of parameters not masked."""
    if after.nonzero is None or dense.nonzero is None:
        return after.macs / dense.macs
    return after.nonzero / dense.nonzero


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write a figure in the format of the suffix; a file of that name stays as it was if the figure cannot be drawn."""
    if path is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format=Path(path).suffix[1:] or "png")
        Path(path).write_bytes(buffer.getvalue())


def _make_figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own: pyplot would keep it alive and may look for a screen."""
    figure = import_optional("matplotlib.figure").Figure((5.8 * panels, 4.6), layout="constrained", facecolor="white")
    panes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    return figure, panes


def _points(dense: Size, rows: Sequence[tuple[Size | StepRow, Agreement | None]], value: str = "share") -> list[Point]:
    """Measured points, after one for the dense model; empty if nothing was measured."""
    found = [(size, row) for size, row in rows if row and row.images and getattr(row, value) is not None]
    if not found:
        return []
    start = 1.0 if value == "share" else found[0][1].dense_accuracy or 0.0
    ends = [(value == "share" and row.interval) or (getattr(row, value),) * 2 for _, row in found]
    shares = [(cost_left(dense, size), getattr(row, value)) for size, row in found]
    return [(1.0, start, start, start), *((*pair, low, high) for pair, (low, high) in zip(shares, ends))]


def _draw_line(axes: Axes, points: Sequence[Point], colour: str, label: str, *, dashed: bool = False) -> None:
    if points:
        x, y, low, high = 100 * np.array(points, dtype=float).T
        axes.errorbar(
            x, y, yerr=np.maximum((y - low, high - y), 0), color=colour, label=label, marker="o", markersize=4,
            markerfacecolor="white" if dashed else colour, linestyle="--" if dashed else "-", elinewidth=0.8,
        )  # fmt: skip


def _finish_axes(axes: Axes, report: Report, label: str) -> None:
    """The cost falls from left to right, as pruning goes on."""
    cost = "MACs" if report.pruned.nonzero is None else "effective parameters"
    axes.set(xlabel=f"{cost} kept (% of the dense model)", ylabel=label, ylim=(0, 102))
    axes.invert_xaxis()
    if axes.containers:
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ max-width: 1000px; margin: 0 auto; padding: 1.5rem; color: #1c2430; font: 15px/1.5 system-ui, sans-serif; }}
h1, td, p {{ overflow-wrap: anywhere; }} div {{ overflow-x: auto; }}
h2 {{ font-size: 1.1rem; margin: 2em 0 .5em; border-bottom: 1px solid #d9dfe6; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25em .7em; border-bottom: 1px solid #d9dfe6; vertical-align: top; }}
.left {{ text-align: left; }} svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{figure}
{sections}
</body>
</html>
"""


def make_page(report: Report, path: str | os.PathLike[str] | None = None, predicted: Any = None) -> str:
    """Make the page of one run, see `Report.to_html`; everything in it that comes from outside is escaped."""
    drawn = io.StringIO()
    plot_report(report, predicted=predicted).savefig(drawn, format="svg")
    svg = drawn.getvalue()
    sections = {name: _format_table(table) for name, table in make_tables(report).items()}
    if report.notes:
        sections["Notes"] = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    page = _PAGE.format(
        title=escape(headline(report)),
        figure=svg[svg.index("<svg") :],
        sections="\n".join(f"<h2>{escape(name)}</h2>\n{body}" for name, body in sections.items()),
    )
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _format_table(table: Table) -> str:
    lines = []
    for number, row in enumerate((table.headings, *table.rows)):
        tag = "td" if number else "th"
        kinds = [' class="left"' * (column < table.left) for column in range(len(row))]
        lines.append("".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row)))
    return "<div><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines if line) + "</table></div>"
