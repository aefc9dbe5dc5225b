"""Tables of what benchmark.py measured: criteria at equal MACs, parameters, sparsity or time, and spread over seeds.

    python scripts/table.py results/digits.jsonl --at macs --values 0.8 0.5 0.3 --format latex

Where no budget of a run lies at the cost that is asked for, its accuracy is interpolated linearly between the two
neighbouring budgets (the dense model is one), and marked. Nothing is extrapolated: a cell that not every seed reaches
stays empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from curves import (
    COSTS,
    EQUAL,
    METRICS,
    areas,
    contexts,
    cost_of,
    curves,
    differences,
    failures,
    only,
    read,
    tell,
    unfinished,
    value,
)

from baselines.torch_pruning_shipped import KNOWN_FAULTS
from jbrprune.errors import JBRError

MARK = "~"
LABELS = "(L)"
PERCENT = tuple(metric for metric in METRICS if metric != "kl")


@dataclass(frozen=True, eq=False)
class Table:
    """One table.

    Attributes:
        title: What was compared.
        cells: One row per criterion and cost: criterion, cost, mean, deviation, seeds, interpolated.
        notes: What a reader ought to know.
        faults: Criterion -> its known fault; footnotes.
        labelled: Criteria that were shown labels.
        areas: Criterion -> area under its curve, mean and deviation over seeds, the largest first; None: not asked for.
    """

    title: str
    cells: pd.DataFrame
    notes: tuple[str, ...]
    faults: dict[str, str]
    labelled: frozenset[str] = frozenset()
    areas: pd.DataFrame | None = None


def tables(
    frame: pd.DataFrame, wanted: str | None, metric: str, values: Sequence[float] | None, *, area: bool = False
) -> list[Table]:
    """One table for everything that is comparable.

    Args:
        frame: From `curves.read`.
        wanted: What is equal in a column: ``macs``, ``params``, ``sparsity`` or ``latency``; None: by kind.
        metric: What the cells show.
        values: The columns; None: the budgets, where they are of the same kind, else 0.9, 0.8, ... 0.1.
        area: Add the mean over the costs that all curves of a table cover, and the number of seeds; order by it.

    Raises:
        ArgumentError: The lines say nothing about it.
    """
    found = []
    apart = differences(frame)
    for title, rows in contexts(frame):
        at = cost_of(rows, wanted)
        targets = sorted(values or _targets(rows, at), reverse=at != "sparsity")
        cells = pd.DataFrame(
            [
                {"criterion": criterion, at: target, **_cell(list(seeds.values()), target)}
                for criterion, seeds in curves(rows, at, metric).items()
                for target in targets
            ]
        )
        faults = {name: KNOWN_FAULTS[name] for name in rows["criterion"].unique() if name in KNOWN_FAULTS}
        notes = _notes(rows, cells, at, metric)
        notes += (f"Not averaged with the other tables of these files, which differ in: {apart}.",) if apart else ()
        summed = areas(rows, at, metric) if area else None
        if summed is not None:
            low, high = summed[["low", "high"]].iloc[0]
            notes += (f"area: mean over {at} from {low:.3f} to {high:.3f}, which all runs of this table cover.",)
        labelled = frozenset(rows["criterion"][rows["labels"].astype(bool)])
        notes += (f"{LABELS}: sees labels.",) if labelled else ()
        found.append(Table(title, cells, notes, faults, labelled, summed))
    return found


def _targets(rows: pd.DataFrame, at: str) -> list[float]:
    if (rows["kind"] == at).all():
        return sorted(rows["budget"].unique())
    return [round(0.1 * tenth, 1) for tenth in range(1, 10)]


def _cell(seeds: Sequence[np.ndarray], target: float) -> dict[str, object]:
    pairs = [value(curve, target) for curve in seeds]
    numbers = np.array([number for number, _ in pairs])  # NaN where a seed does not reach the cost, so the mean is
    return {
        "mean": numbers.mean(),
        "deviation": numbers.std(ddof=1) if len(numbers) > 1 else float("nan"),
        "seeds": len(numbers),
        "interpolated": any(between for _, between in pairs),
    }


def _notes(rows: pd.DataFrame, cells: pd.DataFrame, at: str, metric: str) -> tuple[str, ...]:
    seeds = cells["seeds"]
    unit = ", percent" if metric in PERCENT else ""
    share = "share of weights that are zero" if at == "sparsity" else f"share of the dense model's {at}"
    spread = f"{seeds.max()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    notes = [f"{metric}{unit}, by {share}: mean and standard deviation over seeds ({spread})."]
    if cells["interpolated"].any():
        notes.append(f"{MARK} interpolated linearly between the neighbouring budgets: none is within {EQUAL}.")
    commits = sorted(rows["commit"].unique())
    if len(commits) > 1:
        notes.append(f"Measured at several commits: {', '.join(commits)}.")
    for name in ("versions", "hardware") if {"versions", "hardware"} <= set(rows.columns) else ():
        different = sorted({str(value) for value in rows[name]})
        if len(different) > 1:
            notes.append(f"Measured with different {name}: {'; '.join(different)}.")
    return tuple(notes)


# --- formats ---------------------------------------------------------------------------------------


def order_of(table: Table) -> list[str]:
    """The criteria, from the top."""
    return list(table.cells["criterion"].unique() if table.areas is None else table.areas.index)


def wide(table: Table, metric: str) -> pd.DataFrame:
    """Criteria by costs, as text, with the numbers of footnotes."""
    order = order_of(table)
    number = {name: f" [{place}]" for place, name in enumerate(table.faults, 1)}
    marks = {name: f" {LABELS}" * (name in table.labelled) + number.get(name, "") for name in order}
    at = table.cells.columns[1]
    shown = table.cells.assign(text=[_shown(cell, metric) for cell in table.cells.itertuples()])
    pivoted = shown.pivot(index="criterion", columns=at, values="text").loc[order, shown[at].unique()]
    pivoted.columns = [f"{target:g}" for target in pivoted.columns]
    if table.areas is not None:
        whole = table.areas.rename(columns={"area": "mean"}).assign(interpolated=False)
        pivoted = pivoted.assign(
            area=[_shown(cell, metric) for cell in whole.itertuples()], seeds=[str(n) for n in whole["seeds"]]
        )
    pivoted.index = pd.Index([name + marks[name] for name in order], name="criterion")
    return pivoted.reset_index()


def _shown(cell: tuple, metric: str) -> str:
    if np.isnan(cell.mean):
        return ""
    scale, digits = (100, 2) if metric in PERCENT else (1, 4)
    spread = "" if np.isnan(cell.deviation) else f" ± {scale * cell.deviation:.{digits}f}"
    return f"{MARK if cell.interpolated else ''}{scale * cell.mean:.{digits}f}{spread}"


def _footnotes(table: Table) -> list[str]:
    faults = [f"[{place}] {name}: {text}" for place, (name, text) in enumerate(table.faults.items(), 1)]
    return [*table.notes, *faults]


def markdown(found: Sequence[Table], metric: str) -> str:
    """Tables of Markdown with their notes below."""
    parts = []
    for table in found:
        frame = wide(table, metric)
        rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
        grid = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"**{table.title}**\n\n{grid}\n\n" + "\n".join(f"- {note}" for note in _footnotes(table)))
    return "\n\n".join(parts)


def latex(found: Sequence[Table], metric: str) -> str:
    """Table environments for booktabs, with their notes below."""
    parts = []
    for table in found:
        frame = wide(table, metric)
        layout = {"index": False, "escape": True, "column_format": "l" + "r" * (len(frame.columns) - 1)}
        notes = " \\\\\n".join(_escaped(note) for note in _footnotes(table))
        text = frame.to_latex(caption=_escaped(table.title), position="t", **layout)
        text = text.replace("\\end{table}", "\\par\\footnotesize\\raggedright\n" + notes + "\n\\end{table}")
        parts.append(text.replace("±", "$\\pm$").replace("\\textasciitilde ", "$\\sim$"))
    return "\n".join(parts)


def _escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace(MARK, "\\textasciitilde ")


def csv(found: Sequence[Table], metric: str) -> str:
    """One row per criterion and cost, in full precision, shares not percent."""
    parts = [
        table.cells.assign(
            title=table.title, metric=metric, fault=[table.faults.get(name, "") for name in table.cells["criterion"]]
        )
        for table in found
    ]
    return pd.concat(parts).to_csv(index=False)


FORMATS: dict[str, Callable[[Sequence[Table], str], str]] = {"markdown": markdown, "csv": csv, "latex": latex}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+", help="files that benchmark.py wrote")
    parser.add_argument(
        "--at", choices=COSTS, help="what is equal in a column; default: macs, for single weights sparsity"
    )
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--values", type=float, nargs="+", help="columns, as shares; default: the budgets")
    parser.add_argument("--criterion", nargs="+", help="only these")
    parser.add_argument("--area", action="store_true", help="add the area under each curve, and order by it")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--out", type=Path, help="default: print")
    args = parser.parse_args(argv)
    try:
        frame = only(read(args.lines), args.criterion)
        text = FORMATS[args.format](tables(frame, args.at, args.metric, args.values, area=args.area), args.metric)
        left_out = failures(args.lines, args.criterion)
    except JBRError as error:
        raise SystemExit(f"table.py: {error}") from error
    tell([*left_out, *unfinished(args.lines)])
    if left_out and args.format == "markdown":
        text += "\n\n" + "\n".join(f"- {sentence}" for sentence in left_out)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
