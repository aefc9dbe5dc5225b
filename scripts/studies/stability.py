"""Whether TPV on the training inputs tells TPV on other inputs: by width and number of training samples.

A net of three linear layers learns a teacher (20 inputs, one output of variance 1) from n_train samples, and from
nothing else. Then TPV on these samples is compared with TPV on 2,000 others, for perturbations that do not depend on
the samples (noise on every weight, 8-bit quantization) and for one that is made of them (label noise, with a
proximity penalty and without; see label_noise.py). All are trace forms. Of the first kind `train_test_ratio` is asked
whether it would have warned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fitting import fit, losses_of, mlp, squared, synthetic
from frame import Settings, Study, Tables, curve, main, panels
from kernel import label_noise
from matplotlib.figure import Figure

from jbrprune.tpv import Isotropic, Quantization, TPVWarning, trace_form, train_test_ratio

COUNTS = (10, 30, 100, 300, 500, 1000, 3000)
WIDTHS = (8, 64, 256)
WEIGHTS = {"isotropic": Isotropic(0.01), "quantization": Quantization(8)}
NAMES = {
    "isotropic": "noise on every weight",
    "quantization": "8-bit quantization",
    "label_noise": "label noise, penalty 0.01",
    "repeated_noise": "label noise, no penalty",
}
STABLE = 1.25
"""Train and test TPV agree if neither is more than so many times the other: what a warning is held against."""


def settings(quick: bool) -> Iterator[Settings]:
    sizes = {"dimension": 4, "test": 30, "steps": 3} if quick else {"dimension": 20, "test": 2000, "steps": 150}
    for train in (10, 30) if quick else COUNTS:
        for seed in range(1 if quick else 3):
            for width in (8,) if quick else WIDTHS:
                yield {"teacher": "relu", "width": width, "train": train, "seed": seed, **sizes}


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    sizes = {name: wanted[name] for name in ("dimension", "train", "test", "seed")}
    data = synthetic(wanted["teacher"], **sizes)
    model = mlp(wanted["dimension"], wanted["width"], 1, seed=wanted["seed"])
    fit(model, data.images, data.targets, squared, steps=wanted["steps"], rate=3e-3)
    sides = {"train": data.images, "test": data.test_images}
    found = losses_of(model, data) | {"params": sum(parameter.numel() for parameter in model.parameters())}
    how = {"rtol": 0.0, "validity": False, "progress": False, "batch_size": 250}
    for name, covariance in WEIGHTS.items():
        both = {side: trace_form(model, inputs, covariance, **how) for side, inputs in sides.items()}
        for side, estimate in both.items():
            found |= {f"{name}_{side}": estimate.value, f"{name}_{side}_error": estimate.standard_error}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", TPVWarning)
            ratio = train_test_ratio(both["train"], both["test"])
        found |= {f"{name}_ratio": ratio.value, f"{name}_ratio_error": ratio.standard_error}
        found[f"{name}_warned"] = any(issubclass(one.category, TPVWarning) for one in said)
    return found | label_noise(model, sides)


# --- what came out ---------------------------------------------------------------------------------


def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Train TPV over test TPV, one column for every perturbation."""
    return frame.assign(**{name: frame[f"{name}_train"] / frame[f"{name}_test"] for name in NAMES})


def tables(frame: pd.DataFrame) -> Tables:
    frame = ratios(frame)
    rows = []
    for (width, train), part in frame.groupby(["width", "train"]):
        row = {"width": width, "n_train": train, "runs": len(part)}
        row |= {NAMES[name]: _ratio(part[name]) for name in NAMES}
        row |= {"train loss": part["train_loss"].mean(), "test loss": part["test_loss"].mean()}
        rows.append(row)
    title = (
        "TPV on training inputs over TPV on test inputs: geometric mean (smallest to largest) over seeds; "
        f"bold where a run is off by more than {STABLE}"
    )
    return [(title, pd.DataFrame(rows)), *flags(frame)]


def flags(frame: pd.DataFrame) -> Tables:
    """How often the library warns, against how often the ratio of a run is off; of lines that say it."""
    rows = []
    for name in WEIGHTS:
        known = frame.dropna(subset=[f"{name}_warned"]) if f"{name}_warned" in frame else frame.iloc[:0]
        for train, part in known.groupby("train"):
            warned = part[f"{name}_warned"].astype(bool)
            off = (part[name] > STABLE) | (part[name] < 1 / STABLE)
            row = {"perturbation": NAMES[name], "n_train": train, "runs": len(part), "off": off.sum()}
            row |= {"off, warned": (off & warned).sum(), "off, not warned": (off & ~warned).sum()}
            rows.append(row | {"not off, warned": (~off & warned).sum()})
    title = f"Where `train_test_ratio` warns, and where a run is off by more than {STABLE}; numbers of runs"
    return [(title, pd.DataFrame(rows))] if rows else []


def _ratio(values: pd.Series) -> str:
    mean = np.exp(np.log(values).mean())
    text = f"{mean:.2f} ({values.min():.2f} to {values.max():.2f})"
    return f"**{text}**" if values.max() > STABLE or values.min() < 1 / STABLE else text


def figure(frame: pd.DataFrame) -> Figure:
    """One panel for every perturbation: the ratio by number of training samples, one curve for every width."""
    frame = ratios(frame)
    drawn, (axes,) = panels(len(NAMES), width=3.6)
    for one, (name, title) in zip(axes, NAMES.items(), strict=True):
        for place, (width, rows) in enumerate(frame.groupby("width")):
            curve(one, rows, "train", name, place, f"width {width}")
        one.axhspan(1 / STABLE, STABLE, color="black", alpha=0.07, lw=0)
        one.set(xscale="log", yscale="log", xlabel="training samples", title=title)
        one.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        one.set_ylim(0.2, 5)  # without a penalty the ratio falls to 0 where samples come close to parameters
        one.minorticks_off()
    axes[0].set_ylabel("train TPV / test TPV")
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


STUDY = Study("stability", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
