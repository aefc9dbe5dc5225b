"""Relevance in its variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from baselines.common import layerwise, named
from jbrprune.batches import Batch
from jbrprune.groups import Group
from jbrprune.relevance import relevance_scores
from jbrprune.scores import Scores

PUBLISHED: dict[str, Any] = {"site": "all", "statistic": "batched", "batch": 128}
"""What the published criteria square: the mean over a batch, of all parameters."""


def jbr(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = E_x[v_u(x)^2], pseudo-labels, consumer side: the default here (Arpit, arXiv 2512.11089).

    Departs from it in the consumer side: the paper sums over producers and norms as well.
    """
    return named("jbr", relevance_scores(model, batches, groups, seed=seed, progress=progress))


def jbr_predicted_logit(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """As `jbr`, of the predicted logit (Arpit, arXiv 2512.11089); departs from it in the consumer side only."""
    how: dict[str, Any] = {"objective": "predicted_logit", "seed": seed, "progress": progress}
    return named("jbr_predicted_logit", relevance_scores(model, batches, groups, **how))


def jbr_projection(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """As `jbr`, of random signs over the logits: E of the squared change of all logits (Arpit, arXiv 2512.11089).

    Departs from it in the objective: the paper looks at one direction.
    """
    how: dict[str, Any] = {"objective": "projection", "seed": seed, "progress": progress}
    return named("jbr_projection", relevance_scores(model, batches, groups, **how))


def jbr_mean_replaced(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """As `jbr`, for a channel that is replaced by its mean (Arpit, arXiv 2512.11089).

    Departs from it in what removal is: the paper sets a channel to zero.
    """
    how: dict[str, Any] = {"statistic": "mean_replaced", "seed": seed, "progress": progress}
    return named("jbr_mean_replaced", relevance_scores(model, batches, groups, **how))


def jbr_batched(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """As `jbr`, of means over 128 samples (Arpit, arXiv 2512.11089); departs from it in the consumer side.

    The order of the images matters, the size of the batches they come in does not.
    """
    how: dict[str, Any] = {"statistic": "batched", "batch": 128, "seed": seed, "progress": progress}
    return named("jbr_batched", relevance_scores(model, batches, groups, **how))


def jbr_published(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = E[(mean over 128 samples of v_u)^2], all parameters, samples above 0.9 only (Arpit, arXiv 2512.11089).

    Departs from it in that a unit's layers are added up before the square, as in the paper's formula; its code
    squares layer by layer, as `jbr_published_code` does.

    Raises:
        DataError: The dense model is not that confident about any image.
    """
    how: dict[str, Any] = {**PUBLISHED, "confidence": 0.9, "seed": seed, "progress": progress}
    return named("jbr_published", relevance_scores(model, batches, groups, **how))


def jbr_published_code(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """As `jbr_published`, squared layer by layer and then added up: the code of the paper (Arpit, arXiv 2512.11089).

    Departs from it in that a unit of several channels (a head) is squared as a whole.

    Raises:
        DataError: The dense model is not that confident about any image.
    """
    how: dict[str, Any] = {**PUBLISHED, "confidence": 0.9, "seed": seed, "progress": progress}
    return named("jbr_published_code", layerwise(model, batches, groups, how))
