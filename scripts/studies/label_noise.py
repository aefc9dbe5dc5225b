"""Label noise on synthetic data: retraining against its trace form, on training and test inputs, by width.

A net of three linear layers learns a teacher (20 inputs, one output of variance 1) from 1,000 samples. Then copies
of it learn its own outputs plus noise of standard deviation sigma, with a proximity penalty, and TPV is how far their
outputs move. The penalty is a multiple of the mean squared norm of a sample's gradient, so that it means the same at
every width; 0 is the limit in which the copies repeat the noise. Retraining is expensive, the trace form (through the
kernel, `kernel.py`) is not: it is there for every penalty, retraining for two of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fitting import Data, fit, losses_of, mlp, outputs, relearn, squared, synthetic
from frame import Settings, Study, Tables, curve, label_widths, main, panels, spread
from kernel import Spectrum, spectrum
from matplotlib.figure import Figure
from torch import nn

WIDTHS = (128, 256, 512, 800, 1024, 1600)
RETRAINED = ((1e-2, 0.1, 6), (1e-2, 1.0, 6), (1e-3, 0.1, 6))
"""Penalty, sigma and draws of the noise; from a width of 512 on only the first, with two draws."""
TRACE_ONLY = (1e-1, 1e-4, 1e-5, 0.0)
"""Penalties without retraining."""


def settings(quick: bool) -> Iterator[Settings]:
    sizes = {"dimension": 20, "train": 1000, "test": 1000, "steps": 60}
    if quick:
        sizes = {"dimension": 4, "train": 20, "test": 20, "steps": 5}
    for width in (8,) if quick else WIDTHS:
        for seed in range(1 if quick else 3):
            forms = [*RETRAINED] if width < 512 else [(1e-2, 0.1, 2)]
            forms += [(penalty, 0.1, 0) for penalty in TRACE_ONLY]
            forms += [(1e-3, 0.1, 0)] * (width >= 512)
            for penalty, sigma, draws in forms:
                noise = {"penalty": penalty, "sigma": sigma, "draws": min(draws, 2) if quick else draws}
                yield {"teacher": "linear", "width": width, "seed": seed, **sizes, **noise}


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    how = ("teacher", "width", "seed", "dimension", "train", "test", "steps")
    data, model, seen = trained(*(wanted[name] for name in how))
    scale = seen.values.mean().item()  # trace K / n
    penalty, variance = wanted["penalty"] * scale, wanted["sigma"] ** 2
    train, test = (variance * value for value in seen.label_noise(penalty))
    found = losses_of(model, data) | {"squared_gradient": scale, "learnt": seen.dimension(penalty)}
    found |= {"trace_train": train, "trace_test": test}
    return found | (retrained(model, data, seen, penalty, wanted) if wanted["draws"] else {})


@functools.lru_cache(maxsize=1)
def trained(
    teacher: str, width: int, seed: int, dimension: int, train: int, test: int, steps: int
) -> tuple[Data, nn.Sequential, Spectrum]:
    """A net that has learnt the teacher, and its kernel."""
    data = synthetic(teacher, dimension=dimension, train=train, test=test, seed=seed)
    model = mlp(dimension, width, 1, seed=seed)
    fit(model, data.images, data.targets, squared, steps=steps, rate=3e-3)
    return data, model, spectrum(model, data.images, (data.images, data.test_images))


def retrained(model: nn.Module, data: Data, seen: Spectrum, penalty: float, wanted: Settings) -> dict[str, float]:
    """TPV of copies that learn the net's outputs plus noise, and to first order for the very same noise.

    ``error`` is the root mean square difference of the two changes of the outputs, relative to the real one.
    """
    generator, tolerance = torch.Generator().manual_seed(wanted["seed"]), 1e-6 * wanted["sigma"] ** 2
    points = {"train": data.images, "test": data.test_images}
    before = {name: outputs(model, inputs) for name, inputs in points.items()}
    sums = {f"{what}_{name}": 0.0 for what in ("empirical", "paired", "missed") for name in points}
    for _ in range(wanted["draws"]):
        noise = wanted["sigma"] * torch.randn(before["train"].shape, generator=generator)
        learner = relearn(model, data.images, before["train"] + noise, penalty, tolerance=tolerance)
        for (name, inputs), first_order in zip(points.items(), seen.response(noise[:, 0], penalty), strict=True):
            real = (outputs(learner, inputs) - before[name])[:, 0].double()
            found = {"empirical": real, "paired": first_order, "missed": real - first_order}
            for what, change in found.items():
                sums[f"{what}_{name}"] += change.square().mean().item() / wanted["draws"]
    errors = {f"error_{name}": math.sqrt(sums.pop(f"missed_{name}") / sums[f"empirical_{name}"]) for name in points}
    return sums | errors


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> Tables:
    frame = _relative(frame)
    columns = [f"{form}_{side}" for side in ("train", "test") for form in ("trace", "paired", "empirical")]
    retrained, limits = [], []
    for (width, penalty, sigma), part in frame.groupby(["width", "penalty", "sigma"]):
        row = {"width": width, "penalty": penalty, "sigma": sigma, "seeds": len(part), "learnt": part["learnt"].mean()}
        shown = {name: spread(part[name]) for name in columns if part[name].notna().any()}
        if "empirical_train" in shown:
            errors = {f"error, {side}": spread(part[f"error_{side}"]) for side in ("train", "test")}
            cells = {name.replace("_", ", "): text for name, text in shown.items()}
            retrained.append(row | cells | errors | {"test loss of the net": spread(part["test_loss"])})
        if sigma == 0.1:
            del row["sigma"]
            row |= {f"trace, {side}": shown[f"trace_{side}"] for side in ("train", "test")}
            limits.append(row | {"test loss of the net": spread(part["test_loss"])})
    title = (
        "TPV / sigma^2 by retraining (empirical), to first order for the same noise (paired) and in expectation "
        "(trace), and the relative error of the first-order change; mean (smallest to largest) over seeds"
    )
    limit = "TPV / sigma^2 by the trace form, for every penalty"
    return [(title, pd.DataFrame(retrained)), (limit, pd.DataFrame(limits).sort_values(["penalty", "width"]))]


def _relative(frame: pd.DataFrame) -> pd.DataFrame:
    """TPV as a multiple of the variance of the noise."""
    names = [name for name in frame if name.startswith(("trace_", "paired_", "empirical_"))]
    return frame.assign(**{name: frame[name] / frame["sigma"] ** 2 for name in names})


def figure(frame: pd.DataFrame) -> Figure:
    """Left: retraining and trace form by width. Middle: by penalty. Right: how far test is from train."""
    frame = _relative(frame)
    drawn, ((left, middle, right),) = panels(3)
    first = frame[(frame["penalty"] == 1e-2) & (frame["sigma"] == 0.1)]
    for place, side in enumerate(("train", "test")):
        curve(left, first, "width", f"trace_{side}", place, f"trace form, {side}", marker="", ls="--")
        curve(left, first, "width", f"empirical_{side}", place, f"retraining, {side}", lw=0)
    left.set(xscale="log", ylabel="TPV / sigma$^2$", title="penalty 0.01, sigma 0.1")
    left.set_ylim(bottom=0)
    small = frame[frame["sigma"] == 0.1]
    for place, (penalty, rows) in enumerate(small.groupby("penalty")):
        curve(middle, rows, "width", "trace_test", place, f"penalty {penalty:g}")
        ratio = rows.assign(ratio=rows["trace_train"] / rows["trace_test"])
        curve(right, ratio, "width", "ratio", place, f"penalty {penalty:g}")
    middle.set(xscale="log", yscale="log", ylabel="TPV / sigma$^2$, test inputs", title="trace form")
    right.set(xscale="log", ylabel="train TPV / test TPV", title="trace form")
    right.axhline(1, color="black", lw=0.8)
    for axes in (left, middle, right):
        label_widths(axes, frame)
    left.legend(frameon=False, fontsize=7)
    right.legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("label_noise", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
