"""Reports as plain text: one run in full, or many runs side by side."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.evaluation.latency import Latency
from jbrprune.report.records import LayerRow, Run, Search, Size, plain

WIDTH = 100
RATIO_WIDTH = 120
MAX_ROWS = 40

# ASCII, so that a report can go into any log file and any terminal
RULED = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def report_text(report: Run) -> str:
    """One run: its cost, its agreement with the dense model and the width of every layer, in at most 100 columns."""
    parts = (headline(report), _facts(report), _agreement(report), _layer_table(report.layers), _notes(report.notes))
    return "\n\n".join(text for text in (_rendered(part, WIDTH) for part in parts if part) if text)


def ratio_table(rows: Sequence[Run], title: str) -> str:
    """What each pruning ratio costs: one line per report, after one for the dense model; one table per model.

    Top-1 is given before and after the last repair, all else for the model that was handed over.

    Args:
        rows: Runs in the order in which they are to be listed.
        title: First line.

    Returns:
        Plain text, at most 120 columns.

    Raises:
        ArgumentError: No reports.
    """
    models = list(dict.fromkeys(report.model for report in check_reports(rows)))
    tables = []
    for model in models:
        heading = [f"{model}\n"] * (len(models) > 1)
        tables += ["", *heading, _ratio_table([report for report in rows if report.model == model])]
    return _rendered(Group(title, *tables, "", _RATIO_NOTE), RATIO_WIDTH)


def headline(report: Run) -> str:
    """One line: the model, and its multiply-accumulates before and after, or how many weights are zero."""
    if report.sparsity is not None:
        weights = sum(layer.before for layer in report.layers if layer.kind == "weight")
        return f"{report.model}: {_percent(report.sparsity)} of {_si(weights)} weights are zero"
    return f"{report.model}: {_change(report.dense.macs, report.pruned.macs, 'MACs')}"


def facts(report: Run) -> dict[str, str]:
    """What the run changed and how, by name; empty where there is nothing to say."""
    dense, pruned = report.dense, report.pruned
    return {
        "MACs": _change(dense.macs, pruned.macs, "MACs") if dense.macs != pruned.macs and pruned.nonzero else "",
        "parameters": _change(dense.params, pruned.params, ""),
        "effective": _optional_change(dense.nonzero, pruned.nonzero, "", "parameters that are not masked"),
        "size": _change(dense.bytes, pruned.bytes, "B"),
        "packed": _optional_change(dense.packed, pruned.packed, "B", "without what is masked"),
        "latency": _latency_change(dense.latency, pruned.latency),
        "budget": _listed(report.budget),
        "max_drop": _searched(report.search),
        "settings": _listed(report.settings),
        "time": ", ".join(f"{part} {_number(s, '.1f')} s" for part, s in report.seconds.items()),
    }


def _facts(report: Run) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts(report).items():
        if fact:
            table.add_row(name, fact)
    return table


def _searched(search: Search | None) -> str:
    if search is None:
        return ""
    drop = search.drop
    chosen = f", corrected for choosing among {drop.models} models" if drop.models > 1 else ""
    return (
        f"{_percent(search.allowed)} allowed; the {drop.of} fell by {100 * drop.lost:.2f} % (95 % interval "
        f"{100 * drop.low:.1f} to {100 * drop.high:.1f} %{chosen}) on {search.images}. {len(search.trials)} models "
        f"were measured on them; no smaller one: {search.limit}"
    )


def _agreement(report: Run) -> RenderableType:
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


def _heldout(report: Run, row: Agreement) -> str:
    which = f" ({report.heldout})" if report.heldout else ""
    kind = "" if report.search and "decided" in report.heldout else "held-out "
    return f"Agreement with the dense model on {row.images} {kind}images{which}"


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


def _optional_change(before: int | None, after: int | None, unit: str, what: str) -> str:
    return "" if before is None or after is None else f"{_change(before, after, unit)} ({what})"


def _latency_change(dense: Latency | None, pruned: Latency | None) -> str:
    if dense is None or pruned is None:
        return ""
    threads = f"{pruned.threads} thread" + "s" * (pruned.threads != 1)
    ratio = _speedup(dense, pruned)
    text = "" if ratio is None else f", {ratio:.2f}x as fast"
    if ratio is not None and abs(dense.median_ms - pruned.median_ms) <= (dense.iqr_ms + pruned.iqr_ms) / 2:
        text += ", within the spread"
    change = f"{_spread(dense)} -> {_spread(pruned)} ms{text}"
    clock = ", thread time" if pruned.clock == "thread" else ""
    return f"{change} (median ± IQR/2; batch {pruned.batch}, {threads}, {pruned.device}{clock})"


def _spread(latency: Latency) -> str:
    digits = _decimals(latency.median_ms)
    return f"{latency.median_ms:.{digits}f} ± {latency.iqr_ms / 2:.{digits}f}"


def _speedup(dense: Latency | None, pruned: Latency | None) -> float | None:
    """Ratio of the medians; None where the two were not measured in the same way."""
    if dense is None or pruned is None:
        return None
    if any(getattr(dense, name) != getattr(pruned, name) for name in ("batch", "threads", "device", "clock")):
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
    return ", ".join(f"{name}={value}" for name, value in plain(values).items())


Cell = Callable[[Run], str]


def _ratio_table(reports: Sequence[Run]) -> Table:
    """Reports of one model."""
    known = {
        "accuracy": any(report.final and report.final.accuracy is not None for report in reports),
        "zeros": any(report.sparsity is not None for report in reports),
        "effective": any(report.pruned.nonzero for report in reports),
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


def _repair_change(report: Run) -> str:
    before, after = (_percent(row.top1 if row else None) for row in (report.unrepaired, report.repaired))
    return f"{before.removesuffix(' %')} -> {after}"


def _effective(size: Size) -> str:
    return _si(size.params if size.nonzero is None else size.nonzero)


def _latency_cell(latency: Latency | None) -> str:
    return "-" if latency is None else _spread(latency)


def _speedup_cell(report: Run) -> str:
    ratio = _speedup(report.dense.latency, report.pruned.latency)
    return "-" if ratio is None else f"{ratio:.2f}x"


# heading -> (text for the dense model, text for the pruned one)
_RATIO_COLUMNS: dict[str, tuple[Cell, Cell]] = {
    "kept": (lambda r: _percent(1.0), lambda r: _percent(r.kept)),
    "MACs": (lambda r: _si(r.dense.macs), lambda r: _si(r.pruned.macs)),
    "params": (lambda r: _si(r.dense.params), lambda r: _si(r.pruned.params)),
    "zeros": (lambda r: "", lambda r: _percent(r.sparsity)),
    "effective": (lambda r: _effective(r.dense), lambda r: _effective(r.pruned)),
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


def check_reports(reports: Sequence[Run]) -> Sequence[Run]:
    """The same reports.

    Raises:
        ArgumentError: There are none.
    """
    if not reports:
        raise ArgumentError("A table or plot over pruning ratios needs at least one report, got none.")
    return reports
