"""Norms of weights: of the filters that make a channel, or of everything that goes with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import Part, Values, made, unit_sums
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def l1(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = sum of \|w\| over the filters that make u (Li et al., ICLR 2017, arXiv 1608.08710).

    Departs from it in that several producers of a coupled channel are summed; the paper follows the shortcut's.
    The images are not read.
    """
    values = unit_sums(model, groups, lambda part: part.rows().abs().sum(1), _produces)
    return made("l1", values, groups, site="producer", statistic="norm")


def l2(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = Euclidean norm of the filters that make u (He et al., Soft Filter Pruning, IJCAI 2018, arXiv 1808.06866).

    Departs from it in that the filters of several producers count as one vector, and that nothing is trained
    meanwhile. The images are not read.
    """
    squares = unit_sums(model, groups, lambda part: part.rows().square().sum(1), _produces)
    values = {name: square.sqrt() for name, square in squares.items()}
    return made("l2", values, groups, site="producer", statistic="norm")


def l1_grouped(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = sum of \|w\| over all that goes with u, but biases (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900).

    Departs from it in that layers are summed, where torch-pruning takes their mean. The images are not read.
    """
    return made("l1_grouped", powers(model, groups, 1), groups, site="all", statistic="sum")


def l2_grouped(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = sum of w^2 over all that goes with u, but biases (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900).

    Departs from it in that layers are summed, where torch-pruning takes their mean. The images are not read.
    """
    return made("l2_grouped", powers(model, groups, 2), groups, site="all", statistic="sum of squares")


def l2_normalised(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """`l2_grouped` divided by its mean over the group, torch-pruning's default (Fang et al., arXiv 2301.12900).

    Departs from it in nothing; every group has the mean score 1. The images are not read.
    """
    values = {name: value / value.mean().clamp_min(_TINY) for name, value in powers(model, groups, 2).items()}
    return made("l2_normalised", values, groups, site="all", statistic="sum of squares over the group's mean")


_TINY = torch.finfo(torch.float64).tiny


def powers(model: nn.Module, groups: Sequence[Group], p: int) -> Values:
    r"""For every unit, the sum of \|w\|^p over all that goes with it, but biases."""

    def quantity(part: Part) -> Tensor:
        return part.rows().abs().pow(p).sum(1)

    return unit_sums(model, groups, quantity, lambda part: part.kind != "bias")


def _produces(part: Part) -> bool:
    return part.produces
