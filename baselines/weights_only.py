"""Criteria that read the weights only, and random ones.

Where several producers make a coupled channel, their scores are summed. The images are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from baselines.common import (
    Part,
    Values,
    check_images,
    multiply,
    parts,
    sum_filters,
    sum_members,
    sum_parts,
    sum_powers,
)
from jbrprune.data.batches import Batch
from jbrprune.errors import ModelError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.structure.groups import Group

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), drawn from a seed (a baseline since Mittal et al., WACV 2018, arXiv 1801.10447).

    Departs from it in nothing. Another draw is made whenever the number of units is another.
    """

    seed: int = 0

    def __call__(self, model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
        """Draw a number for every unit."""
        generator = np.random.default_rng([self.seed, sum(group.size for group in groups)])
        return {group.name: torch.from_numpy(generator.random(group.size)) for group in groups}


def l1(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = sum of \|w\| over the filters that make u (Li et al., ICLR 2017, arXiv 1608.08710).

    Departs from it in that several producers are summed; the paper follows the shortcut's.
    """
    return sum_parts(model, groups, lambda part: part.rows().abs().sum(1), _produces)


def l2(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = Euclidean norm of the filters that make u (He et al., Soft Filter Pruning, IJCAI 2018, arXiv 1808.06866).

    Departs from it in that the filters of several producers count as one vector, and that nothing is trained meanwhile.
    """
    squares = sum_parts(model, groups, lambda part: part.rows().square().sum(1), _produces)
    return {name: square.sqrt() for name, square in squares.items()}


def l1_grouped(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = sum of \|w\| over all that goes with u, but biases (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900).

    Departs from it in that layers are summed, where torch-pruning takes their mean.
    """
    return sum_powers(model, groups, 1)


def l2_grouped(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = sum of w^2 over all that goes with u, but biases (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900).

    Departs from it in that layers are summed, where torch-pruning takes their mean.
    """
    return sum_powers(model, groups, 2)


def l2_normalised(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """`l2_grouped` divided by its mean over the group, torch-pruning's default (Fang et al., arXiv 2301.12900).

    Departs from it in that weights of depthwise convolutions, scales of group norms and bare parameters count as well,
    which torch-pruning 1.6.1 leaves out. Every group has the mean score 1.
    """
    return {name: value / value.mean().clamp_min(_TINY) for name, value in sum_powers(model, groups, 2).items()}


def lamp(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = m_u / sum of m_i over all i of the group with m_i >= m_u (Lee et al., ICLR 2021, arXiv 2010.07611).

    Departs from it in that m_u is the sum of the squares of all weights of a unit, not of one weight, and that equal
    units share what the paper breaks by their order.
    """
    return {name: share_of_larger(square) for name, square in sum_powers(model, groups, 2).items()}


def share_of_larger(square: Tensor) -> Tensor:
    """``[n]`` each number divided by the sum of all that are at least as large."""
    ordered, order = square.sort()
    above = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # equal ones share the largest sum
    score = torch.empty_like(square)
    score[order] = ordered / above[first].clamp_min(_TINY)
    return score


def l2_isomorphic(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = share of the units like u with an `l2_normalised` up to u's (Fang et al., ECCV 2024, arXiv 2407.04616).

    Like u are the units of groups with the same kinds of layers on the same sides. Ranked by score alone, every such
    set loses the same share. Departs from it in that sets are told apart by kinds of layers, not by the graph of the
    layers, and that the paper ranks by other criteria as well.
    """
    scores = l2_normalised(model, batches, groups)
    alike: dict[object, list[str]] = {}
    for group in groups:
        kinds = sorted(f"{part.kind} of {type(part.module)} {part.member.axis[1]}" for part in parts(model, group))
        alike.setdefault((group.kind, *kinds), []).append(group.name)
    found = {}
    for names in alike.values():
        ordered = torch.cat([scores[name] for name in names]).sort().values
        found |= {name: torch.searchsorted(ordered, scores[name], right=True).double() / len(ordered) for name in names}
    return {group.name: found[group.name] for group in groups}


def bn_scale(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = mean of \|gamma\| over the batch norms of u (Network Slimming, Liu et al., ICCV 2017, arXiv 1708.06519).

    Departs from it in that the net was not trained with an L1 penalty on gamma, and that units of a group without
    batch norm all get the mean of all others: nothing is known about them.

    Raises:
        ModelError: No group has a batch norm.
    """
    values = {}
    for group in groups:
        scales = [p for p in parts(model, group) if isinstance(p.module, _BatchNorm) and p.kind == "weight"]
        if scales:
            channels = sum(len(part.member.channel) for part in scales) / group.size
            values[group.name] = sum_members(group, [(p.member, p.rows().abs()[:, 0]) for p in scales]) / channels
    if not values:
        raise ModelError(
            f"Criterion 'bn_scale': none of the {len(groups)} groups has a batch norm with a scale, so it cannot rank "
            "anything. Choose another criterion for this model."
        )
    mean = torch.cat(list(values.values())).mean()
    return {group.name: values.get(group.name, mean.expand(group.size)) for group in groups}


def fpgm(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = sum of the distances of u's filter to all others of the layer (He et al., CVPR 2019, arXiv 1811.00250).

    What is close to the geometric median goes first: the others can replace it. Departs from it in that several
    producers are summed, and that nothing is trained meanwhile; the paper prunes each convolution by itself, softly.
    """
    return sum_filters(model, groups, lambda filters: torch.cdist(filters, filters).sum(1))


def whc(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = \|F_u\| * sum over i != u of \|F_i\| (1 - \|cos(F_u, F_i)\|) (Chen et al., ICASSP 2023, arXiv 2302.08185).

    Departs from it in that several producers are summed.
    """

    def score(filters: Tensor) -> Tensor:
        norm, unit = filters.norm(dim=1), F.normalize(filters, dim=1)
        return norm * ((1 - (unit @ unit.T).abs()).clamp_min(0).fill_diagonal_(0) @ norm)

    return sum_filters(model, groups, score)


def synflow(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = sum of \|w dR/dw\| over all parameters of u (SynFlow, Tanaka et al., NeurIPS 2020, arXiv 2006.05467).

    R is the sum of the logits of an image of ones, all parameters replaced by their absolute values, means of batch
    norms by zero. Departs from it in that weights are added up to units, and that the net is trained; its hundred
    rounds are the steps of the pruning. Of the images only the shape is read.
    """
    check_images("synflow", batches)
    work = copy_model(model).cpu().double().eval()
    with torch.no_grad():
        for parameter in work.parameters():
            parameter.abs_()
        for module in work.modules():
            if layers.has_running_statistics(module):
                module.running_mean.zero_()
    leaves = list(work.parameters())
    ones = torch.ones_like(batches[0].images[:1], dtype=torch.float64, device="cpu")
    with preserve.inference_state(work, gradients=True):
        found = torch.autograd.grad(logits_of(work(ones)).sum(), leaves, allow_unused=True)
    gradients = {leaf: gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None}
    return sum_parts(work, groups, lambda part: multiply(part, gradients).abs().sum(1))


def _produces(part: Part) -> bool:
    return part.produces
