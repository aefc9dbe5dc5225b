"""Slow twins and nets for the tests of single weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import cases
import torch
from reference import signs
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores

# --- slow twins ------------------------------------------------------------------------------------------------------


def products(model: nn.Module, images: Tensor, m: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> ``[N, *shape]`` w_j g_j(x_n), one plain backward after the other, on a copy."""
    twin = copy.deepcopy(model).requires_grad_()
    weights = [dict(twin.named_parameters())[name] for name in names]
    found: list[list[Tensor]] = []
    for image, direction in zip(images, m):
        logits = twin(image[None].clone())
        gradients = torch.autograd.grad((logits[0] * direction).sum(), weights, allow_unused=True)
        found.append([w.detach() * (0 if g is None else g) for w, g in zip(weights, gradients)])
    return {name: torch.stack(rows) for name, rows in zip(names, zip(*found))}


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the largest score of each parameter; one whose gradient is zero but for rounding must stay so."""
    assert set(found) == set(expected)
    largest = max(float(e.max()) for e in expected.values())
    for name, e in expected.items():
        scale = float(e.max()) + 1e-18 * largest
        assert found[name].shape == e.shape
        assert float((found[name] - e).abs().max()) <= tolerance * scale, name


def scored(
    model: nn.Module,
    images: object,
    *,
    ignore: Sequence[str] = (),
    parameters: str = "weights",
    batch_size: int = 32,
    **how: Any,
) -> WeightScores:
    relevance = Relevance(**{"objective": "projection"} | how)
    options = {"ignore": ignore, "parameters": parameters, "batch_size": batch_size}
    return weight_scores(model, images, relevance, **options)  # type: ignore[arg-type]


def compare(model: nn.Module, images: Tensor, **options: Any) -> WeightScores:
    """Score, compare with one backward per sample, and give back the scores."""
    scores = scored(model, images, **options)
    with torch.no_grad():
        m = signs(len(images), model(images).shape[1], 0).to(images)
    v = products(model, images, m, list(scores.sums))
    assert_exact(scores.values(), {name: value.square().mean(0) for name, value in v.items()})
    return scores


# --- nets -------------------------------------------------------------------------------------------------------------


class Volumes(nn.Module):
    """[B, C, H, W] -> [B, width, D, H, W / D]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv3d(3, 6, (2, 3, 1), padding=(0, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.unflatten(3, (2, 4)).movedim(4, 2))


class Borrowed(nn.Module):
    """A weight that another function reads (as in BEiT), one that two modules share, one called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lent = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.conv, self.unused = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)
        self.head = nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv(F.avg_pool2d(F.gelu(self.conv(self.stem(x))), 2)))
        x = x.flatten(2).transpose(1, 2)
        x = F.linear(x, self.lent.weight, torch.ones(6, dtype=x.dtype))
        self.lent(x)  # without any part in the logits
        x = torch.tanh(self.one(x)).mean(1)
        return self.head(torch.tanh(self.two(x)))


class PerImage(nn.Module):
    """Frames of an image share one convolution: its first dimension is the batch times four."""

    def __init__(self, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, kernel, groups=groups, padding=kernel // 2)
        self.head = nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        frames = x.unflatten(2, (4, -1)).transpose(1, 2).flatten(0, 1)
        return self.head(torch.tanh(self.conv(frames)).unflatten(0, (len(x), 4)).mean((1, 3, 4)))


def small(layer: nn.Module, width: int = 5, size: int = 2) -> nn.Module:
    """The layer on a map of ``size`` x ``size``."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(size),
        nn.Tanh(),
        layer,
        nn.GELU(),
        nn.Flatten(),
        nn.LazyLinear(cases.CLASSES),
    )


def _transposed(**options: Any) -> nn.Module:
    return cases._chain(nn.ConvTranspose2d(6, 5, 3, **options), 5)


OWN: dict[str, Callable[[], nn.Module]] = {
    "conv3d": lambda: cases.Chain(nn.Conv3d(6, 5, (1, 3, 2), stride=(1, 2, 1)), Volumes(), 5),
    "conv3d depthwise": lambda: cases.Chain(nn.Conv3d(6, 6, 3, padding=1, groups=6), Volumes(), 6),
    "conv3d transposed": lambda: cases.Chain(nn.ConvTranspose3d(6, 5, 2, stride=2), Volumes(), 5),
    "conv1d transposed": lambda: cases.Chain(nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), cases.Lines(), 4),
    "conv2d same, even kernel": lambda: cases._chain(nn.Conv2d(6, 5, 4, padding="same"), 5),
    "conv2d valid": lambda: cases._chain(nn.Conv2d(6, 5, 3, padding="valid"), 5),
    "conv2d circular": lambda: cases._chain(nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), 5),
    "conv2d pointwise, strided": lambda: cases._chain(nn.Conv2d(6, 5, 1, stride=3), 5),
    "conv2d pointwise, padded": lambda: cases._chain(nn.Conv2d(6, 5, 1, padding=2), 5),
    "conv2d pointwise, grouped": lambda: cases._chain(nn.Conv2d(6, 4, 1, groups=2), 4),
    "conv2d one long kernel": lambda: cases._chain(nn.Conv2d(6, 5, (1, 7), padding=(0, 3)), 5),
    "conv2d of timm, same": lambda: cases._chain(Conv2dSame(6, 5, 4, stride=3), 5),
    "transposed, output padding": lambda: _transposed(stride=3, padding=1, output_padding=2),
    "transposed, dilated": lambda: _transposed(stride=2, dilation=3, output_padding=2),
    "transposed, cropped": lambda: _transposed(stride=1, padding=2, dilation=2, output_padding=1),
    "transposed, pointwise": lambda: cases._chain(nn.ConvTranspose2d(6, 5, 1), 5),
    "transposed, depthwise": lambda: cases._chain(nn.ConvTranspose2d(6, 6, 3, groups=6)),
    "instance norm": lambda: cases._chain(nn.InstanceNorm2d(6, affine=True)),
    "rms norm of torch": lambda: cases._tokens(nn.RMSNorm(6)),
    "linear on vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Tanh(), nn.Linear(7, 4)),
    "map of one position": lambda: small(nn.Conv2d(6, 5, 3, padding=1), size=1),
    "map of four positions": lambda: small(nn.Conv2d(6, 5, 3, padding=1)),
    "map of four positions, pointwise": lambda: small(nn.Conv2d(6, 5, 1)),
    "map of four positions, grouped": lambda: small(nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    "map of nine positions": lambda: small(nn.Conv2d(6, 5, 3, padding=1), size=3),
    "borrowed and shared": Borrowed,
    "four frames an image": lambda: PerImage(3),
    "four frames an image, pointwise": lambda: PerImage(1),
    "four frames an image, grouped": lambda: PerImage(3, groups=3),
}


def made(table: dict[str, Callable[[], nn.Module]], case: str) -> nn.Module:
    model = table[case]().eval()
    if any(isinstance(module, nn.LazyLinear) for module in model.modules()):
        model(cases.images(1).float())
    return cases.randomised(model)


def line(weight: list[list[float]]) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    model[1].weight.data = torch.tensor(weight)
    model[1].bias.data = torch.tensor([9.0, 0.0])  # class 0 is predicted
    return model


PIXELS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 0.0]]).view(3, 1, 1, 2)
