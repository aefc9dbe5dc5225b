"""Tables and figures of what benchmark.py measured: criteria at equal MACs, parameters, sparsity or time.

    python scripts/tables.py results/digits.jsonl --at macs --values 0.8 0.5 0.3 --format latex
    python scripts/tables.py results/digits.jsonl --area --figure digits.png

Cells are means and standard deviations over seeds. Where no budget of a run lies at the cost that is asked for, its
accuracy is interpolated linearly between the two neighbouring budgets (the dense model is one), and marked. Nothing is
extrapolated: a cell that not every seed reaches stays empty. The area under a curve is taken by trapezoids, seed by
seed, over the costs that all runs cover, and divided by their range: a mean accuracy. A figure has one panel for
everything that is comparable.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from common import describe_cuts, exit_on_error, lines, make_parser
from common import markdown as grid_of
from matplotlib.figure import Figure

from baselines import describe_departure
from jbrprune.errors import ArgumentError

CONTEXT = (
    *("model", "weights", "model_args", "data", "protocol", "kind", "repair", "steps", "options"),
    *("images", "eval_images", "batch_size", "data_digest", "from_dense", "budgets"),
)
"""Curves are compared that agree in these."""
COSTS = {
    "macs": "share of the dense model's MACs",
    "params": "share of the dense model's parameters",
    "sparsity": "share of weights that are zero",
    "latency": "share of the dense model's time for one image",
}
METRICS = ("accuracy", "agreement", "kl", "unrepaired_accuracy", "unrepaired_agreement")
EQUAL = 0.005
"""Costs that differ by no more, as shares of the dense model, count as equal."""
MARK, LABELS = "~", "(L)"
COLOURS = (
    *("#1f4e79", "#c8742c", "#3f7d4e", "#7b4b94", "#b3262a", "#8c6d1f"),
    *("#2a9d9d", "#d0699d", "#6b6b6b", "#7fa81f", "#3a86ff", "#5c3317"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Curves = dict[str, dict[int, np.ndarray]]
"""Criterion -> seed -> ``[2, n]`` cost (rising) and metric; the dense model is the first or the last point."""


# --- lines -----------------------------------------------------------------------------------------


def read(paths: Sequence[Path], criteria: Sequence[str] | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The results in some files, one row each, and a sentence for every run that failed and has not been made since.

    Adds ``at_macs``, ``at_params`` (of single weights: of those that are not zero), ``at_sparsity`` and, of runs that
    were timed, ``at_latency``, shares of the dense model. A budget that is there twice counts once.

    Args:
        paths: Files of benchmark.py.
        criteria: Only these; None: all.

    Raises:
        ArgumentError: A file is missing or has no lines of benchmark.py, or every run failed; there is no line of one
            of the criteria.
        DataError: A file is damaged.
    """
    names = " and ".join(map(str, paths))
    if missing := [path for path in paths if not path.is_file()]:
        raise ArgumentError(f"There is no file {missing[0]}.")
    found = [line for path in paths for line in lines(path)]
    if not found:
        raise ArgumentError(" ".join([f"{names}: no whole line yet.", *describe_cuts(paths)]))
    if not all({"key", "protocol"} <= line.keys() for line in found):
        raise ArgumentError(f"{names}: expected lines written by benchmark.py.")
    latest = {line["key"]: line for line in sorted(found, key=lambda line: "failed" not in line)}.values()
    for line in latest:
        if scope := line["options"].get("scope"):
            line["options"] = {name: value for name, value in line["options"].items() if name != "scope"}
            line["criterion"] += f", {scope}"
    there = {line["criterion"]: None for line in latest if "failed" not in line}
    if absent := [name for name in criteria or () if name not in there]:
        raise ArgumentError(f"No line of {', '.join(absent)}; there are {', '.join(there)}.")
    wanted = [line for line in latest if not criteria or line["criterion"] in criteria]
    failed = Counter(
        f"{line['criterion']} on {line['model']}, {line['protocol']}, seed {line['seed']}: {line['failed']}"
        for line in wanted
        if "failed" in line
    )
    left_out = [f"Left out, it failed: {what} ({count} budgets)" for what, count in failed.items()]
    if not there:
        raise ArgumentError(f"{names}: every run failed. {left_out[0]}")
    frame = pd.DataFrame([line for line in wanted if "failed" not in line])
    for name in ("model_args", "options", "budgets"):
        frame[name] = [json.dumps(value, sort_keys=True) for value in frame[name]]
    frame["steps"] = ["auto" if pd.isna(steps) else str(int(steps)) for steps in frame["steps"]]
    numbers = ("nonzero", "params", "sparsity", "latency_ms", "dense_latency_ms")
    known = {name: pd.to_numeric(frame.get(name, pd.Series(index=frame.index, dtype=float))) for name in numbers}
    frame["at_macs"] = frame["macs"] / frame["dense_macs"]
    frame["at_params"] = known["nonzero"].fillna(known["params"]) / frame["dense_params"]
    frame["at_sparsity"] = known["sparsity"]
    frame["at_latency"] = known["latency_ms"] / known["dense_latency_ms"]
    return frame, left_out


