"""How large a perturbation may be for first order to hold: six perturbations of an MLP, a ResNet and a ViT on digits.

Each perturbation is made at several sizes of its own (standard deviation of the noise, bits, learning rate, share of
units), and the change of the logits on test images is compared with its first-order value along the very same dw:

    error = sqrt( sum (f(w + dw) - f(w) - J dw)^2 / sum (f(w + dw) - f(w))^2 )

so that 0 is exact, and 1 is as wrong as predicting no change at all. Beside it stand the size of dw relative to the
weights, and the share of images whose top-1 class changes: what first order holds up to, in terms a user cares about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fitting import NETS, Data, Relative, change, losses_of, on_digits, outputs, relearn, wander
from frame import Settings, Study, Tables, curve, dots, main, panels
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from jbrprune.structure.discovery import find_groups
from jbrprune.tpv import Isotropic, Quantization, Removal, taylor_error, trace_form

Change = Mapping[str, Tensor]
SIZES: dict[str, tuple[float, ...]] = {
    "isotropic": (0.003, 0.01, 0.03, 0.1, 0.3),
    "quantization": (8, 6, 5, 4, 3, 2),
    "sgd": (0.001, 0.003, 0.01, 0.03, 0.1),
    "label_noise": (0.03, 0.1, 0.3, 1.0, 3.0),
    "removal": (0.01, 0.03, 0.1, 0.2, 0.4),
    "removal_of_weights": (0.1, 0.3, 0.5, 0.7, 0.9),
}
NAMES = {
    "isotropic": "noise, share of each layer's weights",
    "quantization": "rounding, bits",
    "sgd": "50 steps of SGD, learning rate",
    "label_noise": "label noise, share of the logits",
    "removal": "random units removed, share",
    "removal_of_weights": "least weights removed, share",
}


def settings(quick: bool) -> Iterator[Settings]:
    for seed in range(1 if quick else 3):
        for net in NETS:
            for perturbation, sizes in SIZES.items():
                if quick and net != "mlp" and perturbation in ("sgd", "label_noise"):  # what takes long
                    continue
                for size in sizes[1:2] if quick else sizes:
                    how = {"steps": 4, "train": 64, "test": 32} if quick else {"steps": 300, "train": 1297, "test": 250}
                    yield {"net": net, "perturbation": perturbation, "size": size, "seed": seed, **how}


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    model, data = on_digits(*(wanted[name] for name in ("net", "seed", "steps", "train", "test")))
    dw = MAKERS[wanted["perturbation"]](model, data, wanted["size"], wanted["seed"])
    weights = weights_of(model)
    before = outputs(model, data.test_images)
    with torch.no_grad():
        moved = {name: weights[name] + step for name, step in dw.items()}
        after = functional_call(model, moved, (data.test_images,))
    validity = taylor_error(model, data.test_images, dw, [1.0], batch_size=125, progress=False)

    def square(tensors: Change) -> float:
        return sum(tensor.double().square().sum().item() for tensor in tensors.values())

    return {
        "accuracy": losses_of(model, data)["test_accuracy"],
        "relative_size": (square(dw) / square(weights)) ** 0.5,
        "tpv": (after - before).square().sum(1).mean().item(),
        "relative_tpv": ((after - before).square().sum() / before.square().sum()).item(),
        "flips": (after.argmax(1) != before.argmax(1)).double().mean().item(),
        "error": validity.errors[0],
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# --- perturbations: (model, data, size, seed) -> dw ------------------------------------------------


def isotropic(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """Normal noise in proportion to the root mean square of every tensor."""
    return Relative(size).of(model, weights_of(model)).sample(torch.Generator().manual_seed(seed))


def quantization(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """Real rounding, one range for every tensor."""
    return Quantization(int(size), rounding=True).of(model, weights_of(model)).sample(torch.Generator())


def sgd(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """Where 50 steps of SGD with batches of 32 lead, momentum 0.9."""
    how = {"steps": 50, "rate": size, "batch_size": 32, "momentum": 0.9, "seed": seed}
    return change(model, wander(model, data.images, data.targets, nn.functional.cross_entropy, **how))


def label_noise(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """Learn the logits of 128 images plus noise, relative to their mean size; 15 steps of L-BFGS, penalty 0.01."""
    inputs = data.images[:128]
    found = outputs(model, inputs)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)) * found.abs().mean()
    gradient = trace_form(model, inputs[:64], Isotropic(1.0), rtol=0.0, validity=False, progress=False).value
    return change(model, relearn(model, inputs, found + size * noise, 0.01 * gradient / found.shape[1], steps=15))


def removal(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """Units (channels, heads) drawn at random, the same share of every group, at least one."""
    generator = torch.Generator().manual_seed(seed)
    groups = find_groups(model, data.images[:2]).groups
    drawn = {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(size * group.size))].sort().values
        for group in groups
    }
    return Removal(drawn, groups).of(model, weights_of(model)).sample(torch.Generator())


def removal_of_weights(model: nn.Module, data: Data, size: float, seed: int) -> Change:
    """The smallest weights of every matrix and kernel."""
    weights = weights_of(model)
    keep = {name: w.abs() > w.abs().flatten().quantile(size) for name, w in weights.items() if w.dim() > 1}
    return Removal(keep).of(model, weights).sample(torch.Generator())


MAKERS: dict[str, Callable[[nn.Module, Data, float, int], Change]] = {
    make.__name__: make for make in (isotropic, quantization, sgd, label_noise, removal, removal_of_weights)
}


# --- what came out ---------------------------------------------------------------------------------


def tables(frame: pd.DataFrame) -> Tables:
    means = frame.groupby(["perturbation", "size", "net"])[["error", "flips"]].mean()
    rows = []
    for perturbation, size in dict.fromkeys((name, size) for name, sizes in SIZES.items() for size in sizes):
        row: dict[str, Any] = {"perturbation": NAMES[perturbation], "size": f"{size:g}"}
        for net in [net for net in NETS if (perturbation, size, net) in means.index]:
            found = means.loc[(perturbation, size, net)]
            row[net] = f"{found['error']:.2f} ({found['flips']:.1%})"
        rows += [row] if len(row) > 2 else []
    limits = []
    for name, part in frame.groupby("perturbation", sort=False):
        row = {"perturbation": NAMES[name].split(",")[0]}
        for net in NETS:
            own = part[part["net"] == net]
            found = [own[own["error"] <= tolerance]["flips"].max() for tolerance in (0.1, 0.3, 0.5)]
            row[net] = " / ".join("-" if pd.isna(value) else f"{value:.1%}" for value in found)
        limits.append(row)
    title = "Relative error of the first-order change, and share of top-1 classes that change; means over seeds"
    limit = "The largest share of changed top-1 classes among runs with an error of at most 0.1 / 0.3 / 0.5"
    return [(title, pd.DataFrame(rows).fillna("")), (limit, pd.DataFrame(limits))]


def figure(frame: pd.DataFrame) -> Figure:
    """Error by relative size of dw (above) and by the change that it makes (below), one column for every net."""
    groups = list(frame.groupby("net", sort=False))
    drawn, axes = panels(len(groups), 2, height=3.2)
    for column, (net, rows) in enumerate(groups):
        for name, part in rows.groupby("perturbation"):
            place = list(SIZES).index(name)
            sizes = part.groupby("size")[["relative_size", "error"]].mean().reset_index()
            curve(axes[0, column], sizes, "relative_size", "error", place, NAMES[name].split(",")[0])
            dots(axes[1, column], part, "relative_tpv", "error", place, marker="o", ms=3)
        axes[0, column].set(title=net, xlabel="|dw| / |w|")
        axes[1, column].set(xlabel="TPV / mean squared logits")
        for one in axes[:, column]:
            one.axhline(0.1, color="black", lw=0.8, ls=":")
            one.set(xscale="log", yscale="log", ylim=(2e-3, 3), ylabel="relative error of first order")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return drawn


STUDY = Study("first_order", __doc__, settings, measure, tables, figure)

if __name__ == "__main__":
    main(STUDY)
