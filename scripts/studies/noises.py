"""A perturbation of the studies' own: noise in proportion to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from jbrprune.tpv import Diagonal


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
