"""Label noise on synthetic data: retraining against its trace form, on training and test inputs, by width.

A net of three linear layers learns a teacher (20 inputs, one output of variance 1) from 1,000 samples. Then copies
of it learn its own outputs plus noise of standard deviation sigma, with a proximity penalty, and TPV is how far their
outputs move. The penalty is a multiple of the mean squared norm of a sample's gradient, so that it means the same at
every width; 0 is the limit in which the copies repeat the noise. Retraining is expensive, the trace form (through the
kernel, `kernel.py`) is not: it is there for every penalty, retraining for two of them.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from frame import Places, Settings, Study, curve, main, panels, spread
from kernel import Spectrum, spectrum
from matplotlib.figure import Figure
from torch import Tensor, nn
from training import Data, fit, mlp, outputs, squared, synthetic

WIDTHS = (128, 256, 512, 800, 1024, 1600)
RETRAINED = ((1e-2, 0.1), (1e-2, 1.0), (1e-3, 0.1))
"""Penalty and sigma; of the widest nets only the first."""
TRACE_ONLY = (1e-1, 1e-4, 1e-5, 0.0)


def settings(quick: bool) -> Iterator[Settings]:
    sizes = {"dimension": 20, "train": 1000, "test": 1000, "steps": 120}
    if quick:
        sizes = {"dimension": 4, "train": 20, "test": 20, "steps": 5}
    for seed in range(1 if quick else 3):
        for width in (8, 16) if quick else WIDTHS:
            retrained = RETRAINED if width <= 512 else RETRAINED[:1]
            forms = [(penalty, sigma, 4) for penalty, sigma in retrained]
            forms += [(penalty, 0.1, 0) for penalty in TRACE_ONLY]
            forms += [(1e-3, 0.1, 0)] * (width > 512)
            for penalty, sigma, draws in forms:
                noise = {"penalty": penalty, "sigma": sigma, "draws": draws}
                yield {"teacher": "linear", "width": width, "seed": seed, **sizes, **noise}


def measure(wanted: Settings, places: Places) -> dict[str, Any]:
    how = ("teacher", "width", "seed", "dimension", "train", "test", "steps")
    data, model, seen = trained(*(wanted[name] for name in how))
    scale = seen.values.mean().item()  # trace K / n
    penalty, variance = wanted["penalty"] * scale, wanted["sigma"] ** 2
    train, test = (variance * value for value in seen.label_noise(penalty))
    found = {
        "train_loss": squared(outputs(model, data.images), data.targets).item(),
        "test_loss": squared(outputs(model, data.test_images), data.test_targets).item(),
        "squared_gradient": scale,
        "learnt": seen.dimension(penalty),
        "trace_train": train,
        "trace_test": test,
    }
    return found | (retrained(model, data, penalty, wanted) if wanted["draws"] else {})


@functools.lru_cache(maxsize=1)
def trained(
    teacher: str, width: int, seed: int, dimension: int, train: int, test: int, steps: int
) -> tuple[Data, nn.Sequential, Spectrum]:
    """A net that has learnt the teacher, and its kernel."""
    data = synthetic(teacher, dimension=dimension, train=train, test=test, seed=seed)
    model = mlp(dimension, width, 1, seed=seed)
    fit(model, data.images, data.targets, squared, steps=steps, rate=3e-3)
    return data, model, spectrum(model, data.images, (data.images, data.test_images))


def retrained(model: nn.Module, data: Data, penalty: float, wanted: Settings) -> dict[str, float]:
    """TPV of copies that learn the net's outputs plus noise, with standard errors over the draws."""
    generator = torch.Generator().manual_seed(wanted["seed"])
    before, test_before = outputs(model, data.images), outputs(model, data.test_images)
    moved: dict[str, list[float]] = {"empirical_train": [], "empirical_test": []}
    for _ in range(wanted["draws"]):
        targets = before + wanted["sigma"] * torch.randn(before.shape, generator=generator)
        learner = relearn(model, data.images, targets, penalty)
        moved["empirical_train"].append(squared(outputs(learner, data.images), before).item())
        moved["empirical_test"].append(squared(outputs(learner, data.test_images), test_before).item())
    found = {name: sum(values) / len(values) for name, values in moved.items()}
    errors = {
        f"{name}_error": torch.tensor(values).std().item() / math.sqrt(len(values)) for name, values in moved.items()
    }
    return found | errors


def relearn(model: nn.Module, inputs: Tensor, targets: Tensor, penalty: float, iterations: int = 60) -> nn.Module:
    """A copy that minimises squared error plus ``penalty ||w - w*||^2`` from w* on, in eval mode, by L-BFGS."""
    learner = copy.deepcopy(model).eval()
    centre = [parameter.detach().clone() for parameter in learner.parameters()]
    optimizer = torch.optim.LBFGS(
        learner.parameters(), max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        away = sum((now - then).square().sum() for now, then in zip(learner.parameters(), centre, strict=True))
        loss = squared(learner(inputs), targets) + penalty * away
        loss.backward()
        return loss

    optimizer.step(closure)
    return learner


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    frame = _relative(frame)
    rows = []
    for (width, penalty, sigma), part in frame.groupby(["width", "penalty", "sigma"]):
        row = {"width": width, "penalty": penalty, "sigma": sigma, "seeds": len(part), "learnt": part["learnt"].mean()}
        columns = ("trace_train", "empirical_train", "trace_test", "empirical_test")
        row |= {name.replace("_", ", "): spread(part[name]) for name in columns if part[name].notna().any()}
        row["test loss of the net"] = spread(part["test_loss"])
        rows.append(row)
    retrained = pd.DataFrame([row for row in rows if "empirical, train" in row])
    limits = pd.DataFrame([row for row in rows if row["sigma"] == 0.1]).drop(columns=["sigma"], errors="ignore")
    limits = limits.drop(columns=[name for name in limits if name.startswith("empirical")])
    return [
        ("TPV / sigma^2 by retraining and by the trace form; mean (smallest to largest) over seeds", retrained),
        ("TPV / sigma^2 by the trace form, for every penalty", limits.sort_values(["penalty", "width"])),
    ]


def _relative(frame: pd.DataFrame) -> pd.DataFrame:
    """TPV as a multiple of the variance of the noise."""
    names = [name for name in frame if name.startswith(("trace_", "empirical_"))]
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
    right.set(xscale="log", yscale="log", ylabel="train TPV / test TPV", title="trace form")
    right.axhline(1, color="black", lw=0.8)
    for axes in (left, middle, right):
        axes.set_xlabel("width")
        axes.set_xticks(sorted(frame["width"].unique()), sorted(frame["width"].unique()), fontsize=7)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("label_noise", __doc__ or "", settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
