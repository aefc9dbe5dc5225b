"""Two published ways to low rank, as criteria for ``structure="directions"``.

A criterion is asked with two layers in the place of each, y = V (V^T W x) + b, and may choose their basis itself:

- ``svd``: left singular vectors of W, which know no images;
- ``balf``: left singular vectors of W E[x x^T]^(1/2), in other words eigenvectors of E[(y - b) (y - b)^T].
  Source: "whitened" truncated SVD as in BALF, arXiv 2509.25136.

The score of a direction is its share of its layer's energy (squared singular values); ranks come from one price per
multiply-accumulate over all layers, as for relevance. The mean of what goes is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.structure.directions import measure_moments
from jbrprune.structure.groups import Group


@torch.no_grad()
def turn(pair: Any, seen: Tensor | None = None) -> Tensor:
    """Turn the directions between two layers, largest energy first; return its shares ``[size]``.

    Args:
        pair: Two layers, both with a bias; changed in place, their function stays.
        seen: E[(y - b) (y - b)^T] of what comes out; without it, W W^T.
    """
    first, second = pair
    inner, outer = (layer.weight.double().flatten(1) for layer in pair)
    whole = outer @ inner
    values, vectors = torch.linalg.eigh(whole @ whole.t() if seen is None else seen)
    energy, basis = (part.flip(-1)[..., : len(inner)] for part in (values.clamp_min(0), vectors))
    second.bias.add_((outer @ first.bias.double()).to(second.bias))
    nn.init.zeros_(first.bias)
    first.weight.copy_((basis.t() @ whole).view_as(first.weight))
    second.weight.copy_(basis.view_as(second.weight))
    return energy / energy.sum()


def svd(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Mapping[str, Tensor]:
    """Energy of W by its singular vectors."""
    return {group.name: turn(model.get_submodule(group.name)) for group in groups}


def balf(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Mapping[str, Tensor]:
    """Energy of the outputs, their bias apart, by its eigenvectors."""
    found = {}
    for name, moments in measure_moments(model, batches, [group.name for group in groups], "out").items():
        pair: Any = model.get_submodule(name)
        bias = pair[1].bias.double() + pair[1].weight.double().flatten(1) @ pair[0].bias.double()
        found[name] = turn(pair, moments.covariance + torch.outer(moments.mean - bias, moments.mean - bias))
    return found
