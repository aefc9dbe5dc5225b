"""Random scores: what any criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from baselines.common import made
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def random(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """Uniform in [0, 1), drawn from the seed (a baseline since Mittal et al., WACV 2018, arXiv 1801.10447).

    Departs from it in nothing. Neither weights nor images are read.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}
    return made("random", values, groups, site="none", statistic="uniform")
