"""Data and small nets of the studies, made or trained in seconds, the same for the same seed; what moves their weights.

Perturbations that training makes are here as well: label noise learnt from the weights w* on, and where SGD wanders to.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
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
from jbrprune.tpv import Diagonal

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

    def normal(generator: np.random.Generator, *shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape)).float()  # fewer numbers are the first of more

    units = 1 if teacher == "linear" else 10
    weights, biases = normal(rules, dimension, units), 0.5 * normal(rules, units)

    def answer(x: Tensor) -> Tensor:
        return x @ weights if teacher == "linear" else (x @ weights + biases).relu().sum(1, keepdim=True)

    scale = answer(normal(rules, 10_000, dimension)).std()
    x, test_x = normal(trained, train, dimension), normal(tested, test, dimension)
    return Data(x[:, None, None], answer(x) / scale, test_x[:, None, None], answer(test_x) / scale)


def images(name: str, folder: Path | None, *, train: int, test: int, seed: int, side: int = 32) -> Data:
    """So many images drawn by a seed from the training images, and the first ``test`` of the test images.

    Args:
        name: ``digits`` or ``fashion_mnist``, 32x32 pixels.
        folder: With the IDX files of Fashion-MNIST.
        train: Number of training images.
        test: Number of test images.
        seed: Of the draw.
        side: Average the pixels to so many rows and columns, a divisor of 32.
    """
    x, y, test_x, test_y = _stored(name, folder)
    if train > len(x) or test > len(test_x):
        raise ArgumentError(f"{name} has {len(x)} training and {len(test_x)} test images, got {train} and {test}.")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:train]
    shrunk = [nn.functional.avg_pool2d(part, 32 // side) for part in (x[chosen], test_x[:test])]
    return Data(shrunk[0], y[chosen], shrunk[1], test_y[:test])


@functools.lru_cache(maxsize=2)
def _stored(name: str, folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if name == "digits":
        return digits()
    if name != "fashion_mnist" or folder is None:
        raise ArgumentError(f"Data must be digits, or fashion_mnist with --fashion-mnist FOLDER, got {name!r}.")
    return (*fashion_mnist(folder, train=True), *fashion_mnist(folder, train=False))


# --- nets ------------------------------------------------------------------------------------------


def mlp(inputs: int, width: int, outputs: int, *, layers: int = 3, seed: int = 0) -> nn.Sequential:
    """A net of so many linear layers with rectifiers between them, PyTorch's own initialisation."""
    sizes = [inputs, *[width] * (layers - 1), outputs]
    with _seeded(seed):
        parts: list[nn.Module] = [nn.Flatten()]
        for last, (before, after) in enumerate(pairwise(sizes), 2):
            parts.append(nn.Linear(before, after))
            if last < len(sizes):
                parts.append(nn.ReLU())
        return nn.Sequential(*parts)


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
    seed: int = 0,
) -> None:
    """Train in place by Adam with a cosine schedule, in train mode.

    Args:
        model: The net; left in eval mode.
        inputs: Images.
        targets: What ``loss`` takes.
        loss: ``(outputs, targets) -> `` mean loss.
        steps: So many.
        rate: Learning rate of the first step.
        batch_size: Images per step; None: all.
        seed: Of the order of the images.
    """
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with _seeded(seed):
        for _, chosen in zip(range(steps), _orders(len(inputs), batch_size)):
            optimizer.zero_grad()
            loss(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


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


def losses_of(model: nn.Module, data: Data) -> dict[str, float]:
    """Training and test loss: squared error, or of classes cross entropy (without smoothing), with the accuracy."""
    found = {}
    for side, x, y in (("train", data.images, data.targets), ("test", data.test_images, data.test_targets)):
        said = outputs(model, x)
        if y.is_floating_point():
            found[f"{side}_loss"] = squared(said, y).item()
        else:
            found[f"{side}_loss"] = nn.functional.cross_entropy(said, y).item()
            found[f"{side}_accuracy"] = (said.argmax(1) == y).double().mean().item()
    return found


# --- perturbations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relative:
    """Normal noise on every weight in proportion to the root mean square of its tensor.

    Attributes:
        share: Standard deviation as a share of it.
    """

    share: float

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Diagonal:
        """The covariance of these weights."""
        return Diagonal({name: self.share**2 * w.double().square().mean() for name, w in weights.items()}, weights)


def relearn(
    model: nn.Module, inputs: Tensor, targets: Tensor, penalty: float, *, steps: int = 40, tolerance: float = 0.0
) -> nn.Module:
    """A copy that minimises squared error plus ``penalty ||w - w*||^2`` from w* on, in eval mode, by L-BFGS.

    Args:
        model: With the weights w*.
        inputs: Images.
        targets: ``[N, K]``.
        penalty: On the squared distance to w*.
        steps: At most so many.
        tolerance: Stop once a step lowers the loss by less.
    """
    learner = copy.deepcopy(model).eval()
    centre = [parameter.detach().clone() for parameter in learner.parameters()]
    how = {"history_size": 20, "line_search_fn": "strong_wolfe", "tolerance_grad": 0.0}
    optimizer = torch.optim.LBFGS(learner.parameters(), max_iter=steps, tolerance_change=tolerance, **how)

    def closure() -> Tensor:
        optimizer.zero_grad()
        away = [(now - then).square().sum() for now, then in zip(learner.parameters(), centre, strict=True)]
        loss = squared(learner(inputs), targets) + penalty * torch.stack(away).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return learner


def wander(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    steps: int,
    rate: float,
    batch_size: int,
    momentum: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A copy after so many steps of SGD from w* on, in eval mode, batches drawn with replacement."""
    learner = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(learner.parameters(), rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(learner(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    return learner


def change(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> how far it has moved."""
    moved = dict(after.named_parameters())
    return {name: moved[name].detach() - parameter.detach() for name, parameter in before.named_parameters()}
