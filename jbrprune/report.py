"""What one pruning run did: a record that prints as a table, plots, and survives JSON."""

from __future__ import annotations

import functools
import importlib
import io
import math
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from jbrprune.errors import ArgumentError
from jbrprune.measure import Agreement, Latency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

WIDTH = 100
RATIO_WIDTH = 120
MAX_ROWS = 40
MAX_BARS = 60

DARK, LIGHT, BEFORE = "#1f4e79", "#d9e1e8", "#c8742c"
MODEL_COLOURS = (DARK, BEFORE, "#3f7d4e", "#7b4b94", "#8c6d1f", "#555555")
# ASCII, so that a report can go into any log file and any terminal
RULED = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

Record = TypeVar("Record")


@dataclass(frozen=True)
class LayerRow:
    """Width of one layer before and after.

    Attributes:
        name: Qualified name.
        type: Class of the module.
        kind: What its units are: ``channel``, ``head``, ``group`` or ``width``.
        before: Output channels (heads of an attention) of the dense model.
        after: The same of the pruned model.
    """

    name: str
    type: str
    kind: str
    before: int
    after: int

    @property
    def kept(self) -> float:
        """Share of the width that stayed, in [0, 1]."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        macs: Multiply-accumulates for one image.
        params: Number of parameters.
        bytes: Bytes of parameters and buffers.
        latency: Wall time of a forward pass, or None where it was not measured.
    """

    macs: int
    params: int
    bytes: int
    latency: Latency | None = None


@dataclass(frozen=True)
class StepRow:
    """One step of removal and repair.

    Attributes:
        step: Number of the step, from 1.
        target: Cost the step was to reach, in the unit of the budget.
        macs: Multiply-accumulates after the step.
        params: Parameters after the step.
        seconds: Duration of the step.
        unrepaired: Agreement after removal, on the images that gate the repair; None where it was not measured.
        repaired: The same of the model as the step leaves it.
        repair: Name of the repair that was kept, or ``none``.
    """

    step: int
    target: float
    macs: int
    params: int
    seconds: float
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    repair: str = "none"


