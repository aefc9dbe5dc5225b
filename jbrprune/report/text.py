"""Reports as plain text: one run in full, the runs of a sweep side by side, and the model card of a saved model."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import table
from rich.box import Box
from rich.console import Console

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.report.records import Report, plain

WIDTH = 80
MAX_ROWS = 40
CARD = "README.md"
LIBRARY = "jbrprune"
SHORT = {"agreement": "top-1", "nearest-neighbour agreement": "neighbours", "relative error": "1 - error"}
"""Headings of what models are compared by."""
TASKS = dict.fromkeys(("embedding", "features"), "image-feature-extraction") | {"dense": "image-segmentation"}
"""Kind of output -> task of the Hugging Face Hub."""


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        headings: One for every column; empty for pairs of a name and a value.
        rows: The cells.
        left: So many of the first columns are aligned to the left, the others to the right.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def make_table(rows: Sequence[Mapping[str, Any]], left: int = 1) -> Table:
    """A table of rows with the same keys; columns in which no row has a value are left out."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    return Table(names, [[format_value(row[name]) for name in names] for row in rows], left)


def make_pairs(values: Mapping[str, Any]) -> Table:
    """A table of names and values without headings; what is an empty text is left out."""
    return Table((), [(name, format_value(value)) for name, value in values.items() if value != ""], left=2)


def format_table(content: Table) -> str:
    """Lay a table out as plain ASCII of at most 80 columns, whatever the terminal and its variables are.

    The first column is folded where it is too wide; of pairs, the second.
    """
    ruled = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    grid = table.Table(box=ruled, show_edge=False, pad_edge=False, header_style="", padding=(0, 1, 0, 0))
    grid.show_header = bool(content.headings)
    for number, heading in enumerate(content.headings or ("", "")):
        folds = number == (0 if content.headings else 1)
        justify = "left" if number < content.left else "right"
        grid.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold")
    for row in content.rows:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, emoji=False, _environ={})
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def format_report(report: Report) -> str:
    """Lay a report out in at most 80 columns: cost, agreement with the dense model, width of every layer, notes."""
    layers = report.layers
    if len(layers) > MAX_ROWS:
        layers = tuple(layer for layer in layers if layer.after != layer.before)[:MAX_ROWS]
    parts = [headline(report)]
    hidden = len(report.layers) - len(layers)
    for title, content in make_tables(replace(report, layers=layers, steps=())).items():
        rest = f", {hidden} more layers are not listed" if hidden and title == "Widths" else ""
        parts += [textwrap.fill(title + rest, WIDTH), format_table(content)]
    options: dict[str, Any] = {"initial_indent": "- ", "subsequent_indent": "  ", "break_long_words": False}
    parts += ["\n".join(textwrap.fill(note, WIDTH, **options) for note in report.notes)] * bool(report.notes)
    return "\n\n".join(parts)


def format_sweep(reports: Sequence[Report], title: str) -> str:
    """Lay out what each share costs: one line per report, after one for the dense model.

    Agreement is given before and after the last repair, all else for the model that was handed over.

    Args:
        reports: At least one, all of one model, in the order in which they are to be listed.
        title: First line.

    Returns:
        Plain text, at most 80 columns.
    """
    rows, final = [_sweep_row(reports[0], dense=True), *map(_sweep_row, reports)], reports[0].final
    logits = final is None or final.kl is not None
    note = (
        f"kept: share of the MACs. {SHORT[final.of if final else 'agreement']}, {'KL' if logits else 'error'}: against "
        "the dense model on held-out images; the former before -> after the last repair, all else after it. time: of "
        "one image, in turns with the dense model."
    )
    if any(report.timings is not None and report.timings.ratios[1] > 1 for report in reports):
        note += (
            " A time above 100 % lies within the spread of the timing, or comes from widths at which kernels are slow: "
            "Floors(round_to=8) keeps multiples of 8."
        )
    return f"{title}\n\n{format_table(make_table(rows, left=0))}\n\n{textwrap.fill(note, WIDTH)}"


