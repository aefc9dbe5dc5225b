"""Predicted against measured degradation: criteria x shares of channels x models, on digits.

A ResNet and a ViT that have learnt the digits are pruned in one step, without repair, by five criteria to shares of
their channels. What each cut does to the logits of 300 images is predicted from one pass over the dense model
(`degradation`: TPV, and the share of images whose top-1 class changes), and measured with the units masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from fitting import TIMM, on_digits
from frame import Settings, Study, Tables, correlated, dots, main, panels
from matplotlib.figure import Figure

from baselines import CRITERIA
from jbrprune import degradation, prune
from jbrprune.data.batches import Batch

COMPARED = ("jbr", "l1", "l2_grouped", "taylor", "random")
SHARES = (0.95, 0.85, 0.7, 0.5)


def settings(quick: bool) -> Iterator[Settings]:
    how = {"steps": 300, "train": 1297, "test": 250, "images": 300}
    if quick:
        how = {"steps": 4, "train": 64, "test": 32, "images": 24}
    for seed in range(1 if quick else 3):
        for net in TIMM:
            for criterion in COMPARED[:2] if quick else COMPARED:
                for share in SHARES[1:2] if quick else SHARES:
                    yield {"net": net, "criterion": criterion, "channels": share, "seed": seed, **how}


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    model, data = on_digits(*(wanted[name] for name in ("net", "seed", "steps", "train", "test")))
    inputs, labels = data.images[: wanted["images"]], data.targets[: wanted["images"]]
    batches = [Batch(*pair) for pair in zip(inputs.split(50), labels.split(50), strict=True)]
    shared = {"seed": wanted["seed"], "images": None, "progress": False}
    how = {"channels": wanted["channels"], "criterion": CRITERIA[wanted["criterion"]], "steps": 1, "repair": None}
    report = prune(model, batches, eval_data=data.test_images, **how, **shared).report
    found = degradation(model, report, inputs, **shared)
    damage = {f"predicted_{what}": getattr(found.predicted, what) for what in ("tpv", "flips")}
    damage |= {f"measured_{what}": getattr(found.measured, what) for what in ("tpv", "flips")}
    errors = {name: getattr(found, name) for name in ("taylor_error", "prediction_error", "valid")}
    return {"macs": report.kept, **damage, **errors}


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> Tables:
    ranks, errors = [], []
    for net, part in frame.groupby("net"):
        for criterion, rows in [*part.groupby("criterion"), ("all", part)]:
            row: dict[str, Any] = {"net": net, "criterion": criterion, "cuts": len(rows)}
            for what in ("tpv", "flips"):
                mean = rows.groupby(["criterion", "channels"])[[f"predicted_{what}", "measured_flips"]].mean()
                shown = correlated(mean[f"predicted_{what}"], mean["measured_flips"], digits=3)
                row[f"predicted {what}, measured flips"] = shown
            ranks.append(row)
        for low, high in ((-1.0, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 1.0)):
            rows = part[(part["measured_flips"] > low) & (part["measured_flips"] <= high)]
            missed = 100 * (rows["predicted_flips"] - rows["measured_flips"]).abs()
            ratio = rows["predicted_tpv"] / rows["measured_tpv"]
            row = {"net": net, "measured flips": f"{max(0.0, low):.0%} to {high:.0%}", "cuts": len(rows)}
            if len(rows):
                row["flips missed by, points"] = f"{missed.mean():.1f} (at most {missed.max():.1f})"
                row["predicted / measured TPV"] = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
                row["called valid"] = f"{rows['valid'].mean():.0%}"
            errors.append(row)
    title = "Spearman's rank correlation over criteria and shares (means over seeds), 95 % interval; of few: exact p"
    off = "How far the prediction is off, by what is measured"
    return [(title, pd.DataFrame(ranks)), (off, pd.DataFrame(errors).fillna(""))]


def figure(frame: pd.DataFrame) -> Figure:
    """Predicted against measured: TPV on the left, flips on the right; one row for every net."""
    groups = list(frame.groupby("net"))
    drawn, axes = panels(2, len(groups), height=3.4)
    for row, (net, part) in zip(axes, groups, strict=True):
        for one, what, scale in zip(row, ("tpv", "flips"), ("log", "linear"), strict=True):
            measured, predicted = f"measured_{what}", f"predicted_{what}"
            for place, criterion in enumerate(COMPARED):
                dots(one, part[part["criterion"] == criterion], measured, predicted, place, criterion)
            ends = part[[measured, predicted]].to_numpy()
            low, high = (ends[ends > 0].min(), ends.max()) if scale == "log" else (0.0, 1.0)
            one.plot([low, high], [low, high], color="black", lw=0.8)
            one.set(xscale=scale, yscale=scale, xlabel=f"measured {what}", ylabel=f"predicted {what}", title=net)
        row[0].legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("degradation", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
