"""Optimal Brain Damage, with the diagonal of the Fisher matrix in place of the Hessian's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import Part, check_labels, made, unit_sums
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.models import layers
from jbrprune.structure.groups import Group


def fisher(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = sum of w^2 E_x[g(x)^2] over the weights of u (Optimal Brain Damage, LeCun et al., NeurIPS 1989).

    Departs from it in that the Hessian's diagonal is that of the empirical Fisher matrix, per sample and over all
    samples (as in Theis et al., arXiv 1801.05787), that weights are added up to units, and that the factor 1/2 is left
    out. Layer scales, global response norms and bare parameters do not count.

    Raises:
        DataError: The batches have no labels.
        ModelError: A layer transforms its weight before it is used, as standardised convolutions do.
    """
    check_labels("fisher", batches)
    transformed = [name for name, module in model.named_modules() if layers.adds_input(module)]
    how = {"parameters": "all", "ignore": transformed, "progress": progress}
    single = weight_scores(model, batches, Relevance("label"), **how)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in model.named_parameters()}

    def quantity(part: Part) -> Tensor:
        square = single.sums.get(names[part.parameter])  # type: ignore[index]
        return torch.zeros(len(part.member.channel)) if square is None else part.rows(square).sum(1) / single.samples

    values = unit_sums(model, groups, quantity)
    return made("fisher", values, groups, site="all", statistic="diagonal", samples=single.samples)