def _sweep_row(report: Report, dense: bool = False) -> dict[str, Any]:
    """One row of the table: a report, or its dense model."""
    size, final, timings = report.dense if dense else report.pruned, report.final, report.timings
    tops = [format_percent(row.share, "") or "-" for row in (report.unrepaired, report.repaired) if row is not None]
    accuracy = final and (final.dense_accuracy if dense else final.accuracy)
    ms, ratio = (timings.latencies[0].median_ms, timings.ratios[1]) if timings else (None, None)
    return {
        "kept\n%": f"{100 * size.macs / report.dense.macs:.1f}",
        "MACs": format_si(size.macs),
        "params": format_si(size.params),
        f"{SHORT[final.of if final else 'agreement']} (%)\nbefore -> after": "dense" if dense else " -> ".join(tops),
        "95 %\ninterval": None if dense else format_interval(final),
        "KL\n(nats)": None if dense or final is None or final.kl is None else f"{final.kl:.3g}",
        "relative\nerror": None if dense or final is None or final.error is None else f"{final.error:.3g}",
        "accu-\nracy %": format_percent(accuracy, ""),
        "time\n%": ms and f"{ms:.3g} ms" if dense else format_percent(ratio, ""),
    }


def headline(report: Report) -> str:
    """One line: the model, and its multiply-accumulates before and after, or how many weights are zero."""
    if report.sparsity is not None:
        weights = sum(layer.before for layer in report.layers if layer.kind == "weight")
        return f"{report.model}: {format_percent(report.sparsity)} of {format_si(weights)} weights are zero"
    return f"{report.model}: {format_change(report.dense.macs, report.pruned.macs, 'MACs')}"


def make_tables(report: Report) -> dict[str, Table]:
    """The tables of a report by title; those that would be empty are left out."""
    rows = {"before the last repair": report.unrepaired, "after the last repair": report.repaired}
    if report.final is not None and report.final.accuracy is not None:
        rows = {"dense": Agreement(0, 1.0, 1.0, 0.0, report.final.dense_accuracy)} | rows
    agreements = [
        {"": name, "top-1": format_percent(row.top1), "neighbours": format_percent(row.neighbours)}
        | {"95 % interval": format_interval(row), "top-5": format_percent(row.top5), "KL (nats)": row.kl}
        | {"mean IoU": row.iou, "cosine": row.cosine, "relative error": row.error}
        | {"accuracy": format_percent(row.accuracy)}
        for name, row in rows.items()
        if row is not None
    ]
    errors = {stage: row.errors for stage, row in rows.items() if row is not None and row.errors}
    names = list(next(iter(errors.values()), ()))
    levels = [{"": name} | {stage: found[name] for stage, found in errors.items()} for name in names]
    widths = [
        {"layer": row.name, "type": row.type, "unit": row.kind, "before": row.before, "after": row.after}
        | {"kept": format_percent(row.kept), "": f"{'#' * round(10 * row.kept):10}"}
        for row in report.layers
    ]
    tables = {
        "Cost": make_pairs(_facts(report)),
        f"Agreement with the dense model on {report.heldout or 'held-out images'}": make_table(agreements),
        "Relative error of every output": make_table(levels if len(names) > 1 else ()),
        "Widths": make_table(widths, left=3),
        "Steps": make_table([vars(step) for step in report.steps]),
        "Provenance": make_pairs(report.provenance),
    }
    return {title: content for title, content in tables.items() if content.rows}


