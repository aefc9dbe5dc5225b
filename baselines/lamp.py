"""LAMP: magnitude made comparable between layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import made
from baselines.magnitude import powers
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def lamp(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = m_u / sum of m_i over all i of the group with m_i >= m_u (Lee et al., ICLR 2021, arXiv 2010.07611).

    Departs from it in that m_u is the sum of the squares of all weights of a unit, not of one weight, and that equal
    units share what the paper breaks by their order. The images are not read.
    """
    values = {name: _lamp(square) for name, square in powers(model, groups, 2).items()}
    return made("lamp", values, groups, site="all", statistic="share of what is left")


def _lamp(square: Tensor) -> Tensor:
    ordered, order = square.sort()
    above = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # equal units share the largest sum
    score = torch.empty_like(square)
    score[order] = ordered / above[first].clamp_min(torch.finfo(square.dtype).tiny)
    return score
