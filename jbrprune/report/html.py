"""A report as one HTML file: no scripts, nothing fetched, readable on paper and on a phone."""

from __future__ import annotations

import io
import os
from html import escape
from pathlib import Path
from typing import Any

from jbrprune.report.figures import plot_report
from jbrprune.report.records import Report
from jbrprune.report.text import Table, headline, make_tables

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
