"""The lines of a benchmark as curves: accuracy over cost, one per criterion and seed; values between budgets, areas."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from common import cut, lines

from jbrprune.errors import ArgumentError

CONTEXT = (
    *("model", "weights", "model_args", "data", "protocol", "kind", "repair", "steps", "options"),
    *("images", "eval_images", "batch_size", "data_digest", "from_dense", "budgets"),
)
"""Curves are compared that agree in these."""
COSTS = ("macs", "params", "sparsity", "latency")
METRICS = ("accuracy", "agreement", "kl", "unrepaired_accuracy", "unrepaired_agreement")
EQUAL = 0.005
"""Costs that differ by no more, as shares of the dense model, count as equal."""


def read(paths: Sequence[Path]) -> pd.DataFrame:
    """All lines of some files, one row each, but those of failures; a budget that is there twice counts once.

    Adds ``at_macs``, ``at_params`` (of single weights: of those that are not zero), ``at_sparsity`` and, of runs that
    were timed, ``at_latency``, shares of the dense model.

    Raises:
        ArgumentError: A file is missing or has no lines of benchmark.py, lines of failures only, or lines that nothing
            tells apart but their results (`_check_apart`).
        DataError: A file is damaged.
    """
    found = [line for line in _latest(paths) if "failed" not in line]
    if not found:
        raise ArgumentError(f"{' and '.join(map(str, paths))}: every run failed. {failures(paths)[0]}")
    frame = pd.DataFrame(found)
    for name in ("model_args", "options", "budgets"):
        frame[name] = [json.dumps(value, sort_keys=True) for value in frame[name]]
    frame["steps"] = ["auto" if pd.isna(steps) else str(int(steps)) for steps in frame["steps"]]
    timed = frame.reindex(columns=["latency_ms", "dense_latency_ms"]).apply(pd.to_numeric)
    effective = pd.to_numeric(frame["nonzero"]).fillna(frame["params"])
    return frame.assign(
        at_macs=frame["macs"] / frame["dense_macs"],
        at_params=effective / frame["dense_params"],
        at_sparsity=pd.to_numeric(frame["sparsity"]),
        at_latency=timed["latency_ms"] / timed["dense_latency_ms"],
    )


def failures(paths: Sequence[Path], criteria: Sequence[str] | None = None) -> list[str]:
    """One sentence for every run that failed and has not been made since."""
    found: dict[str, int] = {}
    for line in _latest(paths):
        if "failed" in line and (not criteria or line["criterion"] in criteria):
            what = f"{line['criterion']} on {line['model']}, {line['protocol']}, seed {line['seed']}: {line['failed']}"
            found[what] = found.get(what, 0) + 1
    return [f"Left out, it failed: {what} ({count} budgets)" for what, count in found.items()]


def unfinished(paths: Sequence[Path]) -> list[str]:
    """One sentence for every file whose last line was not written to its end."""
    return [
        f"{path}: the last line was cut in the middle ({n} characters); left out." for path in paths if (n := cut(path))
    ]


def tell(sentences: Sequence[str]) -> None:
    """To standard error, one line each."""
    for sentence in sentences:
        print(sentence, file=sys.stderr)


def _latest(paths: Sequence[Path]) -> list[dict]:
    """All lines, the last one of each key; one of a result before one of a failure."""
    for path in paths:
        if not path.is_file():
            raise ArgumentError(f"There is no file {path}.")
    found = [line for path in paths for line in lines(path)]
    if not found:
        raise ArgumentError(" ".join([f"{' and '.join(map(str, paths))}: no whole line yet.", *unfinished(paths)]))
    if not all({"key", "protocol"} <= line.keys() for line in found):
        raise ArgumentError(f"{' and '.join(map(str, paths))}: expected lines written by benchmark.py.")
    if not all("budgets" in line for line in found):
        raise ArgumentError(
            f"{' and '.join(map(str, paths))}: lines of an older benchmark.py, which do not say through which budgets "
            "a model went, so that different ways would be averaged. Measure them again."
        )
    latest = {line["key"]: line for line in sorted(found, key=lambda line: "failed" not in line)}
    return list(latest.values())


def only(frame: pd.DataFrame, criteria: Sequence[str] | None) -> pd.DataFrame:
    """The lines of some criteria; None: all.

    Raises:
        ArgumentError: There is no line of one of them.
    """
    missing = sorted(set(criteria or ()) - set(frame["criterion"]))
    if missing:
        raise ArgumentError(f"No line of {', '.join(missing)}; there are {', '.join(frame['criterion'].unique())}.")
    return frame[frame["criterion"].isin(criteria)] if criteria else frame


def contexts(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """What is comparable, with a title.

    Raises:
        ArgumentError: Rows that agree in all settings are of different dense models or images, or there are two for one
            budget: a mean over them would mean nothing.
    """
    for values, rows in frame.groupby(list(CONTEXT), sort=False, dropna=False):
        _check_apart(rows)
        own = dict(zip(CONTEXT, values, strict=True))
        way = "each budget from the dense model" if own["from_dense"] else f"through budgets {own['budgets'][1:-1]}"
        dense = f", dense accuracy {rows['dense_accuracy'].iloc[0]:.2%}" if rows["dense_accuracy"].notna().all() else ""
        yield (
            f"{own['model']} ({own['weights']}) on {own['data']}, protocol {own['protocol']}: repair {own['repair']}, "
            f"steps {own['steps']}, {way}, {own['images']} calibration and {own['eval_images']} evaluation images"
            f"{dense}",
            rows,
        )


def differences(frame: pd.DataFrame) -> str:
    """In which settings the lines differ, in words; empty where they are all comparable."""
    found = {name: frame[name].astype(str).unique() for name in CONTEXT}
    return "; ".join(f"{name} ({', '.join(values)})" for name, values in found.items() if len(values) > 1)


def _check_apart(rows: pd.DataFrame) -> None:
    for name in ("dense_accuracy", "dense_macs", "dense_params"):
        different = rows[name].dropna().unique()
        if len(different) > 1:
            raise ArgumentError(
                f"Lines of the same settings have different {name} ({', '.join(map(str, different[:3]))}): other "
                "weights, images or versions under one name. They are not averaged; put them into different files."
            )
    twice = rows[rows.duplicated(["criterion", "seed", "budget"])]
    if len(twice):
        one = twice.iloc[0]
        raise ArgumentError(
            f"{one['criterion']}, seed {one['seed']}, budget {one['budget']} was measured twice in the same settings, "
            "on the way through other budgets. They are not averaged; put them into different files."
        )


def cost_of(rows: pd.DataFrame, at: str | None) -> str:
    """The cost to compare at; None: of single weights their sparsity, else MACs.

    Raises:
        ArgumentError: MACs, which zeros do not change.
    """
    sparse = bool((rows["kind"] == "sparsity").all())
    if sparse and at == "macs":
        raise ArgumentError("Single weights that are zero do not change the MACs: pick --at sparsity or --at params.")
    return at or ("sparsity" if sparse else "macs")


def curves(rows: pd.DataFrame, at: str, metric: str) -> dict[str, dict[int, np.ndarray]]:
    """Criterion -> seed -> ``[2, n]`` cost (rising) and metric; the dense model is the first or the last point.

    Raises:
        ArgumentError: The lines say nothing about it.
    """
    if rows[f"at_{at}"].isna().any() or rows[metric].isna().any():
        raise ArgumentError(f"Some lines say nothing about {metric} at {at}: pick another --at or --metric.")
    found: dict[str, dict[int, np.ndarray]] = {}
    for (criterion, seed), part in rows.groupby(["criterion", "seed"], sort=False):
        costs = [*part[f"at_{at}"], 0.0 if at == "sparsity" else 1.0]
        points = pd.Series([*part[metric], _dense(part, metric)], costs, dtype=float)
        points = points.groupby(level=0).mean()  # a cost that is reached twice has one point, and costs rise
        found.setdefault(criterion, {})[seed] = np.stack([points.index.to_numpy(), points.to_numpy()])
    return found


def _dense(rows: pd.DataFrame, metric: str) -> float:
    """The metric of the dense model."""
    known = {"agreement": 1.0, "unrepaired_agreement": 1.0, "kl": 0.0}
    return known[metric] if metric in known else float(rows["dense_accuracy"].iloc[0])


def value(curve: np.ndarray, target: float) -> tuple[float, bool]:
    """The metric at a cost, and whether it is interpolated linearly; NaN outside of the curve."""
    costs, values = curve
    nearest = np.abs(costs - target).argmin()
    if abs(costs[nearest] - target) <= EQUAL:
        return float(values[nearest]), False
    if not costs[0] < target < costs[-1]:
        return float("nan"), False
    return float(np.interp(target, costs, values)), True


def common_range(found: dict[str, dict[int, np.ndarray]]) -> tuple[float, float]:
    """The costs that every curve covers; empty where the first is not below the second."""
    every = [curve[0] for seeds in found.values() for curve in seeds.values()]
    return max(costs[0] for costs in every), min(costs[-1] for costs in every)


def area(curve: np.ndarray, low: float, high: float) -> float:
    """Mean of the metric between two costs, by trapezoids; NaN for an empty range."""
    if not low < high:
        return float("nan")
    costs, values = curve
    inside = (costs > low) & (costs < high)
    grid = np.concatenate([[low], costs[inside], [high]])
    heights = np.interp(grid, costs, values)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(grid)).sum() / (high - low))


def scoring(rows: pd.DataFrame) -> pd.Series:
    """Criterion -> seconds of one scoring, mean over the passes of all seeds."""
    last = rows.sort_values("scorings").groupby(["criterion", "seed"], sort=False).last()
    sums = last.groupby("criterion")[["scoring_seconds", "scorings"]].sum()
    return sums["scoring_seconds"] / sums["scorings"]


def areas(rows: pd.DataFrame, at: str | None, metric: str) -> pd.DataFrame:
    """Criterion -> area (mean and deviation over seeds) and seconds of a scoring, the largest area first."""
    found = curves(rows, cost_of(rows, at), metric)
    low, high = common_range(found)
    table = pd.DataFrame(
        [
            {"criterion": name, "seed": seed, "area": area(curve, low, high)}
            for name, seeds in found.items()
            for seed, curve in seeds.items()
        ]
    )
    summed = table.groupby("criterion")["area"].agg(["mean", "std", "count"])
    summed.columns = ["area", "deviation", "seeds"]
    return summed.assign(low=low, high=high, scoring_seconds=scoring(rows)).sort_values(
        "area", ascending=metric == "kl"
    )
