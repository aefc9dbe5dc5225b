"""Two published ways to low rank, as criteria for ``structure="directions"``.

A criterion is asked with two layers in the place of each, y = V (V^T W x) + b, and may choose their basis itself:

- ``svd``: left singular vectors of W, which know no images;
- ``balf``: left singular vectors of W E[x x^T]^(1/2), in other words eigenvectors of E[(y - b) (y - b)^T].
  Source: "whitened" truncated SVD as in BALF, arXiv 2509.25136.

The score of a direction is its share of its layer's energy (squared singular values); ranks come from one price per
multiply-accumulate over all layers, as for relevance. The mean of what goes is not kept. The heads of an attention have
the same two energies of their products, queries by keys and values by output; both count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.structure.directions import Moments, ends_of, measure_moments, rotate_heads
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
    return {group.name: turn_any(model.get_submodule(group.name)) for group in groups}


def balf(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Mapping[str, Tensor]:
    """Energy of the outputs, their bias apart, by its eigenvectors."""
    ends = {group.name: ends_of(group) for group in groups}
    found = measure_moments(model, batches, [end for both in ends.values() for end in both])
    return {name: turn_any(model.get_submodule(name), *(found[end] for end in both)) for name, both in ends.items()}


def turn_any(layer: Any, *seen: Moments) -> Tensor:
    """Turn two layers, or the heads of an attention; without moments as if inputs, and attention, were white."""
    if isinstance(layer, nn.Sequential):
        if not seen:
            return turn(layer)
        bias = layer[1].bias.double() + layer[1].weight.double().flatten(1) @ layer[0].bias.double()
        return turn(layer, seen[0].covariance + torch.outer(seen[0].mean - bias, seen[0].mean - bias))
    weight = layer.qkv.weight.double()
    seconds = [each.covariance + torch.outer(each.mean, each.mean) for each in seen]
    seconds = seconds or [
        weight @ weight.t(),
        weight[-layer.proj.in_features :] @ weight[-layer.proj.in_features :].t(),
    ]
    energy = rotate_heads(layer, *(Moments(torch.zeros(len(each)).double(), each) for each in seconds))
    return (energy / energy.sum(1, keepdim=True)).sum(0)
