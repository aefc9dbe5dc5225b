"""Group Fisher: relevance with labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from baselines.common import check_labels
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def group_fisher(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = E_x[(sum over consumers of dL/dmask_u)^2] (Group Fisher, Liu et al., ICML 2021, arXiv 2108.00708, eq. 4).

    Departs from it in that the factor 1/2 is left out and that the score is not divided by the memory saved: the
    selection divides by whatever the budget is.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("group_fisher", batches)
    return Relevance("label")(model, batches, groups, progress=progress)
