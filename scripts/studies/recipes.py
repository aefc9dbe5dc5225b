"""A net trained by a recipe, and everything about it that might tell how well it generalises."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from fitting import Data, Relative, convnet, fit, images, losses_of, mlp, outputs, squared, wander
from frame import Settings
from torch import Tensor, nn

from jbrprune.tpv import Isotropic, Quantization, trace_form

SIZES = {"digits": {"train": 600, "test": 500, "side": 8}, "fashion_mnist": {"train": 1000, "test": 2000, "side": 16}}
HELD_BACK = 200
"""Images that are drawn after the training images: a validation set, which only the comparison sees."""
WEIGHTS = {"isotropic": Isotropic(0.01), "relative": Relative(0.01), "quantization": Quantization(8)}
SIGNALS = {
    "label_noise": "label noise",
    "isotropic": "noise on every weight",
    "relative": "noise of 1 % of each layer's weights",
    "quantization": "8-bit quantization",
    "logits": "(mean logit)^2",
}
"""What is compared, all without labels; the last is no TPV but what the published label noise is scaled by."""


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


def measure(wanted: Settings, folder: Path | None) -> dict[str, Any]:
    """Losses and accuracies of a net on training, held-back and test images, and every signal."""
    count = wanted["train"]
    sizes = {name: wanted[name] for name in ("test", "seed", "side")}
    whole = images(wanted["data"], folder, train=count + HELD_BACK, **sizes)
    data = Data(whole.images[:count], whole.targets[:count], whole.test_images, whole.test_targets)
    held_back = Data(data.images, data.targets, whole.images[count:], whole.targets[count:])
    make = partial(mlp, wanted["side"] ** 2) if wanted["net"] == "mlp" else partial(convnet, 1)
    model = make(wanted["width"], 10, dropout=wanted["dropout"], seed=wanted["seed"])
    loss = nn.CrossEntropyLoss(label_smoothing=wanted["smoothing"])
    how = {name: wanted[name] for name in ("steps", "rate", "batch_size", "weight_decay", "seed")}
    fit(model, data.images, data.targets, loss, **how)
    validation = losses_of(model, held_back)
    found = {f"validation_{what}": validation[f"test_{what}"] for what in ("loss", "accuracy")}
    found |= {"params": sum(parameter.numel() for parameter in model.parameters())}
    return found | losses_of(model, data) | signals(model, data, wanted["seed"])


def signals(model: nn.Module, data: Data, seed: int) -> dict[str, float]:
    """Every signal on the training and on the test images, as ``NAME_train`` and ``NAME_test``."""
    sides = {"train": data.images, "test": data.test_images[: len(data.images)]}
    how = {"rtol": 0.05, "method": "projection", "validity": False, "progress": False, "batch_size": 100}
    found: dict[str, float] = {}
    for side, inputs in sides.items():
        found[f"logits_{side}"] = outputs(model, inputs).abs().mean().item() ** 2
        for name, covariance in WEIGHTS.items():
            found[f"{name}_{side}"] = trace_form(model, inputs, covariance, **how).value
    return found | label_noise(model, sides, seed)


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