def _facts(report: Report) -> dict[str, Any]:
    """Cost, latency, search and settings of the run by name; an empty text where a value does not apply."""
    dense, pruned, search, timings = report.dense, report.pruned, report.search, report.timings
    latency = dropped = ""
    if timings is not None:
        before, after = timings.latencies
        same = ", within the spread" if abs(1 - timings.ratios[1]) <= timings.spreads[1] else ""
        latency = (
            f"{before.median_ms:.3g} ± {before.iqr_ms / 2:.2g} -> {after.median_ms:.3g} ± {after.iqr_ms / 2:.2g} ms, "
            f"{format_percent(timings.ratios[1])} of the time{same} (median ± IQR/2, in turns; batch {after.batch}, "
            f"threads {after.threads}, {after.device}, {after.clock} clock)"
        )
    if search is not None:
        drop = search.drop
        chosen = f", corrected for choosing among {drop.models} models" if drop.models > 1 else ""
        promise = f"with confidence {search.confidence:g} by no more than {100 * drop.upper:.2f} %"
        if search.confidence == 0.5:
            promise = "elsewhere it may well have fallen by more than allowed: confidence=0.5"
        dropped = (
            f"{format_percent(search.allowed)} allowed; the {drop.of} fell by {100 * drop.lost:.2f} % (95 % interval "
            f"{100 * drop.low:.1f} to {100 * drop.high:.1f} %{chosen}) on {search.images}; {promise}. "
            f"{len(search.trials)} models were measured on them; no smaller one: {search.limit}"
        )
    return {
        "MACs": format_change(dense.macs, pruned.macs),
        "parameters": format_change(dense.params, pruned.params),
        "effective": format_change(dense.nonzero, pruned.nonzero, note=" (parameters that are not masked)"),
        "size": format_change(dense.bytes, pruned.bytes, "B"),
        "packed": format_change(dense.packed, pruned.packed, "B", " (without what is masked)"),
        "latency": latency,
        "budget": report.budget,
        "max_drop": dropped,
        "settings": report.settings,
        "time": ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report.seconds.items()),
    }


def format_value(value: object) -> str:
    """One cell: ``25,557,032``, ``0.1234``, ``a=1, b=2``, the share of an agreement; ``-`` for None and NaN."""
    if isinstance(value, Agreement):
        return format_percent(value.share) or "-"
    value = plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={entry}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def format_si(*values: float, unit: str = "") -> str:
    """``4.09 -> 2.04 GMACs``: a prefix and the decimals that the first and the smallest value ask for."""
    sizes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 0.0: ""}
    size = next(size for size in sizes if abs(values[0]) >= size)
    least = min(values) / (size or 1)
    digits = 2 if least < 10 else 1 if least < 100 else 0
    return f"{' -> '.join(f'{value / (size or 1):.{digits}f}' for value in values)} {sizes[size]}{unit}".rstrip()


def format_change(before: float | None, after: float | None, unit: str = "", note: str = "") -> str:
    """``4.09 -> 2.04 GMACs, 50.0 % kept``; nothing where one of the two is not known."""
    if before is None or after is None:
        return ""
    return f"{format_si(before, after, unit=unit)}, {format_percent(after / before if before else math.nan)} kept{note}"


def format_percent(share: float | None, unit: str = " %") -> str | None:
    """``50.0 %``; ``-`` for what is not a number."""
    return None if share is None else "-" if math.isnan(share) else f"{100 * share:.1f}{unit}"


def format_interval(row: Agreement | None) -> str | None:
    """``90.9 - 95.3``: the 95 % interval of the agreement, in percent."""
    ends = row.interval if row is not None and row.images else None
    return None if ends is None else " - ".join(f"{100 * end:.1f}" for end in ends)


def make_card(report: Mapping[str, Any], base: str | None) -> str:
    """Make the model card of a saved model: front matter for the Hugging Face Hub, how to load it, its report.

    Args:
        report: What ``Report.to_dict`` made; empty if there is none.
        base: timm's name of the dense model; None for other models.
    """
    try:
        run = Report.from_dict(report) if report else None
    except ArgumentError:
        run = None  # of another tool: the card does without
    task = TASKS.get(str(run.settings.get("output", "logits")) if run else "logits", "image-classification")
    facts: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": task}
    facts["tags"] = [task, "pruning", LIBRARY] + ["timm"] * bool(base)
    if base:
        name = base.rpartition(":")[2]  # without hf-hub:
        facts["base_model"] = name if "/" in name else f"timm/{name}"
    dense, argument = (f"`{base}`", "") if base else ("a model of your own", ", model=dense")
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"]),
        f"# {base or (run.model if run else 'A pruned model')}, pruned",
        f"Pruned from {dense} with {LIBRARY}, without labels and without training.",
        f'```python\nimport jbrprune\n\nmodel = jbrprune.load("hf-hub:USER/NAME"{argument})  # or this folder\n```',
    ]
    return "\n\n".join(parts + [f"## Report\n\n````text\n{run}\n````"] * (run is not None)) + "\n"


def is_card(text: str) -> bool:
    """Whether a README was made by `make_card`, so that it may be replaced."""
    return text.startswith("---\n") and f'library_name: "{LIBRARY}"' in text.split("\n---", 1)[0]
