"""The Jacobian criterion of Optimal Brain Connection, which the published relevance comes from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from baselines.common import check_labels
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def jacobian(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = sum over layers of E[(mean over 128 samples of g w)^2], L with labels (Optimal Brain Connection).

    Chen et al., arXiv 2508.05521. Departs from it in that a unit of several channels (a head) is squared as a whole,
    and that nothing is normalised by the group.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("jacobian", batches)
    return Relevance("label", "layers", "batched")(model, batches, groups, progress=progress)
