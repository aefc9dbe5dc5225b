"""A net trained by a recipe, and everything about it that might tell how well it generalises."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fitting import Data, convnet, entropy_and_accuracy, fit, images, mlp, outputs, squared
from frame import Places, Settings
from noises import Relative
from relearning import wander
from torch import Tensor, nn

from jbrprune.tpv import Isotropic, Quantization, trace_form

SIZES = {"digits": {"train": 600, "test": 500, "side": 8}, "fashion_mnist": {"train": 1000, "test": 2000, "side": 16}}
HELD_BACK = 200
"""Images that are drawn after the training images: a validation set, which only the comparison sees."""


def settings(data: str, net: str, width: int, seed: int, quick: bool, **recipe: float) -> Settings:
    """Of one training.

    Args:
        data: ``digits`` or ``fashion_mnist``.
        net: ``mlp`` or ``convnet``.
        width: Of its (first) hidden layer.
        seed: Of the draw of images, the initial weights, the order of the images.
        quick: A tiny version.
        recipe: ``weight_decay``, ``dropout``, ``smoothing``; what is not given is 0.
    """
    sizes = {"train": 40, "test": 30, "side": 8} if quick else SIZES[data]
    plain = {"weight_decay": 0.0, "dropout": 0.0, "smoothing": 0.0} | recipe
    how = {"steps": 4 if quick else 300, "rate": 3e-3, "batch_size": 128}
    return {"data": data, "net": net, "width": width, "seed": seed, **sizes, **plain, **how}


def trained(wanted: Settings, places: Places) -> tuple[nn.Module, Data, Data]:
    """The net, its data, and the same data with the images held back as test images."""
    count = wanted["train"]
    everything = images(
        wanted["data"],
        places.fashion_mnist,
        train=count + HELD_BACK,
        test=wanted["test"],
        seed=wanted["seed"],
        side=wanted["side"],
    )
    x, y = everything.images, everything.targets
    data = Data(x[:count], y[:count], everything.test_images, everything.test_targets)
    make = partial(mlp, wanted["side"] ** 2) if wanted["net"] == "mlp" else partial(convnet, 1)
    model = make(wanted["width"], 10, dropout=wanted["dropout"], seed=wanted["seed"])
    loss = nn.CrossEntropyLoss(label_smoothing=wanted["smoothing"])
    how = {name: wanted[name] for name in ("steps", "rate", "batch_size", "weight_decay", "seed")}
    fit(model, data.images, data.targets, loss, **how)
    return model, data, Data(data.images, data.targets, x[count:], y[count:])


def losses(model: nn.Module, data: Data, held_back: Data) -> dict[str, Any]:
    """Cross entropy without smoothing and accuracy, on the training, held-back and test images."""
    sets = {
        "train": (data.images, data.targets),
        "validation": (held_back.test_images, held_back.test_targets),
        "test": (data.test_images, data.test_targets),
    }
    found: dict[str, Any] = {"params": sum(parameter.numel() for parameter in model.parameters())}
    for name, (x, y) in sets.items():
        found[f"{name}_loss"], found[f"{name}_accuracy"] = entropy_and_accuracy(model, x, y)
    return found


WEIGHTS = {"isotropic": Isotropic(0.01), "relative": Relative(0.01), "quantization": Quantization(8)}
SIGNALS = {
    "label_noise": "label noise",
    "isotropic": "noise on every weight",
    "relative": "noise of 1 % of each layer's weights",
    "quantization": "8-bit quantization",
    "logits": "(mean logit)^2",
}
"""What is compared, all without labels; the last is no TPV but what the published label noise is scaled by."""


def signals(model: nn.Module, data: Data, wanted: Settings) -> dict[str, float]:
    """Every signal on the training and on the test images, as ``NAME_train`` and ``NAME_test``."""
    sides = {"train": data.images, "test": data.test_images[: len(data.images)]}
    how = {"rtol": 0.05, "method": "projection", "validity": False, "progress": False, "batch_size": 100}
    found: dict[str, float] = {}
    for side, inputs in sides.items():
        found[f"logits_{side}"] = outputs(model, inputs).abs().mean().item() ** 2
        for name, covariance in WEIGHTS.items():
            found[f"{name}_{side}"] = trace_form(model, inputs, covariance, **how).value
    return found | label_noise(model, sides, wanted["seed"])


def label_noise(model: nn.Module, sides: dict[str, Tensor], seed: int, *, draws: int = 3) -> dict[str, float]:
    """Retraining on the net's own logits plus noise of a tenth of their mean size, as the published code does it.

    SGD with momentum 0.9 on the mean squared error, without penalty, far from convergence: 80 steps of 256 images,
    rate 0.001 (published: 800 steps, rate 0.0001).
    """
    before = {side: outputs(model, inputs) for side, inputs in sides.items()}
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys((f"label_noise_{side}" for side in sides), 0.0)
    for draw in range(draws):
        noise = 0.1 * before["train"].abs().mean() * torch.randn(before["train"].shape, generator=generator)
        how = {"steps": 80, "rate": 1e-3, "batch_size": 256, "momentum": 0.9, "seed": draw}
        moved = wander(model, sides["train"], before["train"] + noise, nn.functional.mse_loss, **how)
        for side, inputs in sides.items():
            found[f"label_noise_{side}"] += squared(outputs(moved, inputs), before[side]).item() / draws
    return found
