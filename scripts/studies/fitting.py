"""Data and small nets of the studies: made or trained in seconds, the same for the same seed."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jbrprune.demo import digits
from jbrprune.errors import ArgumentError
from jbrprune.models import timm_models
from jbrprune.models.preserve import evaluating, same_randomness

sys.path.append(str(Path(__file__).parents[1]))

from sources import fashion_mnist

Loss = Callable[[Tensor, Tensor], Tensor]
TIMM: dict[str, tuple[str, dict[str, Any]]] = {"resnet": ("test_resnet", {}), "vit": ("test_vit", {"img_size": 32})}
NETS = ("mlp", *TIMM)


@dataclass(frozen=True, eq=False)
class Data:
    """Images ``[N, C, H, W]``; targets ``[N]`` (classes) or ``[N, K]`` (numbers)."""

    images: Tensor
    targets: Tensor
    test_images: Tensor
    test_targets: Tensor


# --- data ------------------------------------------------------------------------------------------


def synthetic(teacher: str, *, dimension: int, train: int, test: int, seed: int) -> Data:
    """Standard normal vectors as images ``[N, 1, 1, dimension]``, and a teacher's one noiseless output ``[N, 1]``.

    Args:
        teacher: ``linear``: ``x.w``; ``relu``: a sum of ten rectified ``x.a_k + b_k``. All weights are standard
            normal, the biases half of that; the output is divided by its standard deviation on 10,000 vectors.
        dimension: Of the vectors.
        train: Number of training vectors; a smaller number gives the first of a larger one.
        test: Number of test vectors, which do not depend on ``train``.
        seed: Of everything.
    """
    if teacher not in ("linear", "relu"):
        raise ArgumentError(f"teacher must be linear or relu, got {teacher!r}.")
    rules, trained, tested = (np.random.default_rng([seed, part]) for part in range(3))
    units = 1 if teacher == "linear" else 10
    weights, biases = _normal(rules, dimension, units), 0.5 * _normal(rules, units)

    def answer(x: Tensor) -> Tensor:
        return x @ weights if teacher == "linear" else (x @ weights + biases).relu().sum(1, keepdim=True)

    scale = answer(_normal(rules, 10_000, dimension)).std()
    x, test_x = _normal(trained, train, dimension), _normal(tested, test, dimension)
    return Data(x[:, None, None], answer(x) / scale, test_x[:, None, None], answer(test_x) / scale)


def _normal(generator: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers; unlike torch's, fewer of them are the first of more."""
    return torch.from_numpy(generator.standard_normal(shape)).float()


def images(name: str, folder: Path | None, *, train: int, test: int, seed: int, side: int | None = None) -> Data:
    """So many images drawn by a seed from the training images, and the first ``test`` of the test images.

    Args:
        name: ``digits`` or ``fashion_mnist``, 32x32 pixels.
        folder: With the IDX files of Fashion-MNIST.
        train: Number of training images.
        test: Number of test images.
        seed: Of the draw.
        side: Average the pixels to so many rows and columns, a divisor of 32; None: leave them.
    """
    x, y, test_x, test_y = _stored(name, folder)
    if train > len(x) or test > len(test_x):
        raise ArgumentError(f"{name} has {len(x)} training and {len(test_x)} test images, got {train} and {test}.")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:train]
    size = 32 if side is None else side
    shrunk = [nn.functional.avg_pool2d(part, 32 // size) for part in (x[chosen], test_x[:test])]
    return Data(shrunk[0], y[chosen], shrunk[1], test_y[:test])


@functools.lru_cache(maxsize=2)
def _stored(name: str, folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if name == "digits":
        return digits()
    if name != "fashion_mnist" or folder is None:
        raise ArgumentError(f"Data must be digits, or fashion_mnist with --fashion-mnist FOLDER, got {name!r}.")
    return (*fashion_mnist(folder, train=True), *fashion_mnist(folder, train=False))


# --- nets ------------------------------------------------------------------------------------------


def mlp(
    inputs: int, width: int, outputs: int, *, layers: int = 3, dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """A net of so many linear layers with rectifiers between them, PyTorch's own initialisation."""
    sizes = [inputs, *[width] * (layers - 1), outputs]
    with _seeded(seed):
        parts: list[nn.Module] = [nn.Flatten()]
        for last, (before, after) in enumerate(pairwise(sizes), 2):
            parts.append(nn.Linear(before, after))
            if last < len(sizes):
                parts += [nn.ReLU(), *[nn.Dropout(dropout)] * (dropout > 0)]
        return nn.Sequential(*parts)


def convnet(channels: int, width: int, outputs: int, *, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Three 3x3 convolutions of stride 2 with BatchNorm and rectifiers, then the mean."""
    with _seeded(seed):
        parts: list[nn.Module] = []
        for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            parts += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *[nn.Dropout(dropout)] * (dropout > 0)]
        return nn.Sequential(*parts, nn.Linear(4 * width, outputs))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with same_randomness(torch.device("cpu")):
        torch.manual_seed(seed)
        yield


# --- training --------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    steps: int,
    rate: float = 1e-3,
    batch_size: int | None = None,
    weight_decay: float = 0.0,
    goal: float = 0.0,
    seed: int = 0,
) -> float:
    """Train in place by Adam with a cosine schedule, in train mode; return the loss of the last step.

    Args:
        model: The net.
        inputs: Images.
        targets: What ``loss`` takes.
        loss: ``(outputs, targets) -> `` mean loss.
        steps: At most so many.
        rate: Learning rate of the first step.
        batch_size: Images per step; None: all.
        weight_decay: Decoupled (AdamW).
        goal: Stop once the loss of a step is below it.
        seed: Of the order of the images and of dropout.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with _seeded(seed):
        for step, chosen in enumerate(_orders(len(inputs), batch_size)):
            found = loss(model(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            schedule.step()
            if step + 1 == steps or found.item() < goal:
                break
    model.eval()
    return found.item()


def _orders(count: int, batch_size: int | None) -> Iterator[Tensor | slice]:
    """Batches of a random order, again and again; a last one that is not full is left out."""
    while batch_size is None or batch_size >= count:
        yield slice(None)
    while True:
        yield from torch.randperm(count)[: count // batch_size * batch_size].split(batch_size)


@functools.lru_cache(maxsize=1)
def on_digits(net: str, seed: int, steps: int, train: int, test: int) -> tuple[nn.Module, Data]:
    """An MLP, a small ResNet or a small ViT of timm that has learnt the digits, and the digits."""
    data = images("digits", None, train=train, test=test, seed=seed)
    if net == "mlp":
        model: nn.Module = mlp(1024, 128, 10, seed=seed)
    else:
        name, more = TIMM[net]
        with _seeded(seed):
            model = timm_models.create(name, pretrained=False, in_chans=1, num_classes=10, **more)
    fit(model, data.images, data.targets, nn.functional.cross_entropy, steps=steps, rate=2e-3, batch_size=64, seed=seed)
    return model, data


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the net says in eval mode, ``[N, K]``."""
    with evaluating(model), torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(500)])


def squared(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error, summed over outputs, averaged over samples."""
    return (found - wanted).square().sum(1).mean()


def entropy_and_accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy (without smoothing) and share of right answers."""
    found = outputs(model, inputs)
    return nn.functional.cross_entropy(found, labels).item(), (found.argmax(1) == labels).double().mean().item()
