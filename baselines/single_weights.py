"""Criteria for single weights, in the form of `jbrprune.sparsify`; SNIP and Fisher are forms of relevance.

The images are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.weights_only import share_of_larger
from jbrprune.data.batches import Batch
from jbrprune.sparsity.masks import weights_of


def magnitude(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """s_j = |w_j| (Han et al., NeurIPS 2015, arXiv 1506.02626).

    Departs from it in nothing; ``scope="layer"`` of `jbrprune.sparsify` gives the layerwise form.
    """
    return {name: weight.abs() for name, weight in _weights(model, names).items()}


def lamp(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """s_j = w_j^2 / sum of w_i^2 over all i of the layer with |w_i| >= |w_j| (Lee et al., ICLR 2021, arXiv 2010.07611).

    Departs from it in that equal weights share what the paper breaks by their order.
    """
    weights = _weights(model, names)
    return {name: share_of_larger(weight.square().flatten()).view_as(weight) for name, weight in weights.items()}


@dataclass(frozen=True)
class RandomWeights:
    """Uniform in [0, 1), drawn from a seed: what any criterion has to beat."""

    seed: int = 0

    def __call__(self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
        """Draw a number for every weight."""
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(w.shape, generator=generator) for name, w in _weights(model, names).items()}


def _weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> weight as the layer applies it, masked weights zero; on the CPU, float64."""
    slots = weights_of(model)
    return {name: slots[name].used.detach().double().cpu() for name in names}
