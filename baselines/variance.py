"""Variance of activations: what hardly varies is as good as a bias."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from baselines.common import made, squared_inputs, summed
from jbrprune.criteria.relevance import channel_means
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def variance(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = variance of what the consumers of u read (VBP, Berisha et al., ICCV 2025, arXiv 2507.12988).

    Meant for a removal that puts the mean in place of the channel: ``repair="auto"`` does. Departs from it in that all
    units are scored, not hidden neurons of MLPs only: the mean over consumers, the sum over the channels of a unit.
    """
    squares = squared_inputs(model, batches, groups, channel_means(model, batches, groups), progress=progress)
    values = {}
    for group in groups:
        members = group.side("in")
        values[group.name] = summed(group, [(m, squares[m.axis[0]][m.channel]) for m in members]) / len(members)
    return made("variance", values, groups, site="consumer", statistic="variance", samples=sum(map(len, batches)))
