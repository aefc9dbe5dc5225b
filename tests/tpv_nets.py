"""Slow twins and nets for the tests of test prediction variance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import cases
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from jbrprune.tpv import Covariance, Estimate, empirical, trace_form


def jacobian(model: nn.Module, images: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
    """Name -> ``[N, K, *shape]`` the dense Jacobian, by reverse-mode differentiation of every sample and output."""
    weights = {name: p.detach() for name, p in model.named_parameters() if names is None or name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention has no batching rule and is slow under vmap
        rows = [jacrev(lambda w, x=x: functional_call(model, w, (x[None],))[0])(weights) for x in images]
    return {name: torch.stack([row[name] for row in rows]) for name in weights}


def trace(each: Mapping[str, Tensor], variances: Mapping[str, Any] | float = 1.0) -> float:
    """Mean over samples of the sum over outputs and weights of c_j J_kj^2."""
    total = 0.0
    for name, j in each.items():
        c = variances if isinstance(variances, float) else variances[name]
        total += float((j.square() * c).flatten(1).sum(1).mean())
    return total


def flat(each: Mapping[str, Tensor], dims: int = 2) -> Tensor:
    """``[..., P]`` all parameters side by side."""
    return torch.cat([value.flatten(dims) for value in each.values()], -1)


def mlp(inputs: int = 12, outputs: int = 5, width: int = 7) -> nn.Module:
    """Images ``[N, 3, 2, inputs / 6]``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))
    return net.double().eval()


def linear(weight: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[1].weight.data = weight.double()
    return net.eval()


def pixels(count: int, inputs: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, inputs // 6, generator=generator, dtype=torch.float64)


class Attention(nn.Module):
    """Tokens of an image with a position embedding, a class token, one attention, a scaled residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 8, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.qkv, self.mix = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.gamma * self.mix(a.transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


def estimated(model: nn.Module, images: object, covariance: Any, **options: Any) -> Estimate:
    return trace_form(model, images, covariance, **{"progress": False, "rtol": 0, "validity": False} | options)


def measured(model: nn.Module, images: object, covariance: Any, **options: Any) -> Estimate:
    return empirical(model, images, covariance, **{"progress": False, "rtol": 0, "validity": False} | options)


def crossed(values: Tensor, *, shared: bool = True, walked: bool = False) -> Estimate:
    """The estimate from ``[N, R]`` values."""
    return Estimate(values.double(), shared, walked, "empirical", values.shape[1], 0, "squared logits")


def bound(perturbation: Any, model: nn.Module) -> Covariance:
    return perturbation.of(model, {name: p.detach() for name, p in model.named_parameters()})


def random_gradients(model: nn.Module, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention().double().eval(), cases.images(3)
