"""What the studies share: runs that resume, one JSON line each; tables and a figure from the lines.

Every study is a script with the same arguments:

    python scripts/studies/NAME.py --out results/studies/NAME.jsonl            # runs what is not in the file yet
    python scripts/studies/NAME.py --out results/studies/NAME.jsonl --show docs/studies   # NAME.md, NAME.png; no runs
    python scripts/studies/NAME.py --out /tmp/NAME.jsonl --quick               # a tiny version, in seconds

A run is described by its settings alone, and recognised by them: a line whose settings are in the file is not made
again, whatever interrupted the study.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from jbrprune.data.files import replacing
from jbrprune.errors import JBRError
from jbrprune.models.preserve import same_randomness
from jbrprune.pruning.prepare import provenance
from jbrprune.report.records import plain

sys.path.append(str(Path(__file__).parents[1]))

from common import append, describe_call, key_of, lines, make_parser
from common import markdown as grid_of

Settings = dict[str, Any]
Tables = list[tuple[str, pd.DataFrame]]
COLOURS = ("#1f4e79", "#c8742c", "#3f7d4e", "#7b4b94", "#b3262a", "#8c6d1f", "#2a9d9d", "#6b6b6b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FEWEST_RESAMPLED = 10
"""Pairs from which a bootstrap interval is given; fewer hold so few different samples that it means nothing."""


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        name: Of its script, lines, table and figure.
        about: Its docstring.
        settings: ``quick -> `` the settings of every run; ``seed`` is among them, and ``data`` where there is a choice.
        measure: ``(settings, folder of Fashion-MNIST or None) -> `` what a run found.
        tables: ``lines -> `` title and table, which are printed and written as Markdown.
        figure: ``lines -> `` one figure.
    """

    name: str
    about: str | None
    settings: Callable[[bool], Iterable[Settings]]
    measure: Callable[[Settings, Path | None], Mapping[str, Any]]
    tables: Callable[[pd.DataFrame], Tables]
    figure: Callable[[pd.DataFrame], Figure]


def run(study: Study, wanted: Sequence[Settings], out: Path, folder: Path | None) -> int:
    """Make the runs that are not in the file yet; return how many failed."""
    failed = 0
    for number, settings in enumerate(wanted, 1):
        key = key_of([study.name, settings])
        if any(line["key"] == key for line in lines(out)):
            continue
        label = f"{number}/{len(wanted)} " + " ".join(f"{name}={value}" for name, value in settings.items())
        began = time.perf_counter()
        try:
            with same_randomness(torch.device("cpu")):
                found = study.measure(settings, folder)
        except (JBRError, RuntimeError) as error:  # one run that fails must not stop the others
            failed += 1
            print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        made = provenance(settings["seed"], torch.device("cpu"))
        facts = {name: made[name] for name in ("versions", "hardware", "threads", "time")} | describe_call()
        facts["seconds"] = time.perf_counter() - began
        append(out, [plain({"study": study.name, "key": key, **settings, **found, **facts})])
        print(f"{label}: {facts['seconds']:.1f} s", flush=True)
    return failed


def read(out: Path) -> pd.DataFrame:
    """The lines of a study; a run that is there twice counts once."""
    found = lines(out)
    if not found:
        raise SystemExit(f"There are no lines in {out}: run the study first, without --show.")
    return pd.DataFrame(found).drop_duplicates("key", keep="last")


def main(study: Study, argv: Sequence[str] | None = None) -> None:
    """The command line of a study."""
    parser = make_parser(study.about)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--quick", action="store_true", help="a tiny version, in seconds; its numbers mean nothing")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="only write table and figure of the lines there")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="where its IDX files are")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    args = parser.parse_args(argv)
    if args.show:
        frame = read(args.out)
        text = "\n\n".join(f"**{title}**\n\n{markdown(table)}" for title, table in study.tables(frame))
        print(text)
        args.show.mkdir(parents=True, exist_ok=True)
        with replacing(args.show / f"{study.name}.md") as temporary:
            temporary.write_text(text + "\n")
        with replacing(args.show / f"{study.name}.png") as temporary:
            study.figure(frame).savefig(temporary, dpi=110, format="png")
        return
    wanted = [s for s in study.settings(args.quick) if args.seeds is None or s["seed"] in args.seeds]
    possible = [s for s in wanted if args.fashion_mnist or s.get("data") != "fashion_mnist"]
    if len(possible) < len(wanted):
        print(f"{len(wanted) - len(possible)} runs on Fashion-MNIST are left out: --fashion-mnist FOLDER makes them.")
    failed = run(study, possible, args.out, args.fashion_mnist)
    if failed:
        raise SystemExit(f"{study.name}: {failed} of {len(possible)} runs failed.")


