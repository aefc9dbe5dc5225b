"""WHC: norms weighted by dissimilarity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.common import filter_sums, made
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.structure.groups import Group


def whc(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = \|F_u\| * sum over i != u of \|F_i\| (1 - \|cos(F_u, F_i)\|) (Chen et al., ICASSP 2023, arXiv 2302.08185).

    Departs from it in that several producers of a coupled channel are summed. The images are not read.
    """
    return made("whc", filter_sums(model, groups, _hybrid), groups, site="producer", statistic="weighted dissimilarity")


def _hybrid(filters: Tensor) -> Tensor:
    norm, unit = filters.norm(dim=1), F.normalize(filters, dim=1)
    dissimilar = (1 - (unit @ unit.T).abs()).clamp_min(0).fill_diagonal_(0)
    return norm * (dissimilar @ norm)
