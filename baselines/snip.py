"""SNIP: the sensitivity of the loss to connections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from baselines.common import made, mean_gradients, products, unit_sums
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def snip(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = sum of \|w E_x[dL/dw]\| over all parameters of u (SNIP, Lee et al., ICLR 2019, arXiv 1810.02340).

    Departs from it in that connections are added up to units, that the net is trained, and that scores are not divided
    by their sum, which changes no ranking.

    Raises:
        DataError: The batches have no labels.
    """
    gradients = mean_gradients(model, batches, "snip", progress)
    values = unit_sums(model, groups, lambda part: products(part, gradients).abs().sum(1))
    return made("snip", values, groups, site="all", statistic="sum of absolutes", samples=sum(map(len, batches)))
