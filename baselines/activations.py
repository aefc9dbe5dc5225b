"""Criteria that read what the consumers of a unit read, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import Part, Values, check_images, input_moments, read_inputs, sum_members, sum_parts
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group

IMAGES = 8
"""`hrank` decomposes the feature maps of so many images."""


def wanda(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = sum over consumers of \|w\| * \|x_u\|, their weights and input (Wanda, Sun et al., ICLR 2024, 2306.11695).

    Departs from it in that weights are added up to units, where the paper compares the weights of one output, and that
    \|x\| is the root of the mean square over samples
    and positions, so that neither the number of images nor the size of a map matters.
    """
    moments = input_moments(model, batches, groups)

    def quantity(part: Part) -> Tensor:
        return part.rows().abs().sum(1) * moments[part.member.axis[0]][1][part.member.channel].sqrt()

    return sum_parts(model, groups, quantity, lambda part: part.consumes)


def variance(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = variance of what the consumers of u read (VBP, Berisha et al., ICCV 2025, arXiv 2507.12988).

    What hardly varies is as good as a bias: meant for a removal that puts the mean in place of the channel, which
    ``repair="auto"`` does. Departs from it in that all units are scored, not hidden neurons of MLPs only: the mean over
    consumers, the sum over the channels of a unit.
    """
    moments = input_moments(model, batches, groups)
    of_input = {name: (square - mean.square()).clamp_min(0) for name, (mean, square) in moments.items()}
    return {group.name: _mean_over_consumers(group, of_input) for group in groups}


def hrank(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = mean rank of u's feature maps as the consumers read them (HRank, Lin et al., CVPR 2020, arXiv 2002.10179).

    Departs from it in that a rank is divided by the largest possible one, so that layers compare, that tokens are
    folded into a square map (those in front are left out), that a pooled map counts as alive or dead, and that only
    the first 8 images are read (the paper: 500). Several consumers, and the channels of a unit, are averaged.
    """
    check_images("hrank", batches)
    single = [batch.map(lambda t, i=i: t[i : i + 1]) for batch in batches for i in range(min(len(batch), IMAGES))]
    ranks: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        maps = fold_maps(x)
        ranks.setdefault(name, []).append(torch.linalg.matrix_rank(maps)[0].cpu().double() / min(maps.shape[-2:]))

    read_inputs(model, single[:IMAGES], groups, note)
    shares = {name: torch.stack(found).mean(0) for name, found in ranks.items()}
    return {group.name: _mean_over_consumers(group, shares, average=True) for group in groups}


def fold_maps(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` whatever the layout of positions."""
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[:, :, None, None]
    x = x.flatten(2)
    side = math.isqrt(x.shape[2])
    return x[:, :, -side * side :].unflatten(2, (side, side))


def _mean_over_consumers(group: Group, of_input: dict[str, Tensor], *, average: bool = False) -> Tensor:
    """``[units]`` the mean over the layers that read a unit of the sum, or the average, over its channels there."""
    members = group.side("in")
    shares = [group.size / len(member.channel) if average else 1.0 for member in members]
    pairs = [(m, share * of_input[m.axis[0]][m.channel]) for m, share in zip(members, shares)]
    return sum_members(group, pairs) / len(members)
