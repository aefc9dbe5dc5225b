"""Taylor: how the loss with labels changes to first order when a unit goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from baselines.common import Values, check_labels, made, shown
from jbrprune.criteria.relevance import Relevance, relevances
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.data.distributed import numbered
from jbrprune.structure.groups import Group


def taylor(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = (E_x[sum of g w])^2 over all parameters of u (Molchanov et al., CVPR 2019, arXiv 1906.10771, eq. 9).

    Departs from it in that all images are one batch, where the paper squares in each minibatch and averages the
    squares, and that the parameters of a unit are those of its producers, norms and consumers together.

    Raises:
        DataError: The batches have no labels.
    """
    sums, samples = _summed("taylor", model, batches, groups, lambda v: v, progress)
    values = {name: (total / samples).square() for name, total in sums.items()}
    return made("taylor", values, groups, site="all", statistic="squared mean", samples=samples)


def taylor_abs(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = \|E_x[sum of g w]\|, the root of `taylor` (the degree of Molchanov et al., ICLR 2017, arXiv 1611.06440).

    Score alone ranks as `taylor` does, score per cost does not. Departs from the paper as `taylor_per_sample` does, and
    in that all images are one batch, where the paper takes the absolute value for each image.

    Raises:
        DataError: The batches have no labels.
    """
    sums, samples = _summed("taylor_abs", model, batches, groups, lambda v: v, progress)
    values = {name: total.abs() / samples for name, total in sums.items()}
    return made("taylor_abs", values, groups, site="all", statistic="absolute mean", samples=samples)


def taylor_per_sample(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = E_x[\|sum of g w\|] over all parameters of u (Molchanov et al., ICLR 2017, arXiv 1611.06440, per sample).

    Departs from it in that the sum runs over parameters of producers, norms and consumers instead of one feature map,
    and that scores are not normalised layer by layer.

    Raises:
        DataError: The batches have no labels.
    """
    sums, samples = _summed("taylor_per_sample", model, batches, groups, torch.abs, progress)
    values = {name: total / samples for name, total in sums.items()}
    return made("taylor_per_sample", values, groups, site="all", statistic="mean absolute", samples=samples)


def _summed(
    name: str,
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    of_sample: Callable[[Tensor], Tensor],
    progress: bool,
) -> tuple[Values, int]:
    """The sum over samples of a function of the relevances, and the number of samples."""
    check_labels(name, batches)
    sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    data = shown(batches, name, progress)
    for values, _ in relevances(model, numbered(data), groups, Relevance("label", "all")):
        for group, v in values.items():
            sums[group] += of_sample(v).cpu().double().sum(0)
    return sums, sum(map(len, batches))
