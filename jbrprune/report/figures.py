"""Reports as figures: one run, or many runs against their cost; needs matplotlib."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jbrprune.data.files import replacing
from jbrprune.evaluation.agreement import Agreement
from jbrprune.report.records import LayerRow, Run, StepRow
from jbrprune.report.text import check_reports, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 60

DARK, LIGHT, BEFORE = "#1f4e79", "#d9e1e8", "#c8742c"
MODEL_COLOURS = (DARK, BEFORE, "#3f7d4e", "#7b4b94", "#8c6d1f", "#555555")


def report_plot(report: Run, path: str | os.PathLike[str] | None = None) -> Figure:
    """Kept width of every layer, and agreement against MACs over the steps.

    Args:
        report: The run.
        path: Write the figure here as well; the suffix gives the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The figure; no window is opened and no global state of matplotlib is touched.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = _bar_columns(report.layers)
    rows = max(map(len, columns), default=0)
    height = max(4.2, 0.19 * rows + 1.2)
    figure = _figure(6.0 + 4.2 * len(columns), height)
    figure.suptitle(headline(report), x=0.01, ha="left", fontsize=11)
    top = min(height, 6.5)
    grid = figure.add_gridspec(2, len(columns) + 1, height_ratios=(top, max(height - top, 1e-3)))
    for number, column in enumerate(columns):
        _draw_layers(figure.add_subplot(grid[:, number]), column, rows)
    _draw_steps(figure.add_subplot(grid[0 if height > top else slice(None), -1]), report)
    _save(figure, path)
    return figure


def ratio_plot(reports: Sequence[Run], path: str | os.PathLike[str] | None = None) -> Figure:
    """Top-1 agreement, and accuracy where it is known, against MACs, before and after the last repair.

    Args:
        reports: At least one; each model gets its own colour.
        path: Write the figure here as well; the suffix gives the format.

    Returns:
        The figure.

    Raises:
        ArgumentError: No reports.
        ImportError: matplotlib is not installed.
    """
    check_reports(reports)
    panels = ["top1"] + ["accuracy"] * any(r.final is not None and r.final.accuracy is not None for r in reports)
    figure = _figure(5.6 * len(panels), 4.2)
    for number, value in enumerate(panels, start=1):
        _draw_ratios(figure.add_subplot(1, len(panels), number), reports, value)
    _save(figure, path)
    return figure


def extra(module: str) -> ModuleType:
    """Import a module that ``jbrprune[report]`` installs.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: pip install 'jbrprune[report]'") from error


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot would keep it alive and may look for a screen."""
    figure = extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:] or "png")


def _bar_columns(layers: Sequence[LayerRow]) -> list[Sequence[LayerRow]]:
    """Layers in one or two columns of bars; only those that changed where there are too many."""
    shown = list(layers) if len(layers) <= MAX_BARS else [layer for layer in layers if layer.after != layer.before]
    half = len(shown) if len(shown) <= MAX_BARS // 2 else math.ceil(len(shown) / 2)
    return [shown[start : start + half] for start in range(0, len(shown), half)] if shown else []


def _plain_axes(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.6)  # type: ignore[arg-type]
    axes.tick_params(labelsize=8, length=2.5)


def _draw_layers(axes: Axes, layers: Sequence[LayerRow], rows: int) -> None:
    """Bars from top to bottom, with room for ``rows`` of them so that columns line up."""
    places = range(len(layers))
    axes.barh(places, [100.0] * len(layers), height=0.72, color=LIGHT)
    axes.barh(places, [100 * layer.kept for layer in layers], height=0.72, color=DARK)
    what = "weights" if any(layer.kind == "weight" for layer in layers) else "width"
    small: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "#444444"}
    axes.text(102, -0.85, "kept / dense", **small)
    for place, layer in zip(places, layers, strict=True):
        axes.text(102, place, f"{layer.after} / {layer.before}", **small)
    _plain_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6))
    axes.set_xlabel(f"{what} kept (% of the dense layer)", fontsize=9)
    axes.set_yticks(list(places), [layer.name for layer in layers], fontsize=7)
    axes.tick_params(axis="y", length=0)


def _draw_steps(axes: Axes, report: Run) -> None:
    _draw_line(axes, _step_points(report, "unrepaired"), BEFORE, "before repair", hollow=True)
    _draw_line(axes, _step_points(report, "repaired"), DARK, "after repair")
    if report.final is not None:
        errors = _error_bars([report.final])
        axes.errorbar(
            100 * left(report), 100 * report.final.top1, yerr=errors, fmt="D", color="black", markersize=5, capsize=3,
            linewidth=1, label="final, held-out images, 95 % interval", zorder=4,
        )  # fmt: skip
    _percent_axes(axes, cost_name([report]), "top-1 agreement with the dense model (%)")