def contexts(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """What is comparable, with a title.

    Raises:
        ArgumentError: Rows that agree in all settings are of different dense models or images, or there are two for one
            budget: a mean over them would mean nothing.
    """
    for values, rows in frame.groupby(list(CONTEXT), sort=False, dropna=False):
        for name in ("dense_accuracy", "dense_macs", "dense_params"):
            different = ", ".join(map(str, rows[name].dropna().unique()))
            if ", " in different:
                raise ArgumentError(
                    f"Lines of the same settings have different {name} ({different}): other weights, images or "
                    "versions under one name. They are not averaged; put them into different files."
                )
        for one in rows[rows.duplicated(["criterion", "seed", "budget"])].itertuples():
            raise ArgumentError(
                f"{one.criterion}, seed {one.seed}, budget {one.budget} was measured twice in the same settings. They "
                "are not averaged; put them into different files."
            )
        own = dict(zip(CONTEXT, values, strict=True))
        way = "each budget from the dense model" if own["from_dense"] else f"through budgets {own['budgets'][1:-1]}"
        dense = f", dense accuracy {rows['dense_accuracy'].iloc[0]:.2%}" if rows["dense_accuracy"].notna().all() else ""
        yield (
            f"{own['model']} ({own['weights']}) on {own['data']}, protocol {own['protocol']}: repair {own['repair']}, "
            f"steps {own['steps']}, {way}, {own['images']} calibration and {own['eval_images']} evaluation images"
            f"{dense}",
            rows,
        )


# --- curves ----------------------------------------------------------------------------------------


def cost_of(rows: pd.DataFrame, at: str | None) -> str:
    """The cost to compare at; None: of single weights their sparsity, else MACs.

    Raises:
        ArgumentError: MACs, which zeros do not change.
    """
    sparse = bool((rows["kind"] == "sparsity").all())
    if sparse and at == "macs":
        raise ArgumentError("Single weights that are zero do not change the MACs: pick --at sparsity or --at params.")
    return at or ("sparsity" if sparse else "macs")


def curves(rows: pd.DataFrame, at: str, metric: str) -> Curves:
    """The metric over the cost.

    Raises:
        ArgumentError: The lines say nothing about it.
    """
    if rows[f"at_{at}"].isna().any() or rows[metric].isna().any():
        raise ArgumentError(f"Some lines say nothing about {metric} at {at}: pick another --at or --metric.")
    dense = {"agreement": 1.0, "unrepaired_agreement": 1.0, "kl": 0.0}.get(metric, rows["dense_accuracy"].iloc[0])
    found: Curves = {}
    for (criterion, seed), part in rows.groupby(["criterion", "seed"], sort=False):
        costs = [*part[f"at_{at}"], 0.0 if at == "sparsity" else 1.0]
        points = pd.Series([*part[metric], dense], costs, dtype=float)
        points = points.groupby(level=0).mean()  # a cost that is reached twice has one point, and costs rise
        found.setdefault(criterion, {})[seed] = np.stack([points.index.to_numpy(), points.to_numpy()])
    return found


def value(curve: np.ndarray, target: float) -> tuple[float, bool]:
    """The metric at a cost, and whether it is interpolated linearly; NaN outside of the curve."""
    costs, values = curve
    nearest = np.abs(costs - target).argmin()
    if abs(costs[nearest] - target) <= EQUAL:
        return float(values[nearest]), False
    inside = bool(costs[0] < target < costs[-1])
    return float(np.interp(target, costs, values)) if inside else float("nan"), inside


def common_range(found: Curves) -> tuple[float, float]:
    """The costs that every curve covers; empty where the first is not below the second."""
    every = [curve[0] for seeds in found.values() for curve in seeds.values()]
    return max(costs[0] for costs in every), min(costs[-1] for costs in every)


def area(curve: np.ndarray, low: float, high: float) -> float:
    """Mean of the metric between two costs, by trapezoids; NaN for an empty range."""
    costs, values = curve
    grid = np.concatenate([[low], costs[(costs > low) & (costs < high)], [high]])
    heights = np.interp(grid, costs, values)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(grid)).sum() / (high - low)) if low < high else math.nan


