"""What width does to TPV: nets of three linear layers, from 16 to 512 units, on three sets of data.

TPV on training and test inputs under noise on every weight, 8-bit quantization, and (one output, so on synthetic
data only) label noise with a penalty and without; beside the test loss. Noise on every weight has the same standard
deviation at every width, so that a wider net gets more of it in all; ``relative`` divides by the width of the net's
mean squared weight instead: noise in proportion to the weights of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from fitting import Data, Relative, fit, images, losses_of, mlp, squared, synthetic
from frame import Settings, Study, Tables, correlated, curve, label_widths, main, panels, spread
from kernel import label_noise
from matplotlib.figure import Figure
from torch import nn

from jbrprune.tpv import Isotropic, Quantization, trace_form

WIDTHS = (16, 32, 64, 128, 256, 512)
WEIGHTS = {"isotropic": Isotropic(0.01), "relative": Relative(0.01), "quantization": Quantization(8)}
NAMES = {
    "isotropic": "noise of 0.01 on every weight",
    "relative": "noise of 1 % of each layer's weights",
    "quantization": "8-bit quantization",
    "label_noise": "label noise of 1, penalty 0.01",
    "repeated_noise": "label noise of 1, no penalty",
}


def settings(quick: bool) -> Iterator[Settings]:
    for seed in range(1 if quick else 3):
        for data in ("synthetic", "digits", "fashion_mnist"):
            for width in (4, 8) if quick else WIDTHS:
                sizes = {"train": 40, "test": 30, "steps": 5} if quick else {"train": 1000, "test": 500, "steps": 150}
                yield {"data": data, "width": width, "seed": seed, **sizes}


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    model, data = trained(wanted, folder)
    sides = {"train": data.images, "test": data.test_images}
    found = losses_of(model, data) | {"params": sum(parameter.numel() for parameter in model.parameters())}
    how = {"rtol": 0.0, "method": "exact", "validity": False, "progress": False, "batch_size": 250}
    for side, inputs in sides.items():
        for name, covariance in WEIGHTS.items():
            found[f"{name}_{side}"] = trace_form(model, inputs[:500], covariance, **how).value
    return found | (label_noise(model, sides) if wanted["data"] == "synthetic" else {})


def trained(wanted: Settings, folder: Path | None) -> tuple[nn.Sequential, Data]:
    """A net and its data."""
    sizes = {name: wanted[name] for name in ("train", "test", "seed")}
    if wanted["data"] == "synthetic":
        data = synthetic("relu", dimension=20, **sizes)
        model = mlp(20, wanted["width"], 1, seed=wanted["seed"])
        fit(model, data.images, data.targets, squared, steps=wanted["steps"], rate=3e-3)
        return model, data
    data = images(wanted["data"], folder, side=8, **sizes)
    model = mlp(64, wanted["width"], 10, seed=wanted["seed"])
    how = {"steps": wanted["steps"], "rate": 3e-3, "batch_size": 128, "seed": wanted["seed"]}
    fit(model, data.images, data.targets, nn.functional.cross_entropy, **how)
    return model, data


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> Tables:
    means = frame.groupby(["data", "width"], sort=False).mean(numeric_only=True)
    widths = []
    for (data, width), part in frame.groupby(["data", "width"]):
        row = {"data": data, "width": width, "seeds": len(part)}
        row |= {title: spread(part[f"{name}_test"]) for name, title in NAMES.items() if f"{name}_test" in part}
        widths.append(row | {"train loss": spread(part["train_loss"]), "test loss": spread(part["test_loss"])})
    trends = []
    for data, part in means.groupby("data"):
        for name, title in NAMES.items():
            if f"{name}_test" not in part or part[f"{name}_test"].isna().any():
                continue
            row: dict[str, Any] = {"data": data, "perturbation": title}
            by_width = part.reset_index().sort_values("width")[f"{name}_test"]
            row["widest / narrowest, test"] = by_width.iloc[-1] / by_width.iloc[0]
            row["rank correlation with test loss"] = correlated(part[f"{name}_test"], part["test_loss"])
            ratio = part[f"{name}_train"] / part[f"{name}_test"]
            row["train / test"] = f"{ratio.min():.2f} to {ratio.max():.2f}"
            trends.append(row)
    return [
        ("TPV on test inputs by width: mean (smallest to largest) over seeds", pd.DataFrame(widths)),
        ("Trend over the widths (means over seeds)", pd.DataFrame(trends)),
    ]


def figure(frame: pd.DataFrame) -> Figure:
    """One row for every set of data: TPV relative to the narrowest net, and losses."""
    groups = list(frame.groupby("data", sort=False))
    drawn, axes = panels(2, len(groups), height=3.2)
    for (left, right), (data, rows) in zip(axes, groups, strict=True):
        narrow = rows[rows["width"] == rows["width"].min()]
        for place, (name, title) in enumerate(NAMES.items()):
            column = f"{name}_test"
            if column in rows and rows[column].notna().all():
                curve(
                    left, rows.assign(**{column: rows[column] / narrow[column].mean()}), "width", column, place, title
                )
        for place, side in enumerate(("train", "test")):
            curve(right, rows, "width", f"{side}_loss", place, f"{side} loss")
        left.set(xscale="log", yscale="log", ylabel="TPV / that of the narrowest", title=f"{data}, test inputs")
        right.set(xscale="log", yscale="log", ylabel="loss", title=data)
        for one in (left, right):
            label_widths(one, rows)
            one.legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("width", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
