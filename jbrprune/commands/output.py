"""What the commands say: JSON, or text with tables; progress only to a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from jbrprune.data import distributed


def interactive(as_json: bool) -> bool:
    """Whether to show progress: only text, by one rank, to a terminal, where ``NO_PROGRESS`` is not set."""
    return distributed.rank() == 0 and not as_json and sys.stderr.isatty() and "NO_PROGRESS" not in os.environ


def say(as_json: bool, facts: Mapping[str, Any], text: str) -> None:
    """Print the facts as one JSON object, or the text; of several ranks, one does."""
    if distributed.rank() == 0:
        typer.echo(json.dumps(facts) if as_json else text)


def shown(value: object) -> str:
    """A number as a person reads it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_of(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Rows with the same keys as a table under a title."""
    table = Table(title=title, title_justify="left", box=None, header_style="")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    console = Console(width=100, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