def _step_points(report: Run, name: str) -> list[tuple[float, float]]:
    """(cost kept, top-1), in percent, from the dense model on; empty where no step was measured."""
    rows = [(left_after(report, step), getattr(step, name)) for step in report.steps]
    points = [(100 * left, 100 * row.top1) for left, row in rows if row is not None]
    return [(100.0, 100.0), *points] if points else []


def left(report: Run) -> float:
    """What is left of the cost that was pruned: MACs, or where single weights were, effective parameters."""
    if report.pruned.nonzero is None or report.dense.nonzero is None:
        return report.kept
    return report.pruned.nonzero / report.dense.nonzero


def left_after(report: Run, step: StepRow) -> float:
    """The same after a step."""
    if step.nonzero is None or report.dense.nonzero is None:
        return step.macs / report.dense.macs
    return step.nonzero / report.dense.nonzero


def cost_name(reports: Sequence[Run]) -> str:
    """Name of the cost axis."""
    names = {"MACs" if report.pruned.nonzero is None else "effective parameters" for report in reports}
    return " or ".join(sorted(names))


def _draw_ratios(axes: Axes, reports: Sequence[Run], value: str) -> None:
    models = list(dict.fromkeys(report.model for report in reports))
    for number, model in enumerate(models):
        rows = sorted((report for report in reports if report.model == model), key=lambda report: -left(report))
        suffix = f", {model}" if len(models) > 1 else ""
        colours = (BEFORE, DARK) if len(models) == 1 else (MODEL_COLOURS[number % len(MODEL_COLOURS)],) * 2
        for name, colour in zip(("unrepaired", "repaired"), colours, strict=True):
            _draw_ratio_line(axes, rows, name, value, colour, f"{_WORDS[name]}{suffix}")
        if value == "accuracy" and rows[0].final is not None and rows[0].final.dense_accuracy is not None:
            colour = "#777777" if len(models) == 1 else colours[0]
            level = 100 * rows[0].final.dense_accuracy
            axes.axhline(level, color=colour, linewidth=1, linestyle=":", label=f"dense{suffix}")
    label = "top-1 agreement with the dense model (%)" if value == "top1" else "accuracy (%)"
    _percent_axes(axes, cost_name(reports), label)


_WORDS = {"unrepaired": "before the last repair", "repaired": "after the last repair"}


def _draw_ratio_line(axes: Axes, reports: Sequence[Run], name: str, value: str, colour: str, label: str) -> None:
    """From the dense model on, which agrees with itself."""
    rows = [(100 * left(report), getattr(report, name)) for report in reports]
    rows = [(kept, row) for kept, row in rows if row is not None and getattr(row, value) is not None]
    if not rows:
        return
    start = 1.0 if value == "top1" else rows[0][1].dense_accuracy
    points = [(100.0, 100 * start)] * (start is not None) + [(kept, 100 * getattr(row, value)) for kept, row in rows]
    _draw_line(axes, points, colour, label, hollow=name == "unrepaired")
    if value == "top1":
        x, agreements = zip(*rows, strict=True)
        errors = _error_bars(agreements)
        axes.errorbar(x, [100 * row.top1 for row in agreements], yerr=errors, fmt="none", color=colour, linewidth=0.8)


def _draw_line(
    axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str, hollow: bool = False
) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(
        x, y, color=colour, label=label, marker="o", markersize=4, linewidth=1 if hollow else 1.6,
        linestyle="--" if hollow else "-", markerfacecolor="white" if hollow else colour, clip_on=False,
    )  # fmt: skip


def _error_bars(rows: Sequence[Agreement]) -> list[list[float]]:
    """Distances from top-1 down and up to the ends of the interval, in percent."""
    ends = [(row.top1, *row.top1_interval) for row in rows]
    return [
        [100 * max(0.0, top1 - low) for top1, low, _ in ends],
        [100 * max(0.0, high - top1) for top1, _, high in ends],
    ]


def _percent_axes(axes: Axes, cost: str, label: str) -> None:
    """The cost falls from left to right, as pruning goes on."""
    _plain_axes(axes, grid="both")
    axes.set(xlabel=f"{cost} kept (% of the dense model)", ylabel=label, ylim=(0, 101))
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    if not math.isfinite(axes.dataLim.x0):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
        return
    lowest = float(axes.dataLim.x0)
    margin = 0.04 * (100 - lowest) + 0.5
    axes.set_xlim(100 + margin, lowest - margin)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="lower left")