@dataclass(frozen=True)
class Report:
    """Everything one pruning run has to say.

    Attributes:
        model: Name of the model.
        budget: What was asked for.
        settings: How it was done.
        dense: Cost before.
        pruned: Cost after.
        layers: Width of every layer, in order of execution.
        steps: Trajectory of the run.
        unrepaired: Held-out agreement of the final model before the last repair.
        repaired: Held-out agreement of the final model after the last repair.
        heldout: Which images the held-out agreement was measured on, such as ``last 500 images of the folder``.
        seconds: Part of the run -> seconds.
        provenance: Versions, seed, hardware.
        notes: What a reader ought to know.
    """

    model: str
    budget: dict[str, Any]
    settings: dict[str, Any]
    dense: Size
    pruned: Size
    layers: tuple[LayerRow, ...]
    steps: tuple[StepRow, ...] = ()
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    heldout: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def final(self) -> Agreement | None:
        """Held-out agreement of the model that was handed over."""
        return self.unrepaired if self.repaired is None else self.repaired

    @property
    def kept(self) -> float:
        """Share of the multiply-accumulates that stayed, in [0, 1]."""
        return self.pruned.macs / self.dense.macs

    def __str__(self) -> str:
        """Plain text, at most 100 columns."""
        parts = (_headline(self), _facts(self), _agreement(self), _layer_table(self.layers), _notes(self.notes))
        return "\n\n".join(text for text in (_rendered(part, WIDTH) for part in parts if part) if text)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types: tuples become lists, NaN and Inf become None, anything foreign its string."""
        return _plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Undo `to_dict`; keys that are not known are ignored.

        Raises:
            ArgumentError: A required key is missing (named), or a record is not a mapping.
        """
        return _record(cls, data)

    def to_frame(self) -> DataFrame:
        """One row per layer: name, type, kind, before, after, kept.

        Raises:
            ImportError: pandas is not installed.
        """
        names = [item.name for item in fields(LayerRow)] + ["kept"]
        rows = [[getattr(layer, name) for name in names] for layer in self.layers]
        return _extra("pandas").DataFrame(rows, columns=names)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Kept width of every layer, and agreement against MACs over the steps.

        Args:
            path: Write the figure here as well; the suffix gives the format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The figure; no window is opened and no global state of matplotlib is touched.

        Raises:
            ImportError: matplotlib is not installed.
        """
        columns = _bar_columns(self.layers)
        rows = max(map(len, columns), default=0)
        height = max(4.2, 0.19 * rows + 1.2)
        figure = _figure(6.0 + 4.2 * len(columns), height)
        figure.suptitle(_headline(self), x=0.01, ha="left", fontsize=11)
        top = min(height, 6.5)
        grid = figure.add_gridspec(2, len(columns) + 1, height_ratios=(top, max(height - top, 1e-3)))
        for number, column in enumerate(columns):
            _draw_layers(figure.add_subplot(grid[:, number]), column, rows)
        _draw_steps(figure.add_subplot(grid[0 if height > top else slice(None), -1]), self)
        _save(figure, path)
        return figure


def ratio_table(rows: Sequence[Report], title: str) -> str:
    """What each pruning ratio costs: one line per report, after one for the dense model; one table per model.

    Top-1 is given before and after the last repair, all else for the model that was handed over.

    Args:
        rows: Reports in the order in which they are to be listed.
        title: First line.

    Returns:
        Plain text, at most 120 columns.

    Raises:
        ArgumentError: No reports.
    """
    models = list(dict.fromkeys(report.model for report in _check_reports(rows)))
    tables = []
    for model in models:
        heading = [f"{model}\n"] * (len(models) > 1)
        tables += ["", *heading, _ratio_table([report for report in rows if report.model == model])]
    return _rendered(Group(title, *tables, "", _RATIO_NOTE), RATIO_WIDTH)


def ratio_plot(reports: Sequence[Report], path: str | os.PathLike[str] | None = None) -> Figure:
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
    _check_reports(reports)
    panels = ["top1"] + ["accuracy"] * any(r.final is not None and r.final.accuracy is not None for r in reports)
    figure = _figure(5.6 * len(panels), 4.2)
    for number, value in enumerate(panels, start=1):
        _draw_ratios(figure.add_subplot(1, len(panels), number), reports, value)
    _save(figure, path)
    return figure


# --- text ---------------------------------------------------------------------------------------


def _headline(report: Report) -> str:
    return f"{report.model}: {_change(report.dense.macs, report.pruned.macs, 'MACs')}"


def _facts(report: Report) -> Table:
    dense, pruned = report.dense, report.pruned
    facts = {
        "parameters": _change(dense.params, pruned.params, ""),
        "size": _change(dense.bytes, pruned.bytes, "B"),
        "latency": _latency_change(dense.latency, pruned.latency),
        "budget": _listed(report.budget),
        "settings": _listed(report.settings),
        "time": ", ".join(f"{part} {_number(s, '.1f')} s" for part, s in report.seconds.items()),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            table.add_row(name, fact)
    return table


def _agreement(report: Report) -> RenderableType:
    rows = {"before the last repair": report.unrepaired, "after the last repair": report.repaired}
    measured = {name: row for name, row in rows.items() if row is not None}
    if report.final is None:
        return ""
    labelled = report.final.accuracy is not None
    names = ["", "top-1", "95 % interval", "top-5", "KL (nats)"] + ["accuracy"] * labelled
    table = _table(*names, right=names[1:])
    if labelled:
        table.add_row("dense", *_agreement_cells(Agreement(0, 1.0, 1.0, 0.0, report.final.dense_accuracy)))
    for name, row in measured.items():
        table.add_row(name, *_agreement_cells(row)[: len(names) - 1])
    return Group(_heldout(report, report.final), "", table)


def _heldout(report: Report, row: Agreement) -> str:
    which = f" ({report.heldout})" if report.heldout else ""
    return f"Agreement with the dense model on {row.images} held-out images{which}"


def _agreement_cells(row: Agreement) -> tuple[str, ...]:
    return _percent(row.top1), _interval(row), _percent(row.top5), _number(row.kl, ".4f"), _percent(row.accuracy)


def _layer_table(layers: Sequence[LayerRow]) -> RenderableType:
    if not layers:
        return ""
    changed = [layer for layer in layers if layer.after != layer.before]
    wanted = layers if len(layers) <= MAX_ROWS else changed
    table = _table("layer", "type", "unit", "before", "after", "kept", "", right=("before", "after", "kept"))
    for layer in wanted[:MAX_ROWS]:
        row = (layer.name, layer.type, layer.kind, str(layer.before), str(layer.after))
        table.add_row(*row, _percent(layer.kept), _bar(layer.kept))
    left_out = [f"{len(wanted) - MAX_ROWS} more layers"] * (len(wanted) > MAX_ROWS)
    left_out += [f"{len(layers) - len(wanted)} unchanged layers"] * (len(layers) > len(wanted))
    return Group(table, "... and " + " and ".join(left_out)) if left_out else table


def _notes(notes: Iterable[str]) -> str:
    return "\n".join(
        textwrap.fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
        for note in notes
    )


def _rendered(part: RenderableType, width: int) -> str:
    """Plain text, whatever the terminal and its variables are; names such as ``a[b]`` are not markup."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False,
        markup=False, emoji=False, highlight=False, _environ={},
    )  # fmt: skip
    with console.capture() as capture:
        console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _table(*names: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=RULED, show_edge=False, pad_edge=False, header_style="", padding=(0, 1))
    right = set(right)
    for name in names:
        foldable = name == "layer"
        justify = "right" if name in right else "left"
        table.add_column(name, justify=justify, no_wrap=not foldable, overflow="fold")
    return table


