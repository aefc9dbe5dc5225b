"""Wanda: weights times the norm of what they read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from baselines.common import Part, made, squared_inputs, unit_sums
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def wanda(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = sum over consumers of \|w\| * \|x_u\|, their weights and input (Wanda, Sun et al., ICLR 2024, 2306.11695).

    Departs from it in that weights are added up to units, and that \|x\| is the root of the mean square over samples
    and positions, so that neither the number of images nor the size of a map matters.
    """
    squares = squared_inputs(model, batches, groups, progress=progress)

    def quantity(part: Part) -> Tensor:
        return part.rows().abs().sum(1) * squares[part.member.axis[0]][part.member.channel].sqrt()

    values = unit_sums(model, groups, quantity, lambda part: part.consumes)
    return made("wanda", values, groups, site="consumer", statistic="sum of absolutes")
