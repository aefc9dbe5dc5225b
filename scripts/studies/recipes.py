"""A net trained by a recipe, and everything about it that might tell how well it generalises."""

from __future__ import annotations

from functools import partial
from typing import Any

from frame import Places, Settings
from torch import nn
from training import Data, convnet, entropy_and_accuracy, fit, images, mlp

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
    how = {"steps": 4 if quick else 400, "rate": 3e-3, "batch_size": 128}
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
