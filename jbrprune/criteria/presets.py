"""Relevance in its variants, by name, for ``prune(..., criterion=)``: ours, and as published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from jbrprune.criteria.objectives import OBJECTIVES
from jbrprune.criteria.relevance import relevance_scores
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import unknown
from jbrprune.models import layers
from jbrprune.structure.groups import Group

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


CHANNELS: Mapping[str, Callable[..., Scores]] = MappingProxyType(
    {
        criterion.__name__: criterion
        for criterion in (
            *(jbr, jbr_predicted_logit, jbr_projection, jbr_mean_replaced, jbr_batched),
            *(jbr_published, jbr_published_code),
        )
    }
)
"""Name -> ``criterion(model, batches, groups, *, seed, progress)``, for channels and heads."""


def _of_weights(name: str, objective: str) -> Callable[..., WeightScores]:
    def criterion(
        model: nn.Module, batches: Sequence[Batch], *, ignore: Sequence[str] = (), seed: int = 0, progress: bool = False
    ) -> WeightScores:
        return weight_scores(model, batches, objective=objective, ignore=ignore, seed=seed, progress=progress)

    criterion.__name__ = name
    return criterion


WEIGHTS: Mapping[str, Callable[..., WeightScores]] = MappingProxyType(
    {"jbr": _of_weights("jbr", "projection")}
    | {f"jbr_{objective}": _of_weights(f"jbr_{objective}", objective) for objective in OBJECTIVES}
)
"""Name -> ``criterion(model, batches, *, ignore, seed, progress)``, for single weights: relevance by its objective."""


def variant(name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A criterion by its name.

    Args:
        name: One of ``known``.
        known: `CHANNELS` or `WEIGHTS`, or a larger registry.

    Raises:
        ArgumentError: No such name; the nearest is named.

    Example:
        >>> variant("jbr_published", CHANNELS).__name__
        'jbr_published'
    """
    if name not in known:
        raise unknown("criterion", name, known)
    return known[name]


def named(name: str, scores: Scores) -> Scores:
    """Scores of relevance under the name of a criterion."""
    done = scores.settings
    return replace(scores, settings=replace(done, objective=name, statistic=f"{done.statistic} of {done.objective}"))


def layerwise(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], how: dict[str, Any]) -> Scores:
    """Relevance that is squared layer by layer and then added up; ``how`` goes to `relevance_scores`."""
    single = _by_member(model, groups)
    scores = relevance_scores(model, batches, [one for ones in single.values() for one in ones], **how)
    sums = {name: torch.stack([scores.sums[one.name] for one in ones]).sum(0) for name, ones in single.items()}
    return Scores(sums, tuple(groups), scores.samples, scores.skipped, scores.settings)


def _by_member(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Group name -> groups of the same units with one scored member each, to square layer by layer."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        members = [m for side in ("in", "out") for m in group.side(side) if _is_layer(model.get_submodule(m.axis[0]))]
        found[group.name] = [
            replace(group, name=f"{group.name}: {m.axis[1]} {m.axis[0]}", members=(m,)) for m in members
        ]
    return found


def _is_layer(module: nn.Module) -> bool:
    return layers.channel_dim(module) is not None and layers.has_parameters(module)