def _scale(value: float) -> tuple[float, str]:
    """Divisor and prefix with which the value has one to three digits before the point."""
    steps = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((size, prefix) for size, prefix in steps if abs(value) >= size), (1.0, ""))


def _decimals(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0


def _si(value: float, unit: str = "") -> str:
    size, prefix = _scale(value)
    return f"{value / size:.{_decimals(value / size)}f} {prefix}{unit}".rstrip()


def _change(before: float, after: float, unit: str) -> str:
    """``4.09 -> 2.04 GMACs, 50.0 % kept``, both numbers in the prefix of the first."""
    size, prefix = _scale(before)
    digits = _decimals(min(before, after) / size)
    pair = f"{before / size:.{digits}f} -> {after / size:.{digits}f} {prefix}{unit}".rstrip()
    return f"{pair}, {_percent(after / before if before else None)} kept"


def _latency_change(dense: Latency | None, pruned: Latency | None) -> str:
    if dense is None or pruned is None:
        return ""
    threads = f"{pruned.threads} thread" + "s" * (pruned.threads != 1)
    ratio = _speedup(dense, pruned)
    text = "" if ratio is None else f", {ratio:.2f}x as fast"
    if ratio is not None and abs(dense.median_ms - pruned.median_ms) <= (dense.iqr_ms + pruned.iqr_ms) / 2:
        text += ", within the spread"
    change = f"{_spread(dense)} -> {_spread(pruned)} ms{text}"
    return f"{change} (median ± IQR/2; batch {pruned.batch}, {threads}, {pruned.device})"


def _spread(latency: Latency) -> str:
    digits = _decimals(latency.median_ms)
    return f"{latency.median_ms:.{digits}f} ± {latency.iqr_ms / 2:.{digits}f}"


def _speedup(dense: Latency | None, pruned: Latency | None) -> float | None:
    """Ratio of the medians; None where the two were not measured in the same way."""
    if dense is None or pruned is None:
        return None
    if (dense.batch, dense.threads, dense.device) != (pruned.batch, pruned.threads, pruned.device):
        return None
    return dense.median_ms / pruned.median_ms


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def _interval(row: Agreement | None) -> str:
    if row is None or not row.images:
        return "" if row else "-"
    low, high = row.top1_interval
    return f"{100 * low:.1f} - {100 * high:.1f} %"


def _bar(share: float, length: int = 20) -> str:
    return "#" * round(share * length)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in _plain(values).items())


Cell = Callable[[Report], str]


