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
from frame import COLOURS, MARKERS, Places, Settings, Study, correlated, main, panels
from matplotlib.figure import Figure
from recipes import SIGNALS, losses, signals, trained
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


def measure(wanted: Settings, places: Places) -> dict[str, Any]:
    model, data, held_back = trained(wanted, places)
    return losses(model, data, held_back) | signals(model, data, wanted)


# --- what came out ---------------------------------------------------------------------------------

RECIPE = ["data", "net", "width", "weight_decay", "dropout", "smoothing"]


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for every net and recipe: the mean over seeds."""
    return frame.groupby(RECIPE, sort=False).mean(numeric_only=True).reset_index()


def tables(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    rows = []
    for data, part in means(frame).groupby("data"):
        sets = {"all": part, f"training loss below {FITTED:g}": part[part["train_loss"] < FITTED]}
        sets |= {f"{net} {width}": part[(part["net"] == net) & (part["width"] == width)] for net, width in NETS}
        for name, chosen in sets.items():
            row: dict[str, Any] = {"data": data, "nets and recipes": name, "n": len(chosen)}
            row |= {
                title: correlated(chosen[f"{signal}_train"], chosen["test_loss"]) for signal, title in SIGNALS.items()
            }
            rows.append(row | {"training loss": correlated(chosen["train_loss"], chosen["test_loss"])})
    sides = []
    for data, part in frame.groupby("data"):
        for signal, title in SIGNALS.items():
            ratio = part[f"{signal}_train"] / part[f"{signal}_test"]
            rho = part[f"{signal}_train"].corr(part[f"{signal}_test"], method="spearman")
            low, median, high = ratio.quantile([0.05, 0.5, 0.95])
            sides.append(
                {"data": data, "signal": title, "train / test": f"{median:.2f} ({low:.2f} to {high:.2f})", "rank": rho}
            )
    return [
        ("Spearman's rank correlation of the signal on training images with the clean test loss, 95 % interval; "
         "of few nets: exact p",
         pd.DataFrame(rows)),
        ("The signal on training over that on test images: median (5 % to 95 %), and their rank correlation",
         pd.DataFrame(sides)),
    ]  # fmt: skip


def figure(frame: pd.DataFrame) -> Figure:
    """Test loss by TPV: label noise, relative noise, and by the logits; one row for every set of data."""
    groups = list(means(frame).groupby("data"))
    shown = ("label_noise", "relative", "logits")
    drawn, axes = panels(len(shown), len(groups), height=3.4)
    kinds = ["none", *LEVELS]
    for row, (data, part) in zip(axes, groups, strict=True):
        for one, signal in zip(row, shown, strict=True):
            for place, (net, width) in enumerate(NETS):
                for kind, marker in zip(kinds, MARKERS, strict=False):
                    chosen = part[(part["net"] == net) & (part["width"] == width) & (part.apply(_kind, axis=1) == kind)]
                    one.plot(
                        chosen[f"{signal}_train"], chosen["test_loss"], marker, color=COLOURS[place], ms=5, alpha=0.8
                    )
            one.set(xscale="log", yscale="log", title=data, xlabel=f"{SIGNALS[signal]}, training images")
        row[0].set_ylabel("test loss")
    for place, (net, width) in enumerate(NETS):
        axes[0, 0].plot([], [], "o", color=COLOURS[place], label=f"{net} {width}")
    for kind, marker in zip(kinds, MARKERS, strict=False):
        axes[0, 0].plot([], [], marker, color="grey", label=kind.replace("_", " "))
    axes[0, 0].legend(frameon=False, fontsize=6, ncol=2)
    return drawn


def _kind(row: pd.Series) -> str:
    return next((name for name in LEVELS if row[name] > 0), "none")


STUDY = Study("clean_loss", __doc__ or "", settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
