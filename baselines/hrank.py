"""HRank: the rank of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import Values, made, read_inputs, summed
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError
from jbrprune.structure.groups import Group

IMAGES = 8
"""Feature maps of so many images are decomposed."""


def hrank(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = mean rank of u's feature maps as the consumers read them (HRank, Lin et al., CVPR 2020, arXiv 2002.10179).

    Departs from it in that a rank is divided by the largest possible one, so that layers compare, that tokens are
    folded into a square map (those in front are left out), that a pooled map counts as alive or dead, and that only
    the first 8 images are read. Several consumers, and the channels of a unit, are averaged.
    """
    if not batches:
        raise DataError("Criterion 'hrank' needs images, but there is no batch.")
    totals: Values = {}
    counts: dict[str, int] = {}
    few = _first(batches, IMAGES)

    def note(name: str, x: Tensor) -> None:
        maps = _maps(x)
        share = torch.linalg.matrix_rank(maps).cpu().double() / min(maps.shape[-2:])
        totals[name] = totals.get(name, 0) + share.sum(0)
        counts[name] = counts.get(name, 0) + len(share)

    read_inputs(model, few, groups, note, progress=progress)
    ranks = {name: total / counts[name] for name, total in totals.items()}
    values = {}
    for group in groups:
        members = group.side("in")
        pairs = [(m, ranks[m.axis[0]][m.channel] * group.size / len(m.channel)) for m in members]
        values[group.name] = summed(group, pairs) / len(members)
    return made("hrank", values, groups, site="consumer", statistic="share of full rank", samples=len(few))


def _first(batches: Sequence[Batch], images: int) -> list[Batch]:
    """The first images, one by one."""
    single = [batch.map(lambda t, i=i: t[i : i + 1]) for batch in batches for i in range(min(len(batch), images))]
    return single[:images]


def _maps(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` whatever the layout of positions."""
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[:, :, None, None]
    x = x.flatten(2)
    side = math.isqrt(x.shape[2])
    return x[:, :, -side * side :].unflatten(2, (side, side))