def _ratio_table(reports: Sequence[Report]) -> Table:
    """Reports of one model."""
    known = {
        "accuracy": any(report.final and report.final.accuracy is not None for report in reports),
        "latency\n(ms)": any(report.pruned.latency for report in reports),
        "speed-up": any(_speedup(report.dense.latency, report.pruned.latency) for report in reports),
    }
    columns = {name: cells for name, cells in _RATIO_COLUMNS.items() if known.get(name, True)}
    table = _table(*columns, right=columns)
    table.add_row(*(dense(reports[0]) for dense, _ in columns.values()))
    for report in reports:
        table.add_row(*(pruned(report) for _, pruned in columns.values()))
    return table


def _of_final(form: Callable[[Agreement], str]) -> Cell:
    return lambda report: "-" if report.final is None else form(report.final)


def _repair_change(report: Report) -> str:
    before, after = (_percent(row.top1 if row else None) for row in (report.unrepaired, report.repaired))
    return f"{before.removesuffix(' %')} -> {after}"


def _latency_cell(latency: Latency | None) -> str:
    return "-" if latency is None else _spread(latency)


def _speedup_cell(report: Report) -> str:
    ratio = _speedup(report.dense.latency, report.pruned.latency)
    return "-" if ratio is None else f"{ratio:.2f}x"


# heading -> (text for the dense model, text for the pruned one)
_RATIO_COLUMNS: dict[str, tuple[Cell, Cell]] = {
    "kept": (lambda r: _percent(1.0), lambda r: _percent(r.kept)),
    "MACs": (lambda r: _si(r.dense.macs), lambda r: _si(r.pruned.macs)),
    "params": (lambda r: _si(r.dense.params), lambda r: _si(r.pruned.params)),
    "top-1\nbefore -> after": (lambda r: "dense", _repair_change),
    "95 %\ninterval": (lambda r: "", lambda r: _interval(r.final)),
    "top-5": (lambda r: "", _of_final(lambda a: _percent(a.top5))),
    "KL\n(nats)": (lambda r: "", _of_final(lambda a: _number(a.kl, ".4f"))),
    "accuracy": (_of_final(lambda a: _percent(a.dense_accuracy)), _of_final(lambda a: _percent(a.accuracy))),
    "latency\n(ms)": (lambda r: _latency_cell(r.dense.latency), lambda r: _latency_cell(r.pruned.latency)),
    "speed-up": (lambda r: "", _speedup_cell),
}
_RATIO_NOTE = (
    "kept: share of the MACs. top-1, top-5, KL: agreement with the dense model on held-out images; top-1 before -> "
    "after the last repair, all else after it. latency: median ± IQR/2."
)


def _check_reports(reports: Sequence[Report]) -> Sequence[Report]:
    if not reports:
        raise ArgumentError("A table or plot over pruning ratios needs at least one report, got none.")
    return reports


# --- figures ------------------------------------------------------------------------------------


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: pip install 'jbrprune[report]'") from error


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot would keep it alive and may look for a screen."""
    figure = _extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write under a temporary name in the same folder, then move into place."""
    if path is None:
        return
    target = Path(path)
    suffix = target.suffix or ".png"
    handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=f".{target.stem}-", dir=target.parent)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=150, format=suffix[1:])
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


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
    small: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "#444444"}
    axes.text(102, -0.85, "kept / dense", **small)
    for place, layer in zip(places, layers, strict=True):
        axes.text(102, place, f"{layer.after} / {layer.before}", **small)
    _plain_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6))
    axes.set_xlabel("width kept (% of the dense layer)", fontsize=9)
    axes.set_yticks(list(places), [layer.name for layer in layers], fontsize=7)
    axes.tick_params(axis="y", length=0)


def _draw_steps(axes: Axes, report: Report) -> None:
    _draw_line(axes, _step_points(report, "unrepaired"), BEFORE, "before repair", hollow=True)
    _draw_line(axes, _step_points(report, "repaired"), DARK, "after repair")
    if report.final is not None:
        errors = _error_bars([report.final])
        axes.errorbar(
            100 * report.kept, 100 * report.final.top1, yerr=errors, fmt="D", color="black", markersize=5, capsize=3,
            linewidth=1, label="final, held-out images, 95 % interval", zorder=4,
        )  # fmt: skip
    _percent_axes(axes, "top-1 agreement with the dense model (%)")


