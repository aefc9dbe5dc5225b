"""Whether TPV tells the clean test loss, across architectures and regularisation, on digits and Fashion-MNIST.

Two MLPs and a convolutional net, each trained without regularisation and with two strengths of weight decay,
dropout and label smoothing, on few enough images that they overfit. TPV on the training images and on test images,
without labels, against the cross entropy of the test images; rank correlation over nets and recipes (means over
seeds), with its interval, over all of them and over those that fit the training images well, where the paper finds
TPV to follow the test loss. The mean size of the logits, squared, stands beside as the simplest rival.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from frame import COLOURS, MARKERS, Settings, Study, Tables, correlated, dots, main, panels
from matplotlib.figure import Figure
from recipes import SIGNALS, measure
from recipes import settings as training

NETS = (("mlp", 64), ("mlp", 256), ("convnet", 8))
LEVELS = {"weight_decay": (1.0, 10.0), "dropout": (0.2, 0.6), "smoothing": (0.1, 0.5)}
FITTED = 0.1
"""Training losses below it count as a good fit."""


def settings(quick: bool) -> Iterator[Settings]:
    recipes: list[dict[str, float]] = [{}, *({name: level} for name in LEVELS for level in LEVELS[name])]
    for seed in range(1 if quick else 3):
        for data in ("digits", "fashion_mnist"):
            for net, width in NETS[:1] if quick else NETS:
                for recipe in recipes[:2] if quick else recipes:
                    yield training(data, net, width, seed, quick, **recipe)


# --- what came out ---------------------------------------------------------------------------------


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for every net and recipe: the mean over seeds."""
    recipe = ["data", "net", "width", *LEVELS]
    return frame.groupby(recipe, sort=False).mean(numeric_only=True).reset_index()


def tables(frame: pd.DataFrame) -> Tables:
    rows = []
    for data, part in means(frame).groupby("data"):
        sets = {"all": part, f"training loss below {FITTED:g}": part[part["train_loss"] < FITTED]}
        sets |= {f"{net} {width}": part[(part["net"] == net) & (part["width"] == width)] for net, width in NETS}
        for name, chosen in sets.items():
            told = {title: chosen[f"{signal}_train"] for signal, title in SIGNALS.items()}
            told["training loss"] = chosen["train_loss"]
            cells = {title: correlated(values, chosen["test_loss"]) for title, values in told.items()}
            rows.append({"data": data, "nets and recipes": name, "n": len(chosen), **cells})
    sides = []
    for data, part in frame.groupby("data"):
        for signal, title in SIGNALS.items():
            low, median, high = (part[f"{signal}_train"] / part[f"{signal}_test"]).quantile([0.05, 0.5, 0.95])
            row: dict[str, Any] = {"data": data, "signal": title}
            row["train / test"] = f"{median:.2f} ({low:.2f} to {high:.2f})"
            row["rank"] = part[f"{signal}_train"].corr(part[f"{signal}_test"], method="spearman")
            sides.append(row)
    correlations = (
        "Spearman's rank correlation of the signal on training images with the clean test loss, 95 % interval; of few "
        "nets: exact p"
    )
    ratios = "The signal on training over that on test images: median (5 % to 95 %), and their rank correlation"
    return [(correlations, pd.DataFrame(rows)), (ratios, pd.DataFrame(sides))]


def figure(frame: pd.DataFrame) -> Figure:
    """Test loss by TPV: label noise, relative noise, and by the logits; one row for every set of data."""
    frame = means(frame)
    kinds = ["none", *LEVELS]
    frame["kind"] = [next((name for name in LEVELS if row[name] > 0), "none") for _, row in frame.iterrows()]
    groups, shown = list(frame.groupby("data")), ("label_noise", "relative", "logits")
    drawn, axes = panels(len(shown), len(groups), height=3.4)
    for row, (data, part) in zip(axes, groups, strict=True):
        for one, signal in zip(row, shown, strict=True):
            for (net, width, kind), chosen in part.groupby(["net", "width", "kind"]):
                style = {"marker": MARKERS[kinds.index(kind)], "ms": 5}
                dots(one, chosen, f"{signal}_train", "test_loss", NETS.index((net, width)), **style)
            one.set(xscale="log", yscale="log", title=data, xlabel=f"{SIGNALS[signal]}, training images")
        row[0].set_ylabel("test loss")
    for place, (net, width) in enumerate(NETS):
        axes[0, 0].plot([], [], "o", color=COLOURS[place], label=f"{net} {width}")
    for kind, marker in zip(kinds, MARKERS, strict=False):
        axes[0, 0].plot([], [], marker, color="grey", label=kind.replace("_", " "))
    axes[0, 0].legend(frameon=False, fontsize=6, ncol=2)
    return drawn


STUDY = Study("clean_loss", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