def areas(rows: pd.DataFrame, at: str, metric: str) -> pd.DataFrame:
    """Criterion -> area (mean and deviation over seeds) and seconds of one scoring, the best area first."""
    found = curves(rows, at, metric)
    low, high = common_range(found)
    single = [(name, area(curve, low, high)) for name, seeds in found.items() for curve in seeds.values()]
    table = pd.DataFrame(single, columns=["criterion", "area"]).groupby("criterion")["area"]
    table = table.agg(["mean", "std", "count"]).set_axis(["area", "deviation", "seeds"], axis=1)
    last = rows.sort_values("scorings").groupby(["criterion", "seed"], sort=False).last()
    sums = last.groupby("criterion")[["scoring_seconds", "scorings"]].sum()
    table = table.assign(low=low, high=high, scoring_seconds=sums["scoring_seconds"] / sums["scorings"])
    return table.sort_values("area", ascending=metric == "kl")


# --- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """One table.

    Attributes:
        title: What was compared.
        cells: One row per criterion and cost: criterion, cost, mean, deviation, seeds, interpolated.
        notes: What a reader ought to know.
        departures: Criterion -> where it departs from its paper; footnotes.
        labelled: Criteria that were shown labels.
        areas: From `areas`; None: not asked for.
    """

    title: str
    cells: pd.DataFrame
    notes: tuple[str, ...]
    departures: dict[str, str]
    labelled: frozenset[str]
    areas: pd.DataFrame | None


def tables(
    frame: pd.DataFrame, wanted: str | None, metric: str, values: Sequence[float] | None, *, area=False, best=False
) -> list[Table]:
    """One table for everything that is comparable.

    Args:
        frame: From `read`.
        wanted: What is equal in a column: ``macs``, ``params``, ``sparsity`` or ``latency``; None: by kind.
        metric: What the cells show.
        values: The columns; None: the budgets, where they are of the same kind, else 0.9, 0.8, ... 0.1.
        area: Add areas and scoring times; order by area.
        best: Of the ways to rank by a criterion (``l1, layer`` and ``l1, raw``) keep the one with the best area.

    Raises:
        ArgumentError: The lines say nothing about it.
    """
    settings = {name: frame[name].astype(str).unique() for name in CONTEXT}
    apart = "; ".join(f"{name} ({', '.join(found)})" for name, found in settings.items() if len(found) > 1)
    made = []
    for title, rows in contexts(frame):
        at = cost_of(rows, wanted)
        if best:  # the first of `areas` is the best, so it is written last
            ways = {way.partition(",")[0]: way for way in reversed(areas(rows, at, metric).index)}
            rows = rows[rows["criterion"].isin(ways.values())]
        same = bool((rows["kind"] == at).all())
        targets = values or (rows["budget"].unique() if same else [round(0.1 * tenth, 1) for tenth in range(1, 10)])
        targets = sorted(targets, reverse=at != "sparsity")
        cells = pd.DataFrame(
            [
                {"criterion": criterion, at: target, **_cell(list(seeds.values()), target)}
                for criterion, seeds in curves(rows, at, metric).items()
                for target in targets
            ]
        )
        notes = _notes(rows, cells, at, metric)
        notes += [f"Not averaged with the other tables of these files, which differ in: {apart}."] * bool(apart)
        summed = areas(rows, at, metric) if area else None
        if summed is not None:
            low, high = summed[["low", "high"]].iloc[0]
            notes.append(f"area: mean over {at} from {low:.3f} to {high:.3f}, which all runs of this table cover.")
        labelled = frozenset(rows["criterion"][rows["labels"].astype(bool)])
        notes += [f"{LABELS}: sees labels."] * bool(labelled)
        single = bool((rows["kind"] == "sparsity").all())
        texts = {n: describe_departure(n.partition(",")[0], weights=single) for n in rows["criterion"].unique()}
        departures = {name: text for name, text in texts.items() if text}
        made.append(Table(title, cells, tuple(notes), departures, labelled, summed))
    return made


def _cell(seeds: Sequence[np.ndarray], target: float) -> dict[str, object]:
    pairs = [value(curve, target) for curve in seeds]
    numbers = np.array([number for number, _ in pairs])  # NaN where a seed does not reach the cost, so the mean is
    deviation = numbers.std(ddof=1) if len(numbers) > 1 else float("nan")
    between = any(between for _, between in pairs)
    return {"mean": numbers.mean(), "deviation": deviation, "seeds": len(numbers), "interpolated": between}


def _notes(rows: pd.DataFrame, cells: pd.DataFrame, at: str, metric: str) -> list[str]:
    least, most = cells["seeds"].min(), cells["seeds"].max()
    unit = "" if metric == "kl" else ", percent"
    spread = f"{most}" if least == most else f"{least} to {most}"
    notes = [f"{metric}{unit}, by {COSTS[at]}: mean and standard deviation over seeds ({spread})."]
    if cells["interpolated"].any():
        notes.append(f"{MARK} interpolated linearly between the neighbouring budgets: none is within {EQUAL}.")
    for name in ("commit", "versions", "hardware"):
        different = sorted({str(value) for value in rows.get(name, ())})
        notes += [f"Measured with different {name}: {'; '.join(different)}."] * (len(different) > 1)
    return notes


def wide(table: Table, metric: str) -> pd.DataFrame:
    """Criteria by costs, as text, with the numbers of footnotes."""
    order = list(table.cells["criterion"].unique() if table.areas is None else table.areas.index)
    at = table.cells.columns[1]
    shown = table.cells.assign(text=[_shown(cell, metric) for cell in table.cells.itertuples()])
    pivoted = shown.pivot(index="criterion", columns=at, values="text").loc[order, shown[at].unique()]
    pivoted.columns = [f"{target:g}" for target in pivoted.columns]
    if table.areas is not None:
        whole = table.areas.rename(columns={"area": "mean"}).assign(interpolated=False)
        pivoted["area"] = [_shown(cell, metric) for cell in whole.itertuples()]
        pivoted["seeds"] = [str(number) for number in whole["seeds"]]
        pivoted["seconds of a scoring"] = [f"{seconds:.3g}" for seconds in whole["scoring_seconds"]]
    number = {name: f" [{place}]" for place, name in enumerate(table.departures, 1)}
    marked = [name + f" {LABELS}" * (name in table.labelled) + number.get(name, "") for name in order]
    return pivoted.set_axis(pd.Index(marked, name="criterion")).reset_index()


def _shown(cell: tuple, metric: str) -> str:
    if np.isnan(cell.mean):
        return ""
    scale, digits = (1, 4) if metric == "kl" else (100, 2)
    spread = "" if np.isnan(cell.deviation) else f" ± {scale * cell.deviation:.{digits}f}"
    return f"{MARK if cell.interpolated else ''}{scale * cell.mean:.{digits}f}{spread}"


def _footnotes(table: Table) -> list[str]:
    texts = [f"[{place}] {name}: {text}" for place, (name, text) in enumerate(table.departures.items(), 1)]
    return [*table.notes, *texts]


def markdown(found: Sequence[Table], metric: str) -> str:
    """Tables of Markdown with their notes below."""
    parts = []
    for table in found:
        frame = wide(table, metric)
        notes = "\n".join(f"- {note}" for note in _footnotes(table))
        parts.append(f"**{table.title}**\n\n{grid_of(list(frame.columns), frame.to_numpy().tolist())}\n\n{notes}")
    return "\n\n".join(parts)


def latex(found: Sequence[Table], metric: str) -> str:
    """Tables for booktabs, titles and notes as comments."""
    parts = []
    for table in found:
        frame = wide(table, metric)
        grid = frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(frame.columns) - 1))
        grid = grid.replace("±", "$\\pm$").replace("\\textasciitilde ", "$\\sim$")
        parts.append("\n".join([f"% {table.title}", grid, *(f"% {note}" for note in _footnotes(table))]))
    return "\n\n".join(parts)


def csv(found: Sequence[Table], metric: str) -> str:
    """One row per criterion and cost, in full precision, shares not percent."""
    parts = [t.cells.assign(title=t.title, departure=t.cells["criterion"].map(t.departures)) for t in found]
    return pd.concat(parts).assign(metric=metric).to_csv(index=False)


FORMATS: dict[str, Callable[[Sequence[Table], str], str]] = {"markdown": markdown, "csv": csv, "latex": latex}


# --- figures ---------------------------------------------------------------------------------------


def figure(frame: pd.DataFrame, wanted: str | None, metric: str) -> Figure:
    """One panel for everything that is comparable; the legend is ordered by area, and says it."""
    found = list(contexts(frame))
    heights = [max(4.5, 0.24 * rows["criterion"].nunique() + 1.6) for _, rows in found]
    drawn = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = drawn.subplots(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (title, rows) in zip(panels, found, strict=True):
        at = cost_of(rows, wanted)
        table, every = areas(rows, at, metric), curves(rows, at, metric)
        for place, (name, area) in enumerate(table["area"].items()):
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place // len(COLOURS) % len(MARKERS)]}
            low, high = common_range({name: every[name]})
            grid = np.unique(np.concatenate([curve[0] for curve in every[name].values()]).clip(low, high))
            values = np.stack([np.interp(grid, *curve) for curve in every[name].values()])
            label = name if math.isnan(area) else f"{name} {area:.4f}"
            axes.plot(grid, values.mean(0), lw=1.4, ms=4, label=label, **style)
            axes.fill_between(grid, values.min(0), values.max(0), color=style["color"], alpha=0.13, lw=0)
        low, high = table[["low", "high"]].iloc[0]
        means = f"mean {metric} from {low:.2f} to {high:.2f}" if low < high else "(no common costs)"
        axes.legend(title=means, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set(xlabel=COSTS[at], ylabel=f"{metric}, mean over seeds; band from the least to the largest")
        axes.set_title(textwrap.fill(title, 140), fontsize=9, loc="left")
        axes.xaxis.set_inverted(at != "sparsity")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("lines", type=Path, nargs="+", help="files that benchmark.py wrote")
    parser.add_argument("--at", choices=COSTS, help="equal in a column; default: macs, of single weights sparsity")
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--values", type=float, nargs="+", help="columns, as shares; default: the budgets")
    parser.add_argument("--criterion", nargs="+", help="only these")
    parser.add_argument("--best", action="store_true", help="of each criterion the way of ranking with the best area")
    parser.add_argument("--area", action="store_true", help="add the area under each curve, and order by it")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--out", type=Path, help="file for the tables; default: print them")
    parser.add_argument("--figure", type=Path, help="draw a figure as well; the suffix gives its format")
    args = parser.parse_args(argv)
    with exit_on_error("tables.py"):
        frame, left_out = read(args.lines, args.criterion)
        shown = tables(frame, args.at, args.metric, args.values, area=args.area, best=args.best)
        text = FORMATS[args.format](shown, args.metric)
        if args.figure:
            figure(frame, args.at, args.metric).savefig(args.figure, dpi=130)
        for sentence in (*left_out, *describe_cuts(args.lines)):
            print(sentence, file=sys.stderr)
    if left_out and args.format == "markdown":
        text += "\n\n" + "\n".join(f"- {sentence}" for sentence in left_out)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
