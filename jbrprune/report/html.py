"""A report as one HTML file: no scripts, nothing fetched, readable in light and dark, on paper and on a phone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from jbrprune.data.files import replacing
from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.report.charts import Series, line_chart
from jbrprune.report.figures import cost_name, left, left_after
from jbrprune.report.records import LayerRow, Run, plain
from jbrprune.report.text import facts, headline

if TYPE_CHECKING:
    from pandas import DataFrame

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="headline">$headline</p>
<div class="tiles">$tiles</div>
$sections
</main>
</body>
</html>
""")

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --panel: #f4f6f8; --line: #d9dfe6; --bar: #1f5f99;
  --before: #b8651b; --predicted: #7b4b94; --foreseen: #3f7d4e; --level: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --soft: #9aa6b5; --paper: #14181d; --panel: #1e242b;
  --line: #36404b; --bar: #6fb1ee; --before: #f0a35e; --predicted: #c79be0; --foreseen: #7fc492; --level: #9aa6b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2em 0 .6em; border-bottom: 1px solid var(--line); padding-bottom: .25em; }
.headline, .note { color: var(--soft); margin: .3em 0 1.2em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; }
.tile { background: var(--panel); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; overflow-wrap: anywhere; }
td.wide { width: 32%; min-width: 120px; }
.bar { display: block; height: 10px; margin-top: 6px; background: var(--line); border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px; }
figure { margin: 0; max-width: 640px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg text.axis { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg g polyline { fill: none; stroke: currentColor; stroke-width: 2; }
svg g circle { fill: currentColor; stroke: var(--paper); stroke-width: 1; }
svg g line { stroke: currentColor; stroke-width: 1.2; }
.measured { color: var(--bar); } .before { color: var(--before); } .predicted { color: var(--predicted); }
.foreseen { color: var(--foreseen); } .level { color: var(--level); }
svg .before polyline, svg .predicted polyline, svg .foreseen polyline { stroke-dasharray: 5 4; }
svg .level polyline { stroke-dasharray: 2 3; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 4px 0 0 52px;
  font-size: .85rem; }
.legend li::before { content: ""; display: inline-block; width: 18px; border-top: 3px solid currentColor;
  margin-right: 6px; vertical-align: middle; }
.legend li.before::before, .legend li.predicted::before, .legend li.foreseen::before { border-top-style: dashed; }
.legend li.level::before { border-top-style: dotted; }
@media print { .tile { border: 1px solid var(--line); } }
"""


def report_page(report: Run, path: str | os.PathLike[str] | None = None, predicted: DataFrame | None = None) -> str:
    """One run as a page; everything in it that comes from outside is escaped.

    Args:
        report: The run.
        path: Write the page here as well.
        predicted: What `jbrprune.predict` said of the same model and images, drawn beside what was measured.

    Returns:
        The page.

    Raises:
        ArgumentError: The prediction is of channels, and single weights were pruned; or it lacks a column.
    """
    if predicted is not None:
        _check_predicted(report, predicted)
    sections = {
        "Cost": _costs(report),
        "Agreement with the dense model": _agreement(report),
        "What was measured, step by step": _curves(report, predicted),
        "Widths": _layers(report.layers),
        "Steps": _steps(report),
        "Settings": _pairs({**report.budget, **report.settings}),
        "Provenance": _pairs(report.provenance | {f"seconds, {k}": round(v, 2) for k, v in report.seconds.items()}),
        "Notes": "".join(f"<p>{escape(note)}</p>" for note in report.notes),
    }
    text = _PAGE.substitute(
        title=escape(report.model),
        headline=escape(headline(report)),
        style=_STYLE,
        tiles="".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in _tiles(report)),
        sections="".join(f"<section><h2>{escape(n)}</h2>{body}</section>" for n, body in sections.items() if body),
    )
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def _check_predicted(report: Run, predicted: DataFrame) -> None:
    if report.pruned.nonzero is not None:
        raise ArgumentError(
            "predicted= is what the removal of channels would do, over MACs; this is a report on single weights. "
            "Leave it out."
        )
    if "macs" not in predicted or not {"predicted_flips", "predicted_flips_repaired"} & set(predicted):
        raise ArgumentError(
            "predicted= needs the columns 'macs' and 'predicted_flips' or 'predicted_flips_repaired', as "
            f"jbrprune.predict makes them; got {', '.join(map(str, predicted))}."
        )


def _tiles(report: Run) -> Iterable[tuple[str, str]]:
    dense, pruned = report.dense, report.pruned
    if report.sparsity is not None:
        yield "of the weights are zero", _percent(report.sparsity)
    yield "of the multiply-accumulates kept", _percent(report.kept)
    yield "of the parameters kept", _percent(pruned.params / dense.params if dense.params else None)
    if dense.latency is not None and pruned.latency is not None and pruned.latency.median_ms > 0:
        yield "as fast for one image", f"{dense.latency.median_ms / pruned.latency.median_ms:.2f} times"
    if report.final is not None:
        yield f"top-1 agreement on {report.final.images} held-out images", _percent(report.final.top1)
        if report.final.accuracy is not None:
            yield f"accuracy (dense {_percent(report.final.dense_accuracy)})", _percent(report.final.accuracy)


def _costs(report: Run) -> str:
    rows = [(name, text) for name, text in facts(report).items() if text and name not in ("budget", "settings", "time")]
    return _table((), ([_Text(name), _Text(text)] for name, text in rows))


def _agreement(report: Run) -> str:
    measured = {"before the last repair": report.unrepaired, "after the last repair": report.repaired}
    rows = [[_Text(name), *_agreement_cells(row)] for name, row in measured.items() if row is not None]
    if not rows:
        return ""
    which = f'<p class="note">{escape(report.heldout)}</p>' if report.heldout else ""
    return which + _table(("", "top-1", "95 % interval", "top-5", "KL (nats)", "accuracy"), rows)


def _agreement_cells(row: Agreement) -> list[str]:
    interval = "-"
    if row.images:
        low, high = row.top1_interval
        interval = f"{100 * low:.1f} - {100 * high:.1f} %"
    divergence = "-" if math.isnan(row.kl) else f"{row.kl:.4f}"
    return [_percent(row.top1), interval, _percent(row.top5), divergence, _percent(row.accuracy)]


def _curves(report: Run, predicted: DataFrame | None) -> str:
    agreement = [_measured(report, "unrepaired", "before"), _measured(report, "repaired", "measured")]
    agreement += _final(report) + ([] if predicted is None else _predicted(predicted))
    kept = f"{cost_name([report])} kept (% of the dense model)"
    charts = [line_chart(agreement, kept, "top-1 agreement with the dense model (%)")]
    timed = [(100 * left_after(report, s), 100 * s.relative_latency) for s in report.steps if s.relative_latency]
    if timed:
        lines = [Series("measured", "measured", ((100.0, 100.0), *timed))]
        lines.append(Series("in proportion", "level", ((100.0, 100.0), (timed[-1][0], timed[-1][0]))))
        charts.append(line_chart(lines, kept, "latency (% of the dense model)"))
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _measured(report: Run, name: str, style: str) -> Series:
    rows = [(left_after(report, step), getattr(step, name)) for step in report.steps]
    points = tuple((100 * share, 100 * row.top1) for share, row in rows if row is not None)
    legend = {"unrepaired": "measured, before repair", "repaired": "measured, after repair"}[name]
    return Series(f"{legend} (gate images)", style, ((100.0, 100.0), *points) if points else ())


def _final(report: Run) -> list[Series]:
    if report.final is None or not report.final.images:
        return []
    x, row = 100 * left(report), report.final
    low, high = row.top1_interval
    held = Series(
        "final, held-out images, 95 % interval", "final", ((x, 100 * row.top1),), ((x, 100 * low, 100 * high),)
    )
    if row.accuracy is None or row.dense_accuracy is None:
        return [held]
    return [held, Series("accuracy of the dense model", "level", ((100.0, a := 100 * row.dense_accuracy), (x, a)))]


def _predicted(table: DataFrame) -> list[Series]:
    names = {
        "predicted_flips": ("predicted, without repair", "foreseen"),
        "predicted_flips_repaired": ("predicted, with repair", "predicted"),
    }
    return [
        Series(legend, style, tuple((100 * m, 100 * (1 - f)) for m, f in zip(table["macs"], table[name])))
        for name, (legend, style) in names.items()
        if name in table
    ]


def _layers(layers: Sequence[LayerRow]) -> str:
    rows = [
        [_Text(row.name), _Text(row.type), _Text(row.kind), str(row.before), str(row.after), _bar(row.kept)]
        for row in layers
    ]
    names = (_Text("layer"), _Text("type"), _Text("unit"), "before", "after", _Text("kept"))
    return _table(names, rows) if rows else ""


def _steps(report: Run) -> str:
    def top1(row: Agreement | None) -> str:
        return "" if row is None else _percent(row.top1)

    names = (
        "step",
        "target",
        "MACs",
        "parameters",
        "latency",
        "top-1 before repair",
        "after",
        _Text("repair"),
        "seconds",
    )
    rows = [
        [
            *(str(step.step), _percent(step.target), f"{step.macs:,}", f"{step.params:,}"),
            *(_percent(step.relative_latency) if step.relative_latency else "", top1(step.unrepaired)),
            *(top1(step.repaired), _Text(step.repair), f"{step.seconds:.1f}"),
        ]
        for step in report.steps
    ]
    return _table(names, rows) if rows else ""


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), ([_Text(name), _Text(_said(value))] for name, value in plain(values).items()))


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


class _Text(str):
    """A cell that is aligned to the left."""

    __slots__ = ()


class _Markup(str):
    """A cell that is markup already."""

    __slots__ = ()


def _bar(share: float) -> _Markup:
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    return _Markup(f'<td class="wide"><span class="bar" title="{width} %"><i style="width:{width}%"></i></span></td>')


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(_cell(name, "th") for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if names else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _cell(text: str, tag: str = "td") -> str:
    if isinstance(text, _Markup):
        return text
    kind = ' class="text"' if isinstance(text, _Text) else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