def _step_points(report: Report, name: str) -> list[tuple[float, float]]:
    """(MACs kept, top-1), in percent, from the dense model on; empty where no step was measured."""
    rows = [(step.macs / report.dense.macs, getattr(step, name)) for step in report.steps]
    points = [(100 * macs, 100 * row.top1) for macs, row in rows if row is not None]
    return [(100.0, 100.0), *points] if points else []


def _draw_ratios(axes: Axes, reports: Sequence[Report], value: str) -> None:
    models = list(dict.fromkeys(report.model for report in reports))
    for number, model in enumerate(models):
        rows = sorted((report for report in reports if report.model == model), key=lambda report: -report.kept)
        suffix = f", {model}" if len(models) > 1 else ""
        colours = (BEFORE, DARK) if len(models) == 1 else (MODEL_COLOURS[number % len(MODEL_COLOURS)],) * 2
        for name, colour in zip(("unrepaired", "repaired"), colours, strict=True):
            _draw_ratio_line(axes, rows, name, value, colour, f"{_WORDS[name]}{suffix}")
        if value == "accuracy" and rows[0].final is not None and rows[0].final.dense_accuracy is not None:
            colour = "#777777" if len(models) == 1 else colours[0]
            level = 100 * rows[0].final.dense_accuracy
            axes.axhline(level, color=colour, linewidth=1, linestyle=":", label=f"dense{suffix}")
    label = "top-1 agreement with the dense model (%)" if value == "top1" else "accuracy (%)"
    _percent_axes(axes, label)


_WORDS = {"unrepaired": "before the last repair", "repaired": "after the last repair"}


def _draw_ratio_line(axes: Axes, reports: Sequence[Report], name: str, value: str, colour: str, label: str) -> None:
    """From the dense model on, which agrees with itself."""
    rows = [(100 * report.kept, getattr(report, name)) for report in reports]
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


def _percent_axes(axes: Axes, label: str) -> None:
    """MACs fall from left to right, as pruning goes on."""
    _plain_axes(axes, grid="both")
    axes.set(xlabel="MACs kept (% of the dense model)", ylabel=label, ylim=(0, 101))
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


# --- JSON ---------------------------------------------------------------------------------------


@functools.singledispatch
def _plain(value: Any) -> Any:
    """Pure JSON types; arrays and tensors become lists, anything foreign its string."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    listed = getattr(value, "tolist", None)
    return str(value) if listed is None else _plain(listed())


@_plain.register(str)
@_plain.register(int)
@_plain.register(type(None))
def _(value: Any) -> Any:
    return value


@_plain.register
def _(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@_plain.register(Mapping)
def _(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _plain(item) for key, item in value.items()}


@_plain.register(list)
@_plain.register(tuple)
def _(value: Sequence[Any]) -> list[Any]:
    return [_plain(item) for item in value]


@_plain.register
def _(value: Agreement) -> dict[str, Any]:
    """With the interval, for those who read the file with something else."""
    plain = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return plain | {"top1_interval": _plain(value.top1_interval)}


def _record(kind: type[Record], data: object, where: str = "report") -> Record:
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{where} must be a mapping, as Report.to_dict makes it; got {type(data).__name__}.")
    values: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in data:
            build, value = _NESTED.get(item.name), data[item.name]
            values[item.name] = build(value, f"{where}.{item.name}") if build and value is not None else value
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ArgumentError(f"{where} lacks {item.name!r}; it holds {sorted(data)}. Was it made by Report.to_dict?")
    return kind(**values)


def _records(kind: type[Record], data: Sequence[object], where: str) -> tuple[Record, ...]:
    return tuple(_record(kind, row, f"{where}[{number}]") for number, row in enumerate(data))


_NESTED: dict[str, Callable[[Any, str], object]] = {
    "dense": functools.partial(_record, Size),
    "pruned": functools.partial(_record, Size),
    "latency": functools.partial(_record, Latency),
    "unrepaired": functools.partial(_record, Agreement),
    "repaired": functools.partial(_record, Agreement),
    "layers": functools.partial(_records, LayerRow),
    "steps": functools.partial(_records, StepRow),
    "notes": lambda notes, where: tuple(notes),
}
