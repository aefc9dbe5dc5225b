"""Predicted against measured degradation: criteria x shares of channels x models, on digits.

A ResNet and a ViT that have learnt the digits are pruned in one step, without repair, by five criteria to shares of
their channels. What each cut does to the logits of 300 images is predicted from one pass over the dense model
(`degradation`: TPV, and the share of images whose top-1 class changes), and measured with the units masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from fitting import TIMM, on_digits
from frame import COLOURS, MARKERS, Places, Settings, Study, correlated, main, panels
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


def measure(wanted: Settings, places: Places) -> dict[str, Any]:
    model, data = on_digits(*(wanted[name] for name in ("net", "seed", "steps", "train", "test")))
    inputs, labels = data.images[: wanted["images"]], data.targets[: wanted["images"]]
    shared = {"seed": wanted["seed"], "images": None, "progress": False}
    report = prune(
        model,
        [Batch(*pair) for pair in zip(inputs.split(50), labels.split(50), strict=True)],
        channels=wanted["channels"],
        criterion=CRITERIA[wanted["criterion"]],
        steps=1,
        repair=None,
        eval_data=data.test_images,
        **shared,
    ).report
    found = degradation(model, report, inputs, **shared)
    return {
        "macs": report.kept,
        "predicted_tpv": found.predicted.tpv,
        "measured_tpv": found.measured.tpv,
        "predicted_flips": found.predicted.flips,
        "measured_flips": found.measured.flips,
        "taylor_error": found.taylor_error,
        "prediction_error": found.prediction_error,
        "valid": found.valid,
    }


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    ranks, errors = [], []
    for net, part in frame.groupby("net"):
        for criterion, rows in [*part.groupby("criterion"), ("all", part)]:
            row: dict[str, Any] = {"net": net, "criterion": criterion, "cuts": len(rows)}
            for predicted in ("tpv", "flips"):
                mean = rows.groupby(["criterion", "channels"])[[f"predicted_{predicted}", "measured_flips"]].mean()
                shown = correlated(mean[f"predicted_{predicted}"], mean["measured_flips"], digits=3)
                row[f"predicted {predicted}, measured flips"] = shown
            ranks.append(row)
        for low, high in ((-1.0, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 1.0)):
            rows = part[(part["measured_flips"] > low) & (part["measured_flips"] <= high)]
            missed = (rows["predicted_flips"] - rows["measured_flips"]).abs()
            ratio = rows["predicted_tpv"] / rows["measured_tpv"]
            row = {"net": net, "measured flips": f"{max(0.0, low):.0%} to {high:.0%}", "cuts": len(rows)}
            if len(rows):
                row["flips missed by, points"] = f"{100 * missed.mean():.1f} (at most {100 * missed.max():.1f})"
                row["predicted / measured TPV"] = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
                row["called valid"] = f"{rows['valid'].mean():.0%}"
            errors.append(row)
    return [
        (
            "Spearman's rank correlation over criteria and shares (means over seeds), 95 % interval; of few: exact p",
            pd.DataFrame(ranks),
        ),
        ("How far the prediction is off, by what is measured", pd.DataFrame(errors).fillna("")),
    ]


def figure(frame: pd.DataFrame) -> Figure:
    """Predicted against measured: TPV on the left, flips on the right; one row for every net."""
    groups = list(frame.groupby("net"))
    drawn, axes = panels(2, len(groups), height=3.4)
    for row, (net, part) in zip(axes, groups, strict=True):
        for one, what, scale in zip(row, ("tpv", "flips"), ("log", "linear"), strict=True):
            for place, criterion in enumerate(COMPARED):
                rows = part[part["criterion"] == criterion]
                style = {"color": COLOURS[place], "marker": MARKERS[place], "lw": 0, "ms": 4, "alpha": 0.7}
                one.plot(rows[f"measured_{what}"], rows[f"predicted_{what}"], label=criterion, **style)
            ends = part[[f"measured_{what}", f"predicted_{what}"]].to_numpy()
            low, high = (ends[ends > 0].min(), ends.max()) if scale == "log" else (0.0, 1.0)
            one.plot([low, high], [low, high], color="black", lw=0.8)
            one.set(xscale=scale, yscale=scale, xlabel=f"measured {what}", ylabel=f"predicted {what}", title=net)
        row[0].legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("degradation", __doc__ or "", settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
