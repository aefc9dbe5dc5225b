"""SynFlow: how much of a flow of ones goes through a unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from baselines.common import made, products, unit_sums
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.structure.groups import Group


def synflow(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""s_u = sum of \|w dR/dw\| over all parameters of u (SynFlow, Tanaka et al., NeurIPS 2020, arXiv 2006.05467).

    R is the sum of the logits of an image of ones, all parameters replaced by their absolute values, means of batch
    norms by zero. Departs from it in that weights are added up to units, and that the net is trained; its hundred
    rounds are the steps of the pruning. Of the images only the shape is read.
    """
    if not batches:
        raise DataError("Criterion 'synflow' reads the shape of the images, but there is no batch.")
    work = copy_model(model).cpu().double().eval()
    with torch.no_grad():
        for parameter in work.parameters():
            parameter.abs_()
        for module in work.modules():
            if layers.has_running_statistics(module):
                module.running_mean.zero_()  # type: ignore[union-attr, operator]
    leaves = list(work.parameters())
    ones = torch.ones_like(batches[0].images[:1], dtype=torch.float64, device="cpu")
    with preserve.inference_state(work, gradients=True):
        found = torch.autograd.grad(logits_of(work(ones)).sum(), leaves, allow_unused=True)
    gradients = {leaf: gradient for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None}
    values = unit_sums(work, groups, lambda part: products(part, gradients).abs().sum(1))
    return made("synflow", values, groups, site="all", statistic="sum of absolutes")
