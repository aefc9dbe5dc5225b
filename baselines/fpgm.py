"""FPGM: filters near the geometric median can be replaced by the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.common import filter_sums, made
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def fpgm(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = sum of the distances of u's filter to all others of the layer (He et al., CVPR 2019, arXiv 1811.00250).

    What is close to the geometric median goes first. Departs from it in that several producers of a coupled channel
    are summed. The images are not read.
    """
    return made("fpgm", filter_sums(model, groups, _distances), groups, site="producer", statistic="sum of distances")


def _distances(filters: Tensor) -> Tensor:
    return torch.cdist(filters, filters).sum(1)
