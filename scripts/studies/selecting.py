"""Training-set TPV as a signal to select models and recipes.

Two architectures are trained by six recipes, which draw weight decay, dropout and label smoothing at random and
jointly, so that no single strength orders them. Among the recipes of one architecture, and among all, the one with
the least TPV on the training images is taken; its test loss and accuracy are compared with those of the best, of a
recipe taken at random, of the least training loss, of the smallest logits, and of the least loss on 200 labelled
images that were held back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pandas as pd
from frame import COLOURS, MARKERS, Settings, Study, Tables, dots, main, panels, spread
from matplotlib.figure import Figure
from recipes import SIGNALS, measure
from recipes import settings as training

NETS = (("mlp", 128), ("convnet", 8))
LEVELS = {"weight_decay": (0.0, 1.0, 3.0), "dropout": (0.0, 0.2, 0.4, 0.6), "smoothing": (0.0, 0.05, 0.1, 0.3)}
RECIPES = 6
RULES = {f"{name}_train": f"least {title}" for name, title in SIGNALS.items()} | {
    "train_loss": "least training loss",
    "validation_loss": "least loss on 200 labelled images",
    "test_loss": "the best",
}


def recipes() -> list[dict[str, float]]:
    """Six different recipes, the first without regularisation."""
    drawing = random.Random(0)
    found: list[dict[str, float]] = [dict.fromkeys(LEVELS, 0.0)]
    while len(found) < RECIPES:
        recipe = {name: drawing.choice(levels) for name, levels in LEVELS.items()}
        found += [recipe] * (recipe not in found)
    return found


def settings(quick: bool) -> Iterator[Settings]:
    for seed in range(1 if quick else 3):
        for data in ("digits", "fashion_mnist"):
            for net, width in NETS[:1] if quick else NETS:
                for recipe in recipes()[:2] if quick else recipes():
                    yield training(data, net, width, seed, quick, **recipe)


# --- what came out ---------------------------------------------------------------------------------


def choices(frame: pd.DataFrame) -> pd.DataFrame:
    """What each rule takes, for every set of data, seed and set of nets: test loss and accuracy, and the best loss."""
    found = []
    for (data, seed), run in frame.groupby(["data", "seed"]):
        pools = {f"{net} {width}": run[(run["net"] == net) & (run["width"] == width)] for net, width in NETS}
        pools["both"] = run
        for pool, rows in pools.items():
            if len(rows) < 2:
                continue
            shared = {"data": data, "seed": seed, "pool": pool, "best": rows["test_loss"].min()}
            mean = {"test_loss": rows["test_loss"].mean(), "test_accuracy": rows["test_accuracy"].mean()}
            found.append(shared | {"rule": "at random"} | mean)
            for column, rule in RULES.items():
                taken = rows.loc[rows[column].idxmin()]
                found.append(shared | {"rule": rule} | {name: taken[name] for name in mean})
    return pd.DataFrame(found)


def tables(frame: pd.DataFrame) -> Tables:
    made = choices(frame)
    rows = []
    for (data, pool), part in made.groupby(["data", "pool"], sort=False):
        for rule in ("the best", *list(RULES.values())[:-1], "at random"):
            chosen = part[part["rule"] == rule]
            over = chosen["test_loss"] / chosen["best"]
            row: dict[str, Any] = {"data": data, "among": pool, "rule": rule, "test loss": spread(chosen["test_loss"])}
            row |= {"over the best": spread(over), "test accuracy": f"{chosen['test_accuracy'].mean():.1%}"}
            rows.append(row)
    return [("Test loss of what each rule selects: mean (smallest to largest) over seeds", pd.DataFrame(rows))]


def figure(frame: pd.DataFrame) -> Figure:
    """Left of each pair: test loss by training-set TPV. Right: how much worse than the best each rule's choice is."""
    made = choices(frame)
    groups = list(frame.groupby("data"))
    drawn, axes = panels(2, len(groups), width=5.4, height=3.4)
    for (left, right), (data, rows) in zip(axes, groups, strict=True):
        for place, (net, width) in enumerate(NETS):
            part = rows[(rows["net"] == net) & (rows["width"] == width)]
            dots(left, part, "label_noise_train", "test_loss", place, f"{net} {width}")
        left.set(xscale="log", yscale="log", xlabel="label-noise TPV, training images", ylabel="test loss", title=data)
        left.legend(frameon=False, fontsize=7)
        rules = ["at random", *list(RULES.values())[:-1]][::-1]
        pools = [*(f"{net} {width}" for net, width in NETS), "both"]
        for place, pool in enumerate(pools):
            part = made[(made["data"] == data) & (made["pool"] == pool)]
            over = [(part[part["rule"] == rule]["test_loss"] / part[part["rule"] == rule]["best"]) for rule in rules]
            heights = [number + 0.2 * (place - 1) for number in range(len(rules))]
            style = {"color": COLOURS[place], "marker": MARKERS[place], "lw": 0, "ms": 5}
            right.plot([values.mean() for values in over], heights, label=pool, **style)
        right.set_yticks(range(len(rules)), rules, fontsize=7)
        right.set(xscale="log", xlabel="test loss over that of the best", title=f"{data}: what is selected by")
        right.axvline(1, color="black", lw=0.8)
        right.legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("selecting", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