# --- tables and figures ----------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> str:
    """A table of Markdown; numbers with three significant digits."""

    def shown(value: object) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    return grid_of(list(table.columns), [[shown(value) for value in row] for row in table.itertuples(index=False)])


def spread(values: Iterable[float]) -> str:
    """``mean (smallest to largest)``."""
    array = np.array(list(values), dtype=float)
    if np.isnan(array).all():
        return ""
    ends = f" ({np.nanmin(array):.3g} to {np.nanmax(array):.3g})" if len(array) > 1 else ""
    return f"{np.nanmean(array):.3g}{ends}"


def rank_correlation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95 % interval by resampling pairs (percentile bootstrap, 2,000 draws).

    The pairs must be independent: average over seeds first. NaN for fewer than four pairs, no interval for fewer than
    `FEWEST_RESAMPLED`.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    low = high = float("nan")
    if len(x) < 4:
        return low, low, high
    if len(x) >= FEWEST_RESAMPLED:
        drawn = np.random.default_rng(seed).integers(len(x), size=(2000, len(x)))
        resampled = _correlate(stats.rankdata(x[drawn], axis=1), stats.rankdata(y[drawn], axis=1))
        low, high = np.nanquantile(resampled, [0.025, 0.975])
    return float(stats.spearmanr(x, y).statistic), float(low), float(high)


def permutation_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Share of all pairings whose rank correlation is at least as far from 0 (exact; for up to nine pairs)."""
    x, y = stats.rankdata(first), stats.rankdata(second)
    every = np.array(list(itertools.permutations(y)))
    found = np.abs(_correlate(np.broadcast_to(x, every.shape), every))
    return float(np.mean(found >= np.abs(stats.pearsonr(x, y).statistic) - 1e-12))


def _correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of every row; NaN where a row is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def correlated(first: Sequence[float], second: Sequence[float], digits: int = 2) -> str:
    """A rank correlation as a cell: with its interval, or for few pairs with their number and the exact p."""
    rho, low, high = rank_correlation(first, second)
    if np.isnan(rho):
        return ""
    if np.isnan(low):
        return f"{rho:+.{digits}f} (n = {len(first)}, p = {permutation_p(first, second):.2g})"
    return f"{rho:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A figure of its own (pyplot would keep it alive) and its axes, ``[rows, columns]``."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def curve(axes: Axes, rows: pd.DataFrame, x: str, y: str, place: int, label: str, **style: Any) -> None:
    """Mean over seeds with a band from the smallest to the largest; colour and marker by place."""
    groups = rows.dropna(subset=[y]).groupby(x)[y]
    mean, colour = groups.mean(), COLOURS[place % len(COLOURS)]
    drawn = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "ms": 4, "lw": 1.4} | style
    axes.plot(mean.index, mean.to_numpy(), label=label, **drawn)
    axes.fill_between(mean.index, groups.min(), groups.max(), color=drawn["color"], alpha=0.15, lw=0)


def dots(axes: Axes, rows: pd.DataFrame, x: str, y: str, place: int, label: str = "", **style: Any) -> None:
    """One dot per row; colour and marker by place."""
    drawn = {"color": COLOURS[place], "marker": MARKERS[place], "lw": 0, "ms": 4, "alpha": 0.8} | style
    axes.plot(rows[x], rows[y], label=label, **drawn)


def label_widths(axes: Axes, rows: pd.DataFrame) -> None:
    """Ticks at the widths of the nets, on a logarithmic axis."""
    axes.set_xticks(sorted(rows["width"].unique()), sorted(rows["width"].unique()), fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("width")
