"""Criteria for single weights: magnitude, SNIP and random, as scores beside those of relevance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Settings
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data.batches import Batch
from jbrprune.sparsity.masks import weights_of


def magnitude(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> WeightScores:
    """s_j = |w_j| (Han et al., NeurIPS 2015, arXiv 1506.02626).

    Departs from it in nothing; ``scope="layer"`` of `jbrprune.sparsify` gives the layerwise form. Images are not read.
    """
    return _of_weights(model, ignore, "magnitude", lambda weight: weight.abs())


def random(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> WeightScores:
    """Uniform in (0, 1): what any criterion has to beat. The images are not read."""
    generator = torch.Generator().manual_seed(seed)
    return _of_weights(model, ignore, "random", lambda weight: torch.rand(weight.shape, generator=generator))


def snip(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> WeightScores:
    """s_j = |w_j E_x[dL/dw_j]|, L the cross-entropy with the label (Lee et al., ICLR 2019, arXiv 1810.02340).

    Departs from it in that the net is trained, not freshly initialised, and that the mean is over all images.

    Raises:
        DataError: The batches have no labels.
    """
    return weight_scores(model, batches, Relevance("label", statistic="signed"), ignore=ignore, progress=progress)


def fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> WeightScores:
    """s_j = w_j^2 E_x[(dL/dw_j)^2], L the cross-entropy with the label (OBD, LeCun et al., NeurIPS 1989).

    Departs from it in that the diagonal of the Hessian is that of the empirical Fisher matrix, exact per sample (as in
    Theis et al., 2018, arXiv 1801.05787).

    Raises:
        DataError: The batches have no labels.
    """
    return weight_scores(model, batches, Relevance("label"), ignore=ignore, progress=progress)


def lamp(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    *,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> WeightScores:
    """s_j = w_j^2 / sum of w_i^2 over all i of the layer with |w_i| >= |w_j| (Lee et al., ICLR 2021, arXiv 2010.07611).

    Departs from it in nothing, but that equal weights share what the paper breaks by their order. The images are not
    read.
    """
    return _of_weights(model, ignore, "lamp", _lamp)


WEIGHT_CRITERIA: dict[str, Callable[..., WeightScores]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "random": random,
    "snip": snip,
    "fisher": fisher,
}
"""Name -> ``criterion(model, batches, names)``; pass one as ``criterion=`` to `jbrprune.sparsify`."""


def _lamp(weight: Tensor) -> Tensor:
    square = weight.double().square().flatten()
    ordered, order = square.sort()
    above = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # equal weights share the largest sum
    score = torch.empty_like(square)
    score[order] = ordered / above[first].clamp_min(torch.finfo(torch.float64).tiny)
    return score.view_as(weight)


def _of_weights(model: nn.Module, ignore: Sequence[str], name: str, score: Callable[[Tensor], Tensor]) -> WeightScores:
    sums = {key: score(slot.effective).double().cpu() for key, slot in weights_of(model, ignore).items()}
    return WeightScores(sums, samples=1, skipped=0, settings=Settings(name, "weight", name))
