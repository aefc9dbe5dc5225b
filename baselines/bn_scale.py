"""Network slimming: the scale of the batch norm behind a channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from baselines.common import made, parts, summed
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import ModelError
from jbrprune.structure.groups import Group


def bn_scale(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = mean of \|gamma\| over the batch norms of u (Network Slimming, Liu et al., ICCV 2017, arXiv 1708.06519).

    Departs from it in that the net was not trained with an L1 penalty on gamma, and that units of a group without
    batch norm all get the mean of all others: nothing is known about them. The images are not read.

    Raises:
        ModelError: No group has a batch norm.
    """
    values = {}
    for group in groups:
        scales = [p for p in parts(model, group) if isinstance(p.module, _BatchNorm) and p.kind == "weight"]
        if scales:
            channels = sum(len(part.member.channel) for part in scales) / group.size
            values[group.name] = summed(group, [(p.member, p.rows().abs()[:, 0]) for p in scales]) / channels
    if not values:
        raise ModelError(
            f"Criterion 'bn_scale': none of the {len(groups)} groups has a batch norm with a scale, so it cannot rank "
            "anything. Choose another criterion for this model."
        )
    mean = torch.cat(list(values.values())).mean()
    values |= {g.name: mean.expand(g.size) for g in groups if g.name not in values}
    return made("bn_scale", values, groups, site="norm", statistic="scale")
