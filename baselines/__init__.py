"""Criteria to compare relevance with: each a function that returns scores, all else being equal.

Pass one as ``criterion=`` to `jbrprune.prune` (of `WEIGHT_CRITERIA` to `jbrprune.sparsify`): budget, selection, repair,
images and report stay the same. What draws random numbers is a dataclass with a seed, as `Relevance` is:
``Random(seed=1)``.

Where budgets are costs, score per cost ranks, and there a score and its root rank differently. By its degree (the power
of t that scores gain as all weights are multiplied by t, activations and gradients held) a criterion is

- of degree 2, as relevance is, unless named here;
- of degree 1: ``l1``, ``l2``, ``l1_grouped``, ``bn_scale``, ``fpgm``, ``synflow``, ``wanda``, ``taylor_abs``,
  ``taylor_per_sample``, ``snip``, ``grasp``;
- of degree 0, a rank, a draw, or relative to the mean or sum of its group: ``random``, ``hrank``, ``lamp``,
  ``l2_normalised``, ``l2_isomorphic``, ``tp_*``; and ``variance``, which is of degree 2 in the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getdoc, isfunction
from typing import Any

from baselines import activations, labels, low_rank, single_weights, weights_only
from baselines import torch_pruning_shipped as shipped
from jbrprune.criteria.relevance import PRESETS, Relevance

CRITERIA: dict[str, Relevance | Callable[..., Any]] = {
    **{name: preset for name, preset in PRESETS.items() if name != "jbr_label"},  # that is `group_fisher`
    # weights only
    "random": weights_only.Random(),
    "l1": weights_only.l1,
    "l2": weights_only.l2,
    "l1_grouped": weights_only.l1_grouped,
    "l2_grouped": weights_only.l2_grouped,
    "l2_normalised": weights_only.l2_normalised,
    "l2_isomorphic": weights_only.l2_isomorphic,
    "lamp": weights_only.lamp,
    "bn_scale": weights_only.bn_scale,
    "fpgm": weights_only.fpgm,
    "whc": weights_only.whc,
    "synflow": weights_only.synflow,
    # activations
    "wanda": activations.wanda,
    "variance": activations.variance,
    "hrank": activations.hrank,
    # labels
    # Molchanov et al., CVPR 2019, arXiv 1906.10771: squares of means over minibatches of `batch` images, 128
    "taylor": Relevance("label", "all", "batched"),
    "taylor_abs": labels.taylor_abs,
    "taylor_per_sample": labels.taylor_per_sample,
    "fisher": labels.fisher,
    # Liu et al., ICML 2021, arXiv 2108.00708, eq. 4, without the factor 1/2
    "group_fisher": Relevance("label"),
    # Chen et al., arXiv 2508.05521
    "jacobian": Relevance("label", "layers", "batched"),
    "snip": labels.snip,
    "grasp": labels.grasp,
    # torch-pruning's own, with their faults (`baselines.torch_pruning_shipped.KNOWN_FAULTS`)
    "tp_magnitude": shipped.tp_magnitude,
    "tp_bn_scale": shipped.tp_bn_scale,
    "tp_lamp": shipped.tp_lamp,
    "tp_fpgm": shipped.tp_fpgm,
    "tp_random": shipped.ShippedRandom(),
    "tp_taylor": shipped.tp_taylor,
    "tp_hessian": shipped.tp_hessian,
}
"""Name -> relevance, or ``criterion(model, batches, groups)`` -> group -> scores of its units."""

LOW_RANK: dict[str, Callable[..., Any]] = {"svd": low_rank.svd, "balf": low_rank.balf}
"""The same, of directions only: for ``structure="directions"``."""

WEIGHT_CRITERIA: dict[str, Relevance | Callable[..., Any]] = {
    **{n: preset for n, preset in PRESETS.items() if preset.statistic == "second_moment" and n != "jbr_label"},
    "magnitude": single_weights.magnitude,
    "lamp": single_weights.lamp,
    "random": single_weights.RandomWeights(),
    # Lee et al., ICLR 2019, arXiv 1810.02340
    "snip": Relevance("label", statistic="signed"),
    # Optimal Brain Damage (LeCun et al., NeurIPS 1989)
    "fisher": Relevance("label"),
}
"""Name -> relevance, or ``criterion(model, batches, names)`` -> name of a weight -> scores in its shape."""

LABELS = (
    *("taylor", "taylor_abs", "taylor_per_sample", "fisher", "group_fisher", "jacobian", "snip", "grasp"),
    *("tp_taylor", "tp_hessian"),
)
"""Criteria that need labels."""

DEPARTURES = {
    "taylor": (
        "the parameters of producers, norms and consumers count together, where the paper has one gate behind the "
        "batch norm; nothing is trained and no score kept between two removals."
    ),
    "group_fisher": (
        "scores are divided by multiply-accumulates, where budgets are shares of these, not by the memory saved; "
        "nothing is trained, and many units go at once, where the paper removes one after every 25 updates."
    ),
    "jacobian": "a unit of several channels is squared as a whole, and nothing is normalised.",
    "snip": "the net is trained, and all images are one batch.",
    "fisher": "the Hessian's diagonal is that of the empirical Fisher matrix, per sample; the factor 1/2 is left out.",
}
"""Where forms of relevance depart from the papers that they are named after."""


def describe_departure(name: str, *, weights: bool = False) -> str:
    """Where a criterion departs from its paper, or from what torch-pruning means to do; empty where it does not.

    Example:
        >>> describe_departure("l2_grouped")
        'layers are summed, where torch-pruning takes their mean.'
    """
    criterion = (WEIGHT_CRITERIA if weights else CRITERIA).get(name)
    if isinstance(criterion, Relevance) or name in shipped.KNOWN_FAULTS:
        return (DEPARTURES | shipped.KNOWN_FAULTS).get(name, "")
    own = criterion if isfunction(criterion) else type(criterion)
    text = (getdoc(own) or "").partition("Departs from it ")[2].partition("\n\n")[0]
    return "" if text.startswith("in nothing") else " ".join(text.removeprefix("in that").split())
